#include <assert.h>
#include <math.h>
#include <string.h>

#include "engine/cpu/cpu.h"

/* Softmax runs over blocks of keys, keeping for each query the largest score and the sum so far
 * (FlashAttention, https://arxiv.org/abs/2205.14135). Blocks lie on a fixed grid of positions, so
 * that a query's result depends on its own position and keys alone. */

static float exp_of(const struct cpu *cpu, float x)
{
    cpu->k->exp_sum(&x, 1, 0.0f);
    return x;
}

/* One query, one block of keys: scores become probabilities, out and sums move on. */
struct running {
    float max, sum;
};
static void absorb_block(const struct cpu *cpu, struct running *r, float *score, int32_t keys,
                         float scale, const float *v, int64_t ldv, int32_t head_dim, float *out)
{
    float max = cpu->k->scale_max(score, keys, scale), alpha;

    max = max > r->max ? max : r->max;
    alpha = exp_of(cpu, r->max - max);
    r->sum = r->sum * alpha + cpu->k->exp_sum(score, keys, max);
    r->max = max;
    cpu->k->weighted_sum(score, keys, v, ldv, head_dim, alpha, out);
}

/* ------------------------------------------------------------------ forward */

struct forward_run {
    const struct cpu *cpu;
    const struct attention_args *a;
};

/* Rows [from, to) of a document for one head: `first` is the position of row `from`, keys and
 * values start at position 0. */
struct query_tile {
    int32_t from, to, first, head;
    const float *k, *v;
};

#define SERVE_QUERIES 16
#define SERVE_KEYS 64

static void tile_forward(const struct cpu *cpu, const struct attention_args *a,
                         const struct query_tile *t)
{
    int32_t e = a->config->head_dim, heads = a->config->heads;
    int64_t ldq = (int64_t)heads * e, ldk = (int64_t)a->config->kv_heads * e;
    float score[SERVE_QUERIES * SERVE_KEYS], scale = 1.0f / sqrtf((float)e);
    int32_t rows = t->to - t->from, last = t->first + rows;
    float *out = f32(&a->out) + t->from * ldq + t->head * e;
    struct running running[SERVE_QUERIES];

    for (int32_t r = 0; r < rows; r++) {
        running[r] = (struct running){-INFINITY, 0.0f};
        memset(out + r * ldq, 0, (size_t)e * sizeof *out);
    }
    for (int32_t key = 0; key < last; key += SERVE_KEYS) {
        int32_t keys = last - key < SERVE_KEYS ? last - key : SERVE_KEYS;

        cpu->k->dot(&(struct dot_args){
            .x = f32(&a->q) + t->from * ldq + t->head * e,
            .ldx = ldq,
            .rows = rows,
            .w = t->k + key * ldk,
            .dtype = DTYPE_F32,
            .ldw = ldk,
            .outs = keys,
            .n = e,
            .y = score,
            .ldy = SERVE_KEYS,
        });
        for (int32_t r = 0; r < rows; r++) {
            int32_t seen = t->first + r + 1 - key; /* causal */

            if (seen > keys)
                seen = keys;
            if (seen > 0)
                absorb_block(cpu, &running[r], score + r * SERVE_KEYS, seen, scale,
                             t->v + key * ldk, ldk, e, out + r * ldq);
        }
    }
    for (int32_t r = 0; r < rows; r++) {
        cpu->k->scale(out + r * ldq, e, 1.0f / running[r].sum);
        if (a->lse.data)
            f32(&a->lse)[(int64_t)(t->from + r) * heads + t->head] =
                running[r].max + logf(running[r].sum);
    }
}

/* Tasks: blocks of SERVE_QUERIES rows of each document, times kv heads. */
static bool find_tile(const struct batch *batch, int64_t block, int32_t *doc, int32_t *from,
                      int32_t *to)
{
    for (int32_t d = 0; d < batch->docs; d++) {
        int32_t start = batch->cu_seqlens[d], rows = batch->cu_seqlens[d + 1] - start;
        int64_t blocks = ceil_div(rows, SERVE_QUERIES);

        if (block < blocks) {
            *doc = d;
            *from = start + (int32_t)block * SERVE_QUERIES;
            *to = *from + SERVE_QUERIES < start + rows ? *from + SERVE_QUERIES : start + rows;
            return true;
        }
        block -= blocks;
    }
    return false;
}

