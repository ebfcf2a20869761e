#include <assert.h>

#include "tests/gpu/cblas.h"

void openblas_set_num_threads(int threads);

void openblas_set_num_threads(int threads)
{
    assert(threads == 1);
}

void cblas_sgemm(enum CBLAS_ORDER order, enum CBLAS_TRANSPOSE transpose_a,
                 enum CBLAS_TRANSPOSE transpose_b, long m, long n, long k, float alpha,
                 const float *a, long lda, const float *b, long ldb, float beta, float *c, long ldc)
{
    assert(order == CblasRowMajor);
    for (long i = 0; i < m; i++)
        for (long j = 0; j < n; j++) {
            float sum = 0;

            for (long p = 0; p < k; p++)
                sum += (transpose_a == CblasTrans ? a[p * lda + i] : a[i * lda + p]) *
                       (transpose_b == CblasTrans ? b[j * ldb + p] : b[p * ldb + j]);
            c[i * ldc + j] = alpha * sum + (beta == 0 ? 0 : beta * c[i * ldc + j]);
        }
}
