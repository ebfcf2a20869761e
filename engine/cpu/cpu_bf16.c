/* Precision BF16 on the CPU: what is stored is BF16, what is computed is what the F32 stages
 * compute of it. A stage's activations are widened to floats, its F32 body runs (and rounds between
 * its steps: cpu_round), and what it wrote is rounded and stored.
 *
 * This is the definition that a device's BF16 is held to, not a way to be fast. */
#include <stdlib.h>
#include <string.h>

#include "engine/cpu/cpu.h"

#define SPARE 32 /* floats behind each tensor: loads may overrun */

/* ------------------------------------------------------------------ room */

static int64_t padded(int64_t elements)
{
    return (elements + SPARE + 15) / 16 * 16;
}

/* Keys of the longest document of the batch, those that the cache holds included. */
static int64_t longest(const struct batch *batch)
{
    int64_t most = 0;

    for (int32_t d = 0; d < batch->docs; d++) {
        int64_t n = batch->cu_seqlens[d + 1] - batch->cu_seqlens[d];

        if (batch->slot)
            n += batch->slot[d].past;
        most = n > most ? n : most;
    }
    return most;
}

/* Floats that the hungriest stage takes of a batch: no stage has more tensors than these. */
static int64_t room_of(const struct begin_args *a)
{
    const struct model_config *c = a->config;
    int64_t rows = a->batch->rows, query = model_config_width(c, WIDTH_QUERY);
    int64_t key = model_config_width(c, WIDTH_KEY);
    int64_t all = 4 * (padded(rows * c->hidden) + padded(rows * c->intermediate) +
                       padded(rows * query) + padded(rows * key));

    all += padded(rows * c->hidden); /* head_loss: x, dx, n, dn, and a teacher's x */

    if (a->batch->slot)
        all += 2 * padded(a->batch->docs * longest(a->batch) * key);
    return all;
}

static void begin(struct backend *backend, const struct begin_args *a)
{
    struct cpu *cpu = cpu_of(backend);
    size_t room = (size_t)room_of(a);

    cpu->rows = a->batch->rows;
    if (room > cpu->wide_size) {
        free(cpu->wide);
        cpu->wide_size = 0;
        cpu->wide = aligned_alloc(64, room * sizeof *cpu->wide);
        if (cpu->wide)
            cpu->wide_size = room;
        else if (!err_is_set(&cpu->failure))
            err_set(&cpu->failure, ERR_NO_MEMORY, "no memory for %zu floats of a batch", room);
    }
    cpu_begin(backend, a);
}

/* First of every stage. false: a failure sticks, nothing is done. */
static bool enter(struct cpu *cpu)
{
    cpu->wide_used = 0;
    return !err_is_set(&cpu->failure);
}

/* A float tensor of this shape, not filled; absent for one that is absent. Of a buffer with more
 * rows than the batch only so many. */
static struct tensor make(struct cpu *cpu, const struct tensor *like)
{
    struct tensor t = {0};
    size_t n;

    if (!like->data)
        return t;
    t = tensor_view(NULL, DTYPE_F32, like->rank, like->shape);
    if (t.rank == 2 && t.shape[0] > cpu->rows)
        t.shape[0] = cpu->rows;
    n = (size_t)padded(tensor_elements(&t));
    if (cpu->wide_used + n > cpu->wide_size) {
        err_set(&cpu->failure, ERR_INTERNAL, "bf16: a stage takes more room than begin made");
        return t;
    }
    t.data = cpu->wide + cpu->wide_used;
    cpu->wide_used += n;
    return t;
}

static struct tensor widen(struct cpu *cpu, const struct tensor *from)
{
    struct tensor t = make(cpu, from);

    if (t.data)
        tensor_to_f32(from, 0, tensor_elements(&t), t.data);
    return t;
}

static void store_elements(const float *from, uint16_t *to, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        to[i] = f32_to_bf16(from[i]);
}

static void store(const struct tensor *from, const struct tensor *to)
{
    if (from->data && to->data)
        store_elements(from->data, to->data, tensor_elements(from));
}

