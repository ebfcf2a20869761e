/* linalg.h: what the codecs need of dense linear algebra, by OpenBLAS and its LAPACK, in double
 * precision: a delta's singular values span many orders of magnitude.
 *
 * Matrices are row-major and contiguous. ERR_INVALID: the matrix is not what the function takes
 * (not positive definite, not finite); ERR_NO_MEMORY. Any thread; whoever
 * works on several matrices at once says linalg_one_thread() before. */
#ifndef GRAFT_CODEC_LINALG_H
#define GRAFT_CODEC_LINALG_H

#include <stdbool.h>
#include <stdint.h>

#include "engine/base/err.h"

/* OpenBLAS computes in the calling thread from now on, for the whole process, as the CPU backend
 * has it do: its own threads beside a pool's would fight for cores, and sum in another order. */
void linalg_one_thread(void);

/* c [m, n] = op(a) · op(b), with k the inner length. */
void linalg_product(bool transpose_a, bool transpose_b, int32_t m, int32_t n, int32_t k,
                    const double *a, const double *b, double *c);

/* The same in floats, b as it is; zeros where k is 0. */
void linalg_product_f32(bool transpose_a, int32_t m, int32_t n, int32_t k, const float *a,
                        const float *b, float *c);

void linalg_widen(const float *from, int64_t count, double *to);
/* Adds `share` of the mean of its diagonal (of 1 where that is not positive) to a's [n, n]. */
void linalg_damp(double *a, int32_t n, double share);

/* a [n, n], symmetric and positive definite, becomes lower triangular L with a = L·Lᵀ, zeros above.
 */
int linalg_cholesky(double *a, int32_t n, struct err *err);
/* b [n, cols] becomes L⁻¹·b, or L⁻ᵀ·b. */
void linalg_solve_lower(const double *l, int32_t n, bool transposed, double *b, int32_t cols);
/* b [n, cols] becomes Lᵀ·b. */
void linalg_lower_before(const double *l, int32_t n, double *b, int32_t cols);
/* b [rows, n] becomes b·L. */
void linalg_lower_behind(const double *l, int32_t n, double *b, int32_t rows);
/* a, symmetric and positive definite, becomes upper triangular U with a⁻¹ = Uᵀ·U, zeros below: what
 * GPTQ's error feedback goes by (https://arxiv.org/abs/2210.17323). */
int linalg_feedback(double *a, int32_t n, struct err *err);

/* s [min(m, n)]: the singular values of a [m, n], descending and not negative; vt [rank, n]: the
 * right singular vectors of the first `rank` of them, which may be none. By the eigenvectors of the
 * smaller of a·aᵀ and aᵀ·a: values below 1e-8 of the largest come out as noise of that size, and
 * their vectors may be 0. */
int linalg_singular(const double *a, int32_t m, int32_t n, int32_t rank, double *s, double *vt,
                    struct err *err);

#endif
