#include "engine/codec/bitdelta.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/codec/sparse_signs.h"

enum { PART_SIGN, PART_SCALE };

static int64_t words_of(int32_t cols)
{
    return ((int64_t)cols + 31) / 32;
}

static bool is_sparse(const struct tensor part[])
{
    return part[PART_SIGN].dtype == DTYPE_U8;
}

#define ALL 32 /* columns kept of 32: no mask */

static int64_t bytes_of(int32_t rows, int32_t cols, int32_t kept)
{
    return 2 * (int64_t)rows +
           (kept == ALL ? 4 * rows * words_of(cols) : sparse_signs_bytes(rows, cols, kept));
}

/* Of each matrix as many of 32 columns as of any other, and what is left for one more of the first
 * matrices. */
static int allot(struct codec_plan *plan, int32_t count, int64_t bytes, double *cost,
                 struct err *err)
{
    int64_t sum = 0;
    int32_t kept = ALL + 1;

    do {
        kept--;
        sum = 0;
        for (int32_t i = 0; i < count; i++)
            sum += plan[i].bytes = bytes_of(plan[i].rows, plan[i].cols, kept);
    } while (sum > bytes && kept > 1);
    for (int32_t i = 0; i < count && kept < ALL && sum < bytes; i++) {
        int64_t more = bytes_of(plan[i].rows, plan[i].cols, kept + 1);

        if (sum + more - plan[i].bytes > bytes)
            break;
        sum += more - plan[i].bytes;
        plan[i].bytes = more;
    }
    *cost = NAN;
    if (sum > bytes)
        return err_set(err, ERR_INVALID,
                       "bitdelta keeps one of 32 weights at least, and a scale for each row; ask "
                       "for a lower ratio, or for the codec graft");
    return 0;
}

/* What the plan's bytes are enough for. */
static int32_t kept_of(const struct codec_plan *plan, int32_t rows, int32_t cols)
{
    int32_t kept = ALL;

    while (kept > 1 && bytes_of(rows, cols, kept) > plan->bytes)
        kept--;
    return kept;
}

static int open_parts(struct tensor part[], int32_t rows, int32_t cols, int32_t kept,
                      struct err *err)
{
    int64_t words[2] = {rows, words_of(cols)}, bytes[1], scale[1] = {rows};

    if (kept < ALL)
        bytes[0] = sparse_signs_bytes(rows, cols, kept);
    part[PART_SIGN] =
        kept < ALL ? tensor_view(NULL, DTYPE_U8, 1, bytes) : tensor_view(NULL, DTYPE_I32, 2, words);
    part[PART_SCALE] = tensor_view(NULL, DTYPE_F16, 1, scale);
    for (int p = 0; p < 2; p++) {
        part[p].data =
            malloc((size_t)tensor_elements(&part[p]) * (size_t)dtype_size(part[p].dtype));
        if (part[p].data == NULL)
            return err_set(err, ERR_NO_MEMORY, "no memory for the signs of a matrix");
    }
    return 0;
}

/* Signs of one row into words; the mean absolute value. */
static double compress_row(const float *delta, int32_t cols, uint32_t *word)
{
    double sum = 0;

    for (int32_t from = 0; from < cols; from += 32) {
        int32_t count = cols - from < 32 ? cols - from : 32;
        uint32_t signs = 0;

        for (int32_t c = 0; c < count; c++)
            signs |= (uint32_t)(delta[from + c] >= 0) << c;
        for (int32_t c = 0; c < count; c++)
            sum += fabs((double)delta[from + c]);
        word[from / 32] = signs;
    }
    return sum / cols;
}

static void compress_rows(const struct codec_matrix *m, int32_t kept, void *sign, double *mean)
{
    if (kept < ALL) {
        sparse_signs_write(m->delta, m->rows, m->cols, kept, sign, mean);
        return;
    }
    for (int32_t r = 0; r < m->rows; r++)
        mean[r] = compress_row(m->delta + (int64_t)r * m->cols, m->cols,
                               (uint32_t *)sign + r * words_of(m->cols));
}

static int compress(const struct codec_matrix *m, const struct codec_plan *plan,
                    struct tensor part[], struct err *err)
{
    int32_t kept = kept_of(plan, m->rows, m->cols);
    double *mean = malloc((size_t)m->rows * sizeof *mean);
    uint16_t *scale;
    int rc = -1;

    if (open_parts(part, m->rows, m->cols, kept, err) || mean == NULL) {
        err_set(err, ERR_NO_MEMORY, "no memory for the scales of a matrix");
        goto out;
    }
    /* What is dropped must be finite as well. */
    if (kept < ALL && codec_check_finite(m->delta, m->rows, m->cols, err) != 0)
        goto out;
    compress_rows(m, kept, part[PART_SIGN].data, mean);
    scale = part[PART_SCALE].data;
    for (int32_t r = 0; r < m->rows; r++) {
        if (!(mean[r] < 65504)) { /* the largest F16 */
            err_set(err, ERR_INVALID,
                    "row %d has changed by %g in the mean: the training has diverged, lower the "
                    "learning rate",
                    r, mean[r]);
            goto out;
        }
        scale[r] = f32_to_f16((float)mean[r]);
    }
    rc = 0;
out:
    free(mean);
    return rc;
}

