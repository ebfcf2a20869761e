#include "engine/cuda/shim/machine.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "engine/cuda/shim/fiber.h"
#include "engine/cuda/shim/shim_control.h"

thread_local const struct shim_thread *shim_self;
thread_local dim3 shim_block_dim, shim_grid_dim;

struct warp {
    unsigned ready;   /* may run */
    unsigned arrived; /* wait for the rest of the warp */
    unsigned parted;  /* wait for the block */
    unsigned done;
    struct shim_site *site; /* where lanes wait */
    unsigned meetings;      /* so far: the parity picks the buffer */
    char exchange[2][32 * SHIM_EXCHANGE];
};

struct shared_key { /* a SHARED declaration that the running block has reached */
    const void *key;
    size_t offset;
};

struct copy {
    void *to;
    const void *from;
    size_t bytes;
    int group;
};

struct copies { /* of a thread, issued and not waited for, in order */
    struct copy copy[64];
    int count, groups; /* groups: committed so far */
};

struct machine {
    struct fiber_pool fibers;
    struct shim_thread thread[SHIM_MAX_THREADS];
    struct copies copies[SHIM_MAX_THREADS];
    struct warp warp[SHIM_MAX_THREADS / 32];
    int warps;
    int current;            /* thread */
    struct shim_site *site; /* where the block's threads wait */
    struct shared_key shared_key[64];
    int shared_keys;
    size_t shared_used;
    alignas(128) char shared[SHIM_STATIC_SHARED];
    alignas(128) char dynamic[SHIM_DYNAMIC_SHARED];
    const struct shim_launch *launch;
    uint64_t random;
};

static struct shim_site *sites;
static struct shim_site *skipped;
static uint64_t seed, launches;

struct machine_owner {
    struct machine *machine;
    ~machine_owner()
    {
        if (machine)
            fiber_pool_close(&machine->fibers);
        free(machine);
    }
};
static thread_local struct machine_owner owner;

void shim_die(const char *format, ...)
{
    va_list arguments;

    fprintf(stderr, "shim: kernel %s: ",
            owner.machine && owner.machine->launch ? owner.machine->launch->name : "(none)");
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fprintf(stderr, "\n");
    abort();
}

static unsigned random_below(struct machine *m, unsigned n) /* SplitMix64 */
{
    uint64_t z = m->random += 0x9e3779b97f4a7c15u;

    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (unsigned)(((z ^ z >> 31) >> 32) * n >> 32);
}

/* ------------------------------------------------------------------ barriers, from a thread */

static void place_of(const struct shim_site *site, char *out, size_t size)
{
    snprintf(out, size, "%s:%d", site->file, site->line);
}

/* GRAFT_SHIM_SKIP names the barriers of one line, in all forms of a template. */
static bool is_skipped_from_outside(const struct shim_site *site)
{
    static const char *const skip = getenv("GRAFT_SHIM_SKIP");
    char place[256];

    place_of(site, place, sizeof place);
    return skip && strcmp(skip, place) == 0;
}

static void know(struct shim_site *site)
{
    if (site->known)
        return;
    site->known = true;
    site->skip = site->barrier && is_skipped_from_outside(site);
    site->next = sites;
    sites = site;
}

static struct warp *warp_now(void)
{
    return &owner.machine->warp[owner.machine->current / 32];
}

int shim_lane(void)
{
    return owner.machine->current % 32;
}

static void yield(struct machine *m)
{
    fiber_yield(&m->fibers);
}

void shim_syncthreads(struct shim_site *site)
{
    struct machine *m = owner.machine;

    know(site);
    if (site->skip)
        return;
    if (m->site && m->site != site)
        shim_die("threads wait at %s:%d and at %s:%d", m->site->file, m->site->line, site->file,
                 site->line);
    m->site = site;
    warp_now()->parted |= 1u << shim_lane();
    yield(m);
}

void shim_syncwarp(struct shim_site *site, unsigned mask)
{
    struct warp *w = warp_now();
    unsigned me = 1u << shim_lane();

    know(site);
    if (site->skip)
        return;
    if (mask != SHIM_FULL_MASK)
        shim_die("%s:%d: mask %08x: our kernels use whole warps", site->file, site->line, mask);
    if (w->arrived && w->site != site)
        shim_die("lanes of a warp wait at %s:%d and at %s:%d", w->site->file, w->site->line,
                 site->file, site->line);
    w->site = site;
    w->arrived |= me;
    if (w->arrived == SHIM_FULL_MASK) {
        w->ready |= ~me;
        w->arrived = 0;
        w->meetings++;
        return; /* the last to come goes on at once; another order runs the others first */
    }
    yield(owner.machine);
}

