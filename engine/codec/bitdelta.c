#include "engine/codec/bitdelta.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { PART_SIGN, PART_SCALE };

static int64_t words_of(int32_t cols)
{
    return ((int64_t)cols + 31) / 32;
}

static struct tensor empty_part(int part, int32_t rows, int32_t cols)
{
    int64_t sign[2] = {rows, words_of(cols)}, scale[1] = {rows};

    return part == PART_SIGN ? tensor_view(NULL, DTYPE_I32, 2, sign)
                             : tensor_view(NULL, DTYPE_F16, 1, scale);
}

static int allot(struct codec_plan *plan, int32_t count, int64_t bytes, double *cost,
                 struct err *err)
{
    int64_t sum = 0;

    for (int32_t i = 0; i < count; i++) {
        plan[i].bytes = plan[i].rows * (4 * words_of(plan[i].cols) + 2);
        sum += plan[i].bytes;
    }
    *cost = NAN;
    if (sum > bytes)
        return err_set(err, ERR_INVALID,
                       "bitdelta takes one bit for each weight; ask for a lower ratio, or for the "
                       "codec graft");
    return 0;
}

/* Signs of one row into words; the mean absolute value. */
static double compress_row(const float *delta, int32_t cols, uint32_t *word)
{
    double sum = 0;

    memset(word, 0, (size_t)words_of(cols) * sizeof(*word));
    for (int32_t c = 0; c < cols; c++) {
        word[c / 32] |= (uint32_t)(delta[c] >= 0) << (c % 32);
        sum += fabs((double)delta[c]);
    }
    return sum / cols;
}

static int compress(const struct codec_matrix *m, const struct codec_plan *plan,
                    struct tensor part[], struct err *err)
{
    uint32_t *sign;
    uint16_t *scale;

    for (int p = 0; p < 2; p++) {
        part[p] = empty_part(p, m->rows, m->cols);
        part[p].data =
            malloc((size_t)tensor_elements(&part[p]) * (size_t)dtype_size(part[p].dtype));
        if (part[p].data == NULL)
            return err_set(err, ERR_NO_MEMORY, "no memory for the signs of a matrix");
    }
    sign = part[PART_SIGN].data;
    scale = part[PART_SCALE].data;
    for (int32_t r = 0; r < m->rows; r++) {
        double mean =
            compress_row(m->delta + (int64_t)r * m->cols, m->cols, sign + r * words_of(m->cols));

        if (!(mean < 65504)) /* the largest F16; false for NaN too */
            return err_set(err, ERR_INVALID,
                           "row %d has changed by %g in the mean: the training has diverged, lower "
                           "the learning rate",
                           r, mean);
        scale[r] = f32_to_f16((float)mean);
    }
    return 0;
}

static int accept(const struct tensor part[], int32_t rows, int32_t cols, struct err *err)
{
    const struct tensor *sign = &part[PART_SIGN], *scale = &part[PART_SCALE];
    const uint16_t *value = scale->data;

    if (sign->dtype != DTYPE_I32 || sign->rank != 2 || sign->shape[0] != rows ||
        sign->shape[1] != words_of(cols))
        return err_set(err, ERR_INVALID, "\"sign\" is not an I32 tensor of [%d, %lld]", rows,
                       (long long)words_of(cols));
    if (scale->dtype != DTYPE_F16 || scale->rank != 1 ||
        (scale->shape[0] != rows && scale->shape[0] != 1))
        return err_set(err, ERR_INVALID, "\"scale\" is not an F16 tensor of [%d] or [1]", rows);
    for (int64_t i = 0; i < scale->shape[0]; i++) {
        if (value[i] >= 0x7c00) /* infinity, NaN, or a sign bit */
            return err_set(err, ERR_INVALID, "scale %lld is negative or not finite", (long long)i);
    }
    return 0;
}

static float scale_at(const struct tensor part[], int32_t row)
{
    const uint16_t *scale = part[PART_SCALE].data;

    return f16_to_f32(scale[part[PART_SCALE].shape[0] == 1 ? 0 : row]);
}

static int expand(const struct tensor part[], int32_t rows, int32_t cols, float *delta,
                  struct err *err)
{
    const uint32_t *sign = part[PART_SIGN].data;

    for (int32_t r = 0; r < rows; r++) {
        const uint32_t *word = sign + r * words_of(cols);
        float a = scale_at(part, r);

        for (int32_t c = 0; c < cols; c++)
            delta[(int64_t)r * cols + c] = word[c / 32] >> (c % 32) & 1 ? a : -a;
    }
    return 0;
}

static int view(const struct tensor part[], int32_t rows, int32_t cols, struct delta_tensor *out,
                void **memory, struct err *err)
{
    int64_t count = part[PART_SCALE].shape[0];

    *memory = malloc((size_t)count * sizeof(float));
    if (*memory == NULL)
        return err_set(err, ERR_NO_MEMORY, "no memory for a delta of %d rows", rows);
    tensor_to_f32(&part[PART_SCALE], 0, count, *memory);
    *out = (struct delta_tensor){
        .kind = DELTA_SIGN,
        .rows = rows,
        .cols = cols,
        .bits = part[PART_SIGN].data,
        .scale = *memory,
        .scale_count = (int32_t)count,
    };
    return 0;
}

/* ------------------------------------------------------------------ distillation */

static int32_t scale_count(const struct tensor part[])
{
    return (int32_t)part[PART_SCALE].shape[0];
}

static int32_t scales(const struct tensor part[], int32_t rows, int32_t cols)
{
    return scale_count(part);
}

static void read_scales(const struct tensor part[], int32_t rows, int32_t cols, float *scale)
{
    tensor_to_f32(&part[PART_SCALE], 0, scale_count(part), scale);
}

static void write_scales(struct tensor part[], int32_t rows, int32_t cols, const float *scale)
{
    uint16_t *to = part[PART_SCALE].data;

    for (int32_t i = 0; i < scale_count(part); i++)
        to[i] = f32_to_f16(scale[i]);
}

static int slope(const struct tensor part[], int32_t rows, int32_t cols, const float *gradient,
                 float *out, struct err *err)
{
    const uint32_t *sign = part[PART_SIGN].data;

    memset(out, 0, (size_t)scale_count(part) * sizeof *out);
    for (int32_t r = 0; r < rows; r++) {
        const uint32_t *word = sign + r * words_of(cols);
        const float *g = gradient + (int64_t)r * cols;
        double sum = 0;

        for (int32_t c = 0; c < cols; c++)
            sum += (double)(word[c / 32] >> (c % 32) & 1 ? g[c] : -g[c]);
        out[scale_count(part) == 1 ? 0 : r] += (float)(sum * (double)scale_at(part, r));
    }
    return 0;
}

const struct codec codec_bitdelta = {
    .name = "bitdelta",
    .part_count = 2,
    .suffix = {"sign", "scale"},
    .ratio = 0,
    .distill_steps = 60,
    .allot = allot,
    .compress = compress,
    .accept = accept,
    .expand = expand,
    .view = view,
    .scales = scales,
    .read_scales = read_scales,
    .write_scales = write_scales,
    .slope = slope,
};
