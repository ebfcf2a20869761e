/* kernels_body.h: the source of the kernels, included by kernels_{plain,avx2,avx512}.c behind
 * their simd_*.h, with KERNELS naming the table. See kernels.h for what each one computes. */

#include <math.h>
#include <string.h>

#include "engine/cpu/kernels.h"

#define INLINE static inline __attribute__((always_inline))

/* The first n of sixteen floats, zeros behind. */
INLINE v16 load_n(const float *p, int32_t n)
{
    float t[16] = {0};

    memcpy(t, p, (size_t)n * sizeof *t);
    return v16_load(t);
}

INLINE void store_n(float *p, v16 x, int32_t n)
{
    float t[16];

    v16_store(t, x);
    memcpy(p, t, (size_t)n * sizeof *t);
}

/* for each sixteen of n, the last ones partly: `LOAD(p)` and `STORE(p, x)` know how many */
#define FOR_EACH_16(n) for (int32_t i = 0, left_ = (n); left_ > 0; i += 16, left_ -= 16)
#define LOAD(p) (left_ >= 16 ? v16_load((p) + i) : load_n((p) + i, left_))
#define STORE(p, x)                       \
    do {                                  \
        if (left_ >= 16)                  \
            v16_store((p) + i, (x));      \
        else                              \
            store_n((p) + i, (x), left_); \
    } while (0)

/* exp(x), relative error below 2e-7: x = n·ln 2 + r, |r| ≤ ln 2 / 2, a polynomial for exp(r)
 * (Cephes expf). Below -87.3 the result stays at 1.2e-38 instead of becoming denormal. */
INLINE v16 v16_exp(v16 x)
{
    x = v16_max(v16_min(x, v16_set1(88.3762589f)), v16_set1(-87.3365448f));
    v16 n = v16_round(v16_mul(x, v16_set1(1.44269504f)));
    v16 r = v16_fma(n, v16_set1(-0.693359375f), x);
    r = v16_fma(n, v16_set1(2.12194440e-4f), r);
    v16 p = v16_set1(1.9875691500e-4f);
    p = v16_fma(p, r, v16_set1(1.3981999507e-3f));
    p = v16_fma(p, r, v16_set1(8.3334519073e-3f));
    p = v16_fma(p, r, v16_set1(4.1665795894e-2f));
    p = v16_fma(p, r, v16_set1(1.6666665459e-1f));
    p = v16_fma(p, r, v16_set1(5.0000001201e-1f));
    p = v16_fma(p, v16_mul(r, r), v16_add(r, v16_set1(1.0f)));
    return v16_mul(p, v16_exp2_whole(n));
}

/* ------------------------------------------------------------------ products of rows */

/* The sums of a register tile, to its place in y. */
INLINE void put_sums(v16 acc[SIMD_TILE_ROWS][SIMD_TILE_OUTS], const int R, const int O, float *y,
                     int64_t ldy, bool add)
{
    float sum[SIMD_TILE_ROWS * SIMD_TILE_OUTS];

#ifdef SIMD_SUMS
    if (R == SIMD_TILE_ROWS && O == SIMD_TILE_OUTS)
        v16_store(sum, v16_sums(acc));
    else
#endif
        for (int r = 0; r < R; r++)
            for (int o = 0; o < O; o++)
                sum[r * O + o] = v16_sum(acc[r][o]);
    for (int r = 0; r < R; r++)
        for (int o = 0; o < O; o++)
            y[r * ldy + o] = add ? y[r * ldy + o] + sum[r * O + o] : sum[r * O + o];
}

