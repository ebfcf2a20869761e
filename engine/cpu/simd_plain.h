/* simd_plain.h: v16, sixteen floats, in plain C. The definition of what simd_avx2.h and
 * simd_avx512.h compute: all three give the same bits, operation by operation.
 *
 * v16_sum adds lanes i and i + 8, then i and i + 4, then i and i + 2, then i and i + 1. */
#ifndef GRAFT_CPU_SIMD_PLAIN_H
#define GRAFT_CPU_SIMD_PLAIN_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "engine/tensor.h"

#define SIMD_TILE_ROWS 2 /* register tile of the dot kernel: rows × outputs accumulators */
#define SIMD_TILE_OUTS 2
#define SIMD_OUTER_ROWS 2 /* and of the outer-product kernel */
#define SIMD_OUTER_VECTORS 1

typedef struct {
    float f[16];
} v16;
typedef struct {
    uint32_t u[16];
} u16;

#define SIMD_EACH(expr)          \
    v16 r_;                      \
    for (int i = 0; i < 16; i++) \
        r_.f[i] = (expr);        \
    return r_

static inline v16 v16_load(const float *p)
{
    v16 r;

    memcpy(&r, p, sizeof r);
    return r;
}

static inline void v16_store(float *p, v16 a)
{
    memcpy(p, &a, sizeof a);
}

static inline v16 v16_set1(float x)
{
    SIMD_EACH(x);
}

static inline v16 v16_add(v16 a, v16 b)
{
    SIMD_EACH(a.f[i] + b.f[i]);
}

static inline v16 v16_sub(v16 a, v16 b)
{
    SIMD_EACH(a.f[i] - b.f[i]);
}

static inline v16 v16_mul(v16 a, v16 b)
{
    SIMD_EACH(a.f[i] * b.f[i]);
}

static inline v16 v16_div(v16 a, v16 b)
{
    SIMD_EACH(a.f[i] / b.f[i]);
}

static inline v16 v16_sqrt(v16 a)
{
    SIMD_EACH(sqrtf(a.f[i]));
}

static inline v16 v16_fma(v16 a, v16 b, v16 c)
{
    SIMD_EACH(fmaf(a.f[i], b.f[i], c.f[i]));
}

/* As x86 does it: b where one of them is not a number. */
static inline v16 v16_max(v16 a, v16 b)
{
    SIMD_EACH(a.f[i] > b.f[i] ? a.f[i] : b.f[i]);
}

static inline v16 v16_min(v16 a, v16 b)
{
    SIMD_EACH(a.f[i] < b.f[i] ? a.f[i] : b.f[i]);
}

static inline v16 v16_round(v16 a) /* to nearest, ties to even */
{
    SIMD_EACH(rintf(a.f[i]));
}

/* 2^n for whole n in [-126, 127] */
static inline v16 v16_exp2_whole(v16 n)
{
    v16 r;

    for (int i = 0; i < 16; i++) {
        uint32_t bits = (uint32_t)((int32_t)n.f[i] + 127) << 23;

        memcpy(&r.f[i], &bits, sizeof bits);
    }
    return r;
}

static inline float v16_sum(v16 a)
{
    for (int width = 8; width > 0; width /= 2)
        for (int i = 0; i < width; i++)
            a.f[i] += a.f[i + width];
    return a.f[0];
}

static inline float v16_hmax(v16 a)
{
    for (int width = 8; width > 0; width /= 2)
        for (int i = 0; i < width; i++)
            a.f[i] = a.f[i] > a.f[i + width] ? a.f[i] : a.f[i + width];
    return a.f[0];
}

static inline v16 v16_load_bf16(const uint16_t *p)
{
    SIMD_EACH(bf16_to_f32(p[i]));
}

static inline v16 v16_load_f16(const uint16_t *p)
{
    SIMD_EACH(f16_to_f32(p[i]));
}

static inline u16 u16_load(const uint32_t *p)
{
    u16 r;

    memcpy(&r, p, sizeof r);
    return r;
}

static inline u16 u16_shift_right4(u16 a)
{
    for (int i = 0; i < 16; i++)
        a.u[i] >>= 4;
    return a;
}

/* A table of 16 floats, and the entry of each lane's low four bits. */
typedef struct {
    v16 t;
} table16;

static inline table16 table16_load(const float *p)
{
    return (table16){v16_load(p)};
}

static inline v16 table16_look_up(table16 table, u16 index)
{
    SIMD_EACH(table.t.f[index.u[i] & 15]);
}

#undef SIMD_EACH
#endif
