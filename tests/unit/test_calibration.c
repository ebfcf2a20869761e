/* Statistics for compression against their expectation, worked out token by token: every target
 * and every rival of a short example, each with its probability. And what they are a function of.
 * No TSan: its threads are those of test_trainer. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/codec/calibration.h"
#include "engine/model_moments.h"
#include "tests/unit/reference_model.h"

#define V 70
#define ROWS 3 /* of the short example: the last two ask for an answer */
#define COPIES 4000
#define MARGIN 2.0
#define NEAR_ZERO 1e-12 /* weight of a row that counts, but whose cross-entropy does not */

static const int32_t short_token[ROWS + 1] = {3, 41, 17, 60};
static const float short_weight[ROWS + 1] = {0, 0, 1, 1};

/* A model, and another one of its shapes: its fine-tune. */
struct fixture {
    struct memory_model *memory[2];
    struct backend backend;
    struct model *model[2];
    const struct model_weights *tuned;
};

static void open_fixture(struct fixture *f, int threads)
{
    struct model_config config = memory_model_config(2, true, false, false);
    struct err err = {0};

    assert_int_equal(backend_open(&f->backend, &(struct backend_options){.threads = threads}, &err),
                     0);
    for (int i = 0; i < 2; i++) {
        f->memory[i] = memory_model_new(&config, DTYPE_F32, 11 + (uint64_t)i);
        struct model_source source = memory_model_source(f->memory[i]);
        assert_int_equal(model_open_source(&f->model[i], &f->backend, &source, &err), 0);
    }
    f->tuned = model_base_weights(f->model[1]);
}

static void close_fixture(struct fixture *f)
{
    for (int i = 0; i < 2; i++) {
        model_free(f->model[i]);
        memory_model_free(f->memory[i]);
    }
    backend_close(&f->backend);
}

static struct dataset_example short_example(const void *context, int64_t i)
{
    return (struct dataset_example){short_token, short_weight, ROWS + 1};
}

/* Examples of 1 to 40 tokens. */
struct mixed {
    int32_t token[64];
    float weight[64];
};

static struct dataset_example mixed_example(const void *context, int64_t i)
{
    const struct mixed *m = context;
    int32_t length = 1 + (int32_t)(i * 17 % 40);

    return (struct dataset_example){m->token + i % 20, m->weight + i % 20, length};
}

static void fill_mixed(struct mixed *m)
{
    for (int32_t i = 0; i < 64; i++) {
        m->token[i] = i * 29 % V;
        m->weight[i] = i % 3 == 0;
    }
}

static void measure(struct fixture *f, struct calibration *out, const struct trainer_source *source,
                    struct calibration_options options)
{
    struct err err = {0};

    if (calibration_measure(out, f->model[0], f->tuned, source, &options, &err))
        fail_msg("%s", err.message);
}

static int64_t side(const struct fixture *f, int32_t i, bool of_g)
{
    return f->memory[0]->tensor[i].shape[of_g ? 0 : 1];
}

/* Largest ‖a - b‖ / ‖b‖ of all matrices. */
static double difference(const struct fixture *f, float *const *a, float *const *b, bool of_g)
{
    double worst = 0;

    for (int32_t i = 0; i < f->memory[0]->count; i++) {
        int64_t n = side(f, i, of_g);
        double off = 0, size = 0;

        assert_true(!a[i] == !b[i]);
        for (int64_t k = 0; a[i] && k < n * n; k++) {
            off += pow((double)a[i][k] - (double)b[i][k], 2);
            size += pow((double)b[i][k], 2);
        }
        if (a[i] && !(sqrt(off / size) <= worst))
            worst = sqrt(off / size);
    }
    return worst;
}

/* ------------------------------------------------------------------ the expectation */

/* Every possible loss of the short example: documents like it, each with one row that has a weight.
 */
struct outcomes {
    int32_t token[ROWS * V * ROWS], position[ROWS * V * ROWS], target[ROWS * V * ROWS];
    int32_t best[ROWS * V * ROWS], other[ROWS * V * ROWS], cu_seqlens[ROWS * V + 1];
    float weight[ROWS * V * ROWS], margin[ROWS * V * ROWS];
    struct batch batch;
};

/* The target's loss with `weight`, and the margin of `best` over `other` with `margin`. */
static void add_outcome(struct outcomes *o, int32_t row, int32_t target, int32_t other,
                        const double weight[2])
{
    for (int32_t r = 0; r < ROWS; r++) {
        int32_t at = o->batch.rows++;

        o->token[at] = short_token[r];
        o->position[at] = r;
        o->target[at] = o->best[at] = target;
        o->other[at] = other;
        o->weight[at] = r == row ? (float)weight[0] : 0;
        o->margin[at] = r == row ? (float)weight[1] : 0;
    }
    o->cu_seqlens[++o->batch.docs] = o->batch.rows;
}

