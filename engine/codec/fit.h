/* fit.h: the best left side there is to a given right side of a product. */
#ifndef GRAFT_CODEC_FIT_H
#define GRAFT_CODEC_FIT_H

#include <stdint.h>

#include "engine/base/err.h"

/* left with the least (delta - leftᵀ·right)·H·(delta - leftᵀ·right)ᵀ:
 *   left = inner⁻¹ · right·H·deltaᵀ, inner = right·H·rightᵀ (lightly damped)
 * delta [rows, cols], h [cols, cols] or NULL (the identity), right [rank, cols]; out: left [rank,
 * rows] and inner [rank, rank], the metric in which left may be rounded. */
int fit_left(const double *delta, const double *h, const double *right, int32_t rows, int32_t cols,
             int32_t rank, double *left, double *inner, struct err *err);

#endif
