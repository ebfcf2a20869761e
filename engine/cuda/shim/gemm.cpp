#include "engine/cuda/gemm.h"

#include <cstdlib>
#include <vector>

struct gemm_context {
    struct device *device;
};

int gemm_available(struct err *err)
{
    return 0;
}

int gemm_open(struct gemm_context **out, struct device *device, struct err *err)
{
    *out = (struct gemm_context *)malloc(sizeof **out);
    if (!*out)
        return err_set(err, ERR_NO_MEMORY, "no memory for products");
    (*out)->device = device;
    return 0;
}

void gemm_close(struct gemm_context *context)
{
    free(context);
}

/* [rows, cols] in float, whatever it was. */
static std::vector<float> read(const void *from, enum dtype dtype, int64_t rows, int64_t cols,
                               int64_t ld, bool transposed)
{
    std::vector<float> out((size_t)(rows * cols));

    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++) {
            int64_t at = transposed ? c * ld + r : r * ld + c;

            out[(size_t)(r * cols + c)] = dtype == DTYPE_BF16
                                              ? bf16_to_f32(((const uint16_t *)from)[at])
                                              : ((const float *)from)[at];
        }
    return out;
}

static int64_t span(int64_t rows, int64_t cols, int64_t ld, bool transposed)
{
    return transposed ? (cols - 1) * ld + rows : (rows - 1) * ld + cols;
}

static void multiply(const struct gemm *g)
{
    std::vector<float> a = read(g->a, g->dtype, g->m, g->k, g->lda, g->transpose_a);
    std::vector<float> b = read(g->b, g->dtype, g->k, g->n, g->ldb, g->transpose_b);
    std::vector<float> row((size_t)g->n);

    for (int64_t r = 0; r < g->m; r++) {
        for (float &x : row)
            x = 0;
        for (int64_t i = 0; i < g->k; i++) {
            float factor = a[(size_t)(r * g->k + i)];

            for (int64_t c = 0; c < g->n; c++)
                row[(size_t)c] += factor * b[(size_t)(i * g->n + c)];
        }
        for (int64_t c = 0; c < g->n; c++) {
            float *wide = (float *)g->c + r * g->ldc + c;
            uint16_t *half = (uint16_t *)g->c + r * g->ldc + c;

            if (g->c_dtype == DTYPE_BF16)
                *half = f32_to_bf16(row[(size_t)c] + (g->add ? bf16_to_f32(*half) : 0));
            else
                *wide = row[(size_t)c] + (g->add ? *wide : 0);
        }
    }
}

void gemm_run(struct gemm_context *context, const struct gemm *g)
{
    const struct shim_span spans[] = {
        {g->a, (size_t)(span(g->m, g->k, g->lda, g->transpose_a) * dtype_size(g->dtype))},
        {g->b, (size_t)(span(g->k, g->n, g->ldb, g->transpose_b) * dtype_size(g->dtype))},
        {g->c, (size_t)(span(g->m, g->n, g->ldc, false) * dtype_size(g->c_dtype))},
    };

    if (g->m == 0 || g->n == 0 || g->k == 0 || !shim_host_begin(context->device, "gemm", spans, 3))
        return;
    multiply(g);
    shim_host_end();
}
