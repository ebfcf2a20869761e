#include <assert.h>
#include <stddef.h>
#include <string.h>

#include "engine/cpu/cpu.h"

#define COLUMNS 64 /* of a task that sums over rows */

/* dW += dyᵀ·x of one linear layer; nothing when it is frozen. */
static int weight_gemm(struct gemm *g, const struct linear *grad, const struct tensor *dy,
                       const struct tensor *x, int32_t rows)
{
    if (!grad->w.data)
        return 0;
    *g = (struct gemm){
        .kind = GEMM_TN,
        .m = (int32_t)grad->w.shape[0],
        .n = (int32_t)grad->w.shape[1],
        .k = rows,
        .a = f32(dy),
        .lda = grad->w.shape[0],
        .b = x->data,
        .b_dtype = DTYPE_F32,
        .ldb = grad->w.shape[1],
        .c = f32(&grad->w),
        .ldc = grad->w.shape[1],
        .add = true,
    };
    return 1;
}

/* dx (+)= dy·W */
static struct gemm input_gemm(const struct linear *linear, const struct tensor *dy,
                              const struct tensor *dx, int32_t rows, bool add)
{
    const struct tensor *w = &linear->w;

    return (struct gemm){
        .kind = GEMM_NN,
        .m = rows,
        .n = (int32_t)w->shape[1],
        .k = (int32_t)w->shape[0],
        .a = f32(dy),
        .lda = w->shape[0],
        .b = w->data,
        .b_dtype = w->dtype,
        .ldb = w->shape[1],
        .c = f32(dx),
        .ldc = w->shape[1],
        .add = add,
    };
}

struct column_run {
    const struct cpu *cpu;
    const struct tensor *x, *dy; /* [rows, width] */
    const float *rstd;           /* NULL: a plain sum, for biases */
    int32_t rows, width;
    float *sum;
};

static void column_task(void *context, int64_t task, int worker)
{
    const struct column_run *run = context;
    int32_t from = (int32_t)task * COLUMNS;
    int32_t n = run->width - from < COLUMNS ? run->width - from : COLUMNS;

    if (run->rstd)
        run->cpu->k->rms_norm_weight_grad(f32(run->x) + from, f32(run->dy) + from, run->width,
                                          run->rstd, 1, run->rows, n, run->sum + from);
    else
        run->cpu->k->column_sum(f32(run->dy) + from, run->width, run->rows, n, run->sum + from);
}

static void bias_gradient(struct cpu *cpu, const struct linear *grad, const struct tensor *dy,
                          int32_t rows)
{
    struct column_run run = {.cpu = cpu, .dy = dy, .rows = rows, .sum = f32(&grad->b)};

    if (!grad->b.data)
        return;
    run.width = (int32_t)grad->b.shape[0];
    thread_pool_run(cpu->pool, ceil_div(run.width, COLUMNS), column_task, &run);
}

/* ------------------------------------------------------------------ through a norm of all rows */

struct norm_backward_run {
    const struct cpu *cpu;
    const struct tensor *x, *rstd, *weight, *dn, *n;
    float *dx; /* NULL: only make n again */
    int32_t rows;
};

static void norm_again_task(void *context, int64_t task, int worker)
{
    const struct norm_backward_run *run = context;
    int64_t d = run->weight->shape[0];
    int32_t from = (int32_t)task * CPU_ROW_BLOCK, to = from + CPU_ROW_BLOCK;

    for (int32_t r = from; r < to && r < run->rows; r++) {
        run->cpu->k->rms_norm_again(f32(run->x) + r * d, f32(run->weight), f32(run->n) + r * d,
                                    (int32_t)d, f32(run->rstd)[r]);
        cpu_round(run->cpu, f32(run->n) + r * d, d);
    }
}

