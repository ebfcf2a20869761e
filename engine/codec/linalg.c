#include "engine/codec/linalg.h"

#include <cblas.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

void openblas_set_num_threads(int threads); /* cblas.h has it only in OpenBLAS's own copy */

/* Fortran's: column-major, so that a symmetric matrix's upper half is our lower one. */
void dpotrf_(const char *uplo, const int *n, double *a, const int *lda, int *info);
void dpotri_(const char *uplo, const int *n, double *a, const int *lda, int *info);
void dsyevd_(const char *job, const char *uplo, const int *n, double *a, const int *lda, double *w,
             double *work, const int *lwork, int *iwork, const int *liwork, int *info);

void linalg_one_thread(void)
{
    openblas_set_num_threads(1);
}

void linalg_product(bool transpose_a, bool transpose_b, int32_t m, int32_t n, int32_t k,
                    const double *a, const double *b, double *c)
{
    cblas_dgemm(CblasRowMajor, transpose_a ? CblasTrans : CblasNoTrans,
                transpose_b ? CblasTrans : CblasNoTrans, m, n, k, 1.0, a, transpose_a ? m : k, b,
                transpose_b ? k : n, 0.0, c, n);
}

void linalg_product_f32(bool transpose_a, int32_t m, int32_t n, int32_t k, const float *a,
                        const float *b, float *c)
{
    if (k > 0)
        cblas_sgemm(CblasRowMajor, transpose_a ? CblasTrans : CblasNoTrans, CblasNoTrans, m, n, k,
                    1, a, transpose_a ? m : k, b, n, 0, c, n);
    else
        memset(c, 0, (size_t)m * (size_t)n * sizeof *c);
}

static void clear_upper(double *a, int32_t n)
{
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = i + 1; j < n; j++)
            a[i * n + j] = 0;
}

int linalg_cholesky(double *a, int32_t n, struct err *err)
{
    int size = n, info = 0;

    dpotrf_("U", &size, a, &size, &info);
    if (info != 0)
        return err_set(err, ERR_INVALID, "a matrix of %d is not positive definite (row %d)", n,
                       info);
    clear_upper(a, n);
    return 0;
}

void linalg_solve_lower(const double *l, int32_t n, bool transposed, double *b, int32_t cols)
{
    cblas_dtrsm(CblasRowMajor, CblasLeft, CblasLower, transposed ? CblasTrans : CblasNoTrans,
                CblasNonUnit, n, cols, 1.0, l, n, b, cols);
}

int linalg_feedback(double *a, int32_t n, struct err *err)
{
    int size = n, info = 0;

    if (linalg_cholesky(a, n, err))
        return -1;
    dpotri_("U", &size, a, &size, &info);
    if (info != 0)
        return err_set(err, ERR_INVALID, "a matrix of %d has no inverse (row %d)", n, info);
    for (int64_t i = 0; i < n; i++) /* the inverse is in our lower half */
        for (int64_t j = i + 1; j < n; j++)
            a[i * n + j] = a[j * n + i];
    if (linalg_cholesky(a, n, err))
        return -1;
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = i + 1; j < n; j++) {
            a[i * n + j] = a[j * n + i];
            a[j * n + i] = 0;
        }
    return 0;
}

/* a, symmetric, becomes its eigenvectors, one in each row, values ascending. */
static int eigen(double *a, int32_t n, double *value, struct err *err)
{
    int size = n, info = 0, lwork = -1, liwork = -1, iask = 0;
    double ask = 0, *work = NULL;
    int *iwork = NULL;

    dsyevd_("V", "L", &size, a, &size, value, &ask, &lwork, &iask, &liwork, &info);
    lwork = (int)ask + 1;
    liwork = iask + 1;
    work = malloc((size_t)lwork * sizeof *work);
    iwork = malloc((size_t)liwork * sizeof *iwork);
    if (work && iwork)
        dsyevd_("V", "L", &size, a, &size, value, work, &lwork, iwork, &liwork, &info);
    free(iwork);
    if (!work || !iwork) {
        free(work);
        return err_set(err, ERR_NO_MEMORY, "no memory for eigenvectors of %d", n);
    }
    free(work);
    if (info != 0)
        return err_set(err, ERR_INVALID, "a matrix of %d has no eigenvectors: it is not finite", n);
    return 0;
}

/* The other side of a singular vector of length one: a·v or aᵀ·v, divided by its length. */
static void other_side(double *x, int32_t count, int32_t length, const double *s)
{
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < length; j++)
            x[i * length + j] = s[i] > 0 ? x[i * length + j] / s[i] : 0;
}

int linalg_svd(const double *a, int32_t m, int32_t n, double *u, double *s, double *vt,
               struct err *err)
{
    bool wide = m <= n; /* the gram matrix is a·aᵀ */
    int32_t r = wide ? m : n, other = wide ? n : m;
    double *vector = malloc((size_t)r * (size_t)r * sizeof *vector);
    double *across = malloc((size_t)r * (size_t)other * sizeof *across);
    double *value = malloc((size_t)r * sizeof *value);
    int rc = -1;

    if (!vector || !across || !value) {
        err_set(err, ERR_NO_MEMORY, "no memory for singular vectors of %d by %d", m, n);
        goto out;
    }
    linalg_product(!wide, wide, r, r, other, a, a, vector);
    if (eigen(vector, r, value, err))
        goto out;
    for (int64_t i = 0; i < r / 2; i++) /* descending */
        for (int64_t j = 0; j < r; j++) {
            double swap = vector[i * r + j];

            vector[i * r + j] = vector[(r - 1 - i) * r + j];
            vector[(r - 1 - i) * r + j] = swap;
        }
    for (int64_t i = 0; i < r; i++)
        s[i] = value[r - 1 - i] > 0 ? sqrt(value[r - 1 - i]) : 0;
    /* vector [r, r] in rows; across [r, other] = vectorᵀ's images. */
    linalg_product(false, !wide, r, other, r, vector, a, across);
    other_side(across, r, other, s);
    if (wide)
        memcpy(vt, across, (size_t)r * (size_t)n * sizeof *vt);
    else
        memcpy(vt, vector, (size_t)r * (size_t)n * sizeof *vt);
    for (int64_t i = 0; i < m; i++)
        for (int64_t k = 0; k < r; k++)
            u[i * r + k] = wide ? vector[k * r + i] : across[k * m + i];
    rc = 0;
out:
    free(value);
    free(across);
    free(vector);
    return rc;
}
