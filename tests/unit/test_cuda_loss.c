/* Cross-entropy, margins and distances to a teacher, in chunks, and their gradients: the CUDA
 * kernels against the CPU. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include <cmocka.h>

#include "engine/base/rng.h"
#include "tests/unit/parity.h"
#include "tests/unit/shim_fixture.h"

#define CHUNK 4

enum loss_kind { CROSS_ENTROPY, MARGINS, TEACHER };

struct loss_case {
    struct parity p;
    enum loss_kind kind;
    bool same_head; /* the teacher differs in its x alone */
    int32_t *target, *best, *other;
    float *weight, *margin;
    bool backward;
    struct parity_tensor *x, *nll, *correct, *dx, *d_final_norm, *d_head, *n, *dn, *logits;
    struct parity_tensor *teacher_x, *teacher_logits;
};

static struct tensor of(const struct parity_tensor *t, int side)
{
    return t ? t->t[side] : (struct tensor){0};
}

static void run_loss(void *context, int side)
{
    struct loss_case *c = context;
    struct backend *b = c->p.backend[side];
    const struct loss_margins margins = {c->best, c->other, c->margin};
    struct head_loss_args args = {
        .config = &c->p.config,
        .final_norm = c->p.final_norm[side],
        .head = c->p.head[side],
        .batch = &c->p.batch[side],
        .target = c->kind == TEACHER ? NULL : c->target,
        .weight = c->weight,
        .margins = c->kind == MARGINS ? &margins : NULL,
        .x = c->x->t[side],
        .nll = c->nll->t[side],
        .correct = c->correct->t[side],
        .dx = c->backward ? c->dx->t[side] : (struct tensor){0},
        .d_final_norm = of(c->d_final_norm, side),
        .d_head = of(c->d_head, side),
        .n = c->n->t[side],
        .dn = c->dn->t[side],
        .logits = c->logits->t[side],
    };

    if (c->kind == TEACHER) {
        args.teacher_x = c->teacher_x->t[side];
        args.teacher_norm = c->same_head ? args.final_norm : c->p.layer[side].mlp_norm;
        args.teacher_head = c->same_head ? args.head : c->p.embed[side];
        args.teacher_logits = c->teacher_logits->t[side];
    }
    b->ops->head_loss(b, &args);
}

/* The token that a row finds best; a row of zeros finds all as good, so it is the first. */
static int32_t best_token(const struct loss_case *c, int32_t row)
{
    int32_t d = c->p.config.hidden, best = 0;
    const float *x = (const float *)c->x->start + (int64_t)row * d;
    const float *w = c->p.final_norm[0].data;
    float *head = malloc((size_t)d * sizeof *head);
    double most = -INFINITY;

    assert_non_null(head);
    for (int32_t v = 0; v < c->p.config.vocabulary; v++) {
        double sum = 0;

        tensor_to_f32(&c->p.head[0], (int64_t)v * d, d, head);
        for (int32_t i = 0; i < d; i++)
            sum += (double)x[i] * (double)w[i] * (double)head[i];
        if (sum > most) {
            most = sum;
            best = v;
        }
    }
    free(head);
    return best;
}

/* Every third row has no weight, every second of the others is right; row 1 is all zeros. */
static void choose_targets(struct loss_case *c)
{
    int32_t d = c->p.config.hidden;

    c->target = calloc((size_t)c->p.rows, sizeof *c->target);
    c->best = calloc((size_t)c->p.rows, sizeof *c->best);
    c->other = calloc((size_t)c->p.rows, sizeof *c->other);
    c->weight = calloc((size_t)c->p.rows, sizeof *c->weight);
    c->margin = calloc((size_t)c->p.rows, sizeof *c->margin);
    assert_true(c->target && c->best && c->other && c->weight && c->margin);
    for (int32_t i = 0; i < d && c->p.rows > 1; i++)
        ((float *)c->x->start)[d + i] = 0;
    for (int32_t r = 0; r < c->p.rows; r++) {
        c->weight[r] = r % 3 == 2 ? 0 : 0.1f + 0.01f * (float)r;
        c->target[r] =
            r % 2 == 1 ? best_token(c, r)
                       : (int32_t)(rng_at(5, 5, (uint64_t)r) % (uint64_t)c->p.config.vocabulary);
        c->best[r] = best_token(c, r);
        c->other[r] = r == 4
                          ? c->best[r]
                          : (int32_t)(rng_at(5, 6, (uint64_t)r) % (uint64_t)c->p.config.vocabulary);
        c->margin[r] = r == 3 ? 0 : r % 2 ? -1.5f : 1.5f;
    }
}

