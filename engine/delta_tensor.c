#include <math.h>

#include "engine/backend.h"

static int check_planes(const struct delta_planes *p, struct err *err)
{
    if (p->planes < 1 || p->rank < 1)
        return err_set(err, ERR_INVALID, "delta: %d planes of %d vectors", p->planes, p->rank);
    for (int32_t i = 0; i < p->planes; i++) {
        if (p->vector[i] < (i ? p->vector[i - 1] : 0) || p->vector[i] >= p->rank)
            return err_set(err, ERR_INVALID, "delta: plane %d belongs to vector %d of %d", i,
                           p->vector[i], p->rank);
        if (i >= DELTA_VECTOR_PLANES && p->vector[i - DELTA_VECTOR_PLANES] == p->vector[i])
            return err_set(err, ERR_INVALID, "delta: vector %d has more than %d planes",
                           p->vector[i], DELTA_VECTOR_PLANES);
    }
    return 0;
}

static int check_factors(const struct delta_tensor *delta, struct err *err)
{
    const struct tensor *left = &delta->factors.left, *right = &delta->factors.right;

    if (left->dtype > DTYPE_F16 || right->dtype > DTYPE_F16)
        return err_set(err, ERR_INVALID, "delta: factors of dtypes %s and %s",
                       dtype_name(left->dtype), dtype_name(right->dtype));
    if (left->rank != 2 || right->rank != 2 || left->shape[0] != delta->rows ||
        right->shape[1] != delta->cols || left->shape[1] != right->shape[0] || left->shape[1] < 1)
        return err_set(err, ERR_INVALID, "delta: factors that do not make a matrix of %d by %d",
                       delta->rows, delta->cols);
    if (!isfinite(delta->factors.scale) || delta->factors.scale == 0)
        return err_set(err, ERR_INVALID, "delta: factors with a scale of %g",
                       (double)delta->factors.scale);
    return 0;
}

int delta_tensor_check(const struct delta_tensor *delta, struct err *err)
{
    if (delta->rows < 1 || delta->cols < 1)
        return err_set(err, ERR_INVALID, "delta: a matrix of %d by %d", delta->rows, delta->cols);
    if (delta->kind == DELTA_SIGN && delta->scale_count != 1 && delta->scale_count != delta->rows)
        return err_set(err, ERR_INVALID, "delta: %d scales for %d rows", delta->scale_count,
                       delta->rows);
    if (delta->kind == DELTA_DENSE && delta->dense.dtype > DTYPE_F16)
        return err_set(err, ERR_INVALID, "delta: a dense difference of dtype %s",
                       dtype_name(delta->dense.dtype));
    if (delta->kind == DELTA_PLANES)
        return check_planes(&delta->planes, err);
    return delta->kind == DELTA_FACTORS ? check_factors(delta, err) : 0;
}