static void forward_task(void *context, int64_t task, int worker)
{
    const struct forward_run *run = context;
    const struct attention_args *a = run->a;
    const struct batch *batch = a->batch;
    int32_t e = a->config->head_dim, kv_heads = a->config->kv_heads;
    int32_t group = a->config->heads / kv_heads, kv = (int32_t)(task % kv_heads), doc, from, to;
    int64_t ld = (int64_t)kv_heads * e, base = 0;
    struct query_tile tile;

    if (!find_tile(batch, task / kv_heads, &doc, &from, &to))
        return;
    tile = (struct query_tile){.from = from, .to = to, .first = from - batch->cu_seqlens[doc]};
    if (a->cache) {
        const struct batch_slot *slot = &batch->slot[doc];

        tile.first += slot->past;
        base = ((int64_t)a->layer * a->cache->slots + slot->slot) * a->cache->max_len * ld;
        tile.k = f32(&a->cache->k) + base + kv * e;
        tile.v = f32(&a->cache->v) + base + kv * e;
    } else {
        base = batch->cu_seqlens[doc] * ld;
        tile.k = f32(&a->k) + base + kv * e;
        tile.v = f32(&a->v) + base + kv * e;
    }
    for (int32_t h = kv * group; h < (kv + 1) * group; h++) {
        tile.head = h;
        tile_forward(run->cpu, a, &tile);
    }
}

void cpu_attention(struct backend *backend, const struct attention_args *args)
{
    struct cpu *cpu = cpu_of(backend);
    struct forward_run run = {.cpu = cpu, .a = args};
    int64_t blocks = 0;

    for (int32_t d = 0; d < args->batch->docs; d++)
        blocks +=
            ceil_div(args->batch->cu_seqlens[d + 1] - args->batch->cu_seqlens[d], SERVE_QUERIES);
    thread_pool_run(cpu->pool, blocks * args->config->kv_heads, forward_task, &run);
}

/* ------------------------------------------------------------------ backward */

struct backward_run {
    struct cpu *cpu;
    const struct attention_backward_args *a;
};

/* A matrix of E columns as `outer` wants it: sixteens of columns. Rows end in other heads' values
 * or in the spare line behind an allocation, in lanes that are not stored. */
static void outer_into(const struct cpu *cpu, const float *a, int64_t row_step, int64_t k_step,
                       const struct outer_args *rest)
{
    struct outer_args o = *rest;

    o.a = a;
    o.row_step = row_step;
    o.k_step = k_step;
    o.add = true;
    cpu->k->outer(&o);
}

/* Queries [q0, q0 + rows) and keys [k0, k0 + keys) of one document and head: the probabilities
 * again from lse, then what they owe to dq, dk and dv. */
struct backward_tile {
    int32_t start; /* first row of the document */
    int32_t q0, rows, k0, keys, head;
};

