#include "engine/codec/factor.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/codec/fit.h"
#include "engine/codec/gptq.h"
#include "engine/codec/linalg.h"
#include "engine/codec/planes.h"
#include "engine/tensor.h"

#define SCALE_STEP 1.15f /* between scales that are tried */

struct factor {
    int32_t rows, cols, rank, vectors;
    double *delta;   /* [rows, cols] */
    double *h, *g;   /* [cols, cols], [rows, rows] damped; NULL: the identity */
    double *lg, *lh; /* their Cholesky factors; NULL: the identity */
    double *s, *vt;  /* [rank], [vectors, cols], of lgᵀ · delta · lh */
    double *energy;  /* [rank] */
};

static double *new_doubles(int64_t count)
{
    return malloc((size_t)(count > 0 ? count : 1) * sizeof(double));
}

/* ------------------------------------------------------------------ open */

/* A damped copy. */
static double *damped(const float *a, int32_t n)
{
    double *copy = new_doubles((int64_t)n * n);

    if (!copy)
        return NULL;
    linalg_widen(a, (int64_t)n * n, copy);
    linalg_damp(copy, n, FACTOR_DAMPING);
    return copy;
}

/* A damped copy and its Cholesky factor; neither where there is no `a`. */
static int open_side(const float *a, int32_t n, double **copy, double **root, struct err *err)
{
    if (!a)
        return 0;
    *copy = damped(a, n);
    *root = new_doubles((int64_t)n * n);
    if (!*copy || !*root)
        return err_set(err, ERR_NO_MEMORY, "no memory for the statistics of a matrix");
    memcpy(*root, *copy, (size_t)n * (size_t)n * sizeof **root);
    return linalg_cholesky(*root, n, err);
}

static int open_metric(struct factor *f, const struct factor_statistics *s, struct err *err)
{
    if (!s)
        return 0;
    if (open_side(s->h, f->cols, &f->h, &f->lh, err))
        return err_prefix(err, "inputs");
    if (open_side(s->g, f->rows, &f->g, &f->lg, err))
        return err_prefix(err, "gradients");
    return 0;
}

/* x [rows, cols] becomes lgᵀ · x · lh. */
static void into_metric(const struct factor *f, double *x)
{
    if (f->lg)
        linalg_lower_before(f->lg, f->rows, x, f->cols);
    if (f->lh)
        linalg_lower_behind(f->lh, f->cols, x, f->rows);
}

static int decompose(struct factor *f, struct err *err)
{
    int64_t size = (int64_t)f->rows * f->cols;
    double *inside = new_doubles(size);
    int rc = -1;

    f->vt = new_doubles((int64_t)f->vectors * f->cols);
    f->s = new_doubles(f->rank);
    f->energy = new_doubles(f->rank);
    if (!inside || !f->vt || !f->s || !f->energy) {
        err_set(err, ERR_NO_MEMORY, "no memory to decompose a matrix of %d by %d", f->rows,
                f->cols);
        goto out;
    }
    memcpy(inside, f->delta, (size_t)size * sizeof *inside);
    into_metric(f, inside);
    if (linalg_singular(inside, f->rows, f->cols, f->vectors, f->s, f->vt, err))
        goto out;
    for (int32_t v = 0; v < f->rank; v++)
        f->energy[v] = f->s[v] * f->s[v];
    rc = 0;
out:
    free(inside);
    return rc;
}

int factor_open(struct factor **out, const float *delta, int32_t rows, int32_t cols,
                const struct factor_statistics *statistics, int32_t vectors, struct err *err)
{
    struct factor *f = calloc(1, sizeof *f);

    *out = NULL;
    if (!f)
        return err_set(err, ERR_NO_MEMORY, "no memory for a matrix");
    f->rows = rows;
    f->cols = cols;
    f->rank = rows < cols ? rows : cols;
    f->vectors = vectors;
    assert(vectors >= 0 && vectors <= f->rank);
    f->delta = new_doubles((int64_t)rows * cols);
    if (!f->delta) {
        err_set(err, ERR_NO_MEMORY, "no memory for a matrix of %d by %d", rows, cols);
        goto fail;
    }
    if (codec_check_finite(delta, rows, cols, err))
        goto fail;
    linalg_widen(delta, (int64_t)rows * cols, f->delta);
    if (open_metric(f, statistics, err) || decompose(f, err))
        goto fail;
    *out = f;
    return 0;
fail:
    factor_free(f);
    return -1;
}

void factor_free(struct factor *f)
{
    if (!f)
        return;
    free(f->energy);
    free(f->vt);
    free(f->s);
    free(f->lg);
    free(f->lh);
    free(f->h);
    free(f->g);
    free(f->delta);
    free(f);
}

