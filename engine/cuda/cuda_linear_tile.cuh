/* cuda_linear_tile.cuh: a warp's part of the serving product: 16 outputs by TILES tiles of eight
 * rows, over a range of columns, 64 (a chunk) at a time. For bf16 by mma.m16n8k16, weights and
 * signs as A, rows of x as the columns of B; for float by FMA, each lane holding the sums that it
 * would hold of C: with g = lane / 4 and t = lane % 4, outputs g and g + 8 of rows 2t and 2t + 1.
 *
 * Which columns an mma takes: see cuda_delta.cuh. */
#ifndef GRAFT_CUDA_CUDA_LINEAR_TILE_CUH
#define GRAFT_CUDA_CUDA_LINEAR_TILE_CUH

#include <cstring>

#include "engine/cuda/cuda_delta.cuh"
#include "engine/cuda/cuda_linear.cuh"
#include "engine/cuda/ptx.cuh"

#define CHUNK DELTA_TILE_COLS
#define MOST_TILES 8
#ifdef __CUDACC__
#define ROLLED _Pragma("unroll 1")
#else
#define ROLLED
#endif
#define STAGES 4 /* chunks of weights that a warp has in flight */

/* The rows of a block, and whose they are. */
struct linear_columns {
    struct delta_view delta[MOST_TILES * 8];
    int32_t index[MOST_TILES * 8]; /* in x and y; -1: no row */
    int32_t group[MOST_TILES * 8];
    int32_t leader[MOST_TILES * 8]; /* first column of its tile with the same delta; -1: none */
    unsigned signs[MOST_TILES];     /* leaders of each tile that have signs, as bits */
    unsigned dense[MOST_TILES];     /* … that have a dense delta */
};

template <int TILES> struct linear_sums {
    float base[TILES][4], own[TILES][4];
};

/* What a warp works on. */
struct linear_range {
    const struct linear_columns *columns;
    const void *x, *w;
    int32_t in, out, tile; /* tile: of 16 outputs, in its matrix */
    int32_t from, to;      /* chunks */
};

/* ------------------------------------------------------------------ bf16 */

static __device__ __forceinline__ unsigned pair_of(bf16 low, bf16 high)
{
    uint16_t half[2];

    memcpy(&half[0], &low, sizeof low);
    memcpy(&half[1], &high, sizeof high);
    return half[0] | (unsigned)half[1] << 16;
}

/* Eight values of a row from column c on, zeros behind the last. */
template <bool ALIGNED>
static __device__ __forceinline__ uint4 load_piece(const bf16 *row, int32_t c, int32_t in)
{
    if constexpr (ALIGNED) {
        return c < in ? *reinterpret_cast<const uint4 *>(row + c) : make_uint4(0, 0, 0, 0);
    } else {
        bf16 zero = from_float<bf16>(0);
        unsigned pair[4];

        UNROLL
        for (int i = 0; i < 4; i++)
            pair[i] = pair_of(c + 2 * i < in ? row[c + 2 * i] : zero,
                              c + 2 * i + 1 < in ? row[c + 2 * i + 1] : zero);
        return make_uint4(pair[0], pair[1], pair[2], pair[3]);
    }
}

/* The two mma of a half; w: its pieces of rows g and g + 8. */
static __device__ __forceinline__ void add_half(float c[4], const uint4 w[2], const uint4 &x)
{
    const unsigned a[2][4] = {{w[0].x, w[1].x, w[0].y, w[1].y}, {w[0].z, w[1].z, w[0].w, w[1].w}};
    const unsigned b[2][2] = {{x.x, x.y}, {x.z, x.w}};

    mma_bf16(c, a[0], b[0]);
    mma_bf16(c, a[1], b[1]);
}

