#include "engine/cpu/cpu_backend.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "engine/cpu/cpu.h"

void openblas_set_num_threads(int threads); /* cblas.h has it only in OpenBLAS's own copy */

/* ------------------------------------------------------------------ rows and their adapters */

const struct adapter *cpu_row_adapter(const struct batch *batch, int32_t row)
{
    const struct row_segments *s = &batch->segments;
    int32_t low = 0, high = s->count;

    if (s->count == 0)
        return NULL;
    while (high - low > 1) {
        int32_t middle = (low + high) / 2;

        if (s->start[middle] <= row)
            low = middle;
        else
            high = middle;
    }
    return s->adapter[low];
}

const float *cpu_row_vector(const struct batch *batch, int32_t row, int32_t layer, size_t offset,
                            const struct tensor *base)
{
    const struct adapter *adapter = cpu_row_adapter(batch, row);

    if (adapter) {
        const struct tensor *own = (const void *)((const char *)&adapter->layer[layer] + offset);

        if (own->data)
            return f32(own);
    }
    return f32(base);
}

/* ------------------------------------------------------------------ memory */

#define ALIGNMENT 64 /* a cache line; allocations end in a spare one, so that loads may overrun */

/* calloc takes large blocks from the system, which are zero without being touched: a kv cache costs
 * only what is used of it. The address that calloc gave lies in front of the aligned one. */
static void *cpu_alloc(struct backend *backend, size_t bytes, struct err *err)
{
    char *given = NULL, *memory;

    if (bytes <= SIZE_MAX - 3 * ALIGNMENT)
        given = calloc(1, bytes + 3 * ALIGNMENT);
    if (!given) {
        err_set(err, ERR_NO_MEMORY, "no memory for %zu bytes of a model", bytes);
        return NULL;
    }
    memory = given + sizeof(void *);
    memory += (ALIGNMENT - (uintptr_t)memory % ALIGNMENT) % ALIGNMENT;
    memcpy(memory - sizeof(void *), &given, sizeof(void *));
    return memory;
}

static void cpu_free(struct backend *backend, void *memory)
{
    void *given;

    if (memory == NULL)
        return;
    memcpy(&given, (char *)memory - sizeof(void *), sizeof(void *));
    free(given);
}

static void cpu_copy(struct backend *backend, void *to, const void *from, size_t bytes)
{
    if (bytes > 0)
        memcpy(to, from, bytes);
}

static int open_matrix(struct backend *backend, const struct tensor *host, struct tensor *out,
                       struct err *err)
{
    int64_t elements = tensor_elements(host), part = 1 << 12;
    uint16_t *copy;
    float value[1 << 12];

    if (!cpu_of(backend)->bf16) {
        out->data = host->data;
        return 0;
    }
    copy = cpu_alloc(backend, (size_t)elements * sizeof *copy, err);
    if (!copy)
        return -1;
    for (int64_t i = 0; i < elements; i += part) {
        int64_t n = elements - i < part ? elements - i : part;

        tensor_to_f32(host, i, n, value);
        for (int64_t k = 0; k < n; k++)
            copy[i + k] = f32_to_bf16(value[k]);
    }
    *out = tensor_view(copy, DTYPE_BF16, host->rank, host->shape);
    return 0;
}

/* Matrices stay where they are, or in BF16 are copied; so are vectors (norms, biases), to F32. */
static int cpu_weight_open(struct backend *backend, const struct tensor *host, struct tensor *out,
                           struct err *err)
{
    *out = *host;
    out->data = NULL;
    if (host->dtype > DTYPE_F16)
        return err_set(err, ERR_INVALID, "weights of dtype %s: F32, F16 or BF16 are known",
                       dtype_name(host->dtype));
    if (host->rank != 1)
        return open_matrix(backend, host, out, err);
    float *copy = cpu_alloc(backend, (size_t)host->shape[0] * sizeof *copy, err);
    if (!copy)
        return -1;
    tensor_to_f32(host, 0, host->shape[0], copy);
    *out = tensor_view(copy, DTYPE_F32, 1, host->shape);
    return 0;
}

static void cpu_weight_close(struct backend *backend, struct tensor *weight)
{
    if (weight->rank == 1 || cpu_of(backend)->bf16)
        cpu_free(backend, weight->data);
    weight->data = NULL;
}

static int cpu_check(struct backend *backend, struct err *err)
{
    struct cpu *cpu = cpu_of(backend);

    if (!err_is_set(&cpu->failure))
        return 0;
    err_set(err, cpu->failure.kind, "%s", cpu->failure.message);
    err_clear(&cpu->failure);
    return -1;
}

/* ------------------------------------------------------------------ begin, embeddings */

static void begin_task(void *context, int64_t task, int worker)
{
    const struct begin_args *a = context;
    int32_t half = (int32_t)a->inv_freq.shape[0];
    int32_t from = (int32_t)task * CPU_ROW_BLOCK, to = from + CPU_ROW_BLOCK;

    for (int32_t r = from; r < to && r < a->batch->rows; r++) {
        float *cs = f32(&a->rope) + (int64_t)r * 2 * half;

        for (int32_t i = 0; i < half; i++) {
            /* The angle is rounded to f32 as the reference implementation does. */
            float angle = (float)a->batch->position[r] * f32(&a->inv_freq)[i];

            cs[i] = (float)cos((double)angle) * a->rope_magnitude;
            cs[half + i] = (float)sin((double)angle) * a->rope_magnitude;
        }
    }
}

void cpu_begin(struct backend *backend, const struct begin_args *args)
{
    struct begin_args a = *args;

    thread_pool_run(cpu_of(backend)->pool, ceil_div(a.batch->rows, CPU_ROW_BLOCK), begin_task, &a);
}