static void norm_backward_task(void *context, int64_t task, int worker)
{
    const struct norm_backward_run *run = context;
    int64_t d = run->weight->shape[0];
    int32_t from = (int32_t)task * CPU_ROW_BLOCK, to = from + CPU_ROW_BLOCK;

    for (int32_t r = from; r < to && r < run->rows; r++)
        run->cpu->k->rms_norm_backward(f32(run->x) + r * d, f32(run->weight), f32(run->dn) + r * d,
                                       run->dx + r * d, (int32_t)d, f32(run->rstd)[r]);
}

static void norm_backward(struct cpu *cpu, const struct norm_backward_run *run,
                          const struct tensor *grad)
{
    struct norm_backward_run r = *run;
    struct column_run columns = {
        .cpu = cpu,
        .x = run->x,
        .dy = run->dn,
        .rstd = f32(run->rstd),
        .rows = run->rows,
        .width = (int32_t)run->weight->shape[0],
        .sum = f32(grad),
    };

    cpu_round(cpu, f32(run->dn), (int64_t)run->rows * columns.width);
    if (grad->data)
        thread_pool_run(cpu->pool, ceil_div(columns.width, COLUMNS), column_task, &columns);
    thread_pool_run(cpu->pool, ceil_div(run->rows, CPU_ROW_BLOCK), norm_backward_task, &r);
}

/* ------------------------------------------------------------------ mlp */

struct silu_backward_run {
    const struct cpu *cpu;
    const struct mlp_backward_args *a;
    int32_t rows;
};

static void silu_backward_task(void *context, int64_t task, int worker)
{
    const struct silu_backward_run *run = context;
    const struct mlp_backward_args *a = run->a;
    int64_t f = a->gate.shape[1];
    int32_t from = (int32_t)task * CPU_ROW_BLOCK, to = from + CPU_ROW_BLOCK;

    for (int32_t r = from; r < to && r < run->rows; r++) {
        cpu_round(run->cpu, f32(&a->d_act) + r * f, f);
        run->cpu->k->silu_mul_backward(f32(&a->gate) + r * f, f32(&a->up) + r * f,
                                       f32(&a->d_act) + r * f, f32(&a->act) + r * f, (int32_t)f);
        cpu_round(run->cpu, f32(&a->gate) + r * f, f);
        cpu_round(run->cpu, f32(&a->up) + r * f, f);
        cpu_round(run->cpu, f32(&a->act) + r * f, f);
    }
}

void cpu_mlp_backward(struct backend *backend, const struct mlp_backward_args *a)
{
    struct cpu *cpu = cpu_of(backend);
    int32_t rows = (int32_t)a->x.shape[0];
    struct silu_backward_run silu = {.cpu = cpu, .a = a, .rows = rows};
    struct norm_backward_run norm = {
        .cpu = cpu,
        .x = &a->x,
        .rstd = &a->rstd,
        .weight = &a->weights->mlp_norm,
        .dn = &a->dn,
        .n = &a->n,
        .dx = f32(&a->dx),
        .rows = rows,
    };
    struct gemm g[GEMM_MAX];
    int count = 0;

    g[0] = input_gemm(&a->weights->down, &a->dx, &a->d_act, rows, false);
    cpu_gemm(cpu, g, 1);
    thread_pool_run(cpu->pool, ceil_div(rows, CPU_ROW_BLOCK), silu_backward_task, &silu);
    thread_pool_run(cpu->pool, ceil_div(rows, CPU_ROW_BLOCK), norm_again_task, &norm);

    g[count++] = input_gemm(&a->weights->gate, &a->gate, &a->dn, rows, false);
    count += weight_gemm(&g[count], &a->grads->down, &a->dx, &a->act, rows);
    count += weight_gemm(&g[count], &a->grads->gate, &a->gate, &a->n, rows);
    count += weight_gemm(&g[count], &a->grads->up, &a->up, &a->n, rows);
    cpu_gemm(cpu, g, count);
    g[0] = input_gemm(&a->weights->up, &a->up, &a->dn, rows, true);
    cpu_gemm(cpu, g, 1);
    bias_gradient(cpu, &a->grads->gate, &a->gate, rows);
    bias_gradient(cpu, &a->grads->up, &a->up, rows);
    bias_gradient(cpu, &a->grads->down, &a->dx, rows);
    norm_backward(cpu, &norm, &a->grads->mlp_norm);
}