/* One register tile: R rows against O outputs, over all n. */
#define DEFINE_DOT(suffix, type, LOAD16)                                                           \
    INLINE v16 load_tail_##suffix(const type *p, int32_t n)                                        \
    {                                                                                              \
        type t[16] = {0};                                                                          \
        memcpy(t, p, (size_t)n * sizeof *t);                                                       \
        return LOAD16(t);                                                                          \
    }                                                                                              \
                                                                                                   \
    INLINE void dot_tile_##suffix(const struct dot_args *a, const int R, const int O, int32_t row, \
                                  int32_t out)                                                     \
    {                                                                                              \
        const float *x = a->x + row * a->ldx;                                                      \
        const type *w = (const type *)a->w + out * a->ldw;                                         \
        v16 acc[SIMD_TILE_ROWS][SIMD_TILE_OUTS];                                                   \
        v16 wv[SIMD_TILE_OUTS];                                                                    \
        int32_t i = 0;                                                                             \
                                                                                                   \
        for (int r = 0; r < R; r++)                                                                \
            for (int o = 0; o < O; o++)                                                            \
                acc[r][o] = v16_set1(0.0f);                                                        \
        for (; i + 16 <= a->n; i += 16) {                                                          \
            for (int o = 0; o < O; o++)                                                            \
                wv[o] = LOAD16(w + o * a->ldw + i);                                                \
            for (int r = 0; r < R; r++) {                                                          \
                v16 xv = v16_load(x + r * a->ldx + i);                                             \
                for (int o = 0; o < O; o++)                                                        \
                    acc[r][o] = v16_fma(xv, wv[o], acc[r][o]);                                     \
            }                                                                                      \
        }                                                                                          \
        if (i < a->n) {                                                                            \
            for (int o = 0; o < O; o++)                                                            \
                wv[o] = load_tail_##suffix(w + o * a->ldw + i, a->n - i);                          \
            for (int r = 0; r < R; r++) {                                                          \
                v16 xv = load_n(x + r * a->ldx + i, a->n - i);                                     \
                for (int o = 0; o < O; o++)                                                        \
                    acc[r][o] = v16_fma(xv, wv[o], acc[r][o]);                                     \
            }                                                                                      \
        }                                                                                          \
        put_sums(acc, R, O, a->y + row * a->ldy + out, a->ldy, a->add);                            \
    }                                                                                              \
                                                                                                   \
    static void dot_##suffix(const struct dot_args *a)                                             \
    {                                                                                              \
        int32_t out = 0, row;                                                                      \
                                                                                                   \
        for (; out + SIMD_TILE_OUTS <= a->outs; out += SIMD_TILE_OUTS) {                           \
            for (row = 0; row + SIMD_TILE_ROWS <= a->rows; row += SIMD_TILE_ROWS)                  \
                dot_tile_##suffix(a, SIMD_TILE_ROWS, SIMD_TILE_OUTS, row, out);                    \
            for (; row < a->rows; row++)                                                           \
                dot_tile_##suffix(a, 1, SIMD_TILE_OUTS, row, out);                                 \
        }                                                                                          \
        for (; out < a->outs; out++)                                                               \
            for (row = 0; row < a->rows; row++)                                                    \
                dot_tile_##suffix(a, 1, 1, row, out);                                              \
    }

DEFINE_DOT(f32, float, v16_load)
DEFINE_DOT(bf16, uint16_t, v16_load_bf16)
DEFINE_DOT(f16, uint16_t, v16_load_f16)

static void dot(const struct dot_args *a)
{
    if (a->dtype == DTYPE_F32)
        dot_f32(a);
    else if (a->dtype == DTYPE_BF16)
        dot_bf16(a);
    else
        dot_f16(a);
}

/* One register tile of a sum of outer products: R rows, V vectors of columns, `cols` of them real.
 */