/* ------------------------------------------------------------------ forward */

static void embed(struct backend *backend, const struct embed_args *a)
{
    struct cpu *cpu = cpu_of(backend);
    struct embed_args w = *a;

    if (!enter(cpu))
        return;
    w.x = make(cpu, &a->x);
    cpu_embed(backend, &w);
    store(&w.x, &a->x);
}

/* The rows of k or v that came out, to where they belong in the cache. */
static void store_cache(const struct attn_in_args *a, const struct tensor *from,
                        const struct tensor *cache)
{
    int64_t width = from->shape[1];

    for (int32_t d = 0; d < a->batch->docs; d++) {
        const struct batch_slot *slot = &a->batch->slot[d];
        int64_t row = a->batch->cu_seqlens[d], rows = a->batch->cu_seqlens[d + 1] - row;
        int64_t to = ((int64_t)a->layer * a->cache->slots + slot->slot) * a->cache->max_len;

        store_elements(f32(from) + row * width, (uint16_t *)cache->data + (to + slot->past) * width,
                       rows * width);
    }
}

static void attn_in(struct backend *backend, const struct attn_in_args *a)
{
    struct cpu *cpu = cpu_of(backend);
    struct attn_in_args w = *a;

    if (!enter(cpu))
        return;
    w.cache = NULL;
    w.x = widen(cpu, &a->x);
    w.n = make(cpu, &a->n);
    w.q = make(cpu, &a->q);
    w.k = make(cpu, &a->k);
    w.v = make(cpu, &a->v);
    w.q_raw = make(cpu, &a->q_raw);
    w.k_raw = make(cpu, &a->k_raw);
    if (err_is_set(&cpu->failure))
        return;
    cpu_attn_in(backend, &w);
    store(&w.n, &a->n);
    store(&w.q, &a->q);
    store(&w.k, &a->k);
    store(&w.v, &a->v);
    store(&w.q_raw, &a->q_raw);
    store(&w.k_raw, &a->k_raw);
    if (a->cache) {
        store_cache(a, &w.k, &a->cache->k);
        store_cache(a, &w.v, &a->cache->v);
    }
}

/* What the batch's documents have in one layer of the cache, as a cache of floats with a slot for
 * each document. */
static struct tensor widen_cache(struct cpu *cpu, const struct attention_args *a,
                                 const struct tensor *cache, int64_t len)
{
    int64_t width = cache->shape[3];
    struct tensor t =
        tensor_view(cache->data, DTYPE_F32, 4, (int64_t[]){1, a->batch->docs, len, width});

    t = make(cpu, &t);
    for (int32_t d = 0; t.data && d < a->batch->docs; d++) {
        int64_t keys =
            a->batch->slot[d].past + a->batch->cu_seqlens[d + 1] - a->batch->cu_seqlens[d];
        int64_t from =
            ((int64_t)a->layer * a->cache->slots + a->batch->slot[d].slot) * a->cache->max_len;

        tensor_to_f32(cache, from * width, keys * width, f32(&t) + d * len * width);
    }
    return t;
}

/* Attention over the cache: its slots are the documents' own, one behind the other. */
static void attend(struct backend *backend, const struct attention_args *w)
{
    struct cpu *cpu = cpu_of(backend);
    struct batch batch = *w->batch;
    int64_t len = longest(w->batch);
    struct kv_cache wide = {.slots = batch.docs, .max_len = (int32_t)len};

    wide.k = widen_cache(cpu, w, &w->cache->k, len);
    wide.v = widen_cache(cpu, w, &w->cache->v, len);
    if (err_is_set(&cpu->failure))
        return;
    for (int32_t d = 0; d < batch.docs; d++) {
        /* One document at a time: a list of slots would have to be allocated. */
        const int32_t rows[2] = {0, batch.cu_seqlens[d + 1] - batch.cu_seqlens[d]};
        const struct batch_slot slot = {.slot = d, .past = batch.slot[d].past};
        struct attention_args one = *w;
        struct batch of = batch;
        int64_t from = batch.cu_seqlens[d], width = w->q.shape[1];

        of.docs = 1;
        of.rows = rows[1];
        of.cu_seqlens = rows;
        of.slot = &slot;
        of.token += from;
        of.position += from;
        of.segments = (struct row_segments){0};
        one.batch = &of;
        one.layer = 0;
        one.cache = &wide;
        one.q.data = f32(&w->q) + from * width;
        one.out.data = f32(&w->out) + from * width;
        if (one.lse.data)
            one.lse.data = f32(&w->lse) + from * w->lse.shape[1];
        one.q.shape[0] = one.out.shape[0] = rows[1];
        cpu_attention(backend, &one);
    }
}