/* ------------------------------------------------------------------ attn_out */

void cpu_attn_out_backward(struct backend *backend, const struct attn_out_backward_args *a)
{
    struct cpu *cpu = cpu_of(backend);
    int32_t rows = (int32_t)a->dy.shape[0];
    struct gemm g[GEMM_MAX];
    int count = 0;

    g[count++] = input_gemm(&a->weights->o, &a->dy, &a->d_attn, rows, false);
    count += weight_gemm(&g[count], &a->grads->o, &a->dy, &a->attn, rows);
    cpu_gemm(cpu, g, count);
    bias_gradient(cpu, &a->grads->o, &a->dy, rows);
}

/* ------------------------------------------------------------------ attn_in */

struct rotate_back_run {
    const struct cpu *cpu;
    const struct attn_in_backward_args *a;
    int32_t rows;
};

/* Gradient through the norm of each head: `d` becomes the gradient at `raw`. */
static void norm_heads_backward(const struct cpu *cpu, const float *raw, float *d, int32_t heads,
                                int32_t head_dim, const float *w, float eps)
{
    float dx[512], out[512]; /* head_dim is at most 512, asserted at attn_in_backward */

    for (int32_t h = 0; h < heads; h++, raw += head_dim, d += head_dim) {
        float rstd = cpu->k->rms_norm(raw, w, out, head_dim, eps);

        memset(dx, 0, (size_t)head_dim * sizeof *dx);
        cpu->k->rms_norm_backward(raw, w, d, dx, head_dim, rstd);
        memcpy(d, dx, (size_t)head_dim * sizeof *d);
    }
}

static void unrotate_task(void *context, int64_t task, int worker)
{
    const struct rotate_back_run *run = context;
    const struct attn_in_backward_args *a = run->a;
    const struct model_config *c = a->config;
    int32_t from = (int32_t)task * CPU_ROW_BLOCK, to = from + CPU_ROW_BLOCK;

    for (int32_t r = from; r < to && r < run->rows; r++) {
        const float *cs = f32(&a->rope) + (int64_t)r * c->head_dim;

        run->cpu->k->rope(f32(&a->dq) + r * a->dq.shape[1], c->heads, c->head_dim, cs, true);
        run->cpu->k->rope(f32(&a->dk) + r * a->dk.shape[1], c->kv_heads, c->head_dim, cs, true);
    }
}

static void norm_heads_task(void *context, int64_t task, int worker)
{
    const struct rotate_back_run *run = context;
    const struct attn_in_backward_args *a = run->a;
    const struct model_config *c = a->config;
    int32_t from = (int32_t)task * CPU_ROW_BLOCK, to = from + CPU_ROW_BLOCK;

    for (int32_t r = from; r < to && r < run->rows; r++) {
        norm_heads_backward(run->cpu, f32(&a->q_raw) + r * a->dq.shape[1],
                            f32(&a->dq) + r * a->dq.shape[1], c->heads, c->head_dim,
                            f32(&a->weights->q_norm), c->rms_norm_eps);
        norm_heads_backward(run->cpu, f32(&a->k_raw) + r * a->dk.shape[1],
                            f32(&a->dk) + r * a->dk.shape[1], c->kv_heads, c->head_dim,
                            f32(&a->weights->k_norm), c->rms_norm_eps);
    }
}

static void round_heads(struct cpu *cpu, const struct attn_in_backward_args *a)
{
    cpu_round(cpu, f32(&a->dq), tensor_elements(&a->dq));
    cpu_round(cpu, f32(&a->dk), tensor_elements(&a->dk));
}

