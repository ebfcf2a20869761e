#include "engine/codec/linalg.h"

#include <cblas.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

void openblas_set_num_threads(int threads); /* cblas.h has it only in OpenBLAS's own copy */

/* Fortran's: column-major, so that a symmetric matrix's upper half is our lower one. */
void dpotrf_(const char *uplo, const int *n, double *a, const int *lda, int *info);
void dtrtri_(const char *uplo, const char *diag, const int *n, double *a, const int *lda,
             int *info);
void dsyevd_(const char *job, const char *uplo, const int *n, double *a, const int *lda, double *w,
             double *work, const int *lwork, int *iwork, const int *liwork, int *info);

void linalg_one_thread(void)
{
    openblas_set_num_threads(1);
}

void linalg_widen(const float *from, int64_t count, double *to)
{
    for (int64_t i = 0; i < count; i++)
        to[i] = (double)from[i];
}

void linalg_damp(double *a, int32_t n, double share)
{
    double mean = 0;

    for (int64_t i = 0; i < n; i++)
        mean += a[i * n + i] / n;
    for (int64_t i = 0; i < n; i++)
        a[i * n + i] += share * (mean > 0 ? mean : 1);
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

void linalg_lower_before(const double *l, int32_t n, double *b, int32_t cols)
{
    cblas_dtrmm(CblasRowMajor, CblasLeft, CblasLower, CblasTrans, CblasNonUnit, n, cols, 1.0, l, n,
                b, cols);
}

void linalg_lower_behind(const double *l, int32_t n, double *b, int32_t rows)
{
    cblas_dtrmm(CblasRowMajor, CblasRight, CblasLower, CblasNoTrans, CblasNonUnit, rows, n, 1.0, l,
                n, b, n);
}

/* Rows and columns in the opposite order. */
static void turn_round(double *a, int64_t n)
{
    for (int64_t i = 0, k = n * n - 1; i < k; i++, k--) {
        double swap = a[i];

        a[i] = a[k];
        a[k] = swap;
    }
}

/* With J a·J = L·Lᵀ, J turning the order round: a = (J L·J)·(J L·J)ᵀ, and so U = J L⁻¹ J. */
int linalg_feedback(double *a, int32_t n, struct err *err)
{
    int size = n, info = 0;

    turn_round(a, n);
    if (linalg_cholesky(a, n, err))
        return -1;
    dtrtri_("U", "N", &size, a, &size, &info); /* our lower half */
    if (info != 0)
        return err_set(err, ERR_INVALID, "a matrix of %d has no inverse (row %d)", n, info);
    turn_round(a, n);
    return 0;
}

/* value: ascending. With vectors a, of which only our upper half is read, becomes them, one in each
 * row. */
static int eigen(double *a, int32_t n, bool vectors, double *value, struct err *err)
{
    const char *job = vectors ? "V" : "N";
    int size = n, info = 0, lwork = -1, liwork = -1, iask = 0;
    double ask = 0, *work = NULL;
    int *iwork = NULL;

    dsyevd_(job, "L", &size, a, &size, value, &ask, &lwork, &iask, &liwork, &info);
    lwork = (int)ask + 1;
    liwork = iask + 1;
    work = malloc((size_t)lwork * sizeof *work);
    iwork = malloc((size_t)liwork * sizeof *iwork);
    if (work && iwork)
        dsyevd_(job, "L", &size, a, &size, value, work, &lwork, iwork, &liwork, &info);
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

/* Right singular vectors of a [m, n] from the eigenvectors of its smaller square [r, r], ascending:
 * they are these, or a's images of them, divided by their length. */
static void right_vectors(const double *a, int32_t m, int32_t n, const double *vector, int32_t rank,
                          const double *s, double *vt)
{
    int64_t r = m <= n ? m : n;

    for (int64_t v = 0; v < rank && m > n; v++)
        memcpy(vt + v * n, vector + (r - 1 - v) * r, (size_t)n * sizeof *vt);
    if (m > n || rank == 0)
        return;
    cblas_dgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, rank, n, m, 1.0, vector + (r - rank) * r,
                m, a, n, 0.0, vt, n);
    for (int64_t v = 0; v < rank / 2; v++)
        cblas_dswap(n, vt + v * n, 1, vt + (rank - 1 - v) * n, 1);
    for (int64_t v = 0; v < rank; v++)
        for (int64_t j = 0; j < n; j++)
            vt[v * n + j] = s[v] > 0 ? vt[v * n + j] / s[v] : 0;
}

int linalg_singular(const double *a, int32_t m, int32_t n, int32_t rank, double *s, double *vt,
                    struct err *err)
{
    bool wide = m <= n;
    int32_t r = wide ? m : n;
    double *square = malloc((size_t)r * (size_t)r * sizeof *square);
    double *value = malloc((size_t)r * sizeof *value);
    int rc = -1;

    if (!square || !value) {
        err_set(err, ERR_NO_MEMORY, "no memory for singular vectors of %d by %d", m, n);
        goto out;
    }
    cblas_dsyrk(CblasRowMajor, CblasUpper, wide ? CblasNoTrans : CblasTrans, r, wide ? n : m, 1.0,
                a, n, 0.0, square, r);
    if (eigen(square, r, rank > 0, value, err))
        goto out;
    for (int64_t v = 0; v < r; v++)
        s[v] = value[r - 1 - v] > 0 ? sqrt(value[r - 1 - v]) : 0;
    right_vectors(a, m, n, square, rank, s, vt);
    rc = 0;
out:
    free(value);
    free(square);
    return rc;
}