static __device__ __forceinline__ void add_signs(float c[4], unsigned word, const uint4 x[2])
{
    UNROLL
    for (int m = 0; m < 4; m++) {
        unsigned a[4], b[2] = {m % 2 ? x[m / 2].z : x[m / 2].x, m % 2 ? x[m / 2].w : x[m / 2].y};

        UNROLL
        for (int i = 0; i < 4; i++) /* 0xbf80 is -1 */
            a[i] = lop3<(0xf0 & 0xcc) ^ 0xaa>(word << (15 - 4 * m - i), 0x80008000u, 0xbf80bf80u);
        mma_bf16(c, a, b);
    }
}

/* Eight values of a dense difference, each as the sum of two bf16: as good as exact. */
static __device__ __forceinline__ void split_piece(const struct delta_view &d, int32_t r, int32_t c,
                                                   uint4 *near, uint4 *rest)
{
    unsigned first[4], second[4];

    UNROLL
    for (int i = 0; i < 4; i++) {
        bf16 a[2], b[2];

        UNROLL
        for (int k = 0; k < 2; k++) {
            int32_t column = c + 2 * i + k;
            float value = r < d.rows && column < d.cols ? delta_dense(d, r, column) : 0;

            a[k] = from_float<bf16>(value);
            b[k] = from_float<bf16>(value - to_float(a[k]));
        }
        first[i] = pair_of(a[0], a[1]);
        second[i] = pair_of(b[0], b[1]);
    }
    *near = make_uint4(first[0], first[1], first[2], first[3]);
    *rest = make_uint4(second[0], second[1], second[2], second[3]);
}

static __device__ __forceinline__ void add_dense(float c[4], const struct delta_view &d, int32_t r,
                                                 int32_t column, const uint4 x[2])
{
    ROLLED
    for (int h = 0; h < 2; h++) {
        uint4 near[2], rest[2], half = h ? x[1] : x[0];

        split_piece(d, r, column + 32 * h, &near[0], &rest[0]);
        split_piece(d, r + 8, column + 32 * h, &near[1], &rest[1]);
        add_half(c, near, half);
        if (d.dtype != DTYPE_BF16)
            add_half(c, rest, half);
    }
}

/* The deltas of the rows of tile j. Another tenant's rows are zero, so that its sums do not change:
 * x + 0 is x, and a sum that began as +0 never becomes -0. */
static __device__ __forceinline__ void add_own(const struct linear_range &range, int j,
                                               int32_t chunk, const uint4 x[2], float c[4])
{
    const struct linear_columns *columns = range.columns;
    const struct delta_view *delta = columns->delta + j * 8;
    int lane = threadIdx.x % 32, mine = columns->leader[j * 8 + lane / 4];
    unsigned signs = columns->signs[j], dense = columns->dense[j], word[8];
    int64_t at = ((int64_t)range.tile * ((range.in + CHUNK - 1) / CHUNK) + chunk) * 32 + lane;
    uint4 none = make_uint4(0, 0, 0, 0);

    UNROLL
    for (int i = 0; i < 8; i++) /* all are under way before the first is used */
        word[i] = signs >> i & 1 ? delta[i].bits[at] : 0;
    UNROLL
    for (int i = 0; i < 8; i++)
        if (signs >> i & 1) {
            uint4 own[2] = {mine == i ? x[0] : none, mine == i ? x[1] : none};

            add_signs(c, word[i], own);
        }
    ROLLED
    for (int i = 0; i < 8; i++)
        if (dense >> i & 1) {
            uint4 own[2] = {mine == i ? x[0] : none, mine == i ? x[1] : none};

            add_dense(c, delta[i], range.tile * 16 + lane / 4, chunk * CHUNK + lane % 4 * 8, own);
        }
}

template <int TILES, bool OWN, bool ALIGNED>
static __device__ __forceinline__ void add_chunk(const struct linear_range &range, const uint4 w[4],
                                                 int32_t chunk, struct linear_sums<TILES> *sums)
{
    int lane = threadIdx.x % 32;
    int32_t column = chunk * CHUNK + lane % 4 * 8;

    UNROLL
    for (int j = 0; j < TILES; j++) {
        int32_t index = range.columns->index[j * 8 + lane / 4];
        const bf16 *row = static_cast<const bf16 *>(range.x) + (int64_t)index * range.in;
        uint4 x[2];

        UNROLL
        for (int h = 0; h < 2; h++)
            x[h] = index < 0 ? make_uint4(0, 0, 0, 0)
                             : load_piece<ALIGNED>(row, column + 32 * h, range.in);
        add_half(sums->base[j], w, x[0]);
        add_half(sums->base[j], w + 2, x[1]);
        if (OWN)
            add_own(range, j, chunk, x, sums->own[j]);
    }
}