int32_t factor_rank(const struct factor *factor)
{
    return factor->rank;
}

const double *factor_energy(const struct factor *factor)
{
    return factor->energy;
}

/* ------------------------------------------------------------------ bits */

/* What a vector of this width adds to its matrix's bytes. */
static double vector_bytes(const struct codec_plan *m, int width)
{
    return width ? (double)(planes_bytes(m->rows, m->cols, 1, width) -
                            planes_bytes(m->rows, m->cols, 0, 0))
                 : 0;
}

/* What a width loses of a side's variance when it is rounded with feedback and fitted, as parts of
 * what a Gaussian by itself would lose: least where levels are many enough for the feedback to find
 * its way. Found by the KL of held-out rows (README.md, "What was tried"). */
static double lost(int width)
{
    return planes_loss(width) * (width == 0 ? 1 : width == 1 ? 0.6 : 0.15);
}

static double kept(double energy, int width)
{
    double share = 1 - lost(width); /* both sides lose it */

    return energy * share * share;
}

/* Widths of one matrix at a price for each byte. */
static void choose(struct codec_plan *m, double price)
{
    double bytes[PLANES_MAX_WIDTH + 1];
    int32_t rank = 0, planes = 0;

    for (int w = 0; w <= PLANES_MAX_WIDTH; w++)
        bytes[w] = vector_bytes(m, w);
    for (int32_t v = 0; v < m->rank; v++) {
        int best = 0;

        for (int w = 1; w <= PLANES_MAX_WIDTH; w++)
            if (kept(m->energy[v], w) - price * bytes[w] >
                kept(m->energy[v], best) - price * bytes[best])
                best = w;
        m->width[v] = (uint8_t)best;
        rank += best > 0;
        planes += best;
    }
    m->bytes = (int64_t)planes_bytes(m->rows, m->cols, rank, planes);
}

static int64_t bytes_at(struct codec_plan *plan, int32_t count, double price)
{
    int64_t bytes = 0;

    for (int32_t i = 0; i < count; i++) {
        choose(&plan[i], price);
        bytes += plan[i].bytes;
    }
    return bytes;
}

bool factor_allot(struct codec_plan *plan, int32_t count, int64_t bytes, double *cost)
{
    double low = 1e-30, high = 1e30; /* energy for a byte: at `high` nothing is bought */
    int64_t least = 0;
    bool fits;

    for (int32_t i = 0; i < count; i++)
        least += (int64_t)planes_bytes(plan[i].rows, plan[i].cols, 0, 0);
    while (high < 1e280 && bytes_at(plan, count, high) > least)
        high *= 1e10; /* what has diverged is worth more: it is refused when it is rounded */
    fits = least <= bytes;
    for (int i = 0; fits && i < 200; i++) {
        double middle = sqrt(low * high);

        if (bytes_at(plan, count, middle) > bytes)
            low = middle;
        else
            high = middle;
    }
    bytes_at(plan, count, high);
    *cost = 0;
    for (int32_t i = 0; i < count; i++)
        for (int32_t v = 0; v < plan[i].rank; v++)
            *cost += (plan[i].energy[v] - kept(plan[i].energy[v], plan[i].width[v])) / 2;
    return fits;
}

/* ------------------------------------------------------------------ rounding */

/* What is made of a factor: both sides of its `rank` vectors that have a width. */
struct rounding {
    const struct factor *f;
    int32_t rank;
    uint8_t *width;       /* [rank] */
    double *right, *left; /* [rank, cols], [rank, rows]: what is rounded, then what came of it */
    double *inner;        /* [rank, rank]: right · H · rightᵀ */
    uint8_t *right_signs, *left_signs; /* [rank, cols], [rank, rows] */
    float *right_scale, *left_scale;   /* [rank] */
    float *row, *col;                  /* [rows], [cols] */
};

static int open_rounding(struct rounding *r, const struct factor *f, const uint8_t *width,
                         struct err *err)
{
    int64_t rows = f->rows, cols = f->cols;

