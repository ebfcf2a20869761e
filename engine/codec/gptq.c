#include "engine/codec/gptq.h"

#include <cblas.h>
#include <stdlib.h>

/* Columns [from, to) of all rows; error[row, col - from]: what each lost, in units of feedback. */
static void round_block(const struct gptq *g, int64_t from, int64_t to, double *error)
{
    int64_t cols = g->cols;

    for (int64_t c = from; c < to; c++) {
        const double *feedback = g->feedback ? g->feedback + c * cols : NULL;

        if (g->begin)
            g->begin(g->context, g->x, (int32_t)c);
        for (int64_t r = 0; r < g->rows; r++) {
            double *x = g->x + r * cols, was = x[c], wrong;

            x[c] = g->round(g->context, (int32_t)r, (int32_t)c, was);
            if (!feedback)
                continue;
            wrong = (was - x[c]) / feedback[c];
            error[r * GPTQ_BLOCK + c - from] = wrong;
            for (int64_t i = c + 1; i < to; i++)
                x[i] -= wrong * feedback[i];
        }
    }
}

int gptq_round(const struct gptq *g, struct err *err)
{
    int64_t cols = g->cols;
    double *error = malloc((size_t)g->rows * GPTQ_BLOCK * sizeof *error + 1);

    if (!error)
        return err_set(err, ERR_NO_MEMORY, "no memory to round %d rows", g->rows);
    for (int64_t from = 0, to; from < cols; from = to) {
        to = from + GPTQ_BLOCK < cols ? from + GPTQ_BLOCK : cols;
        round_block(g, from, to, error);
        if (g->feedback && to < cols && g->rows > 0)
            cblas_dgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, g->rows, (int)(cols - to),
                        (int)(to - from), -1.0, error, GPTQ_BLOCK, g->feedback + from * cols + to,
                        (int)cols, 1.0, g->x + to, (int)cols);
    }
    free(error);
    return 0;
}
