#include <assert.h>
#include <math.h>
#include <string.h>

#include "engine/cpu/cpu.h"

#define MAX_CHUNK 1024 /* rows of the caller's scratch that are used at most */
#define COLUMNS 64

struct loss_run {
    struct cpu *cpu;
    const struct head_loss_args *a;
    int32_t row[MAX_CHUNK]; /* the chunk's rows in the batch */
    float rstd[MAX_CHUNK];
    int32_t count;
};

static void norm_task(void *context, int64_t i, int worker)
{
    struct loss_run *run = context;
    const struct head_loss_args *a = run->a;
    int64_t d = a->x.shape[1];

    run->rstd[i] = run->cpu->k->rms_norm(f32(&a->x) + run->row[i] * d, f32(&a->final_norm),
                                         f32(&a->n) + i * d, (int32_t)d, a->config->rms_norm_eps);
    cpu_round(run->cpu, f32(&a->n) + i * d, d);
}

/* Logits of one row become the gradient at the logits; loss and hit are noted. */
static void softmax_task(void *context, int64_t i, int worker)
{
    struct loss_run *run = context;
    const struct head_loss_args *a = run->a;
    const struct cpu_kernels *k = run->cpu->k;
    int32_t vocabulary = (int32_t)a->head.shape[0], row = run->row[i], best = 0;
    float *logit = f32(&a->logits) + i * vocabulary;
    float max = k->scale_max(logit, vocabulary, 1.0f), of_target = logit[a->target[row]];

    if (of_target == max)
        while (logit[best] != max)
            best++;
    ((int32_t *)a->correct.data)[row] = of_target == max && best == a->target[row];
    float sum = k->exp_sum(logit, vocabulary, max);
    f32(&a->nll)[row] = logf(sum) + max - of_target;
    if (!a->dx.data)
        return;
    k->scale(logit, vocabulary, a->weight[row] / sum);
    logit[a->target[row]] -= a->weight[row];
    cpu_round(run->cpu, logit, vocabulary);
}

static void norm_backward_task(void *context, int64_t i, int worker)
{
    struct loss_run *run = context;
    const struct head_loss_args *a = run->a;
    int64_t d = a->x.shape[1];

    run->cpu->k->rms_norm_backward(f32(&a->x) + run->row[i] * d, f32(&a->final_norm),
                                   f32(&a->dn) + i * d, f32(&a->dx) + run->row[i] * d, (int32_t)d,
                                   run->rstd[i]);
}

static void norm_grad_task(void *context, int64_t task, int worker)
{
    struct loss_run *run = context;
    const struct head_loss_args *a = run->a;
    int32_t d = (int32_t)a->x.shape[1], from = (int32_t)task * COLUMNS;
    int32_t n = d - from < COLUMNS ? d - from : COLUMNS;

    for (int64_t i = 0; i < run->count; i++)
        run->cpu->k->rms_norm_weight_grad(f32(&a->x) + (int64_t)run->row[i] * d + from,
                                          f32(&a->dn) + i * d + from, d, &run->rstd[i], 1, 1, n,
                                          f32(&a->d_final_norm) + from);
}

static void chunk_backward(struct loss_run *run)
{
    const struct head_loss_args *a = run->a;
    struct cpu *cpu = run->cpu;
    int32_t vocabulary = (int32_t)a->head.shape[0], d = (int32_t)a->head.shape[1];
    struct gemm g[2] = {
        {
            .kind = GEMM_NN,
            .m = run->count,
            .n = d,
            .k = vocabulary,
            .a = f32(&a->logits),
            .lda = vocabulary,
            .b = a->head.data,
            .b_dtype = a->head.dtype,
            .ldb = d,
            .c = f32(&a->dn),
            .ldc = d,
        },
        {
            .kind = GEMM_TN,
            .m = vocabulary,
            .n = d,
            .k = run->count,
            .a = f32(&a->logits),
            .lda = vocabulary,
            .b = a->n.data,
            .b_dtype = DTYPE_F32,
            .ldb = d,
            .c = f32(&a->d_head),
            .ldc = d,
            .add = true,
        },
    };

    cpu_gemm(cpu, g, a->d_head.data ? 2 : 1);
    cpu_round(cpu, f32(&a->dn), (int64_t)run->count * d);
    if (a->d_final_norm.data)
        thread_pool_run(cpu->pool, ceil_div(d, COLUMNS), norm_grad_task, run);
    thread_pool_run(cpu->pool, run->count, norm_backward_task, run);
}

static void run_chunk(struct loss_run *run)
{
    const struct head_loss_args *a = run->a;
    int32_t vocabulary = (int32_t)a->head.shape[0], d = (int32_t)a->head.shape[1];
    struct gemm logits = {
        .kind = GEMM_NT,
        .m = run->count,
        .n = vocabulary,
        .k = d,
        .a = f32(&a->n),
        .lda = d,
        .b = a->head.data,
        .b_dtype = a->head.dtype,
        .ldb = d,
        .c = f32(&a->logits),
        .ldc = vocabulary,
    };

    thread_pool_run(run->cpu->pool, run->count, norm_task, run);
    cpu_gemm(run->cpu, &logits, 1);
    thread_pool_run(run->cpu->pool, run->count, softmax_task, run);
    if (a->dx.data)
        chunk_backward(run);
    run->count = 0;
}

void cpu_head_loss(struct backend *backend, const struct head_loss_args *a)
{
    struct loss_run run = {.cpu = cpu_of(backend), .a = a};
    int32_t rows = a->batch->rows;
    int32_t chunk = a->n.shape[0] < MAX_CHUNK ? (int32_t)a->n.shape[0] : MAX_CHUNK;

    memset(a->nll.data, 0, (size_t)rows * sizeof(float));
    memset(a->correct.data, 0, (size_t)rows * sizeof(int32_t));
    if (a->dx.data)
        memset(a->dx.data, 0, (size_t)(rows * a->x.shape[1]) * sizeof(float));
    for (int32_t r = 0; r < rows; r++) {
        if (a->weight[r] == 0)
            continue;
        run.row[run.count++] = r;
        if (run.count == chunk)
            run_chunk(&run);
    }
    if (run.count > 0)
        run_chunk(&run);
}