static void open_case(struct loss_case *c, struct backend *shim, const struct parity_shape *shape)
{
    const int64_t v = shape->vocabulary ? shape->vocabulary : 101;
    int64_t d, rows;

    *c = (struct loss_case){.backward = true};
    parity_open(&c->p, shim, shape);
    d = c->p.config.hidden;
    rows = c->p.rows;
    c->x = parity_random(&c->p, 2, (int64_t[]){rows, d}, 2);
    c->dx = parity_output(&c->p, 2, (int64_t[]){rows, d});
    c->nll = parity_output_f32(&c->p, 1, &rows);
    c->correct = parity_integers(&c->p, rows);
    c->n = parity_output(&c->p, 2, (int64_t[]){CHUNK, d});
    c->dn = parity_output(&c->p, 2, (int64_t[]){CHUNK, d});
    c->logits = parity_output_f32(&c->p, 2, (int64_t[]){CHUNK, v});
    c->teacher_x = parity_random(&c->p, 2, (int64_t[]){rows, d}, 2);
    c->teacher_logits = parity_output_f32(&c->p, 2, (int64_t[]){CHUNK, v});
    choose_targets(c);
}

static void close_case(struct loss_case *c)
{
    free(c->target);
    free(c->best);
    free(c->other);
    free(c->weight);
    free(c->margin);
    parity_close(&c->p);
}

static int64_t rows_right(const struct loss_case *c, int side)
{
    int32_t *correct = malloc((size_t)c->p.rows * sizeof *correct);
    struct backend *b = c->p.backend[side];
    int64_t sum = 0;

    assert_non_null(correct);
    b->ops->download(b, correct, c->correct->t[side].data, (size_t)c->p.rows * sizeof *correct);
    for (int32_t r = 0; r < c->p.rows; r++)
        sum += correct[r];
    free(correct);
    return sum;
}

static void compare(struct loss_case *c, double tolerance)
{
    c->d_head =
        parity_random_f32(&c->p, 2, (int64_t[]){c->p.config.vocabulary, c->p.config.hidden}, 0.01f);
    c->d_final_norm = parity_random_f32(&c->p, 1, (int64_t[]){c->p.config.hidden}, 0.1f);
    parity_run(&c->p, run_loss, c);
    parity_equal(&c->p, "nll", c->nll, tolerance);
    parity_equal(&c->p, "correct", c->correct, 0);
    parity_equal(&c->p, "dx", c->dx, tolerance);
    parity_equal(&c->p, "d_head", c->d_head, tolerance);
    parity_equal(&c->p, "d_final_norm", c->d_final_norm, tolerance);
}

static void loss_of_shape(struct backend *shim, const struct parity_shape *shape)
{
    struct loss_case c;

    open_case(&c, shim, shape);
    compare(&c, parity_tolerance(&c.p));
    if (c.p.rows > 1)
        assert_in_range(rows_right(&c, 1), c.p.rows / 4, c.p.rows / 2);
    close_case(&c);
}

static void margins_of_shape(struct backend *shim, const struct parity_shape *shape)
{
    struct loss_case c;

    open_case(&c, shim, shape);
    c.kind = MARGINS;
    compare(&c, parity_tolerance(&c.p));
    if (c.p.rows > 1)
        assert_in_range(rows_right(&c, 1), c.p.rows / 4, c.p.rows / 2);
    close_case(&c);
}

/* A teacher with a head of its own: all is far away. */
static void far_teacher_of_shape(struct backend *shim, const struct parity_shape *shape)
{
    struct loss_case c;

    open_case(&c, shim, shape);
    c.kind = TEACHER;
    compare(&c, parity_tolerance(&c.p));
    close_case(&c);
}

static int64_t rows_with_weight(const struct loss_case *c)
{
    int64_t count = 0;

    for (int32_t r = 0; r < c->p.rows; r++)
        count += c->weight[r] != 0;
    return count;
}

/* The same head, and an x `apart` from the model's: most rows agree, row 1 in a draw of all. */
static void near_teacher(struct loss_case *c, float apart)
{
    const float *x = c->x->start;
    float *teacher = c->teacher_x->start;

    c->kind = TEACHER;
    c->same_head = true;
    for (int64_t i = 0; i < (int64_t)c->p.rows * c->p.config.hidden; i++)
        teacher[i] = x[i] * (1 + apart * (float)(2 * rng_unit_at(6, 1, (uint64_t)i) - 1));
}

static void near_teacher_of_shape(struct backend *shim, const struct parity_shape *shape)
{
    struct loss_case c;

    open_case(&c, shim, shape);
    near_teacher(&c, 0.5f);
    compare(&c, parity_tolerance(&c.p));
    if (c.p.rows > 5)
        assert_in_range(rows_right(&c, 1), rows_with_weight(&c) / 3, rows_with_weight(&c) - 1);
    close_case(&c);
}

/* The model finds all tokens of row 1 as good: the first, then, which is the one that the teacher
 * is for, whose x is that token's row of the head. */