const char *shim_exchange(struct shim_site *site, unsigned mask, const void *mine, size_t bytes)
{
    struct warp *w = warp_now();
    char *buffer = w->exchange[w->meetings & 1];

    memcpy(buffer + shim_lane() * SHIM_EXCHANGE, mine, bytes);
    shim_syncwarp(site, mask);
    return buffer;
}

unsigned shim_ballot(struct shim_site *site, unsigned mask, bool vote)
{
    const char *all = shim_exchange(site, mask, &vote, sizeof vote);
    unsigned votes = 0;

    for (int lane = 0; lane < 32; lane++)
        if (all[lane * SHIM_EXCHANGE])
            votes |= 1u << lane;
    return votes;
}

/* ------------------------------------------------------------------ shared memory */

void *shim_shared(const void *key, size_t bytes)
{
    struct machine *m = owner.machine;
    size_t offset = m->shared_used;

    for (int i = 0; i < m->shared_keys; i++)
        if (m->shared_key[i].key == key)
            return m->shared + m->shared_key[i].offset;
    if (m->shared_keys == 64 || offset + bytes > SHIM_STATIC_SHARED)
        shim_die("more than %u bytes of static shared memory", SHIM_STATIC_SHARED);
    m->shared_key[m->shared_keys++] = {key, offset};
    m->shared_used = (offset + bytes + 127) / 128 * 128;
    return m->shared + offset;
}

void *shim_dynamic_shared(void)
{
    return owner.machine->dynamic;
}

/* ------------------------------------------------------------------ copies in flight */

void shim_copy_async(void *to, const void *from, size_t bytes)
{
    struct copies *c = &owner.machine->copies[owner.machine->current];

    if (c->count == 64)
        shim_die("more than 64 copies of a thread in flight");
    c->copy[c->count++] = {to, from, bytes, c->groups};
}

void shim_copy_commit(void)
{
    owner.machine->copies[owner.machine->current].groups++;
}

/* What is waited for is copied now and not before: nobody may have read it. */
void shim_copy_wait(int groups_left)
{
    struct copies *c = &owner.machine->copies[owner.machine->current];
    int done = 0;

    for (; done < c->count && c->copy[done].group < c->groups - groups_left; done++)
        if (c->copy[done].from)
            memcpy(c->copy[done].to, c->copy[done].from, c->copy[done].bytes);
        else
            memset(c->copy[done].to, 0, c->copy[done].bytes);
    c->count -= done;
    memmove(c->copy, c->copy + done, (size_t)c->count * sizeof *c->copy);
}

/* ------------------------------------------------------------------ running blocks */

static void thread_body(void)
{
    struct machine *m = owner.machine;

    m->launch->thread(m->launch->context);
    if (m->copies[m->current].count)
        shim_die("thread %d ends without waiting for its copies", m->current);
    warp_now()->done |= 1u << shim_lane();
}

static struct machine *machine_now(void)
{
    struct machine *m = owner.machine;

    if (!m) {
        m = owner.machine = (struct machine *)aligned_alloc(128, (sizeof *m + 127) / 128 * 128);
        if (!m)
            abort();
        memset((void *)m, 0, sizeof *m);
        fiber_pool_open(&m->fibers, SHIM_MAX_THREADS, thread_body);
    }
    return m;
}

/* Lanes of a warp that were ready, from a random one on, up or down. */
static void run_warp(struct machine *m, int index)
{
    struct warp *w = &m->warp[index];
    unsigned ready = w->ready, first = random_below(m, 64), step = first & 32 ? 31 : 1;

    for (unsigned i = 0, lane = first & 31; i < 32; i++, lane = (lane + step) & 31) {
        if (!(ready & 1u << lane))
            continue;
        w->ready &= ~(1u << lane);
        m->current = index * 32 + (int)lane;
        shim_self = &m->thread[m->current];
        fiber_resume(&m->fibers.fiber[m->current]);
    }
}

/* Nobody can run: the block is through, or all wait at the same barrier, or it is stuck. */
static bool release(struct machine *m)
{
    bool all_done = true, all_parted = true;

    for (int i = 0; i < m->warps; i++) {
        const struct warp *w = &m->warp[i];

        all_done = all_done && w->done == SHIM_FULL_MASK;
        all_parted = all_parted && w->parted == SHIM_FULL_MASK;
        if (w->arrived)
            shim_die("%s:%d: lanes %08x wait for the others, which do not come", w->site->file,
                     w->site->line, w->arrived);
    }
    if (all_done)
        return false;
    if (!all_parted)
        shim_die("%s:%d: some threads wait that others never reach", m->site->file, m->site->line);
    for (int i = 0; i < m->warps; i++) {
        m->warp[i].ready = m->warp[i].parted;
        m->warp[i].parted = 0;
    }
    m->site = nullptr;
    return true;
}

