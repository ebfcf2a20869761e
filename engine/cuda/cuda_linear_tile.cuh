/* cuda_linear_tile.cuh: a warp's part of the serving product: 16 outputs by TILES tiles of eight
 * rows, over a range of columns, 64 (a chunk) at a time. For bf16 by mma.m16n8k16, weights and
 * signs as A, rows of x as the columns of B; for float by FMA, each lane holding the sums that it
 * would hold of C: with g = lane / 4 and t = lane % 4, outputs g and g + 8 of rows 2t and 2t + 1.
 *
 * Which columns an mma takes: see cuda_delta.cuh. */
#ifndef GRAFT_CUDA_CUDA_LINEAR_TILE_CUH
#define GRAFT_CUDA_CUDA_LINEAR_TILE_CUH

#include "engine/cuda/cuda_delta.cuh"
#include "engine/cuda/cuda_linear.cuh"
#include "engine/cuda/ptx.cuh"
#include "engine/cuda/vector.cuh"

#define SPLIT 8 /* warps of a block, each on a range of the columns */
#define THREADS (SPLIT * 32)
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
    unsigned more[MOST_TILES];      /* … that have signs twice */
    unsigned dense[MOST_TILES];     /* … that have a dense delta */
    unsigned planes[MOST_TILES];    /* … that have planes */
};

template <int TILES> struct linear_sums {
    float base[TILES][4], own[TILES][4];
};

/* The chunk behind part `part`. */
static __device__ __forceinline__ int32_t part_end(int32_t chunks, int part)
{
    return (int32_t)((int64_t)chunks * (part + 1) / SPLIT);
}

/* What a warp works on. */
struct linear_range {
    const struct linear_columns *columns;
    const void *x, *w;
    int32_t in, out, tile; /* tile: of 16 outputs, in its matrix */
    int32_t from, to;      /* chunks */
};

