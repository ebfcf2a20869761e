/* Linear algebra of the codecs, planes of signs, and a matrix's way through them: decomposed in a
 * metric, given bits, rounded, and back. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/base/rng.h"
#include "engine/codec/codec.h"
#include "engine/codec/factor.h"
#include "engine/codec/gptq.h"
#include "engine/codec/linalg.h"
#include "engine/codec/planes.h"
#include "tests/unit/check.h"

#define ROWS 40
#define COLS 72
#define RANK ROWS
#define TAIL_LOST 3e-4 /* of what there is; 2e-3 at scales that fit a Gaussian */
#define SLOPE_OFF 1e-5 /* of all the gradient moves */

static double uniform(uint64_t stream, int64_t i)
{
    return 2 * rng_unit_at(77, stream, (uint64_t)i) - 1;
}

/* x·xᵀ of random vectors whose sizes differ by far, [n, n]. */
static float *second_moment(int32_t n, uint64_t stream)
{
    float *a = calloc((size_t)n * (size_t)n, sizeof *a);

    assert_non_null(a);
    for (int64_t k = 0; k < 3 * n; k++) {
        double x[COLS], common = uniform(stream, 100000 + k);

        for (int64_t i = 0; i < n; i++)
            x[i] = (uniform(stream, k * n + i) + common) * (i % 7 == 0 ? 6 : 0.3);
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j < n; j++)
                a[i * n + j] += (float)(x[i] * x[j] / (3 * n));
    }
    return a;
}

/* A difference whose singular values fall. */
static float *difference(uint64_t stream)
{
    float *d = calloc(ROWS * COLS, sizeof *d);

    assert_non_null(d);
    for (int64_t v = 0; v < RANK; v++)
        for (int64_t i = 0; i < ROWS; i++)
            for (int64_t j = 0; j < COLS; j++)
                d[i * COLS + j] +=
                    (float)(0.02 * pow(0.8, (double)v) * uniform(stream, v * 1000 + i) *
                            uniform(stream + 1, v * 1000 + j));
    return d;
}

/* ------------------------------------------------------------------ linear algebra */

/* All vectors, then fewer of them, then none. */
static void singular_of(int32_t m, int32_t n)
{
    int32_t r = m < n ? m : n;
    double *a = malloc((size_t)(m * n) * sizeof *a), *s = malloc((size_t)r * sizeof *s);
    double *vt = malloc((size_t)(r * n) * sizeof *vt), *few = malloc((size_t)(r * n) * sizeof *few);
    double *image = calloc((size_t)(m * r), sizeof *image), *again = malloc((size_t)r * sizeof *s);

    assert_true(a && s && vt && few && image && again);
    for (int64_t i = 0; i < m * n; i++)
        a[i] = uniform(1, i);
    CHECK(linalg_singular(a, m, n, r, s, vt, &err));
    for (int64_t v = 0; v < r; v++)
        for (int64_t i = 0; i < m; i++)
            for (int64_t j = 0; j < n; j++)
                image[v * m + i] += a[i * n + j] * vt[v * n + j];
    for (int64_t v = 0; v < r; v++)
        for (int64_t w = 0; w < r; w++) {
            double left = 0, right = 0; /* the images of orthonormal vectors are orthogonal */

            for (int64_t i = 0; i < m; i++)
                left += image[v * m + i] * image[w * m + i];
            for (int64_t j = 0; j < n; j++)
                right += vt[v * n + j] * vt[w * n + j];
            assert_true(fabs(left - (v == w ? s[v] * s[v] : 0)) < 1e-8);
            assert_true(fabs(right - (v == w)) < 1e-8);
            assert_true(w <= v || (s[v] >= s[w] && s[w] >= 0));
        }
    for (int32_t rank = r / 2; rank >= 0; rank = rank ? rank / 2 : -1) {
        CHECK(linalg_singular(a, m, n, rank, again, few, &err));
        for (int32_t v = 0; v < r; v++)
            assert_true(fabs(again[v] - s[v]) < 1e-10);
        for (int64_t i = 0; i < (int64_t)rank * n; i++)
            assert_true(fabs(fabs(few[i]) - fabs(vt[i])) < 1e-8);
    }
    free(again);
    free(image);
    free(few);
    free(vt);
    free(s);
    free(a);
}