static void run_block(struct machine *m)
{
    const struct shim_launch *launch = m->launch;
    unsigned threads = launch->block.x * launch->block.y * launch->block.z;

    memset(m->shared, 0xff, m->shared_used);
    memset(m->dynamic, 0xff, launch->shared);
    m->shared_keys = 0;
    m->shared_used = 0;
    m->site = nullptr;
    m->warps = (int)(threads / 32);
    for (int i = 0; i < m->warps; i++) {
        struct warp *w = &m->warp[i];

        w->ready = SHIM_FULL_MASK;
        w->arrived = w->parted = w->done = 0;
    }
    /* In some blocks warps take turns, in others one runs far ahead: hazards show in either. */
    static const unsigned stay_of_64[] = {0, 48, 64};
    unsigned stay = stay_of_64[random_below(m, 3)];
    int now = -1;

    do {
        for (;;) {
            int runnable[SHIM_MAX_THREADS / 32], count = 0;

            for (int i = 0; i < m->warps; i++)
                if (m->warp[i].ready)
                    runnable[count++] = i;
            if (count == 0)
                break;
            if (now < 0 || !m->warp[now].ready || random_below(m, 64) >= stay)
                now = runnable[random_below(m, (unsigned)count)];
            run_warp(m, now);
        }
    } while (release(m));
}

static uint64_t divisor(uint64_t a, uint64_t b)
{
    while (b) {
        uint64_t rest = a % b;

        a = b;
        b = rest;
    }
    return a;
}

static void place_threads(struct machine *m, uint3 block)
{
    dim3 d = m->launch->block;

    for (unsigned i = 0; i < d.x * d.y * d.z; i++)
        m->thread[i] = {{i % d.x, i / d.x % d.y, i / (d.x * d.y)}, block};
}

void shim_run(const struct shim_launch *launch)
{
    struct machine *m = machine_now();
    dim3 g = launch->grid, b = launch->block;
    uint64_t blocks = (uint64_t)g.x * g.y * g.z, threads = (uint64_t)b.x * b.y * b.z;

    m->launch = launch;
    m->random = seed ^ ++launches * 0xd1342543de82ef95u;
    if (threads % 32 || threads == 0 || threads > SHIM_MAX_THREADS)
        shim_die("a block of %u x %u x %u threads: warps must be whole, at most 1024", b.x, b.y,
                 b.z);
    if (g.y > 65535 || g.z > 65535 || g.x > 0x7fffffff || launch->shared > SHIM_DYNAMIC_SHARED)
        shim_die("a grid of %u x %u x %u blocks, %zu bytes shared: more than a GPU takes", g.x, g.y,
                 g.z, launch->shared);
    shim_block_dim = b;
    shim_grid_dim = g;
    m->shared_used = SHIM_STATIC_SHARED; /* of the last kernel: poison it all once */
    uint64_t step = blocks > 2 ? random_below(m, (unsigned)blocks) | 1u : 1;
    uint64_t at = random_below(m, (unsigned)blocks);
    while (divisor(step, blocks) != 1)
        step += 2;
    for (uint64_t i = 0; i < blocks; i++, at = (at + step) % blocks) {
        place_threads(m, {(unsigned)(at % g.x), (unsigned)(at / g.x % g.y),
                          (unsigned)(at / ((uint64_t)g.x * g.y))});
        run_block(m);
    }
    m->launch = nullptr;
}

/* ------------------------------------------------------------------ for tests */

void shim_seed(uint64_t value)
{
    seed = value;
    launches = 0;
}

int shim_barrier_count(void)
{
    int count = 0;

    for (const struct shim_site *s = sites; s; s = s->next)
        count += s->barrier;
    return count;
}

const char *shim_barrier_skip(int index)
{
    static char place[256];

    if (skipped)
        skipped->skip = false;
    skipped = nullptr;
    for (struct shim_site *s = sites; s && index >= 0; s = s->next)
        if (s->barrier && index-- == 0)
            skipped = s;
    if (!skipped)
        return "";
    skipped->skip = true;
    place_of(skipped, place, sizeof place);
    return place;
}

void shim_write_barriers(FILE *out)
{
    char place[256];

    for (const struct shim_site *s = sites; s; s = s->next)
        if (s->barrier) {
            place_of(s, place, sizeof place);
            fprintf(out, "barrier %s\n", place);
        }
}