INLINE void outer_tile(const struct outer_args *g, const int R, const int V, int32_t row,
                       int32_t col)
{
    const float *a = g->a + row * g->row_step, *b = g->b + col;
    float *c = g->c + row * g->ldc + col;
    int32_t cols = g->cols - col;
    v16 acc[SIMD_OUTER_ROWS][SIMD_OUTER_VECTORS], bv[SIMD_OUTER_VECTORS];

    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++)
            acc[r][v] = v16_set1(0.0f);
    if (g->add)
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++)
                acc[r][v] = cols >= v * 16 + 16
                                ? v16_load(c + r * g->ldc + v * 16)
                                : load_n(c + r * g->ldc + v * 16, (cols - v * 16) & 15);
    for (int32_t k = 0; k < g->k; k++) {
        for (int v = 0; v < V; v++)
            bv[v] = v16_load(b + v * 16);
        for (int r = 0; r < R; r++) {
            v16 av = v16_set1(a[r * g->row_step]);

            for (int v = 0; v < V; v++)
                acc[r][v] = v16_fma(av, bv[v], acc[r][v]);
        }
        a += g->k_step;
        b += g->ldb;
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) {
            if (cols >= v * 16 + 16)
                v16_store(c + r * g->ldc + v * 16, acc[r][v]);
            else
                store_n(c + r * g->ldc + v * 16, acc[r][v], (cols - v * 16) & 15);
        }
}

INLINE void outer_columns(const struct outer_args *g, const int V, int32_t col)
{
    int32_t row = 0;

    for (; row + SIMD_OUTER_ROWS <= g->rows; row += SIMD_OUTER_ROWS)
        outer_tile(g, SIMD_OUTER_ROWS, V, row, col);
    for (; row + 2 <= g->rows; row += 2)
        outer_tile(g, 2, V, row, col);
    if (row < g->rows)
        outer_tile(g, 1, V, row, col);
}

static void outer(const struct outer_args *g)
{
    int32_t col = 0;

    for (; col + (SIMD_OUTER_VECTORS - 1) * 16 < g->cols; col += SIMD_OUTER_VECTORS * 16)
        outer_columns(g, SIMD_OUTER_VECTORS, col);
    for (; col < g->cols; col += 16)
        outer_columns(g, 1, col);
}

/* ------------------------------------------------------------------ sign products */

/* Columns whose tables (64 KiB) stay in the second cache. In the first one (8 KiB, 512 columns)
 * each table is nearer, but bits then come from memory in stretches of a kilobyte, and that costs
 * more. */
#define SIGN_CHUNK 4096

/* Of each four columns the sixteen sums ±x0 ±x1 ±x2 ±x3, indexed by the four sign bits. */
INLINE void sign_tables(const float *x, int32_t words, float *table)
{
    static const float sign[4][16] = {
        {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1},
        {-1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1},
        {-1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1},
        {-1, -1, -1, -1, -1, -1, -1, -1, 1, 1, 1, 1, 1, 1, 1, 1},
    };
    v16 s0 = v16_load(sign[0]), s1 = v16_load(sign[1]);
    v16 s2 = v16_load(sign[2]), s3 = v16_load(sign[3]);

    for (int32_t g = 0; g < words * 8; g++, x += 4) {
        v16 low = v16_add(v16_mul(s0, v16_set1(x[0])), v16_mul(s1, v16_set1(x[1])));
        v16 high = v16_add(v16_mul(s2, v16_set1(x[2])), v16_mul(s3, v16_set1(x[3])));

        v16_store(table + g * 16, v16_add(low, high));
    }
}

/* Adds the chunk's part of B blocks of sixteen outputs to acc, and fetches what lies `ahead` of it:
 * a delta's bits come from memory, in stretches too short for the processor to see them coming. */
INLINE void sign_blocks(const int B, const uint32_t *bits, int64_t block_stride, int64_t ahead,
                        int32_t words, const float *table, float *acc)
{
    v16 sum[4];
    u16 index[4];

    for (int b = 0; b < B; b++)
        sum[b] = v16_load(acc + b * 16);
    for (int32_t w = 0; w < words; w++) {
        for (int b = 0; b < B; b++) {
            const uint32_t *at = bits + b * block_stride + w * 16;

            index[b] = u16_load(at);
            __builtin_prefetch(at + ahead);
        }
        for (int g = 0; g < 8; g++) {
            table16 t = table16_load(table + (w * 8 + g) * 16);

            for (int b = 0; b < B; b++) {
                sum[b] = v16_add(sum[b], table16_look_up(t, index[b]));
                index[b] = u16_shift_right4(index[b]);
            }
        }
    }
    for (int b = 0; b < B; b++)
        v16_store(acc + b * 16, sum[b]);
}

