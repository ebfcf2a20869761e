#include "engine/codec/delta_come.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/codec/factor.h"
#include "engine/codec/fit.h"
#include "engine/codec/gptq.h"
#include "engine/codec/groups.h"
#include "engine/codec/linalg.h"

#define FIRST_VECTORS 2 /* in 8 bits */
#define NEXT_VECTORS 32 /* in 3 bits; all others in 2 */

static int width_of(int32_t vector)
{
    return vector < FIRST_VECTORS ? 8 : vector < FIRST_VECTORS + NEXT_VECTORS ? 3 : 2;
}

static int64_t vector_bytes(int32_t rows, int32_t cols, int width)
{
    return 1 + (int64_t)(groups_bytes(rows, width) + groups_bytes(cols, width));
}

/* ------------------------------------------------------------------ plan */

/* One more vector for a matrix, if it fits: its bytes, or 0. */
static int64_t add_vector(struct codec_plan *plan, int64_t left)
{
    int32_t next = codec_plan_vectors(plan);
    int64_t bytes =
        next < plan->rank ? vector_bytes(plan->rows, plan->cols, width_of(next)) : INT64_MAX;

    if (bytes > left)
        return 0;
    plan->width[next] = (uint8_t)width_of(next);
    plan->bytes += bytes;
    return bytes;
}

/* The same share of its own size for each matrix; what is left over goes round. */
static int allot(struct codec_plan *plan, int32_t count, int64_t bytes, double *cost,
                 struct err *err)
{
    int64_t left = bytes - 4 * (int64_t)count;
    double weights = 0, share;

    *cost = NAN;
    for (int32_t i = 0; i < count; i++) {
        weights += (double)plan[i].rows * plan[i].cols;
        memset(plan[i].width, 0, (size_t)plan[i].rank);
        plan[i].bytes = 4;
    }
    if (left < 0)
        return err_set(err, ERR_INVALID,
                       "delta-come keeps the number of its vectors for each matrix; ask for a "
                       "lower ratio");
    share = count ? (double)left / weights : 0;
    for (int32_t i = 0; i < count; i++) {
        int64_t own = (int64_t)(share * plan[i].rows * plan[i].cols), added;

        while ((added = add_vector(&plan[i], own)) > 0) {
            own -= added;
            left -= added;
        }
    }
    for (bool more = true; more;) {
        more = false;
        for (int32_t i = 0; i < count; i++) {
            int64_t added = add_vector(&plan[i], left);

            left -= added;
            more |= added > 0;
        }
    }
    return 0;
}

/* ------------------------------------------------------------------ compress */

struct come {
    int32_t rows, cols, rank; /* rank: vectors that are kept */
    const uint8_t *width;
    double *delta, *h, *feedback;
    double *s, *vt, *left, *turned, *inner;
    int32_t left_groups, right_groups;
    struct group *left_group, *right_group; /* [rank, groups of a side] */
    uint8_t *left_code, *right_code;        /* [rank, rows], [rank, cols] */
};

static double *doubles(int64_t rows, int64_t cols)
{
    return malloc((size_t)(rows * cols) * sizeof(double) + 1);
}

static int open_come(struct come *c, const struct codec_matrix *m, const struct codec_plan *plan,
                     struct err *err)
{
    int64_t rows = m->rows, cols = m->cols;
    size_t rank;

    c->rows = m->rows;
    c->cols = m->cols;
    c->rank = codec_plan_vectors(plan);
    c->width = plan->width;
    rank = (size_t)c->rank;
    c->left_groups = groups_count(m->rows);
    c->right_groups = groups_count(m->cols);
    c->delta = doubles(rows, cols);
    c->s = doubles(1, plan->rank);
    c->vt = doubles(c->rank, cols);
    c->left = doubles(c->rank, rows);
    c->turned = doubles(rows, c->rank);
    c->inner = doubles(c->rank, c->rank);
    c->left_group = calloc(rank * (size_t)c->left_groups + 1, sizeof *c->left_group);
    c->right_group = calloc(rank * (size_t)c->right_groups + 1, sizeof *c->right_group);
    c->left_code = malloc(rank * (size_t)rows + 1);
    c->right_code = malloc(rank * (size_t)cols + 1);
    if (m->h) {
        c->h = doubles(cols, cols);
        c->feedback = doubles(cols, cols);
    }
    if (!c->delta || !c->s || !c->vt || !c->left || !c->turned || !c->inner || !c->left_group ||
        !c->right_group || !c->left_code || !c->right_code || (m->h && (!c->h || !c->feedback)))
        return err_set(err, ERR_NO_MEMORY, "no memory to decompose a matrix of %d by %d", m->rows,
                       m->cols);
    return 0;
}

static void close_come(struct come *c)
{
    free(c->delta);
    free(c->h);
    free(c->feedback);
    free(c->s);
    free(c->vt);
    free(c->left);
    free(c->turned);
    free(c->inner);
    free(c->left_group);
    free(c->right_group);
    free(c->left_code);
    free(c->right_code);
}

