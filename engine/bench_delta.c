#include "engine/bench_delta.h"

#include <math.h>
#include <stdlib.h>

#include "engine/base/rng.h"

#define SIZE 1e-4f /* standard deviation of the difference */

/* Gaussian enough: twelve uniform numbers (Irwin-Hall) have its first moments. */
static float draw(uint64_t i)
{
    float sum = -6;

    for (uint64_t k = 0; k < 3; k++) {
        uint64_t bits = rng_at(7, i, k);

        for (int part = 0; part < 4; part++, bits >>= 16)
            sum += (float)(bits & 0xffff) * 0x1p-16f;
    }
    return sum * SIZE;
}

static int compress(struct bench_delta *d, const float *delta, double *energy, uint8_t *width,
                    int64_t bytes, struct err *err)
{
    const struct codec_matrix matrix = {.rows = d->rows, .cols = d->cols, .delta = delta};
    struct codec_plan plan = {.rows = d->rows,
                              .cols = d->cols,
                              .rank = d->rows < d->cols ? d->rows : d->cols,
                              .energy = d->codec->energy ? energy : NULL,
                              .width = width};
    double cost;

    if ((d->codec->energy && d->codec->energy(&matrix, energy, err)) ||
        d->codec->allot(&plan, 1, bytes, &cost, err) ||
        d->codec->compress(&matrix, &plan, d->part, err))
        return -1;
    for (int i = 0; i < d->codec->part_count; i++)
        d->bytes += tensor_elements(&d->part[i]) * dtype_size(d->part[i].dtype);
    return d->codec->view(d->part, d->rows, d->cols, &d->tensor, &d->memory, err);
}

int bench_delta_make(struct bench_delta *out, const struct codec *codec, int32_t rows, int32_t cols,
                     double ratio, struct err *err)
{
    size_t count = (size_t)rows * (size_t)cols, rank = (size_t)(rows < cols ? rows : cols);
    float *delta = malloc(count * sizeof *delta);
    double *energy = malloc(rank * sizeof *energy);
    uint8_t *width = calloc(rank, sizeof *width);
    int rc;

    *out = (struct bench_delta){.codec = codec, .rows = rows, .cols = cols};
    if (!delta || !energy || !width) {
        rc = err_set(err, ERR_NO_MEMORY, "no memory for a difference of %d by %d", rows, cols);
    } else {
        for (size_t i = 0; i < count; i++)
            delta[i] = draw(i);
        rc = compress(out, delta, energy, width,
                      ratio > 0 ? (int64_t)(2 * (double)count / ratio) : INT64_MAX, err);
    }
    free(delta);
    free(energy);
    free(width);
    return rc;
}

void bench_delta_free(struct bench_delta *delta)
{
    for (int i = 0; i < CODEC_MAX_PARTS; i++)
        free(delta->part[i].data);
    free(delta->memory);
    *delta = (struct bench_delta){0};
}