#define SIGN_BLOCKS 32 /* blocks whose sums wait on the stack between chunks: 512 outputs */

static void sign_part(const struct sign_args *a, int32_t from, int32_t to)
{
    int64_t stride = (a->cols + 31) / 32 * (int64_t)16;
    float acc[SIGN_BLOCKS * 16] = {0};
    float table[SIGN_CHUNK / 4 * 16];

    for (int32_t c = 0; c < a->cols; c += SIGN_CHUNK) {
        int32_t cols = a->cols - c < SIGN_CHUNK ? a->cols - c : SIGN_CHUNK;
        int32_t words = (cols + 31) / 32, b = from;
        const float *x = a->x + c;
        const uint32_t *bits = a->bits + c / 32 * 16;
        float padded[SIGN_CHUNK];

        if (cols % 32 != 0) { /* zeros behind the last column, whatever the bits there */
            memcpy(padded, x, (size_t)cols * sizeof *x);
            memset(padded + cols, 0, (size_t)(words * 32 - cols) * sizeof *x);
            x = padded;
        }
        sign_tables(x, words, table);
        for (; b + 4 <= to; b += 4) {
            int64_t behind = to - b - 4 < 4 ? to - b - 4 : 4; /* blocks that come next */

            sign_blocks(4, bits + b * stride, stride, behind * stride, words, table,
                        acc + (b - from) * 16);
        }
        for (; b < to; b++)
            sign_blocks(1, bits + b * stride, stride, 0, words, table, acc + (b - from) * 16);
    }
    int32_t end = to * 16 < a->rows ? to * 16 : a->rows;
    for (int32_t o = from * 16; o < end; o++)
        a->y[o] += a->scale[o] * acc[o - from * 16];
}

static void sign(const struct sign_args *a)
{
    for (int32_t b = a->from; b < a->to; b += SIGN_BLOCKS)
        sign_part(a, b, b + SIGN_BLOCKS < a->to ? b + SIGN_BLOCKS : a->to);
}

/* ------------------------------------------------------------------ attention */

INLINE void weighted_sum_64(const float *p, int32_t keys, const float *v, int64_t ldv, float alpha,
                            float *out)
{
    v16 a = v16_set1(alpha);
    v16 s0 = v16_mul(a, v16_load(out)), s1 = v16_mul(a, v16_load(out + 16));
    v16 s2 = v16_mul(a, v16_load(out + 32)), s3 = v16_mul(a, v16_load(out + 48));

    for (int32_t k = 0; k < keys; k++, v += ldv) {
        v16 pk = v16_set1(p[k]);

        s0 = v16_fma(pk, v16_load(v), s0);
        s1 = v16_fma(pk, v16_load(v + 16), s1);
        s2 = v16_fma(pk, v16_load(v + 32), s2);
        s3 = v16_fma(pk, v16_load(v + 48), s3);
    }
    v16_store(out, s0);
    v16_store(out + 16, s1);
    v16_store(out + 32, s2);
    v16_store(out + 48, s3);
}

static void weighted_sum(const float *p, int32_t keys, const float *v, int64_t ldv, int32_t width,
                         float alpha, float *out)
{
    int32_t e = 0;

    for (; e + 64 <= width; e += 64)
        weighted_sum_64(p, keys, v + e, ldv, alpha, out + e);
    for (; e < width; e += 16) {
        int32_t n = width - e < 16 ? width - e : 16;
        v16 s = v16_mul(v16_set1(alpha), load_n(out + e, n));

        for (int32_t k = 0; k < keys; k++)
            s = v16_fma(v16_set1(p[k]), load_n(v + k * ldv + e, n), s);
        store_n(out + e, s, n);
    }
}

