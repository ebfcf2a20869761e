#include <assert.h>
#include <stddef.h>
#include <string.h>

#include "engine/cpu/cpu.h"

#define AT(member) offsetof(struct adapter_layer, member)

static void over_rows(struct cpu *cpu, int32_t rows, thread_pool_fn *fn, void *run)
{
    thread_pool_run(cpu->pool, ceil_div(rows, CPU_ROW_BLOCK), fn, run);
}

/* ------------------------------------------------------------------ norm of all rows */

struct norm_run {
    const struct cpu *cpu;
    const struct batch *batch;
    int32_t layer;
    size_t adapter; /* offset of the norm in adapter_layer */
    const struct tensor *weight;
    const float *x;
    float *n, *rstd; /* rstd may be NULL */
    float eps;
};

static void norm_task(void *context, int64_t task, int worker)
{
    const struct norm_run *run = context;
    int64_t d = run->weight->shape[0];
    int32_t from = (int32_t)task * CPU_ROW_BLOCK, to = from + CPU_ROW_BLOCK;

    for (int32_t r = from; r < to && r < run->batch->rows; r++) {
        const float *w = cpu_row_vector(run->batch, r, run->layer, run->adapter, run->weight);
        float rstd = run->cpu->k->rms_norm(run->x + r * d, w, run->n + r * d, (int32_t)d, run->eps);

        cpu_round(run->cpu, run->n + r * d, d);
        if (run->rstd)
            run->rstd[r] = rstd;
    }
}

/* ------------------------------------------------------------------ attn_in */

struct attn_in_run {
    const struct cpu *cpu;
    const struct attn_in_args *a;
};

static void norm_heads(const struct cpu *cpu, float *x, int32_t heads, int32_t head_dim,
                       const float *w, float eps)
{
    for (int32_t h = 0; h < heads; h++)
        cpu->k->rms_norm(x + h * head_dim, w, x + h * head_dim, head_dim, eps);
}

static void rotate_row(const struct cpu *cpu, const struct attn_in_args *a, int32_t row)
{
    const struct model_config *c = a->config;
    const struct layer_weights *w = a->weights;
    int64_t q_width = (int64_t)c->heads * c->head_dim, k_width = (int64_t)c->kv_heads * c->head_dim;
    const float *cs = f32(&a->rope) + (int64_t)row * c->head_dim;
    float *q = f32(&a->q) + row * q_width, *k = f32(&a->k) + row * k_width;

    cpu_round(cpu, q, q_width);
    cpu_round(cpu, k, k_width);
    if (c->qk_norm) {
        if (a->q_raw.data) {
            memcpy(f32(&a->q_raw) + row * q_width, q, (size_t)q_width * sizeof *q);
            memcpy(f32(&a->k_raw) + row * k_width, k, (size_t)k_width * sizeof *k);
        }
        norm_heads(cpu, q, c->heads, c->head_dim,
                   cpu_row_vector(a->batch, row, a->layer, AT(q_norm), &w->q_norm),
                   c->rms_norm_eps);
        norm_heads(cpu, k, c->kv_heads, c->head_dim,
                   cpu_row_vector(a->batch, row, a->layer, AT(k_norm), &w->k_norm),
                   c->rms_norm_eps);
    }
    cpu->k->rope(q, c->heads, c->head_dim, cs, false);
    cpu->k->rope(k, c->kv_heads, c->head_dim, cs, false);
}

static void rotate_task(void *context, int64_t task, int worker)
{
    const struct attn_in_run *run = context;
    int32_t from = (int32_t)task * CPU_ROW_BLOCK, to = from + CPU_ROW_BLOCK;

    for (int32_t r = from; r < to && r < run->a->batch->rows; r++)
        rotate_row(run->cpu, run->a, r);
}

