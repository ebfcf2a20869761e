#include <assert.h>
#include <string.h>

#include "engine/cpu/cpu.h"

#define DELTA_OUTS 512  /* outputs of one task: its tables are made once for all of them */
#define DELTA_INNER 256 /* planes or vectors of one task of the right side */

/* Two rounds: factored deltas first bring x down to `inner` sums, then everything adds to y. What a
 * task computes depends on its own call and on shapes alone, and so does a row of a batch. */
struct apply_run {
    struct cpu *cpu;
    const struct cpu_delta_call *call;
    int32_t count;
    int64_t first[CPU_DELTA_CALLS + 1]; /* task numbers */
};

/* The call of a task, and the part of the call. */
static int32_t call_of(const struct apply_run *run, int64_t *task)
{
    int32_t low = 0, high = run->count;

    while (high - low > 1) {
        int32_t middle = (low + high) / 2;

        if (run->first[middle] <= *task)
            low = middle;
        else
            high = middle;
    }
    *task -= run->first[low];
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

static void right_task(void *context, int64_t task, int worker)
{
    const struct apply_run *run = context;
    const struct cpu_delta_scratch *s = &run->cpu->delta;
    int32_t i = call_of(run, &task);
    const struct packed_delta *d = run->call[i].delta;
    const float *x = run->call[i].x;
    float *sums = s->sums + (int64_t)i * s->inner,
          *scaled = s->operand + (int64_t)worker * s->width;
    struct span part = span_part(d->inner, 16, run->first[i + 1] - run->first[i], task);

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
    const struct apply_run *run = context;
    const struct cpu_delta_scratch *s = &run->cpu->delta;
    int32_t i = call_of(run, &task);
    const struct cpu_delta_call *call = &run->call[i];
    const struct packed_delta *d = call->delta;
    const float *sums = s->sums + (int64_t)i * s->inner, *x = call->x;
    struct span outs = span_part(d->rows, 16, run->first[i + 1] - run->first[i], task);

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

void cpu_delta_apply(struct cpu *cpu, const struct cpu_delta_call *call, int32_t count)
{
    struct apply_run run = {.cpu = cpu, .call = call, .count = count};

    assert(count <= CPU_DELTA_CALLS);
    for (int32_t i = 0; i < count; i++)
        run.first[i + 1] = run.first[i] + ceil_div(call[i].delta->inner, DELTA_INNER);
    if (run.first[count] > 0)
        thread_pool_run(cpu->pool, run.first[count], right_task, &run);
    for (int32_t i = 0; i < count; i++)
        run.first[i + 1] = run.first[i] + ceil_div(call[i].delta->rows, DELTA_OUTS);
    if (count > 0)
        thread_pool_run(cpu->pool, run.first[count], left_task, &run);
}
