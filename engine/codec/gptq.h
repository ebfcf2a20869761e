/* gptq.h: rounding with the error fed forward (GPTQ, https://arxiv.org/abs/2210.17323): what a
 * column loses is made good by the columns behind it, as far as the metric lets one stand for the
 * other. */
#ifndef GRAFT_CODEC_GPTQ_H
#define GRAFT_CODEC_GPTQ_H

#include <stdint.h>

#include "engine/base/err.h"

struct gptq {
    double *x; /* [rows, cols] in: what to round; out: what it was rounded to */
    int32_t rows, cols;
    const double *feedback; /* [cols, cols] of the metric of the columns (linalg_feedback); NULL:
                               the identity */
    /* [rows, rows] likewise of the rows, where what one loses can be made good by those behind it;
     * NULL: the identity. The metric is the Kronecker product of both. */
    const double *row_feedback;
    /* Before column `col` is rounded: x has been fed its predecessors' errors, see GPTQ_BLOCK.
     * NULL: not wanted. -1 ends the rounding. */
    int (*begin)(void *context, const double *x, int32_t col, struct err *err);
    /* The value that x[row, col] is rounded to. */
    double (*round)(void *context, int32_t row, int32_t col, double value);
    void *context;
};

/* `begin` of a column sees it and those behind it up to date, up to the next multiple of this. */
#define GPTQ_BLOCK 128

int gptq_round(const struct gptq *gptq, struct err *err);

#endif