/* logits [ROWS, V] of the short example. */
static void logits_of(struct fixture *f, float *logits)
{
    static const int32_t position[ROWS] = {0, 1, 2}, cu_seqlens[2] = {0, ROWS};
    struct batch batch = {.rows = ROWS,
                          .token = short_token,
                          .position = position,
                          .docs = 1,
                          .cu_seqlens = cu_seqlens,
                          .serving = true};
    struct model_decoder *decoder;
    struct err err = {0};

    assert_int_equal(model_decoder_open(&decoder, f->model[0], ROWS, ROWS, &err), 0);
    assert_int_equal(model_decode(decoder,
                                  &(struct model_decode_args){.weights = f->tuned,
                                                              .batch = &batch,
                                                              .logit_row = position,
                                                              .logit_count = ROWS,
                                                              .logits = logits},
                                  &err),
                     0);
    model_decoder_free(decoder);
}

/* Probabilities of a row; `without` a token, or -1. */
static void probabilities(const float *logit, int32_t without, double p[V])
{
    double sum = 0;

    for (int32_t v = 0; v < V; v++)
        sum += p[v] = v == without ? 0 : exp((double)logit[v]);
    for (int32_t v = 0; v < V; v++)
        p[v] /= sum;
}

static int32_t best_of(const float *logit)
{
    int32_t best = 0;

    for (int32_t v = 0; v < V; v++)
        best = logit[v] > logit[best] ? v : best;
    return best;
}

static void list_outcomes(struct outcomes *o, const float *logits, bool margin)
{
    double p[V];

    o->batch = (struct batch){
        .token = o->token, .position = o->position, .cu_seqlens = o->cu_seqlens, .docs = 0};
    for (int32_t r = 0; r < ROWS; r++) {
        const float *logit = logits + r * V;
        int32_t best = margin ? best_of(logit) : -1;

        probabilities(logit, best, p);
        for (int32_t v = 0; v < V; v++) {
            const double alone[2] = {sqrt(p[v]), 0},
                         of_margin[2] = {NEAR_ZERO, sqrt(p[v]) * MARGIN};

            if (!margin)
                add_outcome(o, r, v, 0, alone);
            else if (v != best && short_weight[r + 1] > 0)
                add_outcome(o, r, best, v, of_margin);
        }
    }
}

/* What calibration_measure estimates. */
static void expect(struct fixture *f, bool margin, struct calibration *out)
{
    int32_t count = model_tensor_count(f->model[0]);
    struct model_moments *moments = calloc((size_t)count, sizeof *moments);
    struct outcomes *o = calloc(1, sizeof *o);
    const struct loss_margins margins = {o->best, o->other, o->margin};
    struct model_moments_pass *pass;
    float logits[ROWS * V];
    struct err err = {0};

    out->count = count;
    out->h = calloc((size_t)count, sizeof *out->h);
    out->g = calloc((size_t)count, sizeof *out->g);
    assert_true(moments && o && out->h && out->g);
    for (int32_t i = 0; i < count; i++) {
        if (!model_tensor_is_linear(f->model[0], i))
            continue;
        moments[i].h = out->h[i] = calloc((size_t)(side(f, i, 0) * side(f, i, 0)), sizeof(float));
        moments[i].g = out->g[i] = calloc((size_t)(side(f, i, 1) * side(f, i, 1)), sizeof(float));
    }
    logits_of(f, logits);
    assert_int_equal(model_moments_open(&pass, f->model[0], ROWS * V * ROWS, &err), 0);
    for (int with_margin = 0; with_margin <= margin; with_margin++) {
        list_outcomes(o, logits, with_margin);
        assert_int_equal(model_moments_add(pass,
                                           &(struct model_moments_args){
                                               .weights = f->tuned,
                                               .batch = &o->batch,
                                               .weight = o->weight,
                                               .target = o->target,
                                               .margins = with_margin ? &margins : NULL,
                                           },
                                           moments, NULL, &err),
                         0);
    }
    for (int32_t i = 0; i < count; i++) {
        for (int64_t k = 0; out->h[i] && k < side(f, i, 0) * side(f, i, 0); k++)
            out->h[i][k] = (float)((double)out->h[i][k] / moments[i].weight);
        for (int64_t k = 0; out->g[i] && k < side(f, i, 1) * side(f, i, 1); k++)
            out->g[i][k] /= ROWS;
        if (out->h[i]) {
            model_moments_mirror(out->h[i], side(f, i, 0));
            model_moments_mirror(out->g[i], side(f, i, 1));
        }
    }
    model_moments_free(pass);
    free(o);
    free(moments);
}

