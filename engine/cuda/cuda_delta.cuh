/* cuda_delta.cuh: where the sign of row r, column c lies.
 *
 * A tile is 16 rows by 64 columns: 32 words, one for each lane of the warp that multiplies it as
 * the A operand of four mma.m16n8k16. Byte j of a word belongs to columns 16j.. of the tile; its
 * bits are the eight values that the lane holds of A (ptx.cuh), in order: with g = lane / 4 and
 * t = lane % 4, bits 0 and 1 are row g, columns 2t and 2t + 1; 2 and 3 row g + 8, the same columns;
 * 4 and 5 row g, columns 2t + 8 and 2t + 9; 6 and 7 row g + 8 of those. 1 is plus. */
#ifndef GRAFT_CUDA_CUDA_DELTA_CUH
#define GRAFT_CUDA_CUDA_DELTA_CUH

#include "engine/cuda/cuda.h"

#define DELTA_TILE_ROWS 16
#define DELTA_TILE_COLS 64

/* The word and bit of row r, column c, of a matrix of `cols` columns. */
static __host__ __device__ __forceinline__ int64_t delta_word(int32_t cols, int32_t r, int32_t c)
{
    int64_t tile =
        (int64_t)(r / DELTA_TILE_ROWS) * ((cols + DELTA_TILE_COLS - 1) / DELTA_TILE_COLS) +
        c / DELTA_TILE_COLS;

    return tile * 32 + r % 8 * 4 + c % 8 / 2;
}
static __host__ __device__ __forceinline__ int delta_bit(int32_t r, int32_t c)
{
    return c % 64 / 16 * 8 + c % 16 / 8 * 4 + r % 16 / 8 * 2 + c % 2;
}

/* One value; slow, for single rows. The view is not empty. */
static __device__ __forceinline__ float delta_value(const struct delta_view &d, int32_t r,
                                                    int32_t c)
{
    int64_t at = (int64_t)r * d.cols + c;

    if (d.bits)
        return d.bits[delta_word(d.cols, r, c)] >> delta_bit(r, c) & 1 ? d.scale[r] : -d.scale[r];
    if (d.dtype == DTYPE_BF16)
        return to_float(static_cast<const bf16 *>(d.dense)[at]);
    if (d.dtype == DTYPE_F16)
        return to_float(static_cast<const f16 *>(d.dense)[at]);
    return static_cast<const float *>(d.dense)[at];
}

static __device__ __forceinline__ bool delta_is_empty(const struct delta_view &d)
{
    return d.rows == 0;
}

#endif
