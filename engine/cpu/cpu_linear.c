#include <assert.h>
#include <string.h>

#include "engine/cpu/cpu.h"

#define MAX_CALLS 4

struct linear_run {
    struct cpu *cpu;
    const struct batch *batch;
    int32_t layer;
    const struct linear_call *call;
    int count;
    int64_t first[MAX_CALLS + 1]; /* task numbers */
    int32_t parts[MAX_CALLS];     /* tasks along the outputs */
    struct cpu_delta_run delta;   /* serving: of the first rows that have one */
};

static const struct adapter_linear *row_linear(const struct linear_run *run, int32_t row,
                                               const struct linear_call *call)
{
    const struct adapter *adapter = cpu_row_adapter(run->batch, row);

    if (!adapter)
        return NULL;
    return (const void *)((const char *)&adapter->layer[run->layer] + call->adapter);
}

static const struct linear_call *call_of(const struct linear_run *run, int64_t *task, int *index)
{
    int i = 0;

    while (*task >= run->first[i + 1])
        i++;
    *task -= run->first[i];
    *index = i;
    return &run->call[i];
}

static void add_bias(const struct linear_run *run, const struct linear_call *call, int32_t row,
                     struct span outs)
{
    int64_t out = call->linear->w.shape[0];
    const struct adapter_linear *own = row_linear(run, row, call);
    const struct tensor *bias = own && own->b.data ? &own->b : &call->linear->b;
    float *y = call->y + row * out;

    if (bias->data)
        run->cpu->k->add(y + outs.from, f32(bias) + outs.from, y + outs.from, outs.to - outs.from);
}

/* Serving: own products, a block of rows against a block of outputs. */
static void base_task(const struct linear_run *run, int64_t task)
{
    int i;
    const struct linear_call *call = call_of(run, &task, &i);
    const struct tensor *w = &call->linear->w;
    int32_t out = (int32_t)w->shape[0], in = (int32_t)w->shape[1];
    int64_t row_blocks = ceil_div(run->batch->rows, CPU_ROW_BLOCK);
    struct span outs = span_part(out, 16, run->parts[i], task / row_blocks);
    struct span rows = span_part(run->batch->rows, 4, row_blocks, task % row_blocks);

    if (outs.from >= outs.to || rows.from >= rows.to)
        return;
    run->cpu->k->dot(&(struct dot_args){
        .x = call->x + (int64_t)rows.from * in,
        .ldx = in,
        .rows = rows.to - rows.from,
        .w = (const char *)w->data + (int64_t)outs.from * in * dtype_size(w->dtype),
        .dtype = w->dtype,
        .ldw = in,
        .outs = outs.to - outs.from,
        .n = in,
        .y = call->y + (int64_t)rows.from * out + outs.from,
        .ldy = out,
        .add = call->add,
    });
    for (int32_t r = rows.from; r < rows.to; r++)
        add_bias(run, call, r, outs);
}

/* The deltas' first round reads nothing but x: behind the base's tasks it costs no pause of its
 * own. */
static void serving_task(void *context, int64_t task, int worker)
{
    const struct linear_run *run = context;
    int64_t base = run->first[run->count];

    if (task < base)
        base_task(run, task);
    else
        cpu_delta_right_task(&run->delta, task - base, worker);
}

/* Where to go on among the deltas of all rows. They are taken in the order of the calls: rows of
 * one tenant read its bits in turn. */
struct next_delta {
    int call;
    int32_t row;
};

static int32_t take_deltas(const struct linear_run *run, struct next_delta *next,
                           struct cpu_delta_call *out)
{
    int32_t count = 0;

    for (; next->call < run->count; next->call++, next->row = 0) {
        const struct linear_call *call = &run->call[next->call];
        const int64_t *shape = call->linear->w.shape;

        for (; next->row < run->batch->rows; next->row++) {
            const struct adapter_linear *own = row_linear(run, next->row, call);

            if (!own || !own->delta)
                continue;
            if (count == CPU_DELTA_CALLS)
                return count;
            out[count++] = (struct cpu_delta_call){.delta = own->delta,
                                                   .x = call->x + next->row * shape[1],
                                                   .y = call->y + next->row * shape[0]};
        }
    }
    return count;
}

static bool has_adapters(const struct batch *batch)
{
    for (int32_t s = 0; s < batch->segments.count; s++)
        if (batch->segments.adapter[s])
            return true;
    return false;
}

static void serve(struct linear_run *run)
{
    struct cpu_delta_call delta[CPU_DELTA_CALLS];
    struct next_delta next = {0};
    int32_t count = has_adapters(run->batch) ? take_deltas(run, &next, delta) : 0;

    for (int i = 0; i < run->count; i++) {
        run->parts[i] = (int32_t)ceil_div(run->call[i].linear->w.shape[0], CPU_ROW_BLOCK);
        run->first[i + 1] =
            run->first[i] + run->parts[i] * ceil_div(run->batch->rows, CPU_ROW_BLOCK);
    }
    cpu_delta_open(&run->delta, run->cpu, delta, count);
    thread_pool_run(run->cpu->pool, run->first[run->count] + run->delta.right[count], serving_task,
                    run);
    cpu_delta_finish(&run->delta);
    while (count == CPU_DELTA_CALLS) {
        count = take_deltas(run, &next, delta);
        cpu_delta_apply(run->cpu, delta, count);
    }
}

static void bias_task(void *context, int64_t task, int worker)
{
    const struct linear_run *run = context;
    int32_t from = (int32_t)task * CPU_ROW_BLOCK, to = from + CPU_ROW_BLOCK;

    for (int32_t r = from; r < to && r < run->batch->rows; r++)
        for (int i = 0; i < run->count; i++)
            add_bias(run, &run->call[i], r,
                     (struct span){0, (int32_t)run->call[i].linear->w.shape[0]});
}

static void train(struct linear_run *run)
{
    struct gemm gemm[MAX_CALLS] = {{0}};
    bool biased = false;

    for (int i = 0; i < run->count; i++) {
        const struct linear_call *call = &run->call[i];
        const struct tensor *w = &call->linear->w;

        biased = biased || call->linear->b.data;
        gemm[i] = (struct gemm){
            .kind = GEMM_NT,
            .m = run->batch->rows,
            .n = (int32_t)w->shape[0],
            .k = (int32_t)w->shape[1],
            .a = call->x,
            .lda = w->shape[1],
            .b = w->data,
            .b_dtype = w->dtype,
            .ldb = w->shape[1],
            .c = call->y,
            .ldc = w->shape[0],
            .add = call->add,
        };
    }
    cpu_gemm(run->cpu, gemm, run->count);
    if (biased)
        thread_pool_run(run->cpu->pool, ceil_div(run->batch->rows, CPU_ROW_BLOCK), bias_task, run);
}

void cpu_linear(struct cpu *cpu, const struct batch *batch, int32_t layer,
                const struct linear_call *call, int count)
{
    struct linear_run run = {
        .cpu = cpu, .batch = batch, .layer = layer, .call = call, .count = count};

    assert(count <= MAX_CALLS);
    if (batch->serving)
        serve(&run);
    else
        train(&run);
}
