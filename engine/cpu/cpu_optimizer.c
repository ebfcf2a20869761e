#include <math.h>
#include <string.h>

#include "engine/cpu/cpu.h"

#define SPAN (1 << 18) /* elements of one task */

struct optimizer_run {
    const struct cpu *cpu;
    const struct parameter *parameter;
    int64_t elements;
    double part[1024]; /* sums of squares of the tasks of one parameter */
    struct adamw_step step;
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

static void adamw_task(void *context, int64_t task, int worker)
{
    const struct optimizer_run *run = context;
    const struct parameter *p = run->parameter;
    int64_t from = task * SPAN, n = run->elements - from < SPAN ? run->elements - from : SPAN;

    run->cpu->k->adamw(f32(&p->w) + from, f32(&p->g) + from, f32(&p->m) + from, f32(&p->v) + from,
                       n, &run->step);
}

void cpu_adamw(struct backend *backend, const struct adamw_args *args)
{
    struct cpu *cpu = cpu_of(backend);
    float norm = f32(&args->norm)[0];

    for (int32_t i = 0; i < args->count; i++) {
        struct optimizer_run run = {.cpu = cpu, .parameter = &args->parameter[i]};

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