static float scale_max(float *x, int32_t n, float scale)
{
    v16 s = v16_set1(scale), max = v16_set1(-INFINITY);
    float best = -INFINITY;
    int32_t i = 0;

    for (; i + 16 <= n; i += 16) {
        v16 t = v16_mul(v16_load(x + i), s);

        v16_store(x + i, t);
        max = v16_max(t, max);
    }
    for (; i < n; i++) {
        x[i] *= scale;
        best = x[i] > best ? x[i] : best;
    }
    float lanes = v16_hmax(max);
    return lanes > best ? lanes : best;
}

static float exp_sum(float *x, int32_t n, float max)
{
    v16 m = v16_set1(max), sum = v16_set1(0.0f);
    int32_t i = 0;

    for (; i + 16 <= n; i += 16) {
        v16 e = v16_exp(v16_sub(v16_load(x + i), m));

        v16_store(x + i, e);
        sum = v16_add(sum, e);
    }
    if (i < n) {
        store_n(x + i, v16_exp(v16_sub(load_n(x + i, n - i), m)), n - i);
        sum = v16_add(sum, load_n(x + i, n - i));
    }
    return v16_sum(sum);
}

static void softmax_again(float *x, int32_t n, float scale, float lse)
{
    v16 s = v16_set1(scale), l = v16_set1(-lse);

    FOR_EACH_16(n)
    STORE(x, v16_exp(v16_fma(LOAD(x), s, l)));
}

static void softmax_backward(float *p, const float *dp, int32_t n, float delta, float scale)
{
    v16 d = v16_set1(delta), s = v16_set1(scale);

    FOR_EACH_16(n)
    STORE(p, v16_mul(v16_mul(LOAD(p), s), v16_sub(LOAD(dp), d)));
}

/* exp(-d) - 1 + d without its cancellation: |d| ≤ 1/2, to 1e-7 of it. */
INLINE v16 exp_excess(v16 d)
{
    v16 e = v16_fma(d, v16_set1(1.0f / 40320), v16_set1(-1.0f / 5040));

    e = v16_fma(d, e, v16_set1(1.0f / 720));
    e = v16_fma(d, e, v16_set1(-1.0f / 120));
    e = v16_fma(d, e, v16_set1(1.0f / 24));
    e = v16_fma(d, e, v16_set1(-1.0f / 6));
    e = v16_fma(d, e, v16_set1(0.5f));
    return v16_mul(v16_mul(d, d), e);
}

/* Sixteen terms of the sum; *gradient is p - p_teacher. Beyond 1/2 nothing cancels, and p says what
 * the polynomial can not: `far` is 1 there, else 0. */
INLINE v16 divergence_16(const struct divergence_args *a, v16 teacher, v16 model, v16 *gradient)
{
    v16 pt = v16_exp(v16_sub(teacher, v16_set1(a->teacher_max)));
    v16 p = v16_exp(v16_sub(model, v16_set1(a->max)));
    v16 d = v16_sub(v16_sub(teacher, model), v16_set1(a->shift));
    v16 half = v16_set1(0.5f), one = v16_set1(1.0f), zero = v16_set1(0.0f);
    v16 size = v16_max(d, v16_sub(zero, d));
    v16 far = v16_mul(v16_sub(size, half), v16_set1(1e30f));
    v16 inner = v16_max(v16_min(d, half), v16_set1(-0.5f)), excess = exp_excess(inner);

    far = v16_min(v16_max(far, zero), one);
    v16 near = v16_sub(one, far);
    pt = v16_mul(pt, v16_set1(a->teacher_share));
    p = v16_mul(p, v16_set1(a->share));
    *gradient = v16_fma(far, v16_sub(p, pt), v16_mul(near, v16_mul(pt, v16_sub(excess, inner))));
    return v16_fma(far, v16_fma(pt, v16_sub(d, one), p), v16_mul(near, v16_mul(pt, excess)));
}