/* Piece i of a lane: half i / 2 of row g + 8 (i % 2). */
static __device__ __forceinline__ void piece_place(const struct linear_range &range, int32_t chunk,
                                                   int i, int32_t *r, int32_t *c)
{
    int lane = threadIdx.x % 32;

    *r = range.tile * 16 + lane / 4 + i % 2 * 8;
    *c = chunk * CHUNK + i / 2 * 32 + lane % 4 * 8;
}

/* Brings a lane's four pieces of a chunk into its own places: nobody else reads them, so that the
 * lane need not wait for anyone. */
static __device__ __forceinline__ void stage_chunk(const struct linear_range &range, int32_t chunk,
                                                   uint4 *stage)
{
    UNROLL
    for (int i = 0; i < 4; i++) {
        int32_t r, c;

        piece_place(range, chunk, i, &r, &c);
        bool there = chunk < range.to && r < range.out && c < range.in;
        copy_async_16(stage + i * 32,
                      static_cast<const bf16 *>(range.w) + (there ? (int64_t)r * range.in + c : 0),
                      there);
    }
    copy_commit();
}

/* stage: the warp's [STAGES][4][32] pieces. */
template <int TILES, bool OWN>
static __device__ __forceinline__ void add_staged(const struct linear_range &range, uint4 *stage,
                                                  struct linear_sums<TILES> *sums)
{
    uint4 w[4];

    stage += threadIdx.x % 32;
    for (int s = 0; s < STAGES - 1; s++)
        stage_chunk(range, range.from + s, stage + s * 128);
    for (int32_t chunk = range.from; chunk < range.to; chunk++) {
        int s = (chunk - range.from) % STAGES;

        copy_wait<STAGES - 2>();
        UNROLL
        for (int i = 0; i < 4; i++)
            w[i] = stage[s * 128 + i * 32];
        stage_chunk(range, chunk + STAGES - 1, stage + (s + STAGES - 1) % STAGES * 128);
        add_chunk<TILES, OWN, true>(range, w, chunk, sums);
    }
    copy_wait<0>();
}

/* Rows that do not begin at multiples of 16 bytes. */
template <int TILES, bool OWN>
static __device__ __forceinline__ void add_unaligned(const struct linear_range &range,
                                                     struct linear_sums<TILES> *sums)
{
    const bf16 *weights = static_cast<const bf16 *>(range.w);

    for (int32_t chunk = range.from; chunk < range.to; chunk++) {
        uint4 w[4];

        UNROLL
        for (int i = 0; i < 4; i++) {
            int32_t r, c;

            piece_place(range, chunk, i, &r, &c);
            w[i] = r < range.out ? load_piece<false>(weights + (int64_t)r * range.in, c, range.in)
                                 : make_uint4(0, 0, 0, 0);
        }
        add_chunk<TILES, OWN, false>(range, w, chunk, sums);
    }
}

template <int TILES, bool OWN, bool ALIGNED>
static __device__ __forceinline__ void add_range(const bf16 *, const struct linear_range &range,
                                                 uint4 *stage, struct linear_sums<TILES> *sums)
{
    if constexpr (ALIGNED)
        add_staged<TILES, OWN>(range, stage, sums);
    else
        add_unaligned<TILES, OWN>(range, sums);
}

/* ------------------------------------------------------------------ float */

/* Four values of a row from column c on; row NULL, or behind the last: zeros. */
template <bool ALIGNED>
static __device__ __forceinline__ float4 load_four(const float *row, int32_t c, int32_t in)
{
    if (!row || c >= in)
        return make_float4(0, 0, 0, 0);
    if (ALIGNED)
        return *reinterpret_cast<const float4 *>(row + c);
    return make_float4(row[c], c + 1 < in ? row[c + 1] : 0, c + 2 < in ? row[c + 2] : 0,
                       c + 3 < in ? row[c + 3] : 0);
}