static void embed_task(void *context, int64_t task, int worker)
{
    const struct embed_args *a = context;
    int64_t d = a->embed.shape[1];
    int32_t from = (int32_t)task * CPU_ROW_BLOCK, to = from + CPU_ROW_BLOCK;

    for (int32_t r = from; r < to && r < a->batch->rows; r++) {
        const struct adapter *adapter = cpu_row_adapter(a->batch, r);
        float *x = f32(&a->x) + r * d;

        tensor_to_f32(&a->embed, a->batch->token[r] * d, d, x);
        if (adapter && adapter->embed)
            cpu_delta_add_row(adapter->embed, a->batch->token[r], x);
    }
}

void cpu_embed(struct backend *backend, const struct embed_args *args)
{
    struct embed_args a = *args;

    thread_pool_run(cpu_of(backend)->pool, ceil_div(a.batch->rows, CPU_ROW_BLOCK), embed_task, &a);
}

struct embed_backward_run {
    const struct cpu *cpu;
    const struct embed_backward_args *args;
};

/* A token may stand in many rows: they are added in order, each task on columns of its own. */
static void embed_backward_task(void *context, int64_t task, int worker)
{
    const struct embed_backward_run *run = context;
    const struct embed_backward_args *a = run->args;
    int32_t d = (int32_t)a->dx.shape[1];
    int32_t from = (int32_t)task * CPU_ROW_BLOCK;
    int32_t n = d - from < CPU_ROW_BLOCK ? d - from : CPU_ROW_BLOCK;

    for (int64_t r = 0; r < a->batch->rows; r++) {
        float *to = f32(&a->d_embed) + (int64_t)a->batch->token[r] * d + from;

        run->cpu->k->add(to, f32(&a->dx) + r * d + from, to, n);
    }
}

void cpu_embed_backward(struct backend *backend, const struct embed_backward_args *args)
{
    struct cpu *cpu = cpu_of(backend);
    struct embed_backward_run run = {.cpu = cpu, .args = args};

    if (args->d_embed.data)
        thread_pool_run(cpu->pool, ceil_div(args->dx.shape[1], CPU_ROW_BLOCK), embed_backward_task,
                        &run);
}

/* ------------------------------------------------------------------ the table */

static void cpu_close(struct backend *backend)
{
    struct cpu *cpu = cpu_of(backend);

    if (!cpu)
        return;
    thread_pool_free(cpu->pool);
    free(cpu->scratch);
    free(cpu->wide);
    free(cpu->delta.sums);
    free(cpu->delta.operand);
    free(cpu);
}

static const struct backend_ops cpu_table = {
    .name = "cpu",
    .close = cpu_close,
    .check = cpu_check,
    .alloc = cpu_alloc,
    .free = cpu_free,
    .upload = cpu_copy,
    .download = cpu_copy,
    .weight_open = cpu_weight_open,
    .weight_close = cpu_weight_close,
    .delta_pack = cpu_delta_pack,
    .delta_free = cpu_delta_free,
    .delta_bytes = cpu_delta_bytes,
    .begin = cpu_begin,
    .embed = cpu_embed,
    .attn_in = cpu_attn_in,
    .attention = cpu_attention,
    .attn_out = cpu_attn_out,
    .mlp = cpu_mlp,
    .head = cpu_head,
    .sample = cpu_sample,
    .head_loss = cpu_head_loss,
    .mlp_backward = cpu_mlp_backward,
    .attn_out_backward = cpu_attn_out_backward,
    .attention_backward = cpu_attention_backward,
    .attn_in_backward = cpu_attn_in_backward,
    .embed_backward = cpu_embed_backward,
    .gram = cpu_gram,
    .gradient_norm = cpu_gradient_norm,
    .adamw = cpu_adamw,
};

static struct backend_ops bf16_table;
static pthread_once_t bf16_once = PTHREAD_ONCE_INIT;

static void make_bf16_table(void)
{
    bf16_table = cpu_table;
    cpu_bf16_table(&bf16_table);
}

int cpu_backend_open(struct backend *backend, int threads, const struct cpu_kernels *kernels,
                     enum dtype precision, struct err *err)
{
    struct cpu *cpu = calloc(1, sizeof *cpu);
    size_t workers;

    memset(backend, 0, sizeof *backend);
    if (!cpu)
        return err_set(err, ERR_NO_MEMORY, "no memory for the cpu backend");
    pthread_once(&bf16_once, make_bf16_table);
    backend->ops = precision == DTYPE_BF16 ? &bf16_table : &cpu_table;
    backend->state = cpu;
    cpu->bf16 = precision == DTYPE_BF16;
    cpu->k = kernels ? kernels : cpu_kernels_usable()[0];
    /* Our own kernels are as fast as OpenBLAS's or faster where there is AVX2. Where there is not,
     * OpenBLAS has kernels for what is there. */
    cpu->blas = cpu->k == &cpu_kernels_plain;
    openblas_set_num_threads(1); /* the pool calls it, one block a call */
    if (thread_pool_open(&cpu->pool, threads, err))
        goto fail;
    workers = (size_t)thread_pool_threads(cpu->pool);
    backend->threads = thread_pool_threads(cpu->pool);
    backend->activation = precision;
    cpu->scratch = aligned_alloc(64, workers * sizeof *cpu->scratch);
    if (!cpu->scratch) {
        err_set(err, ERR_NO_MEMORY, "no memory for the cpu backend's scratch");
        goto fail;
    }
    if (cpu_gemm_check(cpu, err))
        goto fail;
    return 0;
fail:
    cpu_close(backend);
    memset(backend, 0, sizeof *backend);
    return -1;
}
