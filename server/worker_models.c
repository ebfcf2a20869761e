#include "server/worker_models.h"

#include <assert.h>
#include <inttypes.h>
#include <malloc.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/file_io.h"
#include "engine/base/log.h"
#include "server/capacity.h"
#include "server/devices.h"
#include "server/worker.h"
#include "server/worker_check.h"
#include "server/worker_watch.h"

#define REFUSED 64

struct worker_delta {
    struct worker_delta *next;
    struct worker_base *base;
    char *tenant;
    char sha256[65];
    struct engine_delta *engine_delta;
    int64_t bytes;
    int32_t pins;
    uint64_t used;
};

struct worker_models {
    struct worker_models_options options;
    struct worker_base *bases;
    struct worker_delta *deltas;
    uint64_t clock;
    int64_t loads;
    struct file_identity refused[REFUSED]; /* the last that were found damaged */
    int next_refused;
};

#define MEMORY_MARGIN (INT64_C(64) << 20) /* bytes left to the system */

/* ------------------------------------------------------------------ unloading */

static void free_delta(struct worker_delta *d)
{
    engine_delta_free(d->engine_delta);
    free(d->tenant);
    free(d);
}

static void remove_delta(struct worker_models *m, struct worker_delta *delta)
{
    struct worker_delta **p = &m->deltas;

    assert(delta->pins == 0);
    while (*p != delta)
        p = &(*p)->next;
    *p = delta->next;
    free_delta(delta);
}

static void free_base(struct worker_base *b)
{
    worker_check_free(b->check);
    engine_session_free(b->session);
    engine_free(b->engine);
    free(b);
}

void worker_models_drop(struct worker_models *m, struct worker_base *base)
{
    struct worker_base **p = &m->bases;

    engine_session_free(base->session); /* before the deltas that its sequences point to */
    base->session = NULL;
    for (struct worker_delta *d = m->deltas, *next; d != NULL; d = next) {
        next = d->next;
        if (d->base == base)
            remove_delta(m, d);
    }
    while (*p != base)
        p = &(*p)->next;
    *p = base->next;
    free_base(base);
}

/* ------------------------------------------------------------------ room */

static struct worker_delta *oldest_delta(const struct worker_models *m,
                                         const struct worker_delta *keep)
{
    struct worker_delta *oldest = NULL;

    for (struct worker_delta *d = m->deltas; d != NULL; d = d->next) {
        if (d->pins == 0 && d != keep && (oldest == NULL || d->used < oldest->used))
            oldest = d;
    }
    return oldest;
}

static struct worker_base *oldest_base(const struct worker_models *m,
                                       const struct worker_base *keep)
{
    struct worker_base *oldest = NULL;

    for (struct worker_base *b = m->bases; b != NULL; b = b->next) {
        if (b->active == 0 && b != keep && (oldest == NULL || b->used < oldest->used))
            oldest = b;
    }
    return oldest;
}

/* Until `more` bytes fit, or all that is left is in use. */
static void make_room_for_base(struct worker_models *m, int64_t more)
{
    struct worker_models_stats now;
    struct worker_base *oldest;

    for (;;) {
        worker_models_stats(m, &now);
        if (now.base_bytes + more <= m->options.base_bytes ||
            (oldest = oldest_base(m, NULL)) == NULL)
            return;
        log_info("unloading base %.12s to make room", oldest->sha256);
        worker_models_drop(m, oldest);
    }
}

static void make_room_for_delta(struct worker_models *m, int64_t more,
                                const struct worker_delta *keep)
{
    struct worker_models_stats now;
    struct worker_delta *oldest;

    for (;;) {
        worker_models_stats(m, &now);
        if (now.delta_bytes + more <= m->options.delta_bytes ||
            (oldest = oldest_delta(m, keep)) == NULL)
            return;
        remove_delta(m, oldest);
    }
}

/* For a load of so many bytes that found no memory: unloads as many, or what there is, but not
 * `keep`. false: there was nothing. */