static void test_singular(void **state)
{
    singular_of(7, 19);
    singular_of(23, 9);
    singular_of(12, 12);
    singular_of(1, 5);
    singular_of(5, 1);
}

static void test_lower(void **state)
{
    enum { N = 6, M = 4 };
    double l[N * N], b[N * M], c[M * N];

    for (int i = 0; i < N * N; i++)
        l[i] = i / N >= i % N ? uniform(4, i) : 0;
    for (int i = 0; i < N * M; i++)
        b[i] = c[i] = uniform(5, i);
    linalg_lower_before(l, N, b, M);
    linalg_lower_behind(l, N, c, M);
    for (int i = 0; i < N; i++)
        for (int j = 0; j < M; j++) {
            double before = 0, behind = 0;

            for (int k = 0; k < N; k++) {
                before += l[k * N + i] * uniform(5, k * M + j);
                behind += uniform(5, j * N + k) * l[k * N + i];
            }
            assert_true(fabs(b[i * M + j] - before) < 1e-12);
            assert_true(fabs(c[j * N + i] - behind) < 1e-12);
        }
}

static void test_damping(void **state)
{
    const float from[4] = {2, 1, 1, 4};
    double a[4], zero[4] = {0};

    linalg_widen(from, 4, a);
    linalg_damp(a, 2, 0.5); /* of 3 */
    assert_true(a[0] == 3.5 && a[1] == 1 && a[2] == 1 && a[3] == 5.5);
    linalg_damp(zero, 2, 0.5); /* of 1 */
    assert_true(zero[0] == 0.5 && zero[1] == 0 && zero[2] == 0 && zero[3] == 0.5);
}

static void test_vectors_that_are_needed(void **state)
{
    uint8_t width[5] = {3, 0, 2, 0, 0};
    struct codec_plan plan = {.rank = 5, .width = width};

    assert_int_equal(codec_plan_vectors(&plan), 3); /* one without bits between them counts */
    memset(width, 0, sizeof width);
    assert_int_equal(codec_plan_vectors(&plan), 0);
}

static void test_feedback(void **state)
{
    enum { N = 24 };
    float *a = second_moment(N, 3);
    double u[N * N], l[N * N], bad[4] = {1, 2, 2, 1};
    struct err refusal = {0};

    for (int i = 0; i < N * N; i++)
        l[i] = u[i] = (double)a[i] + (i % (N + 1) == 0);
    CHECK(linalg_feedback(u, N, &err));
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) { /* uᵀ·u·a = 1 */
            double sum = 0;

            for (int p = 0; p < N; p++)
                for (int q = 0; q < N; q++)
                    sum += u[p * N + i] * u[p * N + q] * ((double)a[q * N + j] + (q == j));
            assert_true(fabs(sum - (i == j)) < 1e-8);
            assert_true(j >= i || u[i * N + j] == 0);
        }
    CHECK(linalg_cholesky(l, N, &err));
    assert_int_equal(linalg_cholesky(bad, 2, &refusal), -1);
    assert_int_equal(refusal.kind, ERR_INVALID);
    free(a);
}

/* ------------------------------------------------------------------ rounding with feedback */

enum { FEW = 5, MANY = 30, BOTH = FEW * MANY };

static double to_whole(void *context, int32_t row, int32_t col, double value)
{
    (*(int *)context)++;
    return round(value);
}

/* A moment of random vectors as doubles, and its feedback. */
static void metric_of(int32_t n, uint64_t stream, double *metric, double *feedback)
{
    float *a = second_moment(n, stream);

    linalg_widen(a, (int64_t)n * n, metric);
    linalg_damp(metric, n, 0.1);
    memcpy(feedback, metric, (size_t)(n * n) * sizeof *feedback);
    CHECK(linalg_feedback(feedback, n, &err));
    free(a);
}