/* ------------------------------------------------------------------ bf16 */

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
            pair[i] = pack_bf16(c + 2 * i < in ? row[c + 2 * i] : zero,
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

/* ±1 of mma m of a tile. */
static __device__ __forceinline__ void sign_operand(unsigned word, int m, unsigned a[4])
{
    UNROLL
    for (int i = 0; i < 4; i++) /* 0xbf80 is -1 */
        a[i] = lop3<(0xf0 & 0xcc) ^ 0xaa>(word << (15 - 4 * m - i), 0x80008000u, 0xbf80bf80u);
}

/* … and that mma; x: a lane's pieces of the two halves of its row. */
static __device__ __forceinline__ void mma_piece(float c[4], const unsigned a[4], const uint4 x[2],
                                                 int m)
{
    const unsigned b[2] = {m % 2 ? x[m / 2].z : x[m / 2].x, m % 2 ? x[m / 2].w : x[m / 2].y};

    mma_bf16(c, a, b);
}

static __device__ __forceinline__ void add_signs(float c[4], unsigned word, const uint4 x[2])
{
    UNROLL
    for (int m = 0; m < 4; m++) {
        unsigned a[4];

        sign_operand(word, m, a);
        mma_piece(c, a, x, m);
    }
}

/* Eight values of a dense difference, rounded; or, `rest`, what rounding took from them. Both
 * together are as good as exact. */
static __device__ __forceinline__ uint4 split_piece(const struct delta_view &d, int32_t r,
                                                    int32_t c, bool rest)
{
    unsigned pair[4];

    if (d.dtype == DTYPE_BF16 && d.cols % 8 == 0)
        return r < d.rows ? load_piece<true>(
                                static_cast<const bf16 *>(d.dense) + (int64_t)r * d.cols, c, d.cols)
                          : make_uint4(0, 0, 0, 0);
    UNROLL
    for (int i = 0; i < 4; i++) {
        bf16 half[2];

        UNROLL
        for (int k = 0; k < 2; k++) {
            int32_t column = c + 2 * i + k;
            float value = r < d.rows && column < d.cols ? delta_dense(d, r, column) : 0;

            half[k] = from_float<bf16>(value);
            if (rest)
                half[k] = from_float<bf16>(value - to_float(half[k]));
        }
        pair[i] = pack_bf16(half[0], half[1]);
    }
    return make_uint4(pair[0], pair[1], pair[2], pair[3]);
}

/* mine: whether the lane's row of x counts. */
static __device__ __forceinline__ void add_dense(float c[4], const struct delta_view &d, int32_t r,
                                                 int32_t column, const uint4 x[2], bool mine)
{
    int parts = d.dtype == DTYPE_BF16 ? 2 : 4;

    ROLLED
    for (int i = 0; i < parts; i++) {
        int32_t from = column + i % 2 * 32;
        uint4 piece[2] = {split_piece(d, r, from, i > 1), split_piece(d, r + 8, from, i > 1)};
        uint4 half = i % 2 ? x[1] : x[0];

        add_half(c, piece, mine ? half : make_uint4(0, 0, 0, 0));
    }
}

/* A word is 32 weights: 32 bits count them. */
static __device__ __forceinline__ unsigned word_at(const struct linear_range &range, int32_t chunk)
{
    unsigned chunks = (unsigned)(range.in + CHUNK - 1) / CHUNK;

    return ((unsigned)range.tile * chunks + (unsigned)chunk) * 32 + threadIdx.x % 32;
}

/* A lane's words of the tenants of tile j; 0 where one has no signs. */
static __device__ __forceinline__ void load_words(const struct linear_range &range, int j,
                                                  int32_t chunk, unsigned word[8])
{
    const struct delta_view *delta = range.columns->delta + j * 8;
    unsigned at = word_at(range, chunk);
    unsigned signs = chunk < range.to ? range.columns->signs[j] : 0;

    UNROLL
    for (int i = 0; i < 8; i++)
        word[i] = signs >> i & 1 ? delta[i].bits[at] : 0;
}

/* The deltas of the rows of tile j. Another tenant's rows are zero, so that its sums do not change:
 * x + 0 is x, and a sum that began as +0 never becomes -0. */
static __device__ __forceinline__ void add_own(const struct linear_range &range, int j,
                                               int32_t chunk, const unsigned word[8],
                                               const uint4 x[2], float c[4])
{
    const struct linear_columns *columns = range.columns;
    int lane = threadIdx.x % 32, mine = columns->leader[j * 8 + lane / 4];
    unsigned signs = columns->signs[j], more = columns->more[j], dense = columns->dense[j];
    uint4 none = make_uint4(0, 0, 0, 0);

    UNROLL
    for (int i = 0; i < 8; i++)
        if (signs >> i & 1) {
            uint4 own[2] = {mine == i ? x[0] : none, mine == i ? x[1] : none};

            add_signs(c, word[i], own);
        }
    ROLLED
    for (int i = 0; i < 8; i++)
        if (more >> i & 1) {
            uint4 own[2] = {mine == i ? x[0] : none, mine == i ? x[1] : none};

            add_signs(c, columns->delta[j * 8 + i].more[word_at(range, chunk)], own);
        }
    ROLLED
    for (int i = 0; i < 8; i++)
        if (dense >> i & 1)
            add_dense(c, columns->delta[j * 8 + i], range.tile * 16 + lane / 4,
                      chunk * CHUNK + lane % 4 * 8, x, mine == i);
}

/* What a tile of rows adds to: products with weights, and with its tenants' deltas. */
template <bool OWN>
static __device__ __forceinline__ void
add_tile(const struct linear_range &range, int j, int32_t chunk, const uint4 w[4],
         const unsigned word[8], const uint4 x[2], float base[4], float own[4])
{
    add_half(base, w, x[0]);
    add_half(base, w + 2, x[1]);
    if (OWN)
        add_own(range, j, chunk, word, x, own);
}

/* A lane's row of tile j. */
template <bool ALIGNED>
static __device__ __forceinline__ void load_x(const struct linear_range &range, int j,
                                              int32_t chunk, uint4 x[2])
{
    int lane = threadIdx.x % 32;
    int32_t index = chunk < range.to ? range.columns->index[j * 8 + lane / 4] : -1;
    const bf16 *row = static_cast<const bf16 *>(range.x) + (int64_t)index * range.in;

    UNROLL
    for (int h = 0; h < 2; h++)
        x[h] = index < 0
                   ? make_uint4(0, 0, 0, 0)
                   : load_piece<ALIGNED>(row, chunk * CHUNK + 32 * h + lane % 4 * 8, range.in);
}

/* What is under way for the tile that comes next, while a tile is worked on. Where registers are
 * short (four tiles with deltas), rows are not. */
struct linear_ahead {
    uint4 x[2];
    unsigned word[8];
};
template <int TILES, bool OWN> constexpr bool rows_ahead = !(OWN && TILES > 2);

template <int TILES, bool OWN, bool ALIGNED>
static __device__ __forceinline__ void load_ahead(const struct linear_range &range, int j,
                                                  int32_t chunk, struct linear_ahead *ahead)
{
    if (OWN)
        load_words(range, j, chunk, ahead->word);
    if (rows_ahead<TILES, OWN>)
        load_x<ALIGNED>(range, j, chunk, ahead->x);
}

/* ahead: of tile 0, of this chunk in, of the next out. */
template <int TILES, bool OWN, bool ALIGNED>
static __device__ __forceinline__ void add_chunk(const struct linear_range &range, const uint4 w[4],
                                                 int32_t chunk, struct linear_ahead *ahead,
                                                 struct linear_sums<TILES> *sums)
{
    UNROLL
    for (int j = 0; j < TILES; j++) {
        struct linear_ahead next = {};

        load_ahead<TILES, OWN, ALIGNED>(range, (j + 1) % TILES, chunk + (j + 1) / TILES, &next);
        if (!rows_ahead<TILES, OWN>)
            load_x<ALIGNED>(range, j, chunk, ahead->x);
        add_tile<OWN>(range, j, chunk, w, ahead->word, ahead->x, sums->base[j], sums->own[j]);
        *ahead = next;
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
 * lane need not wait for anyone. The caller closes the group. */
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
}

/* Sends for the first chunks. Does not need the rows yet: weights come while they are found. stage:
 * the warp's [STAGES][4][32] pieces. */
static __device__ __forceinline__ void start_staged(const struct linear_range &range, uint4 *stage)
{
    stage += threadIdx.x % 32;
    for (int s = 0; s < STAGES - 1; s++) {
        stage_chunk(range, range.from + s, stage + s * 128);
        copy_commit();
    }
}

/* After start_staged. */
template <int TILES, bool OWN>
static __device__ __forceinline__ void add_staged(const struct linear_range &range, uint4 *stage,
                                                  struct linear_sums<TILES> *sums)
{
    struct linear_ahead ahead = {};
    uint4 w[4];

    stage += threadIdx.x % 32;
    load_ahead<TILES, OWN, true>(range, 0, range.from, &ahead);
    for (int32_t chunk = range.from; chunk < range.to; chunk++) {
        int s = (chunk - range.from) % STAGES;

        copy_wait<STAGES - 2>();
        UNROLL
        for (int i = 0; i < 4; i++)
            w[i] = stage[s * 128 + i * 32];
        stage_chunk(range, chunk + STAGES - 1, stage + (s + STAGES - 1) % STAGES * 128);
        copy_commit();
        add_chunk<TILES, OWN, true>(range, w, chunk, &ahead, sums);
    }
    copy_wait<0>();
}

/* Rows that do not begin at multiples of 16 bytes. */
template <int TILES, bool OWN>
static __device__ __forceinline__ void add_unaligned(const struct linear_range &range,
                                                     struct linear_sums<TILES> *sums)
{
    const bf16 *weights = static_cast<const bf16 *>(range.w);
    struct linear_ahead ahead = {};

    load_ahead<TILES, OWN, false>(range, 0, range.from, &ahead);
    for (int32_t chunk = range.from; chunk < range.to; chunk++) {
        uint4 w[4];

        UNROLL
        for (int i = 0; i < 4; i++) {
            int32_t r, c;

            piece_place(range, chunk, i, &r, &c);
            w[i] = r < range.out ? load_piece<false>(weights + (int64_t)r * range.in, c, range.in)
                                 : make_uint4(0, 0, 0, 0);
        }
        add_chunk<TILES, OWN, false>(range, w, chunk, &ahead, sums);
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

/* ------------------------------------------------------------------ bf16, many rows */

/* Rows of x of a chunk that all warps of the block read, as they lie in fragments:
 * [WIDE_TILES][2 halves][32 lanes]; by all `threads` of the block. */
#define WIDE_TILES 8
#define WIDE_STAGES 3
#define WIDE_X (WIDE_TILES * 64)

static __device__ __forceinline__ void stage_x(const struct linear_range &range, int32_t chunk,
                                               int threads, uint4 *stage)
{
    for (int e = threadIdx.x; e < WIDE_X; e += threads) {
        int lane = e % 32, h = e / 32 % 2;
        int32_t index = range.columns->index[e / 64 * 8 + lane / 4];
        int32_t c = chunk * CHUNK + h * 32 + lane % 4 * 8;
        bool there = chunk < range.to && index >= 0 && c < range.in;

        copy_async_16(stage + e,
                      static_cast<const bf16 *>(range.x) +
                          (there ? (int64_t)index * range.in + c : 0),
                      there);
    }
}

/* A chunk whose rows are in shared memory. */
template <bool OWN>
static __device__ __forceinline__ void
add_wide_chunk(const struct linear_range &range, const uint4 w[4], const uint4 *rows, int32_t chunk,
               unsigned word[8], struct linear_sums<WIDE_TILES> *sums)
{
    int lane = threadIdx.x % 32;

    UNROLL
    for (int j = 0; j < WIDE_TILES; j++) {
        uint4 x[2] = {rows[j * 64 + lane], rows[j * 64 + 32 + lane]};
        unsigned next[8];

        if (OWN)
            load_words(range, (j + 1) % WIDE_TILES, chunk + (j + 1) / WIDE_TILES, next);
        add_tile<OWN>(range, j, chunk, w, word, x, sums->base[j], sums->own[j]);
        if (OWN) {
            UNROLL
            for (int i = 0; i < 8; i++)
                word[i] = next[i];
        }
    }
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
            if (!d.more)
                continue;
            word = d.more[delta_word(d.cols, r, column)];
            c[k] = signed_four(x[k], word, delta_bit(g, column), c[k]);
            c[2 + k] = signed_four(x[k], word, delta_bit(g + 8, column), c[2 + k]);
        } else if (d.dense) {
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
