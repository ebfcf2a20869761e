#include "engine/codec/lora.h"

#include <float.h>
#include <math.h>
#include <string.h>

#define WIDTH 256 /* columns that are added up at once */

static int32_t rank_of(const struct tensor part[])
{
    return (int32_t)part[LORA_DOWN].shape[0];
}

static float scale_of(const struct tensor part[])
{
    return *(const float *)part[LORA_SCALE].data;
}

/* ------------------------------------------------------------------ parts are not made here */

int lora_refuse(struct err *err)
{
    return err_set(
        err, ERR_INVALID,
        "lora keeps a LoRA adapter as it is, and there is none: name the directory of one "
        "(adapter_config.json) as the tuned model, or choose another codec: %s",
        codec_makers());
}

static int allot(struct codec_plan *plan, int32_t count, int64_t bytes, double *cost,
                 struct err *err)
{
    *cost = NAN;
    return lora_refuse(err);
}

static int compress(const struct codec_matrix *m, const struct codec_plan *plan,
                    struct tensor part[], struct err *err)
{
    return lora_refuse(err);
}

/* ------------------------------------------------------------------ parts from outside */

static int check_shapes(const struct tensor part[], int32_t rows, int32_t cols, struct err *err)
{
    const struct tensor *scale = &part[LORA_SCALE], *down = &part[LORA_DOWN], *up = &part[LORA_UP];

    if (scale->dtype != DTYPE_F32 || scale->rank != 1 || scale->shape[0] != 1)
        return err_set(err, ERR_INVALID, "\"scale\" is not an F32 tensor of [1]");
    if (down->dtype > DTYPE_F16 || up->dtype > DTYPE_F16)
        return err_set(err, ERR_INVALID, "\"down\" and \"up\" are not of F32, F16 or BF16");
    if (down->rank != 2 || down->shape[1] != cols || down->shape[0] < 1 ||
        down->shape[0] > LORA_MAX_RANK)
        return err_set(err, ERR_INVALID, "\"down\" is not [rank, %d] with a rank of 1 to %d", cols,
                       LORA_MAX_RANK);
    if (up->rank != 2 || up->shape[0] != rows || up->shape[1] != down->shape[0])
        return err_set(err, ERR_INVALID, "\"up\" is not [%d, %lld]", rows,
                       (long long)down->shape[0]);
    return 0;
}

/* The largest |value|; not finite where one is not. */
static float largest(const struct tensor *t)
{
    float value[WIDTH], most = 0;

    for (int64_t from = 0, total = tensor_elements(t); from < total; from += WIDTH) {
        int64_t count = total - from < WIDTH ? total - from : WIDTH;

        tensor_to_f32(t, from, count, value);
        for (int64_t i = 0; i < count; i++) {
            if (!isfinite(value[i]))
                return INFINITY;
            most = fabsf(value[i]) > most ? fabsf(value[i]) : most;
        }
    }
    return most;
}

static int accept(const struct tensor part[], int32_t rows, int32_t cols, struct err *err)
{
    float down, up, scale;

    if (check_shapes(part, rows, cols, err))
        return -1;
    scale = scale_of(part);
    if (!isfinite(scale) || scale == 0)
        return err_set(err, ERR_INVALID, "\"scale\" is %g: it must be finite and not 0",
                       (double)scale);
    down = largest(&part[LORA_DOWN]);
    up = largest(&part[LORA_UP]);
    if (!isfinite(down) || !isfinite(up))
        return err_set(err, ERR_INVALID, "\"%s\" holds a value that is not finite",
                       isfinite(down) ? "up" : "down");
    /* Whatever is summed up on the way, in whatever order, stays a number. */
    if (!((double)up * fmax(1, fabs((double)scale)) * (double)down * rank_of(part) < FLT_MAX))
        return err_set(err, ERR_INVALID, "its values are up to %g and %g: too large to multiply",
                       (double)down, (double)up);
    return 0;
}

/* ------------------------------------------------------------------ the product */

/* Columns [col, col + count) of a row, at most WIDTH. */
static void row_product(const struct tensor part[], int64_t row, int64_t col, int64_t count,
                        float *out)
{
    int32_t rank = rank_of(part);
    int64_t cols = part[LORA_DOWN].shape[1];
    float down[WIDTH], up;

    memset(out, 0, (size_t)count * sizeof *out);
    for (int64_t v = 0; v < rank; v++) {
        tensor_to_f32(&part[LORA_UP], row * rank + v, 1, &up);
        tensor_to_f32(&part[LORA_DOWN], v * cols + col, count, down);
        for (int64_t i = 0; i < count; i++)
            out[i] += up * down[i];
    }
    for (int64_t i = 0; i < count; i++)
        out[i] *= scale_of(part);
}

void lora_product(const struct tensor part[LORA_PARTS], int64_t from, int64_t count, float *out)
{
    int64_t cols = part[LORA_DOWN].shape[1];

    while (count > 0) {
        int64_t col = from % cols, n = cols - col < count ? cols - col : count;

        n = n < WIDTH ? n : WIDTH;
        row_product(part, from / cols, col, n, out);
        from += n;
        out += n;
        count -= n;
    }
}

static int expand(const struct tensor part[], int32_t rows, int32_t cols, float *delta,
                  struct err *err)
{
    lora_product(part, 0, (int64_t)rows * cols, delta);
    return 0;
}

static int view(const struct tensor part[], int32_t rows, int32_t cols, struct delta_tensor *out,
                void **memory, struct err *err)
{
    *memory = NULL;
    *out = (struct delta_tensor){
        .kind = DELTA_FACTORS,
        .rows = rows,
        .cols = cols,
        .factors = {.left = part[LORA_UP], .right = part[LORA_DOWN], .scale = scale_of(part)}};
    return 0;
}

const struct codec codec_lora = {
    .name = "lora",
    .part_count = LORA_PARTS,
    .suffix = {"scale", "down", "up"},
    .own_size = true,
    .imports = true,
    .allot = allot,
    .compress = compress,
    .accept = accept,
    .expand = expand,
    .view = view,
};
