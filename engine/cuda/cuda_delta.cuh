/* cuda_delta.cuh: where the sign of row r, column c lies.
 *
 * A tile is 16 rows by 64 columns: 32 words, one for each lane of the warp that multiplies it as
 * the A operand of four mma.m16n8k16 (ptx.cuh). A product may take its columns in any order, and
 * takes them in the order in which a lane reads 16 bytes of bf16 at a time: lane = 4 g + t holds,
 * of rows g and g + 8, columns 8t to 8t + 7 of each half (32 columns) of the tile. mma number m of
 * a tile takes of them columns 4 (m % 2) to 4 (m % 2) + 3 of half m / 2: two in a[0] and, of row g
 * + 8, a[1]; two in a[2] and a[3].
 *
 * A register of A holds two columns. Register number p = 4m + i (0 to 15) has its lower column's
 * sign in bit p of the lane's word, its upper column's in bit p + 16: one shift brings both where
 * bf16 has its signs. 1 is plus.
 *
 * A difference has such signs once or twice; one of planes has those of its right side, [planes,
 * cols], and of its left side, [rows, planes]. */
#ifndef GRAFT_CUDA_CUDA_DELTA_CUH
#define GRAFT_CUDA_CUDA_DELTA_CUH

#include "engine/cuda/cuda.h"

#define DELTA_TILE_ROWS 16
#define DELTA_TILE_COLS 64
#define DELTA_BLOCK DELTA_TILE_COLS /* planes; no vector lies in two blocks */
static_assert(DELTA_VECTOR_PLANES <= DELTA_BLOCK, "a vector fits into a block");

/* The word and bit of row r, column c, of a matrix of `cols` columns. */
static __host__ __device__ __forceinline__ int64_t delta_word(int32_t cols, int32_t r, int32_t c)
{
    int64_t tile =
        (int64_t)(r / DELTA_TILE_ROWS) * ((cols + DELTA_TILE_COLS - 1) / DELTA_TILE_COLS) +
        c / DELTA_TILE_COLS;

    return tile * 32 + r % 8 * 4 + c % 32 / 8;
}
static __host__ __device__ __forceinline__ int delta_bit(int32_t r, int32_t c)
{
    return (c % 64 / 32 * 2 + c % 8 / 4) * 4 + c % 4 / 2 * 2 + r % 16 / 8 + c % 2 * 16;
}

static __device__ __forceinline__ bool delta_plus(const void *bits, int32_t cols, int32_t r,
                                                  int32_t c)
{
    return static_cast<const unsigned *>(bits)[delta_word(cols, r, c)] >> delta_bit(r, c) & 1;
}

static __device__ __forceinline__ float delta_number(const void *from, int32_t dtype, int64_t at)
{
    if (dtype == DTYPE_BF16)
        return to_float(static_cast<const bf16 *>(from)[at]);
    if (dtype == DTYPE_F16)
        return to_float(static_cast<const f16 *>(from)[at]);
    return static_cast<const float *>(from)[at];
}

/* One value of a dense difference. */
static __device__ __forceinline__ float delta_dense(const struct delta_view &d, int32_t r,
                                                    int32_t c)
{
    return delta_number(d.dense, d.dtype, (int64_t)r * d.cols + c);
}

/* … and of a product of factors. */
static __device__ __forceinline__ float delta_product(const struct delta_view &d, int32_t r,
                                                      int32_t c)
{
    float sum = 0;

    for (int64_t v = 0; v < d.rank; v++)
        sum = fmaf(delta_number(d.left, d.left_dtype, v * d.rows + r),
                   delta_number(d.right, d.right_dtype, v * d.cols + c), sum);
    return d.factor * sum;
}

/* … and of planes, vector by vector. */
static __device__ __forceinline__ float delta_outer(const struct delta_view &d, int32_t r,
                                                    int32_t c)
{
    float sum = 0, left = 0, right = 0;

    for (int32_t p = 0; p < d.planes; p++) {
        struct delta_plane plane = d.plane[p];

        if (p % DELTA_BLOCK == plane.first)
            left = right = 0;
        left += delta_plus(d.left, d.planes, r, p) ? plane.left : -plane.left;
        right += delta_plus(d.right, d.cols, p, c) ? plane.right : -plane.right;
        if (p % DELTA_BLOCK == plane.first + plane.count - 1)
            sum = fmaf(left, right, sum);
    }
    return d.scale[r] * sum * d.col_scale[c];
}

/* One value; slow, for single rows. The view is not empty. */
static __device__ __forceinline__ float delta_value(const struct delta_view &d, int32_t r,
                                                    int32_t c)
{
    if (d.bits) {
        float scale = d.scale[r], sum = delta_plus(d.bits, d.cols, r, c) ? scale : -scale;

        return d.more ? sum + (delta_plus(d.more, d.cols, r, c) ? scale : -scale) : sum;
    }
    if (d.planes)
        return delta_outer(d, r, c);
    return d.rank ? delta_product(d, r, c) : delta_dense(d, r, c);
}

static __device__ __forceinline__ bool delta_is_empty(const struct delta_view &d)
{
    return d.rows == 0;
}

#endif
