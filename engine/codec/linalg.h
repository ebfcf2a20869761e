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

/* a [n, n], symmetric and positive definite, becomes lower triangular L with a = L·Lᵀ, zeros above.
 */
int linalg_cholesky(double *a, int32_t n, struct err *err);
/* b [n, cols] becomes L⁻¹·b, or L⁻ᵀ·b. */
void linalg_solve_lower(const double *l, int32_t n, bool transposed, double *b, int32_t cols);
/* a, symmetric and positive definite, becomes upper triangular U with a⁻¹ = Uᵀ·U, zeros below: what
 * GPTQ's error feedback goes by (https://arxiv.org/abs/2210.17323). */
int linalg_feedback(double *a, int32_t n, struct err *err);

/* a [m, n] = u · diag(s) · vt with r = min(m, n): u [m, r], s [r] descending and not negative,
 * vt [r, n]. By the eigenvectors of the smaller of a·aᵀ and aᵀ·a: singular values below 1e-8 of the
 * largest come out as noise of that size. */
int linalg_svd(const double *a, int32_t m, int32_t n, double *u, double *s, double *vt,
               struct err *err);

#endif
