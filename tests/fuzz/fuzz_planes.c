/* Planes: whatever the bytes, refused or usable; and what is usable is the same difference however
 * it is read. The first bytes say how large the matrix is, and whether the header is made to fit
 * the rest: random bytes seldom add up. */
#include <math.h>
#include <stdbool.h>

#include "engine/codec/planes.h"
#include "tests/fuzz/fuzz.h"

#define MAX_SIDE 40  /* more than a word of signs */
#define LOOKED_AT 20 /* elements of a matrix that are computed another way */

/* A part whose sizes are right: its widths from the input, the rest of it behind them. */
static uint8_t *fitting(const uint8_t *data, size_t size, int32_t rows, int32_t cols, size_t *bytes)
{
    uint32_t most = (uint32_t)(rows < cols ? rows : cols), rank = size ? data[0] % (most + 1) : 0;
    uint32_t planes = 0;
    uint8_t width[MAX_SIDE], *part;

    for (uint32_t v = 0; v < rank; v++) {
        width[v] = (uint8_t)(1 + (v + 1 < size ? data[v + 1] % PLANES_MAX_WIDTH : 0));
        planes += width[v];
    }
    *bytes = planes_bytes(rows, cols, (int32_t)rank, (int32_t)planes);
    part = calloc(*bytes, 1);
    if (!part)
        abort();
    memcpy(part, data, size < *bytes ? size : *bytes);
    memcpy(part, &rank, 4);
    memcpy(part + 4, &planes, 4);
    memcpy(part + 12, width, rank);
    return part;
}

/* One element of the difference, as backend.h defines it. */
static double element(const struct delta_planes *p, int32_t cols, int32_t r, int32_t c,
                      double *size)
{
    size_t left_words = ((size_t)p->planes + 31) / 32, right_words = ((size_t)cols + 31) / 32;
    double scale = (double)p->row_scale[r] * (double)p->col_scale[c], sum = 0;

    *size = 0;
    for (int32_t k = 0, next; k < p->planes; k = next) {
        double left = 0, right = 0, left_size = 0, right_size = 0;

        for (next = k; next < p->planes && p->vector[next] == p->vector[k]; next++) {
            const uint32_t *l = p->left_bits + (size_t)r * left_words;
            const uint32_t *w = p->right_bits + (size_t)next * right_words;
            double a = (double)p->left_scale[next], b = (double)p->right_scale[next];

            left += l[next / 32] >> (next % 32) & 1 ? a : -a;
            right += w[c / 32] >> (c % 32) & 1 ? b : -b;
            left_size += a;
            right_size += b;
        }
        sum += left * right;
        *size += left_size * right_size;
    }
    *size *= scale;
    return sum * scale;
}

static void use(const uint8_t *part, size_t bytes, int32_t rows, int32_t cols)
{
    static float out[MAX_SIDE * MAX_SIDE], gradient[MAX_SIDE * MAX_SIDE];
    float scale[3 * MAX_SIDE], rounded[3 * MAX_SIDE], slope[3 * MAX_SIDE];
    struct delta_tensor view;
    uint8_t *again;
    void *memory;

    if (planes_expand(part, rows, cols, out, NULL) ||
        planes_view(part, rows, cols, &view, &memory, NULL))
        abort();
    if (view.planes.rank != planes_rank(part) || view.rows != rows || view.cols != cols)
        abort();
    for (int32_t i = 0; i < rows * cols; i++)
        gradient[i] = (float)(i % 3 - 1);
    for (int32_t i = 0, at = 0; i < LOOKED_AT; i++, at = (at + 37) % (rows * cols)) {
        double size, want = element(&view.planes, cols, at / cols, at % cols, &size);

        /* below the floats' normal range sums are rounded to steps */
        if (!(fabs((double)out[at] - want) <= 1e-5 * size + 1e-36))
            abort();
    }
    free(memory);
    if (planes_slope(part, rows, cols, gradient, slope, NULL))
        abort();
    for (int32_t i = 0; i < planes_scale_count(part, rows, cols); i++)
        if (!isfinite(slope[i]))
            abort();
    again = malloc(bytes);
    if (!again)
        abort();
    memcpy(again, part, bytes);
    planes_read_scales(part, rows, cols, scale);
    planes_write_scales(again, rows, cols, scale);
    planes_read_scales(again, rows, cols, rounded);
    for (int32_t i = 0; i < planes_scale_count(part, rows, cols); i++)
        if (!(fabsf(rounded[i] - scale[i]) <= 0.03f * scale[i] + 1e-6f)) /* half a step */
            abort();
    if (planes_accept(again, bytes, rows, cols, NULL) != 0)
        abort();
    free(again);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct err err = {0};
    int32_t rows, cols;
    uint8_t *part;
    size_t bytes;

    if (size < 3)
        return 0;
    rows = 1 + data[0] % MAX_SIDE;
    cols = 1 + data[1] % MAX_SIDE;
    bytes = size - 3;
    if (data[2] & 1) {
        part = fitting(data + 3, size - 3, rows, cols, &bytes);
    } else { /* a block of just this size */
        part = malloc(bytes ? bytes : 1);
        if (!part)
            abort();
        memcpy(part, data + 3, bytes);
    }
    if (planes_accept(part, bytes, rows, cols, &err) == 0)
        use(part, bytes, rows, cols);
    else
        fuzz_check_error(&err);
    free(part);
    return 0;
}
