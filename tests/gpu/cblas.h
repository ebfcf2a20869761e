/* cblas.h: the one product that the CPU backend takes from OpenBLAS, for machines without it:
 * `make check-gpu` finds this file first. Plain loops (blas.c), right and slow. */
#ifndef GRAFT_TESTS_GPU_CBLAS_H
#define GRAFT_TESTS_GPU_CBLAS_H

enum CBLAS_ORDER { CblasRowMajor = 101 };
enum CBLAS_TRANSPOSE { CblasNoTrans = 111, CblasTrans = 112 };

void cblas_sgemm(enum CBLAS_ORDER order, enum CBLAS_TRANSPOSE transpose_a,
                 enum CBLAS_TRANSPOSE transpose_b, long m, long n, long k, float alpha,
                 const float *a, long lda, const float *b, long ldb, float beta, float *c,
                 long ldc);

#endif