struct head_norm_grad_run {
    const struct cpu *cpu;
    const struct tensor *raw, *d, *grad;
    int32_t rows, heads, head_dim;
    float eps;
};

/* The weights of q_norm and k_norm are few: one task each, rows and heads in order. */
static void head_norm_grad_task(void *context, int64_t task, int worker)
{
    const struct head_norm_grad_run *run = (struct head_norm_grad_run *)context + task;
    int64_t ld = (int64_t)run->heads * run->head_dim;

    if (!run->grad->data)
        return;
    for (int64_t r = 0; r < run->rows; r++)
        for (int32_t h = 0; h < run->heads; h++) {
            const float *raw = f32(run->raw) + r * ld + h * run->head_dim;
            float out[512], rstd = run->cpu->k->rms_norm(raw, raw, out, run->head_dim, run->eps);

            run->cpu->k->rms_norm_weight_grad(raw, f32(run->d) + r * ld + h * run->head_dim, ld,
                                              &rstd, 1, 1, run->head_dim, f32(run->grad));
        }
}

static void qk_norm_backward(struct cpu *cpu, const struct attn_in_backward_args *a,
                             struct rotate_back_run *rotate)
{
    const struct model_config *c = a->config;
    struct head_norm_grad_run grads[2] = {
        {cpu, &a->q_raw, &a->dq, &a->grads->q_norm, rotate->rows, c->heads, c->head_dim,
         c->rms_norm_eps},
        {cpu, &a->k_raw, &a->dk, &a->grads->k_norm, rotate->rows, c->kv_heads, c->head_dim,
         c->rms_norm_eps},
    };

    assert(c->head_dim <= 512);
    thread_pool_run(cpu->pool, 2, head_norm_grad_task, grads);
    thread_pool_run(cpu->pool, ceil_div(rotate->rows, CPU_ROW_BLOCK), norm_heads_task, rotate);
}

void cpu_attn_in_backward(struct backend *backend, const struct attn_in_backward_args *a)
{
    struct cpu *cpu = cpu_of(backend);
    int32_t rows = (int32_t)a->x.shape[0];
    struct rotate_back_run rotate = {.cpu = cpu, .a = a, .rows = rows};
    struct norm_backward_run norm = {
        .cpu = cpu,
        .x = &a->x,
        .rstd = &a->rstd,
        .weight = &a->weights->attn_norm,
        .dn = &a->dn,
        .n = &a->n,
        .dx = f32(&a->dx),
        .rows = rows,
    };
    struct gemm g[GEMM_MAX];
    int count = 0;

    thread_pool_run(cpu->pool, ceil_div(rows, CPU_ROW_BLOCK), unrotate_task, &rotate);
    if (a->config->qk_norm)
        qk_norm_backward(cpu, a, &rotate);
    round_heads(cpu, a);
    thread_pool_run(cpu->pool, ceil_div(rows, CPU_ROW_BLOCK), norm_again_task, &norm);

    g[count++] = input_gemm(&a->weights->q, &a->dq, &a->dn, rows, false);
    count += weight_gemm(&g[count], &a->grads->q, &a->dq, &a->n, rows);
    count += weight_gemm(&g[count], &a->grads->k, &a->dk, &a->n, rows);
    count += weight_gemm(&g[count], &a->grads->v, &a->dv, &a->n, rows);
    cpu_gemm(cpu, g, count);
    g[0] = input_gemm(&a->weights->k, &a->dk, &a->dn, rows, true);
    cpu_gemm(cpu, g, 1);
    g[0] = input_gemm(&a->weights->v, &a->dv, &a->dn, rows, true);
    cpu_gemm(cpu, g, 1);
    bias_gradient(cpu, &a->grads->q, &a->dq, rows);
    bias_gradient(cpu, &a->grads->k, &a->dk, rows);
    bias_gradient(cpu, &a->grads->v, &a->dv, rows);
    norm_backward(cpu, &norm, &a->grads->attn_norm);
}