static bool unload(struct worker_models *m, int64_t bytes, const struct worker_base *keep)
{
    int64_t freed = 0;
    bool any = false;

    while (!any || freed < bytes) {
        struct worker_delta *delta = oldest_delta(m, NULL);
        struct worker_base *base = delta == NULL ? oldest_base(m, keep) : NULL;

        if (delta == NULL && base == NULL)
            break;
        any = true;
        freed += delta != NULL ? delta->bytes : base->bytes;
        log_info("out of memory: unloading %s %.12s", delta != NULL ? "delta" : "base",
                 delta != NULL ? delta->sha256 : base->sha256);
        if (delta != NULL)
            remove_delta(m, delta);
        else
            worker_models_drop(m, base);
    }
    malloc_trim(0); /* so that the machine has it, not only the next malloc */
    return any;
}

/* Is a load that failed so worth another try? */
static bool try_again(struct worker_models *m, int64_t bytes, const struct worker_base *keep,
                      struct err *err)
{
    if (err->kind != ERR_NO_MEMORY || !unload(m, bytes, keep))
        return false;
    err_clear(err);
    return true;
}

/* ------------------------------------------------------------------ damage */

static int damaged_file(const char *what, const char *sha256, struct err *err)
{
    err_clear(err);
    return err_set_code(err, ERR_IO, "damaged_file", "model",
                        "The model's %s (%.12s) is damaged on the server's disk and is not used. "
                        "The same bytes stored again heal it.",
                        what, sha256);
}

static void remember_refused(struct worker_models *m, const struct file_identity *file)
{
    m->refused[m->next_refused] = *file;
    m->next_refused = (m->next_refused + 1) % REFUSED;
}

static bool is_refused(const struct worker_models *m, const char *path)
{
    struct file_identity file;

    if (!file_identify(path, &file))
        return false;
    for (int i = 0; i < REFUSED; i++)
        if (file_identity_equal(&m->refused[i], &file))
            return true;
    return false;
}

/* What lies at `path` is what the database says it is, or it is not used. */
static int check_delta(struct worker_models *m, const char *path, const char *sha256,
                       struct err *err)
{
    struct file_identity file;
    char found[SHA256_HEX];

    if (!file_identify(path, &file))
        return err_set_code(err, ERR_NOT_FOUND, "model_not_found", "model",
                            "the model was deleted");
    if (file_sha256(path, found, NULL, err) != 0) {
        if (err->kind != ERR_IO) { /* a shortage of memory says nothing about the file */
            err_clear(err);
            return err_set(err, ERR_NO_MEMORY, "no memory to hash delta %.12s", sha256);
        }
        log_error("delta %.12s: %s", sha256, err->message);
    } else if (strcmp(found, sha256) != 0) {
        log_error("delta %.12s is damaged on disk: it hashes to %.12s", sha256, found);
    } else {
        return 0;
    }
    remember_refused(m, &file);
    return damaged_file("delta", sha256, err);
}

struct worker_base *worker_models_damaged(struct worker_models *m, struct err *why)
{
    struct worker_base *b = m->bases;

    while (b != NULL && worker_check_state(b->check) != WORKER_CHECK_DAMAGED)
        b = b->next;
    if (b != NULL) {
        remember_refused(m, &b->file);
        damaged_file("base", b->sha256, why);
    }
    return b;
}

/* ------------------------------------------------------------------ bases */

static int open_engine(struct worker_models *m, struct worker_base *b, const char *path,
                       struct err *err)
{
    const struct engine_session_options session = {.max_sequences = m->options.max_sequences,
                                                   .max_context = m->options.max_context};
    int rc;