static void attention(struct backend *backend, const struct attention_args *a)
{
    struct cpu *cpu = cpu_of(backend);
    struct attention_args w = *a;

    if (!enter(cpu))
        return;
    w.q = widen(cpu, &a->q);
    w.out = make(cpu, &a->out);
    if (!a->cache) {
        w.k = widen(cpu, &a->k);
        w.v = widen(cpu, &a->v);
    }
    if (err_is_set(&cpu->failure))
        return;
    if (a->cache)
        attend(backend, &w);
    else
        cpu_attention(backend, &w);
    store(&w.out, &a->out);
}

static void attn_out(struct backend *backend, const struct attn_out_args *a)
{
    struct cpu *cpu = cpu_of(backend);
    struct attn_out_args w = *a;

    if (!enter(cpu))
        return;
    w.attn = widen(cpu, &a->attn);
    w.x = w.y = widen(cpu, &a->x);
    if (err_is_set(&cpu->failure))
        return;
    cpu_attn_out(backend, &w);
    store(&w.y, &a->y);
}

static void mlp(struct backend *backend, const struct mlp_args *a)
{
    struct cpu *cpu = cpu_of(backend);
    struct mlp_args w = *a;
    bool in_place = a->act.data == a->gate.data;

    if (!enter(cpu))
        return;
    w.x = w.y = widen(cpu, &a->x);
    w.n = make(cpu, &a->n);
    w.gate = make(cpu, &a->gate);
    w.up = make(cpu, &a->up);
    w.act = in_place ? w.gate : make(cpu, &a->act);
    if (err_is_set(&cpu->failure))
        return;
    cpu_mlp(backend, &w);
    store(&w.n, &a->n);
    store(&w.act, &a->act);
    store(&w.gate, &a->gate);
    store(&w.up, &a->up);
    store(&w.y, &a->y);
}

static void head(struct backend *backend, const struct head_args *a)
{
    struct cpu *cpu = cpu_of(backend);
    struct head_args w = *a;

    if (!enter(cpu))
        return;
    w.x = widen(cpu, &a->x);
    w.n = make(cpu, &a->n);
    if (!err_is_set(&cpu->failure))
        cpu_head(backend, &w);
}

static void head_loss(struct backend *backend, const struct head_loss_args *a)
{
    struct cpu *cpu = cpu_of(backend);
    struct head_loss_args w = *a;

    if (!enter(cpu))
        return;
    w.x = widen(cpu, &a->x);
    w.teacher_x = widen(cpu, &a->teacher_x);
    w.dx = make(cpu, &a->dx);
    w.n = make(cpu, &a->n);
    w.dn = make(cpu, &a->dn);
    if (err_is_set(&cpu->failure))
        return;
    cpu_head_loss(backend, &w);
    store(&w.dx, &a->dx);
}

/* ------------------------------------------------------------------ backward */

static void mlp_backward(struct backend *backend, const struct mlp_backward_args *a)
{
    struct cpu *cpu = cpu_of(backend);
    struct mlp_backward_args w = *a;

    if (!enter(cpu))
        return;
    w.x = widen(cpu, &a->x);
    w.gate = widen(cpu, &a->gate);
    w.up = widen(cpu, &a->up);
    w.dx = widen(cpu, &a->dx);
    w.n = make(cpu, &a->n);
    w.dn = make(cpu, &a->dn);
    w.act = make(cpu, &a->act);
    w.d_act = make(cpu, &a->d_act);
    if (err_is_set(&cpu->failure))
        return;
    cpu_mlp_backward(backend, &w);
    store(&w.gate, &a->gate);
    store(&w.up, &a->up);
    store(&w.n, &a->n);
    store(&w.act, &a->act);
    store(&w.dx, &a->dx);
}

