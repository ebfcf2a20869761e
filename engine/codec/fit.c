#include "engine/codec/fit.h"

#include <stdlib.h>
#include <string.h>

#include "engine/codec/linalg.h"

#define FIT_DAMPING 1e-5 /* of the mean of inner's diagonal */

static int solve(double *left, const double *inner, int32_t rank, int32_t rows, struct err *err)
{
    size_t bytes = (size_t)rank * (size_t)rank * sizeof(double);
    double *root = malloc(bytes + 1);
    int rc;

    if (!root)
        return err_set(err, ERR_NO_MEMORY, "no memory to fit %d vectors", rank);
    memcpy(root, inner, bytes);
    rc = linalg_cholesky(root, rank, err);
    if (!rc) {
        linalg_solve_lower(root, rank, false, left, rows);
        linalg_solve_lower(root, rank, true, left, rows);
    }
    free(root);
    return rc;
}

int fit_left(const double *delta, const double *h, const double *right, int32_t rows, int32_t cols,
             int32_t rank, double *left, double *inner, struct err *err)
{
    double *right_h = NULL;
    const double *weighed = right;

    if (h) {
        right_h = malloc((size_t)rank * (size_t)cols * sizeof *right_h + 1);
        if (!right_h)
            return err_set(err, ERR_NO_MEMORY, "no memory to fit %d vectors", rank);
        linalg_product(false, false, rank, cols, cols, right, h, right_h);
        weighed = right_h;
    }
    linalg_product(false, true, rank, rank, cols, weighed, right, inner);
    linalg_product(false, true, rank, rows, cols, weighed, delta, left);
    free(right_h);
    linalg_damp(inner, rank, FIT_DAMPING);
    return solve(left, inner, rank, rows, err);
}