    worker_watch_begin("opening a model", 0);
    rc = engine_open(&b->engine, path, &m->options.engine, err);
    if (rc != 0 && err->kind == ERR_UNAVAILABLE && !devices_is_cpu(m->options.engine.device))
        err->kind = ERR_DEVICE;
    if (rc == 0)
        rc = engine_session_open(&b->session, b->engine, &session, err);
    worker_watch_end();
    if (rc != 0) {
        engine_free(b->engine);
        b->engine = NULL;
    }
    return rc;
}

static int load_base(struct worker_models *m, const char *sha256, const char *path,
                     struct worker_base **out, struct err *err)
{
    struct engine_base_info info;
    struct worker_base *b;

    if (is_refused(m, path))
        return damaged_file("base", sha256, err);
    m->loads++;
    if (engine_base_read(path, &info, err) != 0)
        return worker_hide_place("base", sha256, err);
    b = calloc(1, sizeof *b);
    if (b == NULL)
        return err_set(err, ERR_NO_MEMORY, "base model: out of memory");
    memcpy(b->sha256, sha256, strnlen(sha256, sizeof b->sha256 - 1));
    (void)file_identify(path, &b->file);
    if (worker_check_start(&b->check, path, sha256, err) != 0) {
        free_base(b);
        return worker_hide_place("base", sha256, err);
    }
    b->bytes = engine_weight_bytes(&info, &m->options.engine);
    make_room_for_base(m, b->bytes);
    while (open_engine(m, b, path, err) != 0) {
        if (try_again(m, b->bytes, NULL, err))
            continue;
        free_base(b);
        return worker_hide_place("base", sha256, err);
    }
    b->next = m->bases;
    m->bases = b;
    log_info("loaded base %.12s, %lld parameters", b->sha256, (long long)info.parameters);
    *out = b;
    return 0;
}

int worker_models_base(struct worker_models *m, const char *sha256, const char *path,
                       struct worker_base **out, struct err *err)
{
    struct worker_base *b = m->bases;

    while (b != NULL && strcmp(b->sha256, sha256) != 0)
        b = b->next;
    if (b == NULL && load_base(m, sha256, path, &b, err) != 0)
        return -1;
    b->used = ++m->clock;
    *out = b;
    return 0;
}

/* ------------------------------------------------------------------ deltas */

/* Where nobody can tell, as much as you like: a lost device has no memory at all, and says what has
 * become of it when it is used. */
static int64_t memory_there(const struct worker_base *base)
{
    int64_t bytes = 0, bytes_free = 0;

    if (engine_memory(base->engine, &bytes, &bytes_free))
        return bytes > 0 ? bytes_free : INT64_MAX;
    capacity_machine(&bytes, &bytes_free);
    return bytes > 0 ? bytes_free - MEMORY_MARGIN : INT64_MAX;
}

/* What unload() could make free. */
static int64_t memory_idle(const struct worker_models *m, const struct worker_base *keep)
{
    int64_t bytes = 0;

    for (const struct worker_delta *d = m->deltas; d != NULL; d = d->next)
        bytes += d->pins == 0 ? d->bytes : 0;
    for (const struct worker_base *b = m->bases; b != NULL; b = b->next)
        bytes += b->active == 0 && b != keep ? b->bytes : 0;
    return bytes;
}

/* The system gives a process more than there is, and kills it when it is used. Nobody's model is
 * unloaded for one that would not fit even then. */
static int check_memory(struct worker_models *m, const struct worker_base *base, int64_t bytes,
                        struct err *err)
{
    int64_t there;

    while (bytes > (there = memory_there(base))) {
        if (bytes - there > memory_idle(m, base) || !unload(m, bytes - there, base))
            return err_set_code(err, ERR_NO_MEMORY, "insufficient_memory", "model",
                                "The fine-tuned model needs about %" PRId64
                                " MiB of memory and its worker has %" PRId64
                                " MiB left: try again when less is asked at once, or make its "
                                "delta smaller.",
                                (bytes >> 20) + 1, there > 0 ? there >> 20 : 0);
    }
    return 0;
}

