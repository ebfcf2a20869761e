/* cuda_attention_mma.cuh: attention on tensor cores, for BF16 and heads of 32, 64, 96 and 128: what
 * its kernels share. A block has tiles of rows of one head in shared memory, [rows][E]; a warp has
 * 16 rows of its own.
 *
 * The 16 bytes of a row that one address of ldmatrix names are put where those of neighbouring rows
 * are in other banks: piece c of row r lies at c ^ (r mod 8), where rows have whole eights of
 * pieces. */
#ifndef GRAFT_CUDA_CUDA_ATTENTION_MMA_CUH
#define GRAFT_CUDA_CUDA_ATTENTION_MMA_CUH

#include "engine/cuda/cuda_attention.cuh"
#include "engine/cuda/ptx.cuh"
#include "engine/cuda/vector.cuh"

#define MMA_THREADS 128
#define MMA_ROWS 64 /* of a block's own; 16 for each warp */

template <int E> static __device__ __forceinline__ int32_t mma_place(int32_t row, int32_t piece)
{
    return row * E + (piece ^ (row & (E % 64 == 0 ? 7 : 3))) * 8;
}

/* Rows [0, ROWS) of x, zeros from row `count` on, on their way to `tile`. */
template <int E, int ROWS>
static __device__ __forceinline__ void mma_fetch(bf16 *tile, const bf16 *x, int64_t ld,
                                                 int32_t count)
{
    for (int32_t i = threadIdx.x; i < ROWS * (E / 8); i += MMA_THREADS) {
        int32_t row = i / (E / 8), piece = i % (E / 8);

        copy_async_16(tile + mma_place<E>(row, piece), x + row * ld + piece * 8, row < count);
    }
}

/* Rows [row, row + 16), columns [16k, 16k + 16) as an A operand. */
template <int E>
static __device__ __forceinline__ void mma_a(unsigned a[4], const bf16 *tile, int32_t row, int k)
{
    int lane = threadIdx.x % 32;

    ldmatrix_x4(a, tile + mma_place<E>(row + lane % 16, k * 2 + lane / 16));
}

/* The same rows as two B operands of the transposed tile, rows [row, row + 8) in b[0], b[1], the
 * others in b[2], b[3]: for x · tileᵀ. */
template <int E>
static __device__ __forceinline__ void mma_b(unsigned b[4], const bf16 *tile, int32_t row, int k)
{
    int lane = threadIdx.x % 32;

    ldmatrix_x4(b, tile + mma_place<E>(row + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2));
}

/* Rows [row, row + 16) as two B operands of the tile, columns [16n, 16n + 8) in b[0], b[1], the
 * next eight in b[2], b[3]: for x · tile. */
template <int E>
static __device__ __forceinline__ void mma_b_down(unsigned b[4], const bf16 *tile, int32_t row,
                                                  int n)
{
    int lane = threadIdx.x % 32;

    ldmatrix_x4_trans(b, tile + mma_place<E>(row + lane % 16, n * 2 + lane / 16));
}

static __device__ __forceinline__ unsigned mma_pair(float low, float high)
{
    return pack_bf16(from_float<bf16>(low), from_float<bf16>(high));
}

/* Sums of 16 rows and 16 columns, of two products, as an A operand. */
static __device__ __forceinline__ void mma_a_of_sums(unsigned a[4], const float left[4],
                                                     const float right[4])
{
    a[0] = mma_pair(left[0], left[1]);
    a[1] = mma_pair(left[2], left[3]);
    a[2] = mma_pair(right[0], right[1]);
    a[3] = mma_pair(right[2], right[3]);
}

/* Row of sum i of this lane among the 16 of its warp, and its column in the 8 of a product. */
static __device__ __forceinline__ int32_t mma_row(int i)
{
    return threadIdx.x % 32 / 4 + i / 2 * 8;
}
static __device__ __forceinline__ int32_t mma_column(int i)
{
    return threadIdx.x % 4 * 2 + i % 2;
}

/* The warp's 16 rows of sums to x, of which `count` exist. */
template <int E>
static __device__ __forceinline__ void mma_store(bf16 *x, int64_t ld, int32_t count,
                                                 const float sum[E / 8][4])
{
    UNROLL
    for (int n = 0; n < E / 8; n++)
        UNROLL
    for (int half = 0; half < 2; half++)
        if (mma_row(2 * half) < count)
            *reinterpret_cast<unsigned *>(x + mma_row(2 * half) * ld + n * 8 + mma_column(0)) =
                mma_pair(sum[n][2 * half], sum[n][2 * half + 1]);
}

/* ------------------------------------------------------------------ cuda_attention_mma*.cu */

/* Can the tensor cores have heads of this width? */
static inline bool cuda_attention_mma_fits(int32_t head_dim)
{
    return head_dim == 32 || head_dim == 64 || head_dim == 96 || head_dim == 128;
}
/* All documents but, where `decoded`, those of one row. */
void cuda_attention_mma(struct cuda *cuda, const attention_job<bf16> &job, bool decoded);

template <typename T> struct backward_job {
    int32_t heads, kv_heads, head_dim;
    float scale; /* 1/√E */
    const T *q, *k, *v, *d_out;
    const float *lse, *delta;
    T *dq, *dk, *dv;
};
/* dk, dv, dq when lse and delta are there. */
void cuda_attention_mma_backward(struct cuda *cuda, const backward_job<bf16> &job);

#endif