/* One document's keys and values go behind those its slot holds. */
static void store_task(void *context, int64_t doc, int worker)
{
    const struct attn_in_run *run = context;
    const struct attn_in_args *a = run->a;
    const struct batch_slot *slot = &a->batch->slot[doc];
    int64_t width = (int64_t)a->config->kv_heads * a->config->head_dim;
    int64_t from = a->batch->cu_seqlens[doc], rows = a->batch->cu_seqlens[doc + 1] - from;
    int64_t to = ((int64_t)a->layer * a->cache->slots + slot->slot) * a->cache->max_len;
    size_t bytes = (size_t)(rows * width) * sizeof(float);

    to += slot->past;
    memcpy(f32(&a->cache->k) + to * width, f32(&a->k) + from * width, bytes);
    memcpy(f32(&a->cache->v) + to * width, f32(&a->v) + from * width, bytes);
}

void cpu_attn_in(struct backend *backend, const struct attn_in_args *args)
{
    struct cpu *cpu = cpu_of(backend);
    const struct layer_weights *w = args->weights;
    int32_t rows = args->batch->rows;
    struct attn_in_run run = {.cpu = cpu, .a = args};
    struct norm_run norm = {
        .cpu = cpu,
        .batch = args->batch,
        .layer = args->layer,
        .adapter = AT(attn_norm),
        .weight = &w->attn_norm,
        .x = f32(&args->x),
        .n = f32(&args->n),
        .rstd = f32(&args->rstd),
        .eps = args->config->rms_norm_eps,
    };
    struct linear_call call[] = {
        {.linear = &w->q, .adapter = AT(q), .x = f32(&args->n), .y = f32(&args->q)},
        {.linear = &w->k, .adapter = AT(k), .x = f32(&args->n), .y = f32(&args->k)},
        {.linear = &w->v, .adapter = AT(v), .x = f32(&args->n), .y = f32(&args->v)},
    };

    over_rows(cpu, rows, norm_task, &norm);
    cpu_linear(cpu, args->batch, args->layer, call, 3);
    over_rows(cpu, rows, rotate_task, &run);
    if (args->cache)
        thread_pool_run(cpu->pool, args->batch->docs, store_task, &run);
}

/* ------------------------------------------------------------------ attn_out, mlp */

static void copy_residual(const struct tensor *x, const struct tensor *y, int32_t rows)
{
    if (x->data != y->data)
        memcpy(y->data, x->data, (size_t)(rows * x->shape[1]) * sizeof(float));
}

void cpu_attn_out(struct backend *backend, const struct attn_out_args *args)
{
    struct linear_call call = {
        .linear = &args->weights->o,
        .adapter = AT(o),
        .x = f32(&args->attn),
        .y = f32(&args->y),
        .add = true,
    };

    copy_residual(&args->x, &args->y, args->batch->rows);
    cpu_linear(cpu_of(backend), args->batch, args->layer, &call, 1);
}

struct silu_run {
    const struct cpu *cpu;
    const struct mlp_args *a;
};

static void silu_task(void *context, int64_t task, int worker)
{
    const struct silu_run *run = context;
    const struct mlp_args *a = run->a;
    int64_t f = a->gate.shape[1];
    int32_t from = (int32_t)task * CPU_ROW_BLOCK, to = from + CPU_ROW_BLOCK;

    for (int32_t r = from; r < to && r < a->batch->rows; r++) {
        cpu_round(run->cpu, f32(&a->gate) + r * f, f);
        cpu_round(run->cpu, f32(&a->up) + r * f, f);
        run->cpu->k->silu_mul(f32(&a->gate) + r * f, f32(&a->up) + r * f, f32(&a->act) + r * f,
                              (int32_t)f);
        cpu_round(run->cpu, f32(&a->act) + r * f, f);
    }
}