static double divergence(const struct divergence_args *a)
{
    v16 weight = v16_set1(a->weight), sum = v16_set1(0.0f), gradient;
    double total = 0;

    FOR_EACH_16(a->n)
    {
        v16 terms = divergence_16(a, LOAD(a->teacher), LOAD(a->model), &gradient);

        if (left_ < 16) {
            float t[16];

            v16_store(t, terms);
            terms = load_n(t, left_);
        }
        STORE(a->model, v16_mul(gradient, weight));
        sum = v16_add(sum, terms);
        if (i % 4096 == 0 || left_ <= 16) { /* f32 lanes over 4096 elements, f64 over those */
            total += (double)v16_sum(sum);
            sum = v16_set1(0.0f);
        }
    }
    return total;
}

static void scale(float *x, int32_t n, float s)
{
    v16 f = v16_set1(s);

    FOR_EACH_16(n)
    STORE(x, v16_mul(LOAD(x), f));
}

static void add(const float *a, const float *b, float *y, int32_t n)
{
    FOR_EACH_16(n)
    STORE(y, v16_add(LOAD(a), LOAD(b)));
}

static float product(const float *a, const float *b, int32_t n)
{
    v16 sum = v16_set1(0.0f);

    FOR_EACH_16(n)
    sum = v16_fma(LOAD(a), LOAD(b), sum);
    return v16_sum(sum);
}

/* ------------------------------------------------------------------ norm, rope, silu */

static void rms_norm_again(const float *x, const float *w, float *n, int32_t width, float rstd)
{
    v16 s = v16_set1(rstd);

    FOR_EACH_16(width)
    STORE(n, v16_mul(v16_mul(LOAD(x), s), LOAD(w)));
}

static float rms_norm(const float *x, const float *w, float *n, int32_t width, float eps)
{
    float rstd = 1.0f / sqrtf(product(x, x, width) / (float)width + eps);

    rms_norm_again(x, w, n, width, rstd);
    return rstd;
}

static void rms_norm_backward(const float *x, const float *w, const float *dn, float *dx,
                              int32_t width, float rstd)
{
    v16 sum = v16_set1(0.0f);

    FOR_EACH_16(width)
    sum = v16_fma(v16_mul(LOAD(w), LOAD(dn)), LOAD(x), sum);
    v16 s = v16_set1(rstd), c = v16_set1(-v16_sum(sum) * rstd * rstd / (float)width);
    FOR_EACH_16(width)
    {
        v16 g = v16_fma(LOAD(x), c, v16_mul(LOAD(w), LOAD(dn)));

        STORE(dx, v16_fma(g, s, LOAD(dx)));
    }
}

static void rms_norm_weight_grad(const float *x, const float *dn, int64_t ld, const float *rstd,
                                 int64_t ldr, int32_t rows, int32_t width, float *dw)
{
    FOR_EACH_16(width)
    {
        v16 sum = LOAD(dw);

        for (int32_t t = 0; t < rows; t++)
            sum =
                v16_fma(v16_mul(LOAD(x + t * ld), LOAD(dn + t * ld)), v16_set1(rstd[t * ldr]), sum);
        STORE(dw, sum);
    }
}

static void column_sum(const float *x, int64_t ld, int32_t rows, int32_t width, float *sum)
{
    FOR_EACH_16(width)
    {
        v16 s = LOAD(sum);

        for (int32_t t = 0; t < rows; t++)
            s = v16_add(s, LOAD(x + t * ld));
        STORE(sum, s);
    }
}

static void rope(float *x, int32_t heads, int32_t head_dim, const float *cs, bool backward)
{
    int32_t half = head_dim / 2;
    v16 flip = v16_set1(backward ? -1.0f : 1.0f);

    for (int32_t h = 0; h < heads; h++, x += head_dim) {
        float *x1 = x, *x2 = x + half;

        FOR_EACH_16(half)
        {
            v16 a = LOAD(x1), b = LOAD(x2), c = LOAD(cs);
            v16 s = v16_mul(LOAD(cs + half), flip);

            STORE(x1, v16_sub(v16_mul(a, c), v16_mul(b, s)));
            STORE(x2, v16_add(v16_mul(b, c), v16_mul(a, s)));
        }
    }
}

INLINE v16 sigmoid(v16 x)
{
    v16 one = v16_set1(1.0f);

    return v16_div(one, v16_add(one, v16_exp(v16_sub(v16_set1(0.0f), x))));
}

