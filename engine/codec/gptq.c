#include "engine/codec/gptq.h"

#include <cblas.h>
#include <stdlib.h>

struct work {
    double *error;  /* [rows, GPTQ_BLOCK] what each element of a block lost, in units of feedback */
    double *column; /* [rows] what is to be rounded, fed with what the rows before it lost */
};

/* One column, row by row; what it holds then is what it was rounded to. */
static void round_column(const struct gptq *g, int64_t c, double *column)
{
    int64_t cols = g->cols;

    for (int64_t r = 0; r < g->rows; r++)
        column[r] = g->x[r * cols + c];
    for (int64_t r = 0; r < g->rows; r++) {
        const double *feedback = g->row_feedback ? g->row_feedback + r * g->rows : NULL;
        double was = column[r], wrong;

        column[r] = g->round(g->context, (int32_t)r, (int32_t)c, was);
        if (!feedback)
            continue;
        wrong = (was - column[r]) / feedback[r];
        for (int64_t i = r + 1; i < g->rows; i++)
            column[i] -= wrong * feedback[i];
    }
}

/* Columns [from, to) of all rows. */
static int round_block(const struct gptq *g, int64_t from, int64_t to, const struct work *w,
                       struct err *err)
{
    int64_t cols = g->cols;

    for (int64_t c = from; c < to; c++) {
        const double *feedback = g->feedback ? g->feedback + c * cols : NULL;

        if (g->begin && g->begin(g->context, g->x, (int32_t)c, err))
            return -1;
        round_column(g, c, w->column);
        for (int64_t r = 0; r < g->rows; r++) {
            double *x = g->x + r * cols, was = x[c], wrong;

            x[c] = w->column[r];
            if (!feedback)
                continue;
            wrong = (was - x[c]) / feedback[c];
            w->error[r * GPTQ_BLOCK + c - from] = wrong;
            for (int64_t i = c + 1; i < to; i++)
                x[i] -= wrong * feedback[i];
        }
    }
    return 0;
}

int gptq_round(const struct gptq *g, struct err *err)
{
    int64_t cols = g->cols;
    struct work w = {malloc((size_t)g->rows * GPTQ_BLOCK * sizeof *w.error + 1),
                     malloc((size_t)g->rows * sizeof *w.column + 1)};
    int rc = -1;

    if (!w.error || !w.column) {
        err_set(err, ERR_NO_MEMORY, "no memory to round %d rows", g->rows);
        goto out;
    }
    for (int64_t from = 0, to; from < cols; from = to) {
        to = from + GPTQ_BLOCK < cols ? from + GPTQ_BLOCK : cols;
        if (round_block(g, from, to, &w, err))
            goto out;
        if (g->feedback && to < cols && g->rows > 0)
            cblas_dgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, g->rows, (int)(cols - to),
                        (int)(to - from), -1.0, w.error, GPTQ_BLOCK, g->feedback + from * cols + to,
                        (int)cols, 1.0, g->x + to, (int)cols);
    }
    rc = 0;
out:
    free(w.error);
    free(w.column);
    return rc;
}