static void round_whole(double *x, int32_t rows, int32_t cols, const double *feedback,
                        const double *row_feedback)
{
    int rounded = 0;

    CHECK(gptq_round(&(struct gptq){.x = x,
                                    .rows = rows,
                                    .cols = cols,
                                    .feedback = feedback,
                                    .row_feedback = row_feedback,
                                    .round = to_whole,
                                    .context = &rounded},
                     &err));
    assert_int_equal(rounded, rows * cols);
}

/* Feedback of rows and of columns is that of their Kronecker product, over all elements in the
 * order in which they are rounded: column by column. */
static void test_feedback_both_ways(void **state)
{
    static double many[MANY * MANY], many_feedback[MANY * MANY], few[FEW * FEW],
        few_feedback[FEW * FEW], both[BOTH * BOTH], x[BOTH], line[BOTH], plain[BOTH];
    double with = 0, without = 0;

    metric_of(MANY, 21, many, many_feedback);
    metric_of(FEW, 22, few, few_feedback);
    for (int i = 0; i < BOTH; i++)
        for (int j = 0; j < BOTH; j++)
            both[i * BOTH + j] = many[i / FEW * MANY + j / FEW] * few[i % FEW * FEW + j % FEW];
    for (int c = 0; c < MANY; c++)
        for (int r = 0; r < FEW; r++)
            line[c * FEW + r] = plain[c * FEW + r] = x[r * MANY + c] =
                4 * uniform(23, r * MANY + c);
    CHECK(linalg_feedback(both, BOTH, &err));
    round_whole(x, FEW, MANY, many_feedback, few_feedback);
    round_whole(line, 1, BOTH, both, NULL);
    for (int c = 0; c < MANY; c++)
        for (int r = 0; r < FEW; r++)
            assert_true(x[r * MANY + c] == line[c * FEW + r]);
    for (int i = 0; i < BOTH; i++) /* and it pays */
        for (int j = 0; j < BOTH; j++) {
            double weight = many[i / FEW * MANY + j / FEW] * few[i % FEW * FEW + j % FEW];

            with += weight * (line[i] - plain[i]) * (line[j] - plain[j]);
            without += weight * (round(plain[i]) - plain[i]) * (round(plain[j]) - plain[j]);
        }
    assert_true(with < without);
}

/* ------------------------------------------------------------------ planes */

/* The nearest sum of signs, and what a Gaussian loses by it. */
static void test_levels(void **state)
{
    for (int width = 1; width <= PLANES_MAX_WIDTH; width++) {
        const float *c = planes_coefficients(width);
        double lost = 0, weight = 0;

        for (int i = -500; i <= 500; i++) {
            float x = (float)i / 100, value, best = INFINITY;
            double density = exp(-(double)x * (double)x / 2);
            unsigned signs = planes_nearest(width, x, &value);
            float sum = 0;

            for (unsigned all = 0; all < 1u << width; all++) {
                float level = 0;

                for (int k = 0; k < width; k++)
                    level += all >> k & 1 ? c[k] : -c[k];
                best = fminf(best, fabsf(x - level));
            }
            for (int k = 0; k < width; k++)
                sum += signs >> k & 1 ? c[k] : -c[k];
            assert_true(fabsf(sum - value) < 1e-5f);
            /* Width 8's two largest overlap: the search may miss by a little. */
            assert_true(fabsf(x - value) <= best + (width == 8 ? 0.02f : 1e-5f));
            lost += density * (double)((x - value) * (x - value));
            weight += density;
        }
        assert_true(fabs(lost / weight / planes_loss(width) - 1) < 0.1);
    }
}

/* ------------------------------------------------------------------ the whole way */

struct made {
    struct factor *factor;
    uint8_t width[RANK];
    char *bytes;
    int64_t size;
    double allotted;
};

