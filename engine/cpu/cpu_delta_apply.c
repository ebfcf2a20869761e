#include <assert.h>
#include <string.h>

#include "engine/cpu/cpu.h"

#define DELTA_OUTS 512  /* outputs of one task: its tables are made once for all of them */
#define DELTA_INNER 256 /* planes or vectors of one task of the right side */

/* The call of a task, and the part of the call. */
static int32_t call_of(const int64_t *first, int32_t count, int64_t *task)
{
    int32_t low = 0, high = count;

    while (high - low > 1) {
        int32_t middle = (low + high) / 2;

        if (first[middle] <= *task)
            low = middle;
        else
            high = middle;
    }
    *task -= first[low];
    return low;
}

static void signs(const struct cpu *cpu, const struct sign_args *args, struct span outs)
{
    struct sign_args a = *args;

    a.from = outs.from / 16;
    a.to = (int32_t)ceil_div(outs.to, 16);
    cpu->k->sign(&a);
}

/* y[outs] of a matrix with so many columns, added or not. */
static void dense(const struct cpu *cpu, const struct tensor *w, const float *x, float *y,
                  struct span outs, bool add)
{
    int32_t cols = (int32_t)w->shape[1];

    cpu->k->dot(&(struct dot_args){
        .x = x,
        .ldx = cols,
        .rows = 1,
        .w = (const char *)w->data + (int64_t)outs.from * cols * dtype_size(w->dtype),
        .dtype = w->dtype,
        .ldw = cols,
        .outs = outs.to - outs.from,
        .n = cols,
        .y = y + outs.from,
        .ldy = w->shape[0],
        .add = add,
    });
}

void cpu_delta_right_task(const struct cpu_delta_run *run, int64_t task, int worker)
{
    const struct cpu_delta_scratch *s = &run->cpu->delta;
    int32_t i = call_of(run->right, run->count, &task);
    const struct packed_delta *d = run->call[i].delta;
    const float *x = run->call[i].x;
    float *sums = s->sums + (int64_t)i * s->inner,
          *scaled = s->operand + (int64_t)worker * s->width;
    struct span part = span_part(d->inner, 16, run->right[i + 1] - run->right[i], task);

    if (d->kind == DELTA_FACTORS) {
        dense(run->cpu, &d->right, x, sums, part, false);
        for (int32_t v = part.from; v < part.to; v++)
            sums[v] *= d->factor;
        return;
    }
    for (int32_t c = 0; c < d->cols; c++)
        scaled[c] = x[c] * d->col_scale[c];
    memset(sums + part.from, 0, (size_t)(part.to - part.from) * sizeof *sums);
    signs(run->cpu,
          &(struct sign_args){.x = scaled,
                              .rows = d->inner,
                              .cols = d->cols,
                              .bits = d->right_bits,
                              .scale = d->right_scale,
                              .y = sums},
          part);
}

/* Of each plane its left scale times the sum of its vector. */
static void join_planes(const struct packed_delta *d, const float *sums, float *out)
{
    for (int32_t p = 0, end = 0; p < d->inner;) {
        float z = 0;

        for (; end < d->inner && d->vector[end] == d->vector[p]; end++)
            z += sums[end];
        for (; p < end; p++)
            out[p] = d->left_scale[p] * z;
    }
}

static void left_task(void *context, int64_t task, int worker)
{
    const struct cpu_delta_run *run = context;
    const struct cpu_delta_scratch *s = &run->cpu->delta;
    int32_t i = call_of(run->left, run->count, &task);
    const struct cpu_delta_call *call = &run->call[i];
    const struct packed_delta *d = call->delta;
    const float *sums = s->sums + (int64_t)i * s->inner, *x = call->x;
    struct span outs = span_part(d->rows, 16, run->left[i + 1] - run->left[i], task);

    if (d->kind == DELTA_DENSE || d->kind == DELTA_FACTORS) {
        dense(run->cpu, &d->dense, d->inner ? sums : x, call->y, outs, true);
        return;
    }
    if (d->kind == DELTA_PLANES) {
        float *joined = s->operand + (int64_t)worker * s->width;

        join_planes(d, sums, joined);
        x = joined;
    }
    struct sign_args args = {.x = x,
                             .rows = d->rows,
                             .cols = d->inner ? d->inner : d->cols,
                             .bits = d->bits,
                             .scale = d->scale,
                             .y = call->y};

    signs(run->cpu, &args, outs);
    args.bits = d->more_bits;
    if (args.bits)
        signs(run->cpu, &args, outs);
}

void cpu_delta_open(struct cpu_delta_run *run, struct cpu *cpu, const struct cpu_delta_call *call,
                    int32_t count)
{
    assert(count <= CPU_DELTA_CALLS);
    run->cpu = cpu;
    run->call = call;
    run->count = count;
    run->right[0] = run->left[0] = 0;
    for (int32_t i = 0; i < count; i++) {
        run->right[i + 1] = run->right[i] + ceil_div(call[i].delta->inner, DELTA_INNER);
        run->left[i + 1] = run->left[i] + ceil_div(call[i].delta->rows, DELTA_OUTS);
    }
}

void cpu_delta_finish(struct cpu_delta_run *run)
{
    thread_pool_run(run->cpu->pool, run->left[run->count], left_task, run);
}

static void right_task(void *context, int64_t task, int worker)
{
    cpu_delta_right_task(context, task, worker);
}

void cpu_delta_apply(struct cpu *cpu, const struct cpu_delta_call *call, int32_t count)
{
    struct cpu_delta_run run;

    cpu_delta_open(&run, cpu, call, count);
    thread_pool_run(cpu->pool, run.right[count], right_task, &run);
    cpu_delta_finish(&run);
}
