#include "engine/cpu/cpu.h"

struct scale_run {
    const struct cpu *cpu;
    const struct gram_args *a;
};

static void scale_task(void *context, int64_t task, int worker)
{
    const struct scale_run *run = context;
    const struct gram_args *a = run->a;
    int64_t n = a->x.shape[1], from = task * CPU_ROW_BLOCK, to = from + CPU_ROW_BLOCK;

    for (int64_t r = from; r < to && r < a->x.shape[0]; r++) {
        float weight = f32(&a->weight)[r];

        for (int64_t i = r * n; i < (r + 1) * n; i++)
            f32(&a->scaled)[i] = f32(&a->x)[i] * weight;
        cpu_round(run->cpu, f32(&a->scaled) + r * n, n);
    }
}

void cpu_gram(struct backend *backend, const struct gram_args *a)
{
    struct cpu *cpu = cpu_of(backend);
    struct scale_run scale = {.cpu = cpu, .a = a};
    int32_t n = (int32_t)a->x.shape[1];
    struct gemm g = {
        .kind = GEMM_TN,
        .m = n,
        .n = n,
        .k = (int32_t)a->x.shape[0],
        .a = a->weight.data ? f32(&a->scaled) : f32(&a->x),
        .lda = n,
        .b = a->x.data,
        .b_dtype = DTYPE_F32,
        .ldb = n,
        .c = f32(&a->out),
        .ldc = n,
        .add = true,
        .symmetric = true,
    };

    if (a->weight.data)
        thread_pool_run(cpu->pool, ceil_div(a->x.shape[0], CPU_ROW_BLOCK), scale_task, &scale);
    cpu_gemm(cpu, &g, 1);
}