static void make(struct made *m, const float *delta, const struct factor_statistics *s,
                 int64_t budget)
{
    struct codec_plan plan = {.rows = ROWS, .cols = COLS, .rank = RANK, .width = m->width};

    CHECK(factor_open(&m->factor, delta, ROWS, COLS, s, RANK, &err));
    assert_int_equal(factor_rank(m->factor), RANK);
    plan.energy = factor_energy(m->factor);
    assert_true(factor_allot(&plan, 1, budget, &m->allotted));
    m->size = plan.bytes;
    assert_true(m->size <= budget);
    m->bytes = malloc((size_t)m->size);
    assert_non_null(m->bytes);
    CHECK(factor_compress(m->factor, m->width, m->bytes, &err));
    CHECK(planes_accept(m->bytes, (size_t)m->size, ROWS, COLS, &err));
}

static void unmake(struct made *m)
{
    factor_free(m->factor);
    free(m->bytes);
}

/* ½·tr(G·E·H·Eᵀ) of the difference and what the bytes expand to, with the damping. */
static double cost_of(const float *delta, const struct factor_statistics *s, const char *bytes)
{
    static float expanded[ROWS * COLS];
    static double ge[ROWS * COLS];
    double cost = 0, mean_h = 0, mean_g = 0;

    CHECK(planes_expand(bytes, ROWS, COLS, expanded, &err));
    for (int i = 0; i < COLS; i++)
        mean_h += (double)s->h[i * COLS + i] / COLS;
    for (int i = 0; i < ROWS; i++)
        mean_g += (double)s->g[i * ROWS + i] / ROWS;
    for (int i = 0; i < ROWS * COLS; i++)
        expanded[i] = delta[i] - expanded[i];
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < COLS; j++) {
            ge[i * COLS + j] = FACTOR_DAMPING * mean_g * (double)expanded[i * COLS + j];
            for (int k = 0; k < ROWS; k++)
                ge[i * COLS + j] += (double)s->g[i * ROWS + k] * (double)expanded[k * COLS + j];
        }
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < COLS; j++) {
            double eh = FACTOR_DAMPING * mean_h * (double)expanded[i * COLS + j];

            for (int k = 0; k < COLS; k++)
                eh += (double)expanded[i * COLS + k] * (double)s->h[k * COLS + j];
            cost += ge[i * COLS + j] * eh / 2;
        }
    return cost;
}

/* In the metric less is lost than without it, at the same bytes; the more bytes, the less; and
 * the loss is as far from the expected one as it was once, to a factor of 2. */
static void test_the_metric_pays(void **state)
{
    float *delta = difference(5), *h = second_moment(COLS, 8), *g = second_moment(ROWS, 9);
    const struct factor_statistics s = {h, g};
    static const double of_expected[] = {2.79, 2.43, 0.381};
    double before = INFINITY;

    for (int b = 0; b < 3; b++) {
        int64_t budget = INT64_C(600) << b;
        struct made with = {0}, without = {0};
        double cost, plain;

        make(&with, delta, &s, budget);
        make(&without, delta, NULL, budget);
        plain = cost_of(delta, &s, without.bytes);
        cost = cost_of(delta, &s, with.bytes);
        assert_true(cost < 0.7 * plain && cost < before);
        print_message("# %d bytes: %.3g of the loss expected\n", (int)budget, cost / with.allotted);
        assert_true(cost / with.allotted < 2 * of_expected[b]);
        assert_true(cost / with.allotted > of_expected[b] / 2);
        before = cost;
        unmake(&with);
        unmake(&without);
    }
    free(g);
    free(h);
    free(delta);
}

/* Elements far out of the others' size are kept, where planes are many: each vector has one, at a
 * place of its own, so that scales of rows and columns are of no help. */
