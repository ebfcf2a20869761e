/* kernels.h: the inner loops of the CPU backend, compiled three times: plain C, AVX2 with FMA,
 * AVX-512. kernels_body.h holds the one source; simd_*.h the sixteen-lane vectors it is written in.
 *
 * All three give the same bits: every sum runs in sixteen lanes (element i goes to lane i % 16, in
 * order) that are added as v16_sum says, and fused multiply-adds are fused everywhere. How many
 * rows a call has never changes the order in which one of them is summed.
 *
 * Pure functions on host memory; any thread. */
#ifndef GRAFT_CPU_KERNELS_H
#define GRAFT_CPU_KERNELS_H

#include <stdbool.h>
#include <stdint.h>

#include "engine/tensor.h"

struct dot_args { /* y[r][o] = x[r] · w[o], or += */
    const float *x;
    int64_t ldx; /* distance of rows, in elements */
    int32_t rows;
    const void *w; /* F32, BF16 or F16 */
    enum dtype dtype;
    int64_t ldw;
    int32_t outs;
    int32_t n; /* length of the products */
    float *y;
    int64_t ldy;
    bool add;
};

/* c[r][j] = Σ_k a(r, k) · b[k][j], or +=, k in order, with a(r, k) = a[r · row_step + k · k_step]:
 * A as it is or transposed. b is packed by pack(): columns padded with zeros to a multiple of 16.
 */
struct outer_args {
    const float *a;
    int64_t row_step, k_step;
    const float *b;
    int64_t ldb;
    int32_t rows, cols, k;
    float *c;
    int64_t ldc;
    bool add;
};

/* Signs repacked for the look-up kernel: blocks of 16 outputs, of each the words of 32 columns,
 * one lane for each output: [(rows + 15) / 16][(cols + 31) / 32][16]. */
struct sign_args { /* y[o] += scale[o] · Σ_c ±x[c], for the outputs of blocks [from, to) */
    const float *x;
    int32_t rows, cols;
    const uint32_t *bits;
    const float *scale; /* [rows] */
    int32_t from, to;
    float *y; /* [rows] */
};

struct adamw_step {
    float clip; /* factor on gradients */
    float learning_rate, beta1, beta2, epsilon, decay;
    float correction1, correction2; /* 1 - beta^step */
};

/* Two rows of logits, and their probabilities p = exp(logit - max) · share. */
struct divergence_args {
    const float *teacher; /* [n] */
    float *model;         /* [n]; out: weight · (p - p_teacher) */
    int32_t n;
    float teacher_max, teacher_share, max, share;
    float shift; /* log Σ exp of the teacher's logits, less that of the model's */
    float weight;
};

struct cpu_kernels {
    const char *name;

    void (*dot)(const struct dot_args *);
    void (*outer)(const struct outer_args *);
    void (*sign)(const struct sign_args *);

    /* out[e] = alpha · out[e] + Σ_k p[k] · v[k][e]; k in order */
    void (*weighted_sum)(const float *p, int32_t keys, const float *v, int64_t ldv, int32_t width,
                         float alpha, float *out);
    float (*scale_max)(float *x, int32_t n, float scale); /* x *= scale; the largest */
    float (*exp_sum)(float *x, int32_t n, float max);     /* x = exp(x - max); their sum */
    /* x = exp(scale · x - lse), the probabilities again */
    void (*softmax_again)(float *x, int32_t n, float scale, float lse);
    /* p = p · (dp - delta) · scale */
    void (*softmax_backward)(float *p, const float *dp, int32_t n, float delta, float scale);
    /* KL(teacher || model) = Σ p_teacher·d with d = log p_teacher - log p, but summed up as
     * p_teacher·(exp(-d) - 1 + d): the same, as both p add up to 1, without a negative term. So
     * nothing cancels, and an error of shift comes in squared. */
    double (*divergence)(const struct divergence_args *);
    void (*scale)(float *x, int32_t n, float s);
    void (*add)(const float *a, const float *b, float *y, int32_t n); /* y = a + b */
    float (*product)(const float *a, const float *b, int32_t n);

    /* n = x · rstd · w; returns rstd = 1 / sqrt(mean(x²) + eps). n may be x. */
    float (*rms_norm)(const float *x, const float *w, float *n, int32_t width, float eps);
    /* The same n, from a known rstd. */
    void (*rms_norm_again)(const float *x, const float *w, float *n, int32_t width, float rstd);
    /* dx += gradient through rms_norm of dn */
    void (*rms_norm_backward)(const float *x, const float *w, const float *dn, float *dx,
                              int32_t width, float rstd);
    /* dw[j] += Σ_t dn[t][j] · x[t][j] · rstd[t], t in order */
    void (*rms_norm_weight_grad)(const float *x, const float *dn, int64_t ld, const float *rstd,
                                 int64_t ldr, int32_t rows, int32_t width, float *dw);
    void (*column_sum)(const float *x, int64_t ld, int32_t rows, int32_t width, float *sum);

    /* Halves of a head rotate against each other: cs is E/2 cosines, E/2 sines. */
    void (*rope)(float *x, int32_t heads, int32_t head_dim, const float *cs, bool backward);
    void (*silu_mul)(const float *gate, const float *up, float *act, int32_t n);
    /* act again, and gate and up replaced by their gradients */
    void (*silu_mul_backward)(float *gate, float *up, const float *d_act, float *act, int32_t n);

    double (*sum_squares)(const float *x, int64_t n);
    void (*adamw)(float *w, float *g, float *m, float *v, int64_t n, const struct adamw_step *s);
};

extern const struct cpu_kernels cpu_kernels_plain, cpu_kernels_avx2, cpu_kernels_avx512;

/* The kernels that this processor can run, best first, NULL at the end: at most 4 entries. */
const struct cpu_kernels *const *cpu_kernels_usable(void);

#endif