    *r = (struct rounding){.f = f};
    for (int32_t v = 0; v < f->vectors; v++)
        r->rank += width[v] > 0;
    r->width = malloc((size_t)r->rank + 1);
    r->right = new_doubles(r->rank * cols);
    r->left = new_doubles(r->rank * rows);
    r->inner = new_doubles((int64_t)r->rank * r->rank);
    r->right_signs = malloc((size_t)(r->rank * cols) + 1);
    r->left_signs = malloc((size_t)(r->rank * rows) + 1);
    r->right_scale = malloc((size_t)r->rank * sizeof(float) + 1);
    r->left_scale = malloc((size_t)r->rank * sizeof(float) + 1);
    r->row = malloc((size_t)rows * sizeof(float));
    r->col = malloc((size_t)cols * sizeof(float));
    if (!r->width || !r->right || !r->left || !r->inner || !r->right_signs || !r->left_signs ||
        !r->right_scale || !r->left_scale || !r->row || !r->col)
        return err_set(err, ERR_NO_MEMORY, "no memory to round %d vectors", r->rank);
    return 0;
}

static void close_rounding(struct rounding *r)
{
    free(r->width);
    free(r->right);
    free(r->left);
    free(r->inner);
    free(r->right_signs);
    free(r->left_signs);
    free(r->right_scale);
    free(r->left_scale);
    free(r->row);
    free(r->col);
}

/* Scales of vectors and of elements with x[v, i]² ≈ (vector_v · element_i)², as they can be stored.
 * Elements' are at most 1. */
static void find_scales(const double *x, int32_t rank, int32_t count, float *vector, float *element)
{
    float top = 0;

    for (int32_t i = 0; i < count; i++)
        element[i] = 1;
    for (int turn = 0; turn < 5; turn++) {
        for (int64_t v = 0; v < rank; v++) {
            double sum = 0;

            for (int64_t i = 0; i < count; i++) {
                double value = x[v * count + i] / (double)element[i];

                sum += value * value;
            }
            vector[v] = f16_to_f32(f32_to_f16((float)sqrt(sum / count)));
        }
        if (turn == 4)
            return;
        for (int64_t i = 0; i < count; i++) {
            double sum = 1e-60;

            for (int64_t v = 0; v < rank; v++) {
                double value = vector[v] > 0 ? x[v * count + i] / (double)vector[v] : 0;

                sum += value * value;
            }
            element[i] = (float)sqrt(sum / (rank > 0 ? rank : 1));
        }
        for (int32_t i = 0; i < count; i++)
            top = fmaxf(i ? top : 0, element[i]);
        for (int32_t i = 0; i < count; i++)
            element[i] /= top;
        planes_scales(element, count, &top);
    }
}

/* Nearest value that can be stored; its signs. A scale of 0 stores 0 whatever the signs. */
static double store(double x, float scale, int width, uint8_t *signs)
{
    float value = 0;

    *signs = (uint8_t)planes_nearest(width, scale > 0 ? (float)(x / (double)scale) : 0, &value);
    return (double)value * (double)scale;
}

/* What rounding x [count] at a vector's scale would lose; an element counts as much as its feedback
 * says that those behind it can not make good. */
static double lost_at(const double *x, int32_t count, const float *element, const double *feedback,
                      int width, float scale)
{
    double sum = 0;
    uint8_t signs;

    for (int64_t i = 0; i < count; i++) {
        double wrong = x[i] - store(x[i], scale * element[i], width, &signs);

        if (feedback)
            wrong /= feedback[i * count + i];
        sum += wrong * wrong;
    }
    return sum;
}

/* A vector's scale that loses least: steps up from the one given, or else down, while that pays.
 * Singular vectors have longer tails than a Gaussian, and what is beyond the largest sum of a
 * vector's planes is lost whole: at eight planes a single element at ten deviations loses more than
 * all others. */
static float fit_scale(const double *x, int32_t count, const float *element, const double *feedback,
                       int width, float first)
{
    double least = lost_at(x, count, element, feedback, width, first);
    float scale = first, step = SCALE_STEP;

    for (;;) {
        float next = f16_to_f32(f32_to_f16(scale * step));
        double sum = lost_at(x, count, element, feedback, width, next);

        if (sum < least) {
            least = sum;
            scale = next;
        } else if (scale == first && step > 1) {
            step = 1 / SCALE_STEP;
        } else {
            return scale;
        }
    }
}

/* The vectors that have a width, as the metric's singular vectors give them. */
static int first_right(struct rounding *r, const uint8_t *width, struct err *err)
{
    const struct factor *f = r->f;
    int64_t cols = f->cols, at = 0;
    double *turned = new_doubles(cols * r->rank);

    if (!turned)
        return err_set(err, ERR_NO_MEMORY, "no memory to round %d vectors", r->rank);
    for (int64_t v = 0; v < f->vectors; v++) {
        if (!width[v])
            continue;
        r->width[at] = width[v];
        for (int64_t c = 0; c < cols; c++)
            turned[c * r->rank + at] = sqrt(f->s[v]) * f->vt[v * cols + c];
        at++;
    }
    if (f->lh)
        linalg_solve_lower(f->lh, f->cols, true, turned, r->rank);
    for (int64_t v = 0; v < r->rank; v++)
        for (int64_t c = 0; c < cols; c++)
            r->right[v * cols + c] = turned[c * r->rank + v];
    free(turned);
    return 0;
}