static void test_long_tails(void **state)
{
    enum { VECTORS = 20 };
    static float delta[ROWS * COLS], expanded[ROWS * COLS];
    struct made m = {0};
    double norm = 0, lost = 0;

    for (int64_t i = 0; i < ROWS; i++)
        for (int64_t j = 0; j < COLS; j++) {
            double sum = 0;

            for (int64_t v = 0; v < VECTORS; v++)
                sum += uniform(31, v * 1000 + i) * (i == 2 * v ? 10 : 1) *
                       uniform(32, v * 1000 + j) * (j == 3 * v ? 10 : 1);
            delta[i * COLS + j] = (float)(0.001 * sum);
            norm += pow(0.001 * sum, 2);
        }
    make(&m, delta, NULL, (int64_t)planes_bytes(ROWS, COLS, VECTORS, VECTORS * PLANES_MAX_WIDTH));
    assert_int_equal(m.width[VECTORS - 1], PLANES_MAX_WIDTH);
    CHECK(planes_expand(m.bytes, ROWS, COLS, expanded, &err));
    for (int64_t i = 0; i < ROWS * COLS; i++)
        lost += pow((double)delta[i] - (double)expanded[i], 2);
    assert_true(lost < TAIL_LOST * norm);
    unmake(&m);
}

/* A budget over several matrices is used up, and goes to those that matter. */
static void test_a_budget_is_met(void **state)
{
    double strong[200], weak[200], cost, nothing;
    uint8_t strong_width[200], weak_width[200];
    struct codec_plan matrix[] = {{512, 200, 200, strong, strong_width, 0},
                                  {512, 200, 200, weak, weak_width, 0}};
    int64_t bytes = 0, sum[2] = {0};

    for (int v = 0; v < 200; v++) {
        strong[v] = pow(0.98, v);
        weak[v] = 0.01 * pow(0.98, v);
    }
    assert_true(factor_allot(matrix, 2, 20000, &cost));
    for (int m = 0; m < 2; m++) {
        int32_t rank = 0, planes = 0;

        for (int v = 0; v < 200; v++) {
            rank += matrix[m].width[v] > 0;
            planes += matrix[m].width[v];
            assert_true(v == 0 || matrix[m].width[v] <= matrix[m].width[v - 1]);
        }
        sum[m] = planes;
        assert_int_equal(matrix[m].bytes, planes_bytes(512, 200, rank, planes));
        bytes += matrix[m].bytes;
    }
    assert_true(bytes <= 20000 && bytes > 19800);
    assert_true(sum[0] > 3 * sum[1] && cost > 0);
    assert_false(factor_allot(matrix, 2, 100, &nothing)); /* not even the scales of rows fit */
    assert_int_equal(strong_width[0], 0);
    assert_true(nothing > cost);
}

/* Each vector's share of one element of the difference, as backend.h defines it; their sum. */
static double parts_of(const struct delta_planes *p, int i, int j, double part[RANK])
{
    double sum = 0;

    for (int v = 0; v < p->rank; v++)
        part[v] = 0;
    for (int32_t first = 0; first < p->planes;) {
        double left = 0, right = 0;
        int32_t k = first;

        for (; k < p->planes && p->vector[k] == p->vector[first]; k++) {
            bool l = p->left_bits[i * ((p->planes + 31) / 32) + k / 32] >> (k % 32) & 1;
            bool r = p->right_bits[k * ((COLS + 31) / 32) + j / 32] >> (j % 32) & 1;

            left += (double)(l ? p->left_scale[k] : -p->left_scale[k]);
            right += (double)(r ? p->right_scale[k] : -p->right_scale[k]);
        }
        part[p->vector[first]] = left * right * (double)p->row_scale[i] * (double)p->col_scale[j];
        sum += part[p->vector[first]];
        first = k;
    }
    return sum;
}

static void test_a_view_is_what_is_expanded(void **state)
{
    float *delta = difference(6), expanded[ROWS * COLS];
    struct delta_tensor view;
    struct made m = {0};
    void *memory;
    double error = 0, size = 0, part[RANK];

    make(&m, delta, NULL, 3000);
    CHECK(planes_view(m.bytes, ROWS, COLS, &view, &memory, &err));
    CHECK(planes_expand(m.bytes, ROWS, COLS, expanded, &err));
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < COLS; j++) {
            double sum = parts_of(&view.planes, i, j, part);

            assert_true(fabs(sum - (double)expanded[i * COLS + j]) < 1e-6);
            error += pow((double)delta[i * COLS + j] - sum, 2);
            size += pow((double)delta[i * COLS + j], 2);
        }
    assert_true(sqrt(error / size) < 0.2);
    free(memory);
    unmake(&m);
    free(delta);
}