static void test_draw(void **state)
{
    struct loss_case c;
    int32_t d;

    open_case(&c, *state, &(struct parity_shape){.name = "draw", .doc_rows = {2}});
    near_teacher(&c, 0);
    d = c.p.config.hidden;
    tensor_to_f32(&c.p.head[0], 0, d, (float *)c.teacher_x->start + d);
    c.weight[0] = 0;
    parity_run(&c.p, run_loss, &c);
    parity_equal(&c.p, "correct", c.correct, 0);
    assert_int_equal(rows_right(&c, 1), 1);
    close_case(&c);
}

/* Of almost the same logits hardly a digit of them is left in their distance; of the same, none is
 * made up. */
static void twin_teacher_of_shape(struct backend *shim, const struct parity_shape *shape)
{
    struct loss_case c;
    bool narrow = shim->activation == DTYPE_BF16;

    open_case(&c, shim, shape);
    near_teacher(&c, narrow ? 0.02f : 1e-4f);
    compare(&c, narrow ? 0.1 : 1e-2);
    near_teacher(&c, 0);
    parity_run(&c.p, run_loss, &c);
    parity_equal(&c.p, "dx", c.dx, 0);
    parity_equal(&c.p, "nll", c.nll, 0);
    assert_int_equal(rows_right(&c, 1), rows_with_weight(&c));
    close_case(&c);
}

/* A vocabulary of several turns of the softmax's loop: gradients that overtake logits would show.
 */
static const struct parity_shape large_vocabularies[] = {
    {.name = "vocabulary of fours", .hidden = 16, .vocabulary = 5120, .doc_rows = {2, 3}},
    {.name = "odd vocabulary", .hidden = 16, .vocabulary = 2051, .doc_rows = {2}, .seed = 8},
    {0},
};

static void test_loss(void **state)
{
    shim_every_shape(*state, parity_training_shapes, loss_of_shape);
    shim_every_shape(*state, large_vocabularies, loss_of_shape);
}

static void test_margins(void **state)
{
    shim_every_shape(*state, parity_training_shapes, margins_of_shape);
    shim_large_shapes(*state, large_vocabularies, margins_of_shape);
}

static void test_teacher(void **state)
{
    shim_every_shape(*state, parity_training_shapes, far_teacher_of_shape);
    shim_every_shape(*state, parity_training_shapes, near_teacher_of_shape);
    shim_large_shapes(*state, large_vocabularies, far_teacher_of_shape);
}

static void test_twin_teacher(void **state)
{
    static const struct parity_shape shapes[] = {
        {.name = "grouped heads"},
        {.name = "vocabulary of fours", .vocabulary = 128, .seed = 9},
        {0},
    };

    shim_every_shape(*state, shapes, twin_teacher_of_shape);
}

static void loss_only(struct backend *shim, const struct parity_shape *shape)
{
    struct loss_case c;

    for (enum loss_kind kind = CROSS_ENTROPY; kind <= TEACHER; kind++) {
        open_case(&c, shim, shape);
        c.kind = kind;
        c.backward = false;
        parity_run(&c.p, run_loss, &c);
        parity_equal(&c.p, "nll", c.nll, parity_tolerance(&c.p));
        parity_equal(&c.p, "correct", c.correct, 0);
        close_case(&c);
    }
}

static void test_loss_only(void **state)
{
    static const struct parity_shape shapes[] = {{.name = "grouped heads"}, {0}};

    shim_every_shape(*state, shapes, loss_only);
}

/* What is not trained is not computed: no gradient of the head, of the norm, and no row at all. */
static void test_frozen_head_and_no_rows(void **state)
{
    struct loss_case c;

    open_case(&c, *state, &(struct parity_shape){.name = "frozen"});
    parity_run(&c.p, run_loss, &c);
    parity_equal(&c.p, "dx", c.dx, parity_tolerance(&c.p));
    for (int32_t r = 0; r < c.p.rows; r++)
        c.weight[r] = 0;
    parity_run(&c.p, run_loss, &c);
    parity_equal(&c.p, "nll", c.nll, 0);
    parity_equal(&c.p, "correct", c.correct, 0);
    parity_equal(&c.p, "dx", c.dx, 0);
    close_case(&c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_loss),
        cmocka_unit_test(test_margins),
        cmocka_unit_test(test_teacher),
        cmocka_unit_test(test_twin_teacher),
        cmocka_unit_test(test_draw),
        cmocka_unit_test(test_loss_only),
        cmocka_unit_test(test_frozen_head_and_no_rows),
    };

    return cmocka_run_group_tests_name("f32", tests, shim_setup, shim_teardown) +
           cmocka_run_group_tests_name("bf16", tests, shim_setup_bf16, shim_teardown);
}