static void check_expectation(bool margin)
{
    struct trainer_source source = {.count = COPIES, .example = short_example};
    struct calibration_options options = {.seed = 1, .margin = margin ? MARGIN : 0};
    struct calibration got, want, other;
    struct fixture f;

    open_fixture(&f, 2);
    measure(&f, &got, &source, options);
    expect(&f, margin, &want);
    expect(&f, !margin, &other);
    assert_int_equal(got.tokens, COPIES * ROWS);
    double of_h = difference(&f, got.h, want.h, false), of_g = difference(&f, got.g, want.g, true);
    if (!(of_h < 0.08 && of_g < 0.08))
        fail_msg("h is off by %g, g by %g", of_h, of_g);
    assert_true(difference(&f, got.g, other.g, true) > 0.3);
    calibration_free(&got);
    calibration_free(&want);
    calibration_free(&other);
    close_fixture(&f);
}

static void test_the_fisher_information(void **state)
{
    check_expectation(false);
}

static void test_with_the_answers_margins(void **state)
{
    check_expectation(true);
}

/* ------------------------------------------------------------------ what they are a function of */

static void test_shapes_and_symmetry(void **state)
{
    struct mixed mixed;
    struct trainer_source source = {.context = &mixed, .count = 100, .example = mixed_example};
    struct calibration c;
    struct fixture f;

    fill_mixed(&mixed);
    open_fixture(&f, 1);
    measure(&f, &c, &source, (struct calibration_options){.margin = 1});
    assert_int_equal(c.count, f.memory[0]->count);
    for (int32_t i = 0; i < c.count; i++) {
        assert_true(!c.h[i] == !model_tensor_is_linear(f.model[0], i));
        assert_true(!c.h[i] == !c.g[i]);
        for (int of_g = 0; of_g < 2 && c.h[i]; of_g++) {
            const float *m = of_g ? c.g[i] : c.h[i];
            int64_t n = side(&f, i, of_g);

            for (int64_t r = 0; r < n; r++) {
                assert_true(m[r * n + r] >= 0);
                for (int64_t k = 0; k < r; k++)
                    assert_true(m[r * n + k] == m[k * n + r]);
            }
        }
    }
    calibration_free(&c);
    close_fixture(&f);
}

static void test_a_seed_decides(void **state)
{
    struct mixed mixed;
    struct trainer_source source = {.context = &mixed, .count = 100, .example = mixed_example};
    struct calibration_options options = {.seed = 5, .margin = 1};
    struct calibration a, b, c;
    struct fixture f, more_threads;

    fill_mixed(&mixed);
    open_fixture(&f, 1);
    open_fixture(&more_threads, 3);
    measure(&f, &a, &source, options);
    measure(&more_threads, &b, &source, options);
    options.seed = 6;
    measure(&f, &c, &source, options);
    assert_int_equal(a.tokens, c.tokens);
    assert_true(difference(&f, a.h, b.h, false) == 0 && difference(&f, a.g, b.g, true) == 0);
    assert_true(difference(&f, a.h, c.h, false) > 0.01);
    calibration_free(&a);
    calibration_free(&b);
    calibration_free(&c);
    close_fixture(&more_threads);
    close_fixture(&f);
}

/* Of three numbers: the last share, how often it was told, and how often it may be. */
static bool note_share(void *context, const char *stage, double share)
{
    double *last = context;

    assert_string_equal(stage, "statistics");
    assert_true(share > last[0] && share <= 1);
    last[0] = share;
    last[1]++;
    return last[1] < last[2];
}

static void test_progress(void **state)
{
    struct mixed mixed;
    struct trainer_source source = {.context = &mixed, .count = 100, .example = mixed_example};
    double share[3] = {0, 0, INFINITY};
    struct calibration_options options = {.margin = 1, .listener = {note_share, share}};
    struct calibration c;
    struct fixture f;
    struct err err = {0};

    fill_mixed(&mixed);
    open_fixture(&f, 1);
    assert_int_equal(calibration_measure(&c, f.model[0], f.tuned, &source, &options, &err), 0);
    assert_true(share[0] == 1 && share[1] >= 3 * 2 * f.memory[0]->config.layers); /* 2,000 tokens */
    calibration_free(&c);
    share[0] = share[1] = 0;
    share[2] = 3;
    assert_int_equal(calibration_measure(&c, f.model[0], f.tuned, &source, &options, &err), -1);
    assert_int_equal(err.kind, ERR_CANCELLED);
    assert_true(share[1] == 3);
    assert_null(c.h);
    close_fixture(&f);
}

