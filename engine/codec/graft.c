#include "engine/codec/graft.h"

#include <stdlib.h>
#include <string.h>

#include "engine/codec/factor.h"
#include "engine/codec/planes.h"

static int energy(const struct codec_matrix *m, double *energy, struct err *err)
{
    struct factor *factor;

    if (factor_open(&factor, m->delta, m->rows, m->cols,
                    &(struct factor_statistics){.h = m->h, .g = m->g}, 0, err))
        return -1;
    memcpy(energy, factor_energy(factor), (size_t)factor_rank(factor) * sizeof *energy);
    factor_free(factor);
    return 0;
}

static int allot(struct codec_plan *plan, int32_t count, int64_t bytes, double *cost,
                 struct err *err)
{
    return factor_allot(plan, count, bytes, cost)
               ? 0
               : err_set(err, ERR_INVALID,
                         "graft keeps a scale for each row and each column of a matrix; ask for a "
                         "lower ratio");
}

static int compress(const struct codec_matrix *m, const struct codec_plan *plan,
                    struct tensor part[], struct err *err)
{
    struct factor *factor;
    int64_t shape[1] = {plan->bytes};
    int32_t vectors = codec_plan_vectors(plan);
    int rc;

    part[0] = tensor_view(malloc((size_t)plan->bytes), DTYPE_U8, 1, shape);
    if (!part[0].data)
        return err_set(err, ERR_NO_MEMORY, "no memory for the planes of a matrix");
    if (factor_open(&factor, m->delta, m->rows, m->cols,
                    &(struct factor_statistics){.h = m->h, .g = m->g}, vectors, err))
        return -1;
    rc = factor_compress(factor, plan->width, part[0].data, err);
    factor_free(factor);
    return rc;
}

static int accept(const struct tensor part[], int32_t rows, int32_t cols, struct err *err)
{
    if (part[0].dtype != DTYPE_U8 || part[0].rank != 1)
        return err_set(err, ERR_INVALID, "\"planes\" is not a U8 tensor of one dimension");
    return planes_accept(part[0].data, (size_t)part[0].shape[0], rows, cols, err);
}

static int expand(const struct tensor part[], int32_t rows, int32_t cols, float *delta,
                  struct err *err)
{
    return planes_expand(part[0].data, rows, cols, delta, err);
}

static int view(const struct tensor part[], int32_t rows, int32_t cols, struct delta_tensor *out,
                void **memory, struct err *err)
{
    return planes_view(part[0].data, rows, cols, out, memory, err);
}

static int32_t scales(const struct tensor part[], int32_t rows, int32_t cols)
{
    return planes_scale_count(part[0].data, rows, cols);
}

static int32_t vector_scales(const struct tensor part[])
{
    return planes_rank(part[0].data);
}

static void read_scales(const struct tensor part[], int32_t rows, int32_t cols, float *scale)
{
    planes_read_scales(part[0].data, rows, cols, scale);
}

static void write_scales(struct tensor part[], int32_t rows, int32_t cols, const float *scale)
{
    planes_write_scales(part[0].data, rows, cols, scale);
}

static int slope(const struct tensor part[], int32_t rows, int32_t cols, const float *gradient,
                 float *out, struct err *err)
{
    return planes_slope(part[0].data, rows, cols, gradient, out, err);
}

const struct codec codec_graft = {
    .name = "graft",
    .part_count = 1,
    .suffix = {"planes"},
    .inputs = true,
    .gradients = true,
    .ratio = 16,
    .distill_steps = 60,
    .common_rate = 0.01,
    .energy = energy,
    .allot = allot,
    .compress = compress,
    .accept = accept,
    .expand = expand,
    .view = view,
    .scales = scales,
    .vector_scales = vector_scales,
    .read_scales = read_scales,
    .write_scales = write_scales,
    .slope = slope,
};
