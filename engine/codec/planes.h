/* planes.h: a matrix as a sum of outer products whose vectors are a few signs deep: what `graft`
 * stores of a difference, and what a backend applies without expanding it (DELTA_PLANES).
 *
 *   difference ≈ diag(row) · Σ_v left_v · right_vᵀ · diag(col)
 *
 * A vector of width w is w planes of signs: each of its values is scale · Σ_k ± c_k, with the c_k
 * that lose least of a Gaussian's variance. Both sides of a vector have the same width. Row and
 * column scales are powers of 2^(-1/16), so that what varies in size between rows and columns is
 * not left to the vectors.
 *
 * As bytes (little-endian), one part of an artifact:
 *
 *   u32 rank, u32 planes            planes: the sum of the widths
 *   f16 row_top, f16 col_top        the largest row and column scale
 *   u8  width[rank]                 1..8
 *   f16 left[rank], f16 right[rank] scales of the vectors
 *   u8  row[rows], u8 col[cols]     scale = top · 2^(-code/16)
 *   zeros up to a multiple of 4, then for each plane, vector by vector:
 *   u32 [(rows + 31) / 32]          signs of its left side, element i in bit i % 32 of word i / 32
 *   u32 [(cols + 31) / 32]          of its right side; 1 = plus, bits behind the last are 0
 *
 * All functions are pure: any thread. */
#ifndef GRAFT_CODEC_PLANES_H
#define GRAFT_CODEC_PLANES_H

#include <stddef.h>
#include <stdint.h>

#include "engine/backend.h"
#include "engine/base/err.h"

#define PLANES_MAX_WIDTH 8

/* c_k of a width, the largest first: [width]. */
const float *planes_coefficients(int width);
/* The share of a Gaussian's variance that a width loses; 1 for 0. */
double planes_loss(int width);
/* The signs (bit k: plus c_k) whose sum is nearest to x, and that sum. */
unsigned planes_nearest(int width, float x, float *value);

size_t planes_bytes(int32_t rows, int32_t cols, int32_t rank, int32_t planes);

/* What a matrix becomes, before it is bytes. */
struct planes {
    int32_t rows, cols, rank;
    const uint8_t *width;       /* [rank] */
    const float *left, *right;  /* [rank] scales */
    const float *row, *col;     /* [rows], [cols] scales, as planes_scales made them */
    const uint8_t *left_signs;  /* [rank][rows] bit k: plus c_k */
    const uint8_t *right_signs; /* [rank][cols] */
};
/* planes_bytes() of them to `out`. */
void planes_write(const struct planes *planes, void *out);

/* Rounds positive scales to those that can be stored: top is the largest, as f16. */
void planes_scales(float *scale, int32_t count, float *top);

/* Bytes from a file: ERR_INVALID unless the functions below may use them. */
int planes_accept(const void *data, size_t bytes, int32_t rows, int32_t cols, struct err *err);
/* What a backend packs; free *memory when that is done. Memory of the caller's data is not used. */
int planes_view(const void *data, int32_t rows, int32_t cols, struct delta_tensor *out,
                void **memory, struct err *err);
/* The difference: out [rows, cols]. */
int planes_expand(const void *data, int32_t rows, int32_t cols, float *out, struct err *err);

int32_t planes_rank(const void *data);

/* Distillation's side: the scales of the vectors' left sides, of rows, then of columns, [rank +
 * rows
 * + cols]. They are stored rounded; negative ones can not be. */
int32_t planes_scale_count(const void *data, int32_t rows, int32_t cols);
void planes_read_scales(const void *data, int32_t rows, int32_t cols, float *scale);
void planes_write_scales(void *data, int32_t rows, int32_t cols, const float *scale);
/* slope[i] = Σ gradient ⊙ ∂difference/∂log(scale i); gradient is [rows, cols]. */
int planes_slope(const void *data, int32_t rows, int32_t cols, const float *gradient, float *slope,
                 struct err *err);

#endif