static struct dataset_example long_example(const void *context, int64_t i)
{
    static int32_t token[900];
    static float weight[900];

    for (int32_t k = 0; k < 900; k++) {
        token[k] = (k * 31 + (int32_t)i) % V;
        weight[k] = k > 600;
    }
    return (struct dataset_example){token, weight, 900};
}

/* More than are wanted, whose last one does not fit: long ones, and short ones. */
static void test_the_last_example_is_cut(void **state)
{
    struct trainer_source longs = {.count = CALIBRATION_TOKENS_INPUTS / 899 + 3,
                                   .example = long_example};
    struct trainer_source shorts = {.count = CALIBRATION_TOKENS, .example = short_example};
    struct calibration c;
    struct fixture f;

    open_fixture(&f, 2);
    measure(&f, &c, &longs, (struct calibration_options){.inputs_only = true});
    assert_int_equal(c.tokens, CALIBRATION_TOKENS_INPUTS);
    calibration_free(&c);
    measure(&f, &c, &shorts, (struct calibration_options){.margin = 1});
    assert_int_equal(c.tokens, CALIBRATION_TOKENS);
    calibration_free(&c);
    close_fixture(&f);
}

/* What forwards of the same examples meet; nothing that is drawn, and no gradient. */
static void test_inputs_alone(void **state)
{
    struct mixed mixed;
    struct trainer_source source = {.context = &mixed, .count = 100, .example = mixed_example};
    struct calibration_options options = {.inputs_only = true, .margin = 1};
    struct calibration c, weighted, again;
    struct fixture f;
    struct err err = {0};

    fill_mixed(&mixed);
    open_fixture(&f, 2);
    measure(&f, &c, &source, options);
    options.margin = 0;
    measure(&f, &again, &source, options);
    options.inputs_only = false;
    measure(&f, &weighted, &source, options);
    assert_int_equal(c.tokens, weighted.tokens);
    for (int32_t i = 0; i < c.count; i++) {
        int32_t first = c.h[i] ? model_moments_reads(f.model[0], i) : i;

        assert_true(!c.h[i] == !model_tensor_is_linear(f.model[0], i));
        assert_true(c.h[i] == c.h[first] && !c.g[i]);
    }
    assert_true(difference(&f, c.h, again.h, false) == 0);
    double near = difference(&f, weighted.h, c.h, false);
    assert_true(near > 0.01 && near < 1); /* of the same tokens, which count otherwise */
    calibration_free(&c);
    calibration_free(&again);
    calibration_free(&weighted);
    ((float *)f.memory[1]->tensor[0].data)[41 * 40] = NAN;
    options.inputs_only = true;
    source = (struct trainer_source){.count = 2, .example = short_example};
    assert_int_equal(calibration_measure(&c, f.model[0], f.tuned, &source, &options, &err), -1);
    assert_int_equal(err.kind, ERR_INVALID);
    assert_null(c.h);
    close_fixture(&f);
}

static void test_nothing_to_measure(void **state)
{
    struct trainer_source none = {.example = short_example};
    struct trainer_source source = {.count = 2, .example = short_example};
    struct calibration_options options = {0};
    struct calibration c;
    struct fixture f;
    struct err err = {0};

    open_fixture(&f, 1);
    assert_int_equal(calibration_measure(&c, f.model[0], f.tuned, &none, &options, &err), -1);
    assert_int_equal(err.kind, ERR_INVALID);
    memset(&err, 0, sizeof err);
    ((float *)f.memory[1]->tensor[0].data)[41 * 40] = NAN;
    assert_int_equal(calibration_measure(&c, f.model[0], f.tuned, &source, &options, &err), -1);
    assert_int_equal(err.kind, ERR_INVALID);
    assert_true(c.count == 0 && !c.h && !c.g);
    close_fixture(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_the_fisher_information),
        cmocka_unit_test(test_with_the_answers_margins),
        cmocka_unit_test(test_shapes_and_symmetry),
        cmocka_unit_test(test_a_seed_decides),
        cmocka_unit_test(test_progress),
        cmocka_unit_test(test_the_last_example_is_cut),
        cmocka_unit_test(test_inputs_alone),
        cmocka_unit_test(test_nothing_to_measure),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