/* A scale is a factor of what it scales: the slope of its logarithm is gradient * that part. */
static void test_slopes_are_those_of_the_definition(void **state)
{
    float *delta = difference(6), gradient[ROWS * COLS], slope[RANK + ROWS + COLS];
    double want[RANK + ROWS + COLS] = {0}, part[RANK], size = 0;
    struct delta_tensor view;
    struct made m = {0};
    int32_t rank;
    void *memory;

    make(&m, delta, NULL, 3000);
    CHECK(planes_view(m.bytes, ROWS, COLS, &view, &memory, &err));
    rank = view.planes.rank;
    assert_true(rank > 1 && rank <= RANK);
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < COLS; j++) {
            double d = parts_of(&view.planes, i, j, part), g = uniform(41, i * COLS + j);

            gradient[i * COLS + j] = (float)g;
            for (int v = 0; v < rank; v++)
                want[v] += g * part[v];
            want[rank + i] += g * d;
            want[rank + ROWS + j] += g * d;
            size += fabs(g * d);
        }
    assert_int_equal(planes_scale_count(m.bytes, ROWS, COLS), rank + ROWS + COLS);
    CHECK(planes_slope(m.bytes, ROWS, COLS, gradient, slope, &err));
    for (int s = 0; s < rank + ROWS + COLS; s++)
        assert_true(fabs((double)slope[s] - want[s]) < SLOPE_OFF * size);
    free(memory);
    unmake(&m);
    free(delta);
}

/* Zeros have nothing to store; what is no number is refused. */
static void test_edges(void **state)
{
    float delta[ROWS * COLS] = {0}, expanded[ROWS * COLS];
    struct made m = {0};
    struct err refusal = {0};

    make(&m, delta, NULL, 4000);
    CHECK(planes_expand(m.bytes, ROWS, COLS, expanded, &err));
    assert_memory_equal(expanded, delta, sizeof delta);
    unmake(&m);
    delta[7] = NAN;
    assert_int_equal(factor_open(&m.factor, delta, ROWS, COLS, NULL, RANK, &refusal), -1);
    assert_int_equal(refusal.kind, ERR_INVALID);
}

/* Whatever a byte is changed to, the bytes are refused or can be read. */
static void test_hostile_bytes(void **state)
{
    float *delta = difference(6), expanded[ROWS * COLS];
    struct made m = {0};
    struct err refusal = {0};
    int refused = 0;

    make(&m, delta, NULL, 900);
    for (int64_t i = 0; i < m.size && i < 400; i++)
        for (int flip = 1; flip < 256; flip *= 2) {
            m.bytes[i] ^= (char)flip;
            err_clear(&refusal);
            if (planes_accept(m.bytes, (size_t)m.size, ROWS, COLS, &refusal))
                refused++;
            else
                CHECK(planes_expand(m.bytes, ROWS, COLS, expanded, &err));
            m.bytes[i] ^= (char)flip;
        }
    assert_true(refused > 64);
    for (int64_t size = 0; size < m.size; size++)
        assert_int_equal(planes_accept(m.bytes, (size_t)size, ROWS, COLS, &refusal), -1);
    assert_int_equal(planes_accept(m.bytes, (size_t)m.size, ROWS + 64, COLS, &refusal), -1);
    unmake(&m);
    free(delta);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_singular),
        cmocka_unit_test(test_lower),
        cmocka_unit_test(test_damping),
        cmocka_unit_test(test_vectors_that_are_needed),
        cmocka_unit_test(test_feedback),
        cmocka_unit_test(test_feedback_both_ways),
        cmocka_unit_test(test_levels),
        cmocka_unit_test(test_the_metric_pays),
        cmocka_unit_test(test_long_tails),
        cmocka_unit_test(test_a_budget_is_met),
        cmocka_unit_test(test_a_view_is_what_is_expanded),
        cmocka_unit_test(test_slopes_are_those_of_the_definition),
        cmocka_unit_test(test_edges),
        cmocka_unit_test(test_hostile_bytes),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