/* A copy's feedback; NULL where `a` is. */
static int feedback_of(const double *a, int32_t n, double **out, struct err *err)
{
    size_t bytes = (size_t)n * (size_t)n * sizeof **out;

    *out = NULL;
    if (!a)
        return 0;
    *out = malloc(bytes);
    if (!*out)
        return err_set(err, ERR_NO_MEMORY, "no memory for the feedback of %d values", n);
    memcpy(*out, a, bytes);
    return linalg_feedback(*out, n, err);
}

/* One side of a rounding. */
struct side {
    double *x; /* [rank, count] */
    int32_t rank, count;
    const double *metric;       /* [count, count]; NULL: the identity */
    const double *row_feedback; /* [rank, rank] of the vectors; NULL: the identity */
    const uint8_t *width;       /* [rank] */
    uint8_t *signs;             /* [rank, count] out */
    float *scale, *element;     /* [rank], [count] out */
};

static double round_value(void *context, int32_t v, int32_t i, double value)
{
    const struct side *s = context;

    return store(value, s->scale[v] * s->element[i], s->width[v],
                 &s->signs[(int64_t)v * s->count + i]);
}

static int round_side(struct side *s, struct err *err)
{
    double *feedback;
    int rc = -1;

    if (feedback_of(s->metric, s->count, &feedback, err))
        goto out;
    find_scales(s->x, s->rank, s->count, s->scale, s->element);
    for (int64_t v = 0; v < s->rank; v++)
        s->scale[v] = fit_scale(s->x + v * s->count, s->count, s->element, feedback, s->width[v],
                                s->scale[v]);
    for (int64_t v = 0; v < s->rank; v++)
        if (!isfinite(s->scale[v])) {
            codec_too_large(err);
            goto out;
        }
    rc = gptq_round(&(struct gptq){.x = s->x,
                                   .rows = s->rank,
                                   .cols = s->count,
                                   .feedback = feedback,
                                   .row_feedback = s->row_feedback,
                                   .round = round_value,
                                   .context = s},
                    err);
out:
    free(feedback);
    return rc;
}

static int round_right(struct rounding *r, struct err *err)
{
    return round_side(&(struct side){.x = r->right,
                                     .rank = r->rank,
                                     .count = r->f->cols,
                                     .metric = r->f->h,
                                     .width = r->width,
                                     .signs = r->right_signs,
                                     .scale = r->right_scale,
                                     .element = r->col},
                      err);
}

/* In the metric of G and of `inner`, which becomes its feedback: what a vector loses can be made
 * good by the other vectors, what a row loses by the other rows. */
static int round_left(struct rounding *r, struct err *err)
{
    if (linalg_feedback(r->inner, r->rank, err))
        return -1;
    return round_side(&(struct side){.x = r->left,
                                     .rank = r->rank,
                                     .count = r->f->rows,
                                     .metric = r->f->g,
                                     .row_feedback = r->inner,
                                     .width = r->width,
                                     .signs = r->left_signs,
                                     .scale = r->left_scale,
                                     .element = r->row},
                      err);
}

static int round_both(struct rounding *r, const uint8_t *width, struct err *err)
{
    const struct factor *f = r->f;

    return first_right(r, width, err) || round_right(r, err) ||
                   fit_left(f->delta, f->h, r->right, f->rows, f->cols, r->rank, r->left, r->inner,
                            err) ||
                   round_left(r, err)
               ? -1
               : 0;
}

int factor_compress(const struct factor *f, const uint8_t *width, void *out, struct err *err)
{
    struct rounding r;
    int rc = -1;

    if (open_rounding(&r, f, width, err))
        goto out;
    for (int32_t i = 0; i < f->rows; i++)
        r.row[i] = 1;
    for (int32_t i = 0; i < f->cols; i++)
        r.col[i] = 1;
    if (r.rank > 0 && round_both(&r, width, err))
        goto out;
    planes_write(&(struct planes){.rows = f->rows,
                                  .cols = f->cols,
                                  .rank = r.rank,
                                  .width = r.width,
                                  .left = r.left_scale,
                                  .right = r.right_scale,
                                  .row = r.row,
                                  .col = r.col,
                                  .left_signs = r.left_signs,
                                  .right_signs = r.right_signs},
                 out);
    rc = 0;
out:
    close_rounding(&r);
    return rc;
}
