/* simd_avx2.h: v16 as two registers of AVX2 with FMA and F16C. Same bits as simd_plain.h. */
#ifndef GRAFT_CPU_SIMD_AVX2_H
#define GRAFT_CPU_SIMD_AVX2_H

#include <immintrin.h>
#include <stdint.h>

#define SIMD_TILE_ROWS 2
#define SIMD_TILE_OUTS 2
#define SIMD_OUTER_ROWS 6 /* and of the outer-product kernel */
#define SIMD_OUTER_VECTORS 1

typedef struct {
    __m256 a, b;
} v16;
typedef struct {
    __m256i a, b;
} u16;

static inline v16 v16_load(const float *p)
{
    return (v16){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}

static inline void v16_store(float *p, v16 x)
{
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}

static inline v16 v16_set1(float x)
{
    return (v16){_mm256_set1_ps(x), _mm256_set1_ps(x)};
}

#define SIMD_BINARY(name, intrinsic)                            \
    static inline v16 name(v16 x, v16 y)                        \
    {                                                           \
        return (v16){intrinsic(x.a, y.a), intrinsic(x.b, y.b)}; \
    }
SIMD_BINARY(v16_add, _mm256_add_ps)
SIMD_BINARY(v16_sub, _mm256_sub_ps)
SIMD_BINARY(v16_mul, _mm256_mul_ps)
SIMD_BINARY(v16_div, _mm256_div_ps)
SIMD_BINARY(v16_max, _mm256_max_ps)
SIMD_BINARY(v16_min, _mm256_min_ps)
#undef SIMD_BINARY

static inline v16 v16_sqrt(v16 x)
{
    return (v16){_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)};
}

static inline v16 v16_fma(v16 x, v16 y, v16 z)
{
    return (v16){_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}

static inline v16 v16_round(v16 x)
{
    return (v16){_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                 _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

static inline __m256 simd_exp2_whole(__m256 n)
{
    __m256i i = _mm256_add_epi32(_mm256_cvttps_epi32(n), _mm256_set1_epi32(127));

    return _mm256_castsi256_ps(_mm256_slli_epi32(i, 23));
}

static inline v16 v16_exp2_whole(v16 n)
{
    return (v16){simd_exp2_whole(n.a), simd_exp2_whole(n.b)};
}

static inline float v16_sum(v16 x)
{
    __m256 s8 = _mm256_add_ps(x.a, x.b);
    __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
    __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));

    return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
}

static inline float v16_hmax(v16 x)
{
    __m256 s8 = _mm256_max_ps(x.a, x.b);
    __m128 s4 = _mm_max_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
    __m128 s2 = _mm_max_ps(s4, _mm_movehl_ps(s4, s4));

    return _mm_cvtss_f32(_mm_max_ss(s2, _mm_movehdup_ps(s2)));
}

static inline __m256 simd_load_bf16(const uint16_t *p)
{
    __m256i i = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));

    return _mm256_castsi256_ps(_mm256_slli_epi32(i, 16));
}

static inline v16 v16_load_bf16(const uint16_t *p)
{
    return (v16){simd_load_bf16(p), simd_load_bf16(p + 8)};
}

static inline v16 v16_load_f16(const uint16_t *p)
{
    return (v16){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
                 _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)))};
}

static inline u16 u16_load(const uint32_t *p)
{
    return (u16){_mm256_loadu_si256((const __m256i *)p),
                 _mm256_loadu_si256((const __m256i *)(p + 8))};
}

static inline u16 u16_shift_right4(u16 x)
{
    return (u16){_mm256_srli_epi32(x.a, 4), _mm256_srli_epi32(x.b, 4)};
}

/* Entries 0 to 7 and 8 to 15: vpermps sees three bits, the fourth chooses. */
typedef struct {
    __m256 low, high;
} table16;

static inline table16 table16_load(const float *p)
{
    return (table16){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}

static inline __m256 simd_look_up(table16 t, __m256i index)
{
    __m256 low = _mm256_permutevar8x32_ps(t.low, index);
    __m256 high = _mm256_permutevar8x32_ps(t.high, index);

    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}

static inline v16 table16_look_up(table16 t, u16 index)
{
    return (v16){simd_look_up(t, index.a), simd_look_up(t, index.b)};
}

#endif
