#include <assert.h>
#include <math.h>
#include <string.h>

#include "engine/cpu/cpu.h"

#define MAX_CHUNK 1024 /* rows of the caller's scratch that are used at most */
#define COLUMNS 64
#define SOFTMAX_BLOCK 256 /* exponentials that are summed in float, before double */

struct reader { /* who turns the last rows into logits: the model or its teacher */
    struct tensor x, norm, head, logits;
};

struct loss_run {
    struct cpu *cpu;
    const struct head_loss_args *a;
    struct reader model, teacher;
    const struct reader *reader; /* of norm_task */
    thread_pool_fn *loss;        /* logits of one row become the gradient at them; loss and hit */
    int32_t row[MAX_CHUNK];      /* the chunk's rows in the batch */
    float rstd[MAX_CHUNK];
    int32_t count;
};

static void norm_task(void *context, int64_t i, int worker)
{
    struct loss_run *run = context;
    const struct head_loss_args *a = run->a;
    const struct reader *from = run->reader;
    int64_t d = a->x.shape[1];

    run->rstd[i] = run->cpu->k->rms_norm(f32(&from->x) + run->row[i] * d, f32(&from->norm),
                                         f32(&a->n) + i * d, (int32_t)d, a->config->rms_norm_eps);
    cpu_round(run->cpu, f32(&a->n) + i * d, d);
}

/* ------------------------------------------------------------------ cross-entropy */

/* What the gradient at the logits of the row's best token has of its margin, and at that of the
 * other one less. */
static float margin_of(const struct loss_margins *m, int32_t row, const float *logit)
{
    float gap;

    if (!m || m->weight[row] == 0)
        return 0;
    gap = logit[m->best[row]] - logit[m->other[row]];
    return m->weight[row] / (gap > 1 ? gap : 1);
}

static void softmax_task(void *context, int64_t i, int worker)
{
    struct loss_run *run = context;
    const struct head_loss_args *a = run->a;
    const struct cpu_kernels *k = run->cpu->k;
    int32_t vocabulary = (int32_t)a->head.shape[0], row = run->row[i], best = 0;
    float *logit = f32(&a->logits) + i * vocabulary;
    float max = k->scale_max(logit, vocabulary, 1.0f), of_target = logit[a->target[row]];
    float margin = margin_of(a->margins, row, logit);

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
    if (margin != 0) {
        logit[a->margins->best[row]] += margin;
        logit[a->margins->other[row]] -= margin;
    }
    cpu_round(run->cpu, logit, vocabulary);
}

/* ------------------------------------------------------------------ the distance to a teacher */

struct softmax {
    int32_t best;
    float max;
    double sum, lse; /* of exp(logit - max); log Σ exp(logit) */
};

/* The place of the largest logit, the first of equal ones; n where none is a number. */
static int32_t place_of(const float *logit, int32_t n, float max)
{
    int32_t best = 0;

    while (best < n && logit[best] != max)
        best++;
    return best;
}

static struct softmax softmax_of(const struct cpu_kernels *k, float *logit, int32_t n)
{
    struct softmax s = {.max = k->scale_max(logit, n, 1.0f)};
    float block[SOFTMAX_BLOCK];

    s.best = place_of(logit, n, s.max);
    for (int32_t from = 0; from < n; from += SOFTMAX_BLOCK) {
        int32_t count = n - from < SOFTMAX_BLOCK ? n - from : SOFTMAX_BLOCK;

        memcpy(block, logit + from, (size_t)count * sizeof *block);
        s.sum += (double)k->exp_sum(block, count, s.max);
    }
    s.lse = log(s.sum) + (double)s.max;
    return s;
}

static void teacher_task(void *context, int64_t i, int worker)
{
    struct loss_run *run = context;
    const struct head_loss_args *a = run->a;
    const struct cpu_kernels *k = run->cpu->k;
    int32_t vocabulary = (int32_t)a->head.shape[0], row = run->row[i];
    float *logit = f32(&a->logits) + i * vocabulary;
    float *of_teacher = f32(&a->teacher_logits) + i * vocabulary;
    struct softmax model = softmax_of(k, logit, vocabulary);
    struct softmax teacher = softmax_of(k, of_teacher, vocabulary);

    f32(&a->nll)[row] = (float)k->divergence(&(struct divergence_args){
        .teacher = of_teacher,
        .model = logit,
        .n = vocabulary,
        .teacher_max = teacher.max,
        .teacher_share = (float)(1 / teacher.sum),
        .max = model.max,
        .share = (float)(1 / model.sum),
        .shift = (float)(teacher.lse - model.lse),
        .weight = a->weight[row],
    });
    ((int32_t *)a->correct.data)[row] = model.best == teacher.best && model.best < vocabulary;
    if (a->dx.data)
        cpu_round(run->cpu, logit, vocabulary);
}

/* ------------------------------------------------------------------ a chunk */

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

/* The logits of the chunk's rows; n and rstd are left as this reader has them. */
static void read_chunk(struct loss_run *run, const struct reader *reader)
{
    const struct head_loss_args *a = run->a;
    int32_t vocabulary = (int32_t)reader->head.shape[0], d = (int32_t)reader->head.shape[1];
    struct gemm logits = {
        .kind = GEMM_NT,
        .m = run->count,
        .n = vocabulary,
        .k = d,
        .a = f32(&a->n),
        .lda = d,
        .b = reader->head.data,
        .b_dtype = reader->head.dtype,
        .ldb = d,
        .c = f32(&reader->logits),
        .ldc = vocabulary,
    };

    run->reader = reader;
    thread_pool_run(run->cpu->pool, run->count, norm_task, run);
    cpu_gemm(run->cpu, &logits, 1);
}

static void run_chunk(struct loss_run *run)
{
    if (run->teacher.x.data)
        read_chunk(run, &run->teacher);
    read_chunk(run, &run->model); /* last: backward takes its n and rstd */
    thread_pool_run(run->cpu->pool, run->count, run->loss, run);
    if (run->a->dx.data)
        chunk_backward(run);
    run->count = 0;
}

void cpu_head_loss(struct backend *backend, const struct head_loss_args *a)
{
    struct loss_run run = {
        .cpu = cpu_of(backend),
        .a = a,
        .model = {a->x, a->final_norm, a->head, a->logits},
        .teacher = {a->teacher_x, a->teacher_norm, a->teacher_head, a->teacher_logits},
        .loss = a->teacher_x.data ? teacher_task : softmax_task,
    };
    int32_t rows = a->batch->rows;
    int32_t chunk = a->n.shape[0] < MAX_CHUNK ? (int32_t)a->n.shape[0] : MAX_CHUNK;

    assert(!a->margins || !a->teacher_x.data);
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