static void silu_mul(const float *gate, const float *up, float *act, int32_t n)
{
    FOR_EACH_16(n)
    {
        v16 g = LOAD(gate);

        STORE(act, v16_mul(v16_mul(g, sigmoid(g)), LOAD(up)));
    }
}

static void silu_mul_backward(float *gate, float *up, const float *d_act, float *act, int32_t n)
{
    v16 one = v16_set1(1.0f);

    FOR_EACH_16(n)
    {
        v16 g = LOAD(gate), u = LOAD(up), d = LOAD(d_act);
        v16 sig = sigmoid(g), silu = v16_mul(g, sig);
        v16 slope = v16_mul(sig, v16_fma(g, v16_sub(one, sig), one));

        STORE(act, v16_mul(silu, u));
        STORE(gate, v16_mul(v16_mul(d, u), slope));
        STORE(up, v16_mul(d, silu));
    }
}

/* ------------------------------------------------------------------ optimizer */

static double sum_squares(const float *x, int64_t n)
{
    double total = 0;

    while (n > 0) { /* f32 lanes over 4096 elements, f64 over those */
        int32_t part = n < 4096 ? (int32_t)n : 4096;

        total += (double)product(x, x, part);
        x += part;
        n -= part;
    }
    return total;
}

INLINE void adamw_16(float *w, float *g, float *m, float *v, const struct adamw_step *s, int32_t n)
{
    v16 grad = v16_mul(n == 16 ? v16_load(g) : load_n(g, n), v16_set1(s->clip));
    v16 m1 = n == 16 ? v16_load(m) : load_n(m, n), v1 = n == 16 ? v16_load(v) : load_n(v, n);
    v16 weight = n == 16 ? v16_load(w) : load_n(w, n), zero = v16_set1(0.0f);

    m1 = v16_fma(v16_sub(grad, m1), v16_set1(1.0f - s->beta1), m1);
    v1 = v16_fma(v16_sub(v16_mul(grad, grad), v1), v16_set1(1.0f - s->beta2), v1);
    v16 mean = v16_mul(m1, v16_set1(1.0f / s->correction1));
    v16 root = v16_sqrt(v16_mul(v1, v16_set1(1.0f / s->correction2)));
    v16 update = v16_div(mean, v16_add(root, v16_set1(s->epsilon)));

    update = v16_fma(weight, v16_set1(s->decay), update);
    weight = v16_fma(update, v16_set1(-s->learning_rate), weight);
    if (n == 16) {
        v16_store(w, weight);
        v16_store(m, m1);
        v16_store(v, v1);
        v16_store(g, zero);
    } else {
        store_n(w, weight, n);
        store_n(m, m1, n);
        store_n(v, v1, n);
        store_n(g, zero, n);
    }
}

static void adamw(float *w, float *g, float *m, float *v, int64_t n, const struct adamw_step *s)
{
    int64_t i = 0;

    for (; i + 16 <= n; i += 16)
        adamw_16(w + i, g + i, m + i, v + i, s, 16);
    if (i < n)
        adamw_16(w + i, g + i, m + i, v + i, s, (int32_t)(n - i));
}

#define KERNELS_TABLE(title)                                                                    \
    {                                                                                           \
        .name = title, .dot = dot, .outer = outer, .sign = sign, .weighted_sum = weighted_sum,  \
        .scale_max = scale_max, .exp_sum = exp_sum, .softmax_again = softmax_again,             \
        .softmax_backward = softmax_backward, .divergence = divergence, .scale = scale,         \
        .add = add, .product = product, .rms_norm = rms_norm, .rms_norm_again = rms_norm_again, \
        .rms_norm_backward = rms_norm_backward, .rms_norm_weight_grad = rms_norm_weight_grad,   \
        .column_sum = column_sum, .rope = rope, .silu_mul = silu_mul,                           \
        .silu_mul_backward = silu_mul_backward, .sum_squares = sum_squares, .adamw = adamw,     \
    }