static int take_matrix(struct come *c, const struct codec_matrix *m, struct err *err)
{
    int64_t cols = m->cols;

    if (codec_check_finite(m->delta, m->rows, m->cols, err))
        return -1;
    linalg_widen(m->delta, m->rows * cols, c->delta);
    if (!m->h)
        return 0;
    linalg_widen(m->h, cols * cols, c->h);
    linalg_damp(c->h, m->cols, FACTOR_DAMPING);
    memcpy(c->feedback, c->h, (size_t)(cols * cols) * sizeof(double));
    return linalg_feedback(c->feedback, m->cols, err);
}

/* Right sides: rows are vectors, groups run along them. */
static int begin_right(void *context, const double *x, int32_t col, struct err *err)
{
    struct come *c = context;
    int32_t count = c->cols - col < GROUPS_SIZE ? c->cols - col : GROUPS_SIZE;

    if (col % GROUPS_SIZE)
        return 0;
    for (int64_t v = 0; v < c->rank; v++)
        if (!group_of(&c->right_group[v * c->right_groups + col / GROUPS_SIZE],
                      x + v * c->cols + col, 1, count, c->width[v]))
            return codec_too_large(err);
    return 0;
}

static double round_right(void *context, int32_t v, int32_t col, double value)
{
    struct come *c = context;
    const struct group *group = &c->right_group[(int64_t)v * c->right_groups + col / GROUPS_SIZE];
    double rounded;

    c->right_code[(int64_t)v * c->cols + col] = group_code(group, value, &rounded);
    return rounded;
}

/* Left sides: columns are vectors, groups run down them. */
static int begin_left(void *context, const double *x, int32_t v, struct err *err)
{
    struct come *c = context;

    for (int32_t g = 0; g < c->left_groups; g++) {
        int32_t from = g * GROUPS_SIZE;
        int32_t count = c->rows - from < GROUPS_SIZE ? c->rows - from : GROUPS_SIZE;

        if (!group_of(&c->left_group[(int64_t)v * c->left_groups + g],
                      x + (int64_t)from * c->rank + v, c->rank, count, c->width[v]))
            return codec_too_large(err);
    }
    return 0;
}

static double round_left(void *context, int32_t row, int32_t v, double value)
{
    struct come *c = context;
    const struct group *group = &c->left_group[(int64_t)v * c->left_groups + row / GROUPS_SIZE];
    double rounded;

    c->left_code[(int64_t)v * c->rows + row] = group_code(group, value, &rounded);
    return rounded;
}

static int round_both(struct come *c, struct err *err)
{
    const struct gptq right = {.x = c->vt,
                               .rows = c->rank,
                               .cols = c->cols,
                               .feedback = c->feedback,
                               .begin = begin_right,
                               .round = round_right,
                               .context = c};
    const struct gptq left = {.x = c->turned,
                              .rows = c->rows,
                              .cols = c->rank,
                              .feedback = c->inner,
                              .begin = begin_left,
                              .round = round_left,
                              .context = c};

    if (gptq_round(&right, err) ||
        fit_left(c->delta, c->h, c->vt, c->rows, c->cols, c->rank, c->left, c->inner, err))
        return -1;
    for (int64_t v = 0; v < c->rank; v++)
        for (int64_t r = 0; r < c->rows; r++)
            c->turned[r * c->rank + v] = c->left[v * c->rows + r];
    if (linalg_feedback(c->inner, c->rank, err))
        return -1;
    return gptq_round(&left, err);
}

static void write_factors(const struct come *c, void *out)
{
    uint32_t rank = (uint32_t)c->rank;
    char *at = (char *)out + 4 + c->rank;

    memcpy(out, &rank, sizeof rank);
    memcpy((char *)out + 4, c->width, rank);
    for (int64_t v = 0; v < c->rank; v++) {
        groups_write(c->left_group + v * c->left_groups, c->left_code + v * c->rows, c->rows,
                     c->width[v], at);
        at += groups_bytes(c->rows, c->width[v]);
        groups_write(c->right_group + v * c->right_groups, c->right_code + v * c->cols, c->cols,
                     c->width[v], at);
        at += groups_bytes(c->cols, c->width[v]);
    }
}

static int compress(const struct codec_matrix *m, const struct codec_plan *plan,
                    struct tensor part[], struct err *err)
{
    int64_t shape[1] = {plan->bytes};
    struct come c = {0};
    int rc = -1;

    part[0] = tensor_view(malloc((size_t)plan->bytes), DTYPE_U8, 1, shape);
    if (!part[0].data)
        return err_set(err, ERR_NO_MEMORY, "no memory for the factors of a matrix");
    if (open_come(&c, m, plan, err) || take_matrix(&c, m, err))
        goto out;
    /* The right vectors have length 1: their scales need no f16 of the difference's size. */
    if (c.rank > 0 &&
        (linalg_singular(c.delta, c.rows, c.cols, c.rank, c.s, c.vt, err) || round_both(&c, err)))
        goto out;
    write_factors(&c, part[0].data);
    rc = 0;
out:
    close_come(&c);
    return rc;
}