static void tile_backward(const struct backward_run *run, struct cpu_scratch *scratch,
                          const struct backward_tile *t)
{
    const struct attention_backward_args *a = run->a;
    const struct cpu *cpu = run->cpu;
    int32_t e = a->config->head_dim, heads = a->config->heads;
    int32_t kv = t->head / (heads / a->config->kv_heads);
    int64_t ldq = (int64_t)heads * e, ldk = (int64_t)a->config->kv_heads * e;
    int64_t q_at = (t->start + t->q0) * ldq + t->head * e, k_at = (t->start + t->k0) * ldk + kv * e;
    float *p = scratch->scores, *ds = scratch->d_scores, scale = 1.0f / sqrtf((float)e);
    struct dot_args d = {
        .ldx = ldq,
        .rows = t->rows,
        .dtype = DTYPE_F32,
        .ldw = ldk,
        .outs = t->keys,
        .n = e,
        .ldy = CPU_KEY_BLOCK,
    };

    d.x = f32(&a->q) + q_at, d.w = f32(&a->k) + k_at, d.y = p;
    cpu->k->dot(&d);
    d.x = f32(&a->d_out) + q_at, d.w = f32(&a->v) + k_at, d.y = ds;
    cpu->k->dot(&d);
    for (int32_t r = 0; r < t->rows; r++) {
        float *p_row = p + r * CPU_KEY_BLOCK, *ds_row = ds + r * CPU_KEY_BLOCK;
        int64_t at = (int64_t)(t->start + t->q0 + r) * heads + t->head;
        int32_t seen = t->q0 + r + 1 - t->k0;

        seen = seen < 0 ? 0 : seen > t->keys ? t->keys : seen;
        cpu->k->softmax_again(p_row, seen, scale, f32(&a->lse)[at]);
        memset(p_row + seen, 0, (size_t)(t->keys - seen) * sizeof *p_row);
        memset(ds_row + seen, 0, (size_t)(t->keys - seen) * sizeof *ds_row);
    }
    outer_into(cpu, p, 1, CPU_KEY_BLOCK,
               &(struct outer_args){.b = f32(&a->d_out) + q_at,
                                    .ldb = ldq,
                                    .rows = t->keys,
                                    .cols = e,
                                    .k = t->rows,
                                    .c = f32(&a->dv) + k_at,
                                    .ldc = ldk});
    for (int32_t r = 0; r < t->rows; r++) {
        int64_t at = (int64_t)(t->start + t->q0 + r) * heads + t->head;

        cpu->k->softmax_backward(p + r * CPU_KEY_BLOCK, ds + r * CPU_KEY_BLOCK, t->keys,
                                 f32(&a->delta)[at], scale);
    }
    outer_into(cpu, p, CPU_KEY_BLOCK, 1,
               &(struct outer_args){.b = f32(&a->k) + k_at,
                                    .ldb = ldk,
                                    .rows = t->rows,
                                    .cols = e,
                                    .k = t->keys,
                                    .c = f32(&a->dq) + q_at,
                                    .ldc = ldq});
    outer_into(cpu, p, 1, CPU_KEY_BLOCK,
               &(struct outer_args){.b = f32(&a->q) + q_at,
                                    .ldb = ldq,
                                    .rows = t->keys,
                                    .cols = e,
                                    .k = t->rows,
                                    .c = f32(&a->dk) + k_at,
                                    .ldc = ldk});
}

static void clear_columns(float *x, int64_t ld, int32_t from, int32_t to, int32_t width)
{
    for (int64_t r = from; r < to; r++)
        memset(x + r * ld, 0, (size_t)width * sizeof *x);
}

/* One document and kv head: dk and dv collect from all its queries, in order. */
static void backward_task(void *context, int64_t task, int worker)
{
    const struct backward_run *run = context;
    const struct attention_backward_args *a = run->a;
    int32_t e = a->config->head_dim, heads = a->config->heads, kv_heads = a->config->kv_heads;
    int32_t doc = (int32_t)(task / kv_heads), kv = (int32_t)(task % kv_heads);
    int32_t group = heads / kv_heads;
    int32_t start = a->batch->cu_seqlens[doc], end = a->batch->cu_seqlens[doc + 1];
    int64_t ldq = (int64_t)heads * e, ldk = (int64_t)kv_heads * e;

    clear_columns(f32(&a->dq) + kv * group * e, ldq, start, end, group * e);
    clear_columns(f32(&a->dk) + kv * e, ldk, start, end, e);
    clear_columns(f32(&a->dv) + kv * e, ldk, start, end, e);
    for (int32_t h = kv * group; h < (kv + 1) * group; h++) {
        for (int64_t r = start; r < end; r++)
            f32(&a->delta)[r * heads + h] = run->cpu->k->product(
                f32(&a->out) + r * ldq + h * e, f32(&a->d_out) + r * ldq + h * e, e);
        for (int32_t q0 = 0; q0 < end - start; q0 += CPU_QUERY_BLOCK) {
            struct backward_tile t = {.start = start, .q0 = q0, .head = h};

            t.rows = end - start - q0 < CPU_QUERY_BLOCK ? end - start - q0 : CPU_QUERY_BLOCK;
            for (t.k0 = 0; t.k0 < q0 + t.rows; t.k0 += CPU_KEY_BLOCK) {
                t.keys = q0 + t.rows - t.k0;
                if (t.keys > CPU_KEY_BLOCK)
                    t.keys = CPU_KEY_BLOCK;
                tile_backward(run, &run->cpu->scratch[worker], &t);
            }
        }
    }
}

void cpu_attention_backward(struct backend *backend, const struct attention_backward_args *args)
{
    struct cpu *cpu = cpu_of(backend);
    struct backward_run run = {.cpu = cpu, .a = args};

    thread_pool_run(cpu->pool, (int64_t)args->batch->docs * args->config->kv_heads, backward_task,
                    &run);
}
