#include "engine/codec/bitdelta.h"

#include <math.h>
#include <string.h>

enum { PART_SIGN, PART_SCALE };

static int64_t words_of(int32_t cols)
{
    return ((int64_t)cols + 31) / 32;
}

static struct tensor layout(int part, int32_t rows, int32_t cols)
{
    int64_t sign[2] = {rows, words_of(cols)}, scale[1] = {rows};

    return part == PART_SIGN ? tensor_view(NULL, DTYPE_I32, 2, sign)
                             : tensor_view(NULL, DTYPE_F16, 1, scale);
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

static int compress(const float *delta, int32_t rows, int32_t cols, void *const part[],
                    struct err *err)
{
    uint32_t *sign = part[PART_SIGN];
    uint16_t *scale = part[PART_SCALE];

    for (int32_t r = 0; r < rows; r++) {
        double mean = compress_row(delta + (int64_t)r * cols, cols, sign + r * words_of(cols));

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

static void expand(const struct tensor part[], int32_t rows, int32_t cols, float *delta)
{
    const uint32_t *sign = part[PART_SIGN].data;
    const uint16_t *scale = part[PART_SCALE].data;

    for (int32_t r = 0; r < rows; r++) {
        const uint32_t *word = sign + r * words_of(cols);
        float a = f16_to_f32(scale[part[PART_SCALE].shape[0] == 1 ? 0 : r]);

        for (int32_t c = 0; c < cols; c++)
            delta[(int64_t)r * cols + c] = word[c / 32] >> (c % 32) & 1 ? a : -a;
    }
}

static void view(const struct tensor part[], int32_t rows, int32_t cols, float *scale,
                 struct delta_tensor *out)
{
    tensor_to_f32(&part[PART_SCALE], 0, part[PART_SCALE].shape[0], scale);
    *out = (struct delta_tensor){
        .kind = DELTA_SIGN,
        .rows = rows,
        .cols = cols,
        .bits = part[PART_SIGN].data,
        .scale = scale,
        .scale_count = (int32_t)part[PART_SCALE].shape[0],
    };
}

const struct codec codec_bitdelta = {
    .name = "bitdelta",
    .part_count = 2,
    .suffix = {"sign", "scale"},
    .layout = layout,
    .compress = compress,
    .accept = accept,
    .expand = expand,
    .view = view,
};