static int accept(const struct tensor part[], int32_t rows, int32_t cols, struct err *err)
{
    const struct tensor *sign = &part[PART_SIGN], *scale = &part[PART_SCALE];
    const uint16_t *value = scale->data;

    if (is_sparse(part)) {
        if (sign->rank != 1)
            return err_set(err, ERR_INVALID, "\"sign\" is not a U8 tensor of one dimension");
        if (sparse_signs_accept(sign->data, sign->shape[0], rows, cols, err))
            return -1;
    } else if (sign->dtype != DTYPE_I32 || sign->rank != 2 || sign->shape[0] != rows ||
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

/* sign[cols]: +1, -1, or 0 where nothing is kept. */
static void read_row(const struct tensor part[], int32_t cols, int32_t row, int8_t *sign)
{
    const uint32_t *word;

    if (is_sparse(part)) {
        sparse_signs_row(part[PART_SIGN].data, cols, row, sign);
        return;
    }
    word = (const uint32_t *)part[PART_SIGN].data + row * words_of(cols);
    for (int32_t c = 0; c < cols; c++)
        sign[c] = word[c / 32] >> (c % 32) & 1 ? 1 : -1;
}

static int expand(const struct tensor part[], int32_t rows, int32_t cols, float *delta,
                  struct err *err)
{
    int8_t *sign = malloc((size_t)cols);

    if (sign == NULL)
        return err_set(err, ERR_NO_MEMORY, "no memory for the signs of a row");
    for (int32_t r = 0; r < rows; r++) {
        float a = scale_at(part, r);

        read_row(part, cols, r, sign);
        for (int32_t c = 0; c < cols; c++)
            delta[(int64_t)r * cols + c] = a * (float)sign[c];
    }
    free(sign);
    return 0;
}

/* Two sets of signs that differ where nothing is kept: [2][rows][words]. */
static void double_signs(const struct tensor part[], int32_t rows, int32_t cols, int8_t *sign,
                         uint32_t *bits)
{
    int64_t words = words_of(cols);

    memset(bits, 0, (size_t)(2 * rows * words) * sizeof *bits);
    for (int32_t r = 0; r < rows; r++) {
        uint32_t *one = bits + r * words, *other = one + rows * words;

        read_row(part, cols, r, sign);
        for (int32_t c = 0; c < cols; c++) {
            one[c / 32] |= (uint32_t)(sign[c] >= 0) << c % 32;
            other[c / 32] |= (uint32_t)(sign[c] > 0) << c % 32;
        }
    }
}

static int view(const struct tensor part[], int32_t rows, int32_t cols, struct delta_tensor *out,
                void **memory, struct err *err)
{
    int64_t count = part[PART_SCALE].shape[0], words = is_sparse(part) ? rows * words_of(cols) : 0;
    int8_t *sign = malloc((size_t)cols);
    float *scale = malloc((size_t)count * sizeof *scale + (size_t)words * 8);
    uint32_t *bits;

    *memory = scale;
    if (sign == NULL || scale == NULL) {
        free(sign);
        free(scale);
        *memory = NULL;
        return err_set(err, ERR_NO_MEMORY, "no memory for a delta of %d rows", rows);
    }
    bits = (uint32_t *)(void *)(scale + count);
    tensor_to_f32(&part[PART_SCALE], 0, count, scale);
    if (words)
        double_signs(part, rows, cols, sign, bits);
    free(sign);
    *out = (struct delta_tensor){
        .kind = DELTA_SIGN,
        .rows = rows,
        .cols = cols,
        .bits = words ? bits : part[PART_SIGN].data,
        .more_bits = words ? bits + words : NULL,
        .scale = scale,
        .scale_count = (int32_t)count,
    };
    return 0;
}

/* What was dropped is a bit that differs: two for each weight. */
static int64_t packed_bytes(const struct tensor part[], int32_t rows, int32_t cols)
{
    return (int64_t)4 * rows * (1 + words_of(cols) * (is_sparse(part) ? 2 : 1));
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
    int8_t *sign = malloc((size_t)cols);

    if (sign == NULL)
        return err_set(err, ERR_NO_MEMORY, "no memory for the signs of a row");
    memset(out, 0, (size_t)scale_count(part) * sizeof *out);
    for (int32_t r = 0; r < rows; r++) {
        const float *g = gradient + (int64_t)r * cols;
        double sum = 0;

        read_row(part, cols, r, sign);
        for (int32_t c = 0; c < cols; c++)
            sum += (double)((float)sign[c] * g[c]);
        out[scale_count(part) == 1 ? 0 : r] += (float)(sum * (double)scale_at(part, r));
    }
    free(sign);
    return 0;
}

const struct codec codec_bitdelta = {
    .name = "bitdelta",
    .part_count = 2,
    .suffix = {"sign", "scale"},
    .ratio = 0,
    .distill_steps = 60,
    .common_rate = 0.1,
    .allot = allot,
    .compress = compress,
    .accept = accept,
    .expand = expand,
    .view = view,
    .packed_bytes = packed_bytes,
    .scales = scales,
    .read_scales = read_scales,
    .write_scales = write_scales,
    .slope = slope,
};