static void attn_out_backward(struct backend *backend, const struct attn_out_backward_args *a)
{
    struct cpu *cpu = cpu_of(backend);
    struct attn_out_backward_args w = *a;

    if (!enter(cpu))
        return;
    w.attn = widen(cpu, &a->attn);
    w.dy = widen(cpu, &a->dy);
    w.d_attn = make(cpu, &a->d_attn);
    if (err_is_set(&cpu->failure))
        return;
    cpu_attn_out_backward(backend, &w);
    store(&w.d_attn, &a->d_attn);
}

static void attention_backward(struct backend *backend, const struct attention_backward_args *a)
{
    struct cpu *cpu = cpu_of(backend);
    struct attention_backward_args w = *a;

    if (!enter(cpu))
        return;
    w.q = widen(cpu, &a->q);
    w.k = widen(cpu, &a->k);
    w.v = widen(cpu, &a->v);
    w.out = widen(cpu, &a->out);
    w.d_out = widen(cpu, &a->d_out);
    w.dq = make(cpu, &a->dq);
    w.dk = make(cpu, &a->dk);
    w.dv = make(cpu, &a->dv);
    if (err_is_set(&cpu->failure))
        return;
    cpu_attention_backward(backend, &w);
    store(&w.dq, &a->dq);
    store(&w.dk, &a->dk);
    store(&w.dv, &a->dv);
}

static void attn_in_backward(struct backend *backend, const struct attn_in_backward_args *a)
{
    struct cpu *cpu = cpu_of(backend);
    struct attn_in_backward_args w = *a;

    if (!enter(cpu))
        return;
    w.x = widen(cpu, &a->x);
    w.q_raw = widen(cpu, &a->q_raw);
    w.k_raw = widen(cpu, &a->k_raw);
    w.dq = widen(cpu, &a->dq);
    w.dk = widen(cpu, &a->dk);
    w.dv = widen(cpu, &a->dv);
    w.dx = widen(cpu, &a->dx);
    w.n = make(cpu, &a->n);
    w.dn = make(cpu, &a->dn);
    if (err_is_set(&cpu->failure))
        return;
    cpu_attn_in_backward(backend, &w);
    store(&w.dq, &a->dq);
    store(&w.dk, &a->dk);
    store(&w.dv, &a->dv);
    store(&w.n, &a->n);
    store(&w.dx, &a->dx);
}

static void embed_backward(struct backend *backend, const struct embed_backward_args *a)
{
    struct cpu *cpu = cpu_of(backend);
    struct embed_backward_args w = *a;

    if (!enter(cpu))
        return;
    w.dx = widen(cpu, &a->dx);
    if (!err_is_set(&cpu->failure))
        cpu_embed_backward(backend, &w);
}

/* ------------------------------------------------------------------ statistics */

static void gram(struct backend *backend, const struct gram_args *a)
{
    struct cpu *cpu = cpu_of(backend);
    struct gram_args w = *a;

    if (!enter(cpu))
        return;
    w.x = widen(cpu, &a->x);
    w.scaled = make(cpu, &a->scaled);
    if (!err_is_set(&cpu->failure))
        cpu_gram(backend, &w);
}

void cpu_bf16_table(struct backend_ops *ops)
{
    ops->gram = gram;
    ops->begin = begin;
    ops->embed = embed;
    ops->attn_in = attn_in;
    ops->attention = attention;
    ops->attn_out = attn_out;
    ops->mlp = mlp;
    ops->head = head;
    ops->head_loss = head_loss;
    ops->mlp_backward = mlp_backward;
    ops->attn_out_backward = attn_out_backward;
    ops->attention_backward = attention_backward;
    ops->attn_in_backward = attn_in_backward;
    ops->embed_backward = embed_backward;
}
