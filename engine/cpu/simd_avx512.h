/* simd_avx512.h: v16 as one register of AVX-512 (F, BW, DQ, VL). Same bits as simd_plain.h. */
#ifndef GRAFT_CPU_SIMD_AVX512_H
#define GRAFT_CPU_SIMD_AVX512_H

#include <immintrin.h>
#include <stdint.h>

#define SIMD_TILE_ROWS 4
#define SIMD_TILE_OUTS 4
#define SIMD_OUTER_ROWS 8 /* and of the outer-product kernel */
#define SIMD_OUTER_VECTORS 3

typedef __m512 v16;
typedef __m512i u16;
typedef __m512 table16;

static inline v16 v16_load(const float *p)
{
    return _mm512_loadu_ps(p);
}

static inline void v16_store(float *p, v16 x)
{
    _mm512_storeu_ps(p, x);
}

static inline v16 v16_set1(float x)
{
    return _mm512_set1_ps(x);
}

static inline v16 v16_add(v16 x, v16 y)
{
    return _mm512_add_ps(x, y);
}

static inline v16 v16_sub(v16 x, v16 y)
{
    return _mm512_sub_ps(x, y);
}

static inline v16 v16_mul(v16 x, v16 y)
{
    return _mm512_mul_ps(x, y);
}

static inline v16 v16_div(v16 x, v16 y)
{
    return _mm512_div_ps(x, y);
}

static inline v16 v16_max(v16 x, v16 y)
{
    return _mm512_max_ps(x, y);
}

static inline v16 v16_min(v16 x, v16 y)
{
    return _mm512_min_ps(x, y);
}

static inline v16 v16_sqrt(v16 x)
{
    return _mm512_sqrt_ps(x);
}

static inline v16 v16_fma(v16 x, v16 y, v16 z)
{
    return _mm512_fmadd_ps(x, y, z);
}

static inline v16 v16_round(v16 x)
{
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

static inline v16 v16_exp2_whole(v16 n)
{
    __m512i i = _mm512_add_epi32(_mm512_cvttps_epi32(n), _mm512_set1_epi32(127));

    return _mm512_castsi512_ps(_mm512_slli_epi32(i, 23));
}

static inline float v16_sum(v16 x)
{
    __m256 s8 = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
    __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));

    return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
}

#define SIMD_SUMS /* v16_sums is here */

/* v16_sum of each, in the order of rows; every addition is the one that v16_sum makes. */
static inline v16 v16_sums(v16 x[SIMD_TILE_ROWS][SIMD_TILE_OUTS])
{
    v16 s[4], t[2];

    for (int o = 0; o < 4; o++) {
        v16 top = _mm512_add_ps(_mm512_shuffle_f32x4(x[0][o], x[1][o], 0x44),
                                _mm512_shuffle_f32x4(x[0][o], x[1][o], 0xee));
        v16 low = _mm512_add_ps(_mm512_shuffle_f32x4(x[2][o], x[3][o], 0x44),
                                _mm512_shuffle_f32x4(x[2][o], x[3][o], 0xee));

        s[o] = _mm512_add_ps(_mm512_shuffle_f32x4(top, low, 0x88),
                             _mm512_shuffle_f32x4(top, low, 0xdd));
    }
    for (int i = 0; i < 2; i++) {
        __m512d a = _mm512_castps_pd(s[2 * i]), b = _mm512_castps_pd(s[2 * i + 1]);

        t[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    return _mm512_add_ps(_mm512_shuffle_ps(t[0], t[1], 0x88), _mm512_shuffle_ps(t[0], t[1], 0xdd));
}

static inline float v16_hmax(v16 x)
{
    __m256 s8 = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 s4 = _mm_max_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
    __m128 s2 = _mm_max_ps(s4, _mm_movehl_ps(s4, s4));

    return _mm_cvtss_f32(_mm_max_ss(s2, _mm_movehdup_ps(s2)));
}

static inline v16 v16_load_bf16(const uint16_t *p)
{
    __m512i i = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));

    return _mm512_castsi512_ps(_mm512_slli_epi32(i, 16));
}

static inline v16 v16_load_f16(const uint16_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

static inline u16 u16_load(const uint32_t *p)
{
    return _mm512_loadu_si512(p);
}

static inline u16 u16_shift_right4(u16 x)
{
    return _mm512_srli_epi32(x, 4);
}

static inline table16 table16_load(const float *p)
{
    return _mm512_loadu_ps(p);
}

static inline v16 table16_look_up(table16 table, u16 index)
{
    return _mm512_permutexvar_ps(index, table); /* looks at four bits of each lane */
}

#endif