static __device__ __forceinline__ float dot_four(float4 a, float4 b, float sum)
{
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

/* x where bit `bit` of the word is set, else -x. */
static __device__ __forceinline__ float signed_as(float x, unsigned word, int bit)
{
    return __uint_as_float(__float_as_uint(x) ^ (~word << (31 - bit) & 0x80000000u));
}

/* ± the four values, added; bit: of the first of them. */
static __device__ __forceinline__ float signed_four(float4 x, unsigned word, int bit, float sum)
{
    sum += signed_as(x.x, word, bit);
    sum += signed_as(x.y, word, bit + 16);
    sum += signed_as(x.z, word, bit + 2);
    return sum + signed_as(x.w, word, bit + 18);
}

static __device__ __forceinline__ float4 dense_four(const struct delta_view &d, int32_t r,
                                                    int32_t c)
{
    float value[4];

    UNROLL
    for (int i = 0; i < 4; i++)
        value[i] = r < d.rows && c + i < d.cols ? delta_dense(d, r, c + i) : 0;
    return make_float4(value[0], value[1], value[2], value[3]);
}

/* The deltas of rows 2t and 2t + 1 of tile j on four columns from `column` on. */
static __device__ __forceinline__ void add_own_four(const struct linear_range &range, int j,
                                                    int32_t column, const float4 x[2], float c[4])
{
    int lane = threadIdx.x % 32, g = lane / 4;
    int32_t r = range.tile * 16 + g;

    UNROLL
    for (int k = 0; k < 2; k++) {
        int leader = range.columns->leader[j * 8 + lane % 4 * 2 + k];

        if (leader < 0)
            continue;
        const struct delta_view &d = range.columns->delta[j * 8 + leader];
        if (d.bits) {
            unsigned word = d.bits[delta_word(d.cols, r, column)];

            c[k] = signed_four(x[k], word, delta_bit(g, column), c[k]);
            c[2 + k] = signed_four(x[k], word, delta_bit(g + 8, column), c[2 + k]);
        } else {
            c[k] = dot_four(dense_four(d, r, column), x[k], c[k]);
            c[2 + k] = dot_four(dense_four(d, r + 8, column), x[k], c[2 + k]);
        }
    }
}

template <int TILES, bool OWN, bool ALIGNED>
static __device__ __forceinline__ void add_range(const float *, const struct linear_range &range,
                                                 uint4 *, struct linear_sums<TILES> *sums)
{
    int lane = threadIdx.x % 32;
    int32_t r = range.tile * 16 + lane / 4;
    int32_t last = min(range.to * CHUNK, range.in);
    const float *w = static_cast<const float *>(range.w) + (int64_t)r * range.in;
    const float *low = r < range.out ? w : nullptr;
    const float *high = r + 8 < range.out ? w + 8 * (int64_t)range.in : nullptr;

    for (int32_t column = range.from * CHUNK; column < last; column += 4) {
        float4 a = load_four<ALIGNED>(low, column, range.in);
        float4 b = load_four<ALIGNED>(high, column, range.in);

        UNROLL
        for (int j = 0; j < TILES; j++) {
            float4 x[2];

            UNROLL
            for (int k = 0; k < 2; k++) {
                int32_t index = range.columns->index[j * 8 + lane % 4 * 2 + k];

                x[k] = load_four<ALIGNED>(index < 0 ? nullptr
                                                    : static_cast<const float *>(range.x) +
                                                          (int64_t)index * range.in,
                                          column, range.in);
                sums->base[j][k] = dot_four(a, x[k], sums->base[j][k]);
                sums->base[j][2 + k] = dot_four(b, x[k], sums->base[j][2 + k]);
            }
            if (OWN)
                add_own_four(range, j, column, x, sums->own[j]);
        }
    }
}

#endif
