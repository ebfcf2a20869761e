#include <math.h>
#include <string.h>

#include "engine/base/rng.h"
#include "engine/cpu/cpu.h"

#define SPAN (1 << 18) /* elements of one task */
#define BLOCK 4096     /* elements that are converted at a time, while they are in the cache */

struct optimizer_run {
    const struct cpu *cpu;
    const struct parameter *parameter;
    int64_t elements;
    double part[1024]; /* sums of squares of the tasks of one parameter */
    struct adamw_step step;
    uint64_t seed, stream; /* of random numbers */
};

static void squares_task(void *context, int64_t task, int worker)
{
    struct optimizer_run *run = context;
    int64_t tasks = ceil_div(run->elements, SPAN), each = ceil_div(tasks, 1024) * SPAN;
    int64_t from = task * each, n = run->elements - from < each ? run->elements - from : each;

    run->part[task] = run->cpu->k->sum_squares(f32(&run->parameter->g) + from, n);
}

void cpu_gradient_norm(struct backend *backend, const struct gradient_norm_args *args)
{
    struct cpu *cpu = cpu_of(backend);
    double total = 0;

    for (int32_t i = 0; i < args->count; i++) {
        struct optimizer_run run = {.cpu = cpu, .parameter = &args->parameter[i]};

        run.elements = tensor_elements(&run.parameter->g);
        int64_t spans = ceil_div(run.elements, SPAN);
        int64_t tasks = ceil_div(spans, ceil_div(spans, 1024));
        thread_pool_run(cpu->pool, tasks, squares_task, &run);
        for (int64_t t = 0; t < tasks; t++)
            total += run.part[t];
    }
    f32(&args->norm)[0] = (float)sqrt(total);
}

/* ------------------------------------------------------------------ AdamW */

/* To one of the two neighbours in bf16, away from zero with the probability of the distance. */
static uint16_t round_randomly(float x, uint64_t random)
{
    uint32_t bits;

    if (!isfinite(x))
        return f32_to_bf16(x);
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)((bits + (uint32_t)(random >> 48)) >> 16);
}

static void update(const struct optimizer_run *run, float *w, int64_t from, int64_t n)
{
    const struct parameter *p = run->parameter;

    run->cpu->k->adamw(w, f32(&p->g) + from, f32(&p->m) + from, f32(&p->v) + from, n, &run->step);
}

/* The new w of BF16 passes through floats. */
static void update_narrow(const struct optimizer_run *run, int64_t from, int64_t n)
{
    uint16_t *narrow = (uint16_t *)run->parameter->w.data + from;
    float w[BLOCK];

    tensor_to_f32(&run->parameter->w, from, n, w);
    update(run, w, from, n);
    for (int64_t i = 0; i < n; i++)
        narrow[i] = round_randomly(w[i], rng_at(run->seed, run->stream, (uint64_t)(from + i)));
}

static void update_with_copy(const struct optimizer_run *run, int64_t from, int64_t n)
{
    float *w = f32(&run->parameter->w) + from;
    uint16_t *copy = (uint16_t *)run->parameter->copy.data + from;

    update(run, w, from, n);
    for (int64_t i = 0; i < n; i++)
        copy[i] = f32_to_bf16(w[i]);
}

static void adamw_task(void *context, int64_t task, int worker)
{
    const struct optimizer_run *run = context;
    const struct parameter *p = run->parameter;
    int64_t from = task * SPAN, n = run->elements - from < SPAN ? run->elements - from : SPAN;

    if (p->w.dtype == DTYPE_F32 && !p->copy.data) {
        update(run, f32(&p->w) + from, from, n);
        return;
    }
    for (int64_t i = 0; i < n; i += BLOCK) {
        int64_t count = n - i < BLOCK ? n - i : BLOCK;

        if (p->w.dtype == DTYPE_BF16)
            update_narrow(run, from + i, count);
        else
            update_with_copy(run, from + i, count);
    }
}

static bool is_known(struct cpu *cpu, const struct parameter *p)
{
    if ((p->w.dtype == DTYPE_F32 && (!p->copy.data || p->copy.dtype == DTYPE_BF16)) ||
        (p->w.dtype == DTYPE_BF16 && !p->copy.data))
        return true;
    err_set(&cpu->failure, ERR_INTERNAL, "adamw: a weight of dtype %s%s", dtype_name(p->w.dtype),
            p->copy.data ? " with a copy" : "");
    return false;
}

void cpu_adamw(struct backend *backend, const struct adamw_args *args)
{
    struct cpu *cpu = cpu_of(backend);
    float norm = f32(&args->norm)[0];

    for (int32_t i = 0; i < args->count; i++) {
        struct optimizer_run run = {
            .cpu = cpu,
            .parameter = &args->parameter[i],
            .seed = args->seed,
            .stream = (uint64_t)args->step << 32 | (uint32_t)i,
        };

        if (!is_known(cpu, run.parameter))
            return;
        run.elements = tensor_elements(&run.parameter->w);
        run.step = (struct adamw_step){
            .clip = norm > args->max_norm ? args->max_norm / norm : 1.0f,
            .learning_rate = args->learning_rate,
            .beta1 = args->beta1,
            .beta2 = args->beta2,
            .epsilon = args->epsilon,
            .decay = run.parameter->decay ? args->weight_decay : 0.0f,
            .correction1 = (float)(1.0 - pow((double)args->beta1, args->step)),
            .correction2 = (float)(1.0 - pow((double)args->beta2, args->step)),
        };
        thread_pool_run(cpu->pool, ceil_div(run.elements, SPAN), adamw_task, &run);
    }
}
