/* cuda_planes.cuh: what a delta of planes (engine/backend.h) adds to a product: two products with
 * signs, nothing is expanded.
 *
 * right: for each plane, t_p = right_p · (col_scale ⊙ x). A launch of its own (cuda_planes.cu).
 *
 * joined: z_p = left_scale_p · Σ right_scale_q · t_q over the planes q of p's vector. In the same
 * launch: planes come in blocks of 64, no vector lies in two, and what sums a block joins it.
 *
 * left: y_r += row_scale_r · Σ_p ± z_p. In the product's own kernel, here: z stands for the row of
 * x, planes for its columns, and each of the SPLIT parts of an output has its share of them.
 *
 * In decoding both sides take as long as their bits take to come, so these lie as other signs do
 * (cuda_delta.cuh): a warp reads 32 neighbouring words, each bit once for all of a tenant's rows in
 * a tile of eight; and tensor cores take them, so that a prompt's rows do not cost an addition for
 * each bit.
 *
 * What they multiply is computed here and is not rounded to bf16 as a stored activation is: it is
 * two bf16, which together are as good as float, and two products. In the job's `sums` a row has
 * 256 bytes for each block: 64 floats, or 64 bf16 and then 64 of what rounding took from those. */
#ifndef GRAFT_CUDA_CUDA_PLANES_CUH
#define GRAFT_CUDA_CUDA_PLANES_CUH

#include "engine/cuda/cuda_linear_tile.cuh"

/* Eight columns of each half of a chunk, as load_x has them, in two. */
struct split_row {
    uint4 high[2], low[2];
};

/* What a warp works on: 16 outputs, the planes of one part. */
struct planes_part {
    const struct linear_columns *columns;
    const float *sums; /* of row i from i · stride on */
    int64_t stride;
    int32_t tile, part;
};

static __device__ __forceinline__ void add_split(float c[4], unsigned word,
                                                 const struct split_row &x)
{
    UNROLL
    for (int m = 0; m < 4; m++) {
        unsigned a[4];

        sign_operand(word, m, a);
        mma_piece(c, a, x.high, m);
        mma_piece(c, a, x.low, m);
    }
}

/* The row, or zeros, in registers: piece by piece, as a choice between structs is one of addresses.
 */
static __device__ __forceinline__ struct split_row row_if(bool mine, const struct split_row &x)
{
    uint4 none = make_uint4(0, 0, 0, 0);

    return {{mine ? x.high[0] : none, mine ? x.high[1] : none},
            {mine ? x.low[0] : none, mine ? x.low[1] : none}};
}

/* Block `block` of 64 sums. */
static __device__ __forceinline__ struct split_row load_split(const float *sums, int32_t block)
{
    const uint4 *from = reinterpret_cast<const uint4 *>(sums) + block * 16 + threadIdx.x % 4;

    return {{from[0], from[4]}, {from[8], from[12]}};
}

/* A lane's words of turn `turn` of the part; 0 where a tenant has no more of them. Returns whether
 * any has. */
static __device__ __forceinline__ bool load_left(const struct planes_part &p, int j, int32_t turn,
                                                 unsigned word[8])
{
    const struct delta_view *delta = p.columns->delta + j * 8;
    unsigned planes = p.columns->planes[j];
    bool any = false;

    UNROLL
    for (int i = 0; i < 8; i++) {
        int32_t blocks = planes >> i & 1 ? delta[i].planes / DELTA_BLOCK : 0;
        int32_t block = part_end(blocks, p.part - 1) + turn;
        bool there = block < part_end(blocks, p.part);

        word[i] =
            there ? static_cast<const unsigned *>(
                        delta[i].left)[((int64_t)p.tile * blocks + block) * 32 + threadIdx.x % 32]
                  : 0;
        any = any || there;
    }
    return any;
}

/* The lane's row of tile j, of the same turn; zeros where its own delta has no more. */
static __device__ __forceinline__ struct split_row load_own(const struct planes_part &p, int j,
                                                            int32_t turn)
{
    int row = j * 8 + threadIdx.x % 32 / 4;
    int32_t blocks = p.columns->leader[row] < 0 ? 0 : p.columns->delta[row].planes / DELTA_BLOCK;
    int32_t block = part_end(blocks, p.part - 1) + turn;

    if (block >= part_end(blocks, p.part))
        return split_row();
    return load_split(p.sums + p.columns->index[row] * p.stride, block);
}

/* As in add_own, another tenant's rows are zero and change nothing. The loop over tenants is not
 * unrolled, but has their words at hand: they come together. */
static __device__ __forceinline__ void add_left(const bf16 *, const struct planes_part &p, int j,
                                                float c[4])
{
    int mine = p.columns->leader[j * 8 + threadIdx.x % 32 / 4];
    unsigned planes = p.columns->planes[j], word[8];

    ROLLED
    for (int32_t turn = 0; load_left(p, j, turn, word); turn++) {
        struct split_row x = load_own(p, j, turn);

        ROLLED
        for (int i = 0; i < 8; i++) {
            unsigned own = word[0];

            if (!(planes >> i & 1))
                continue;
            UNROLL
            for (int k = 1; k < 8; k++)
                own = i == k ? word[k] : own;
            add_split(c, own, row_if(mine == i, x));
        }
    }
}

static __device__ __forceinline__ void add_left(const float *, const struct planes_part &p, int j,
                                                float c[4])
{
    int lane = threadIdx.x % 32, g = lane / 4;

    UNROLL
    for (int k = 0; k < 2; k++) {
        int row = j * 8 + lane % 4 * 2 + k;
        const struct delta_view &d = p.columns->delta[row];
        int32_t blocks = p.columns->leader[row] < 0 ? 0 : d.planes / DELTA_BLOCK;
        const float *sums = p.sums + p.columns->index[row] * p.stride;

        for (int32_t at = part_end(blocks, p.part - 1) * DELTA_BLOCK;
             at < part_end(blocks, p.part) * DELTA_BLOCK; at += 4) {
            float4 x = *reinterpret_cast<const float4 *>(sums + at);
            unsigned word =
                static_cast<const unsigned *>(d.left)[delta_word(d.planes, p.tile * 16 + g, at)];

            c[k] = signed_four(x, word, delta_bit(g, at), c[k]);
            c[2 + k] = signed_four(x, word, delta_bit(g + 8, at), c[2 + k]);
        }
    }
}

/* To the sums of the tenants' own: the left sides. */
template <typename T, int TILES>
static __device__ __forceinline__ void add_planes(const struct planes_part &p,
                                                  struct linear_sums<TILES> *sums)
{
    UNROLL
    for (int j = 0; j < TILES; j++)
        if (p.columns->planes[j])
            add_left(static_cast<const T *>(nullptr), p, j, sums->own[j]);
}

#endif