/* ------------------------------------------------------------------ reading */

static int32_t rank_of(const struct tensor part[])
{
    uint32_t rank;

    memcpy(&rank, part[0].data, sizeof rank);
    return (int32_t)rank;
}

static int bad(struct err *err, const char *what)
{
    return err_set(err, ERR_INVALID, "\"factors\": %s", what);
}

static int accept(const struct tensor part[], int32_t rows, int32_t cols, struct err *err)
{
    const unsigned char *data = part[0].data;
    int64_t size = part[0].shape[0], at;
    uint32_t rank;

    if (part[0].dtype != DTYPE_U8 || part[0].rank != 1)
        return bad(err, "it is not a U8 tensor of one dimension");
    if (size < 4)
        return bad(err, "it is too short");
    memcpy(&rank, data, sizeof rank);
    if (rank > (uint32_t)(rows < cols ? rows : cols) || size < 4 + (int64_t)rank)
        return bad(err, "it has more vectors than such a matrix, or than it has bytes");
    at = 4 + (int64_t)rank;
    for (uint32_t v = 0; v < rank; v++) {
        int width = data[4 + v];

        if (width < 1 || width > 8)
            return bad(err, "a vector has no width from 1 to 8");
        if (size - at < (int64_t)(groups_bytes(rows, width) + groups_bytes(cols, width)))
            return bad(err, "it ends inside a vector");
        if (!groups_valid(data + at, rows) ||
            !groups_valid(data + at + groups_bytes(rows, width), cols))
            return bad(err, "a scale is negative or not finite");
        at += (int64_t)(groups_bytes(rows, width) + groups_bytes(cols, width));
    }
    return at == size ? 0 : bad(err, "bytes are left over behind its vectors");
}

/* left: [rows, rank], right: [rank, cols]. */
static void read_sides(const struct tensor part[], int32_t rows, int32_t cols, float *left,
                       float *right)
{
    const unsigned char *data = part[0].data;
    int32_t rank = rank_of(part);
    size_t at = 4 + (size_t)rank;

    for (int32_t v = 0; v < rank; v++) {
        int width = data[4 + v];

        groups_read(data + at, rows, width, left + v, rank);
        at += groups_bytes(rows, width);
        groups_read(data + at, cols, width, right + (int64_t)v * cols, 1);
        at += groups_bytes(cols, width);
    }
}

static int open_sides(const struct tensor part[], int32_t rows, int32_t cols, float **left,
                      float **right, struct err *err)
{
    size_t rank = (size_t)rank_of(part);

    *left = malloc(rank * ((size_t)rows + (size_t)cols) * sizeof(float) + 1);
    if (!*left)
        return err_set(err, ERR_NO_MEMORY, "no memory for a delta of %zu vectors", rank);
    *right = *left + rank * (size_t)rows;
    read_sides(part, rows, cols, *left, *right);
    return 0;
}

static int expand(const struct tensor part[], int32_t rows, int32_t cols, float *delta,
                  struct err *err)
{
    float *left, *right;

    if (open_sides(part, rows, cols, &left, &right, err))
        return -1;
    linalg_product_f32(false, rows, cols, rank_of(part), left, right, delta);
    free(left);
    return 0;
}

static int view(const struct tensor part[], int32_t rows, int32_t cols, struct delta_tensor *out,
                void **memory, struct err *err)
{
    int64_t left_shape[2] = {rows, rank_of(part)}, right_shape[2] = {rank_of(part), cols};
    float *left, *right;

    if (open_sides(part, rows, cols, &left, &right, err))
        return -1;
    *memory = left;
    *out = (struct delta_tensor){.kind = DELTA_FACTORS,
                                 .rows = rows,
                                 .cols = cols,
                                 .factors = {.left = tensor_view(left, DTYPE_F32, 2, left_shape),
                                             .right = tensor_view(right, DTYPE_F32, 2, right_shape),
                                             .scale = 1}};
    return 0;
}

/* Both sides as f32; a rank that accept() would refuse counts as the most there are. */
static int64_t packed_bytes(const struct tensor part[], int32_t rows, int32_t cols)
{
    uint32_t most = (uint32_t)(rows < cols ? rows : cols), rank = 0;

    if (tensor_elements(&part[0]) * dtype_size(part[0].dtype) >= (int64_t)sizeof rank)
        memcpy(&rank, part[0].data, sizeof rank);
    return 4 * (int64_t)(rank < most ? rank : most) * ((int64_t)rows + cols);
}

const struct codec codec_delta_come = {
    .name = "delta-come",
    .part_count = 1,
    .suffix = {"factors"},
    .inputs = true,
    .ratio = 16,
    .allot = allot,
    .compress = compress,
    .accept = accept,
    .expand = expand,
    .view = view,
    .packed_bytes = packed_bytes,
};