void cpu_mlp(struct backend *backend, const struct mlp_args *args)
{
    struct cpu *cpu = cpu_of(backend);
    const struct layer_weights *w = args->weights;
    struct silu_run silu = {.cpu = cpu, .a = args};
    struct norm_run norm = {
        .cpu = cpu,
        .batch = args->batch,
        .layer = args->layer,
        .adapter = AT(mlp_norm),
        .weight = &w->mlp_norm,
        .x = f32(&args->x),
        .n = f32(&args->n),
        .rstd = f32(&args->rstd),
        .eps = args->config->rms_norm_eps,
    };
    struct linear_call in[] = {
        {.linear = &w->gate, .adapter = AT(gate), .x = f32(&args->n), .y = f32(&args->gate)},
        {.linear = &w->up, .adapter = AT(up), .x = f32(&args->n), .y = f32(&args->up)},
    };
    struct linear_call out = {
        .linear = &w->down,
        .adapter = AT(down),
        .x = f32(&args->act),
        .y = f32(&args->y),
        .add = true,
    };

    over_rows(cpu, args->batch->rows, norm_task, &norm);
    cpu_linear(cpu, args->batch, args->layer, in, 2);
    over_rows(cpu, args->batch->rows, silu_task, &silu);
    copy_residual(&args->x, &args->y, args->batch->rows);
    cpu_linear(cpu, args->batch, args->layer, &out, 1);
}

/* ------------------------------------------------------------------ head */

#define HEAD_OUTS 256 /* logits of one task */

struct head_run {
    const struct cpu *cpu;
    const struct head_args *a;
};

static void head_norm_task(void *context, int64_t i, int worker)
{
    const struct head_run *run = context;
    const struct head_args *a = run->a;
    const struct adapter *adapter = cpu_row_adapter(a->batch, a->row[i]);
    const struct tensor *w =
        adapter && adapter->final_norm.data ? &adapter->final_norm : &a->final_norm;
    int64_t d = a->x.shape[1];

    run->cpu->k->rms_norm(f32(&a->x) + a->row[i] * d, f32(w), f32(&a->n) + i * d, (int32_t)d,
                          a->config->rms_norm_eps);
    cpu_round(run->cpu, f32(&a->n) + i * d, d);
}

static void head_task(void *context, int64_t task, int worker)
{
    const struct head_run *run = context;
    const struct head_args *a = run->a;
    int32_t vocabulary = (int32_t)a->head.shape[0], d = (int32_t)a->head.shape[1];
    int64_t parts = ceil_div(vocabulary, HEAD_OUTS);
    struct span outs = span_part(vocabulary, 16, parts, task);

    run->cpu->k->dot(&(struct dot_args){
        .x = f32(&a->n),
        .ldx = d,
        .rows = a->count,
        .w = (const char *)a->head.data + (int64_t)outs.from * d * dtype_size(a->head.dtype),
        .dtype = a->head.dtype,
        .ldw = d,
        .outs = outs.to - outs.from,
        .n = d,
        .y = f32(&a->logits) + outs.from,
        .ldy = vocabulary,
    });
}

static void head_deltas(struct cpu *cpu, const struct head_args *a)
{
    int64_t vocabulary = a->head.shape[0], d = a->head.shape[1];
    struct cpu_delta_call delta[CPU_DELTA_CALLS];
    int32_t count = 0;

    for (int32_t i = 0; i < a->count; i++) {
        const struct adapter *adapter = cpu_row_adapter(a->batch, a->row[i]);

        if (!adapter || !adapter->head)
            continue;
        delta[count++] = (struct cpu_delta_call){
            .delta = adapter->head, .x = f32(&a->n) + i * d, .y = f32(&a->logits) + i * vocabulary};
        if (count == CPU_DELTA_CALLS) {
            cpu_delta_apply(cpu, delta, count);
            count = 0;
        }
    }
    cpu_delta_apply(cpu, delta, count);
}

void cpu_head(struct backend *backend, const struct head_args *args)
{
    struct cpu *cpu = cpu_of(backend);
    struct head_run run = {.cpu = cpu, .a = args};

    if (args->count == 0)
        return;
    thread_pool_run(cpu->pool, args->count, head_norm_task, &run);
    thread_pool_run(cpu->pool, ceil_div(args->head.shape[0], HEAD_OUTS), head_task, &run);
    head_deltas(cpu, args);
}