static int open_delta(struct worker_models *m, struct worker_delta *d, const char *path,
                      struct err *err)
{
    struct engine_delta_memory memory;
    int rc;

    if (engine_delta_measure(d->base->engine, path, &memory, err) != 0)
        return -1;
    if (check_memory(m, d->base, memory.opening_bytes, err) != 0)
        return -1;
    make_room_for_delta(m, memory.bytes, NULL);
    do {
        worker_watch_begin("opening a delta", 0);
        rc = engine_delta_open(&d->engine_delta, d->base->engine, path, err);
        worker_watch_end();
    } while (rc != 0 && try_again(m, memory.bytes, d->base, err));
    return rc;
}

static int load_delta(struct worker_models *m, struct worker_base *base, const char *tenant,
                      const char *sha256, const char *path, struct worker_delta **out,
                      struct err *err)
{
    struct worker_delta *d;

    if (is_refused(m, path))
        return damaged_file("delta", sha256, err);
    m->loads++;
    if (check_delta(m, path, sha256, err) != 0)
        return -1;
    d = calloc(1, sizeof *d);
    if (d == NULL)
        return err_set(err, ERR_NO_MEMORY, "delta: out of memory");
    d->base = base;
    d->tenant = strdup(tenant);
    memcpy(d->sha256, sha256, strnlen(sha256, sizeof d->sha256 - 1));
    if (d->tenant == NULL) {
        err_set(err, ERR_NO_MEMORY, "delta: out of memory");
        goto fail;
    }
    if (open_delta(m, d, path, err) != 0) {
        worker_hide_place("delta", sha256, err);
        goto fail;
    }
    d->bytes = engine_delta_bytes(d->engine_delta);
    d->next = m->deltas;
    m->deltas = d;
    make_room_for_delta(m, 0, d);
    *out = d;
    return 0;
fail:
    free_delta(d);
    return -1;
}

int worker_models_pin(struct worker_models *m, struct worker_base *base, const char *tenant,
                      const char *sha256, const char *path, struct worker_delta **out,
                      struct err *err)
{
    struct worker_delta *d = m->deltas;

    while (d != NULL &&
           (d->base != base || strcmp(d->sha256, sha256) != 0 || strcmp(d->tenant, tenant) != 0))
        d = d->next;
    if (d == NULL && load_delta(m, base, tenant, sha256, path, &d, err) != 0)
        return -1;
    d->used = ++m->clock;
    d->pins++;
    *out = d;
    return 0;
}

void worker_models_unpin(struct worker_delta *delta)
{
    assert(delta->pins > 0);
    delta->pins--; /* it may go when the next one is loaded, never inside a step */
}

const struct engine_delta *worker_delta_engine(const struct worker_delta *delta)
{
    return delta->engine_delta;
}

/* ------------------------------------------------------------------ the whole */

int worker_models_open(struct worker_models **out, const struct worker_models_options *options,
                       struct err *err)
{
    struct worker_models *m = calloc(1, sizeof *m);

    if (m == NULL)
        return err_set(err, ERR_NO_MEMORY, "models: out of memory");
    m->options = *options;
    *out = m;
    return 0;
}

void worker_models_free(struct worker_models *models)
{
    if (models == NULL)
        return;
    for (struct worker_delta *d = models->deltas; d != NULL; d = d->next)
        d->pins = 0;
    while (models->bases != NULL)
        worker_models_drop(models, models->bases);
    free(models);
}

struct worker_base *worker_models_first(struct worker_models *models)
{
    return models->bases;
}

void worker_models_stats(const struct worker_models *models, struct worker_models_stats *out)
{
    *out = (struct worker_models_stats){.loads = models->loads};
    for (const struct worker_base *b = models->bases; b != NULL; b = b->next) {
        out->bases++;
        out->base_bytes += b->bytes;
    }
    for (const struct worker_delta *d = models->deltas; d != NULL; d = d->next) {
        out->deltas++;
        out->delta_bytes += d->bytes;
    }
}
