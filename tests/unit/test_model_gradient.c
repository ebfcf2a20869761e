/* The whole model's losses (cross-entropy, answers' margins, the distance to a teacher) and their
 * gradients against a double-precision reference: every tensor of small models with each flag,
 * documents packed. And a meta-test: an operation broken on purpose must
 * turn the comparison red. No TSan: its threads are those of test_trainer. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/base/rng.h"
#include "tests/unit/reference_model.h"

#define ROWS 23
/* From one element of a matrix that is looked at to the next; a sanitizer looks at the code that
 * runs, which is the same for all. */
#if defined(__SANITIZE_ADDRESS__)
#define STRIDE 331
#else
#define STRIDE 67
#endif
#define STEP 1e-5 /* of the central differences: their own error is near 1e-9 */
#define TOLERANCE 2e-5 /* of ‖difference‖ / ‖gradient‖ of a tensor: F32 sums over some 60 terms */

struct fixture {
    struct memory_model *memory;
    struct reference *reference;
    struct backend backend;
    struct model *model;
    struct model_training *training;
    struct model_weights grads;
    struct batch batch;
    int32_t token[ROWS], position[ROWS], target[ROWS], cu_seqlens[4];
    int32_t best[ROWS], other[ROWS];
    float weight[ROWS], margin[ROWS];
    /* Which loss; NULL: not this one. */
    const struct loss_margins *margins; /* of the arrays above */
    double divisor[ROWS];               /* of their gaps */
    const struct model_weights *taught_by;
    const void *taught_before; /* what the teacher gave */
    double *teacher_logits;    /* [ROWS, V] by the reference */
};

struct teacher { /* of a fixture */
    struct memory_model *memory;
    struct reference *reference;
    struct model *model;
    double logits[ROWS * 70];
};

static void fill_batch(struct fixture *f)
{
    static const int32_t cu_seqlens[4] = {0, 9, 10, ROWS};

    memcpy(f->cu_seqlens, cu_seqlens, sizeof cu_seqlens);
    for (int32_t d = 0; d < 3; d++)
        for (int32_t r = cu_seqlens[d]; r < cu_seqlens[d + 1]; r++) {
            f->token[r] = (int32_t)(rng_at(5, 1, (uint64_t)r) % 70);
            f->target[r] = (int32_t)(rng_at(5, 2, (uint64_t)r) % 70);
            f->best[r] = r == 4 ? f->target[r] : (int32_t)(rng_at(5, 6, (uint64_t)r) % 70);
            f->other[r] = r == 3 ? f->best[r] : (int32_t)(rng_at(5, 3, (uint64_t)r) % 70);
            f->margin[r] = r % 3 == 1 ? 0 : (r % 2 ? 1 : -1) * (0.3f + 0.1f * (float)r);
            f->weight[r] = r % 4 == 2 ? 0 : 0.05f + 0.01f * (float)r;
            f->position[r] = r - cu_seqlens[d];
        }
    f->batch = (struct batch){.rows = ROWS,
                              .token = f->token,
                              .position = f->position,
                              .docs = 3,
                              .cu_seqlens = f->cu_seqlens};
}

static struct fixture *open_fixture_in(const struct model_config *config, enum dtype precision)
{
    const struct backend_options options = {.precision = precision, .threads = 2};
    struct fixture *f = calloc(1, sizeof *f);
    struct err err = {0};
    char name[MODEL_NAME_MAX];

    assert_non_null(f);
    f->memory = memory_model_new(config, DTYPE_F32, 11);
    f->reference = reference_new(f->memory);
    struct model_source source = memory_model_source(f->memory);
    assert_int_equal(backend_open(&f->backend, &options, &err), 0);
    assert_int_equal(model_open_source(&f->model, &f->backend, &source, &err), 0);
    assert_int_equal(model_training_open(&f->training, f->model, ROWS, true, &err), 0);
    assert_int_equal(model_weights_alloc(&f->grads, f->model, &err), 0);
    assert_int_equal(model_tensor_count(f->model), f->memory->count);
    for (int32_t i = 0; i < f->memory->count; i++) {
        struct tensor *g = model_tensor(f->model, &f->grads, i, name);

        assert_string_equal(name, f->memory->name[i]);
        g->data = f->backend.ops->alloc(&f->backend, (size_t)tensor_elements(g) * 4, &err);
        assert_non_null(g->data);
    }
    if (config->tied_embeddings)
        f->grads.head = f->grads.embed;
    fill_batch(f);
    return f;
}

static struct fixture *open_fixture(const struct model_config *config)
{
    return open_fixture_in(config, DTYPE_F32);
}

static void close_fixture(struct fixture *f)
{
    char name[MODEL_NAME_MAX];

    for (int32_t i = 0; i < f->memory->count; i++)
        f->backend.ops->free(&f->backend, model_tensor(f->model, &f->grads, i, name)->data);
    model_weights_release(&f->grads);
    model_training_free(f->training);
    model_free(f->model);
    backend_close(&f->backend);
    reference_free(f->reference);
    memory_model_free(f->memory);
    free(f);
}

static struct model_loss run_model(struct fixture *f, bool gradients)
{
    struct model_loss loss;
    struct err err = {0};

    assert_int_equal(model_loss(f->training,
                                &(struct model_loss_args){
                                    .weights = model_base_weights(f->model),
                                    .grads = gradients ? &f->grads : NULL,
                                    .batch = &f->batch,
                                    .target = f->taught_by ? NULL : f->target,
                                    .weight = f->weight,
                                    .margins = f->margins,
                                    .teacher = f->taught_by,
                                    .teacher_rows = f->taught_before,
                                },
                                &loss, &err),
                     0);
    return loss;
}

static double want_loss(const struct fixture *f)
{
    const struct reference *r = f->reference;
    double x[ROWS * 40];

    assert_int_equal(r->config.hidden, 40);
    reference_forward(r, &f->batch, x);
    if (f->taught_by)
        return reference_divergence(r, ROWS, x, f->teacher_logits, f->weight);
    return reference_head_loss(r, ROWS, x, f->target, f->weight);
}

/* What is differentiated. */
static double want_objective(const struct fixture *f)
{
    double loss = want_loss(f), x[ROWS * 40], gap[ROWS];

    if (!f->margins)
        return loss;
    reference_forward(f->reference, &f->batch, x);
    reference_gaps(f->reference, ROWS, x, f->best, f->other, gap);
    for (int32_t r = 0; r < ROWS; r++)
        if (f->weight[r] != 0)
            loss += (double)f->margin[r] * gap[r] / f->divisor[r];
    return loss;
}

/* The margins, with divisors as they are now: how many of them are more than 1. */
static int32_t take_margins(struct fixture *f, struct loss_margins *margins)
{
    double x[ROWS * 40];
    int32_t count = 0;

    reference_forward(f->reference, &f->batch, x);
    reference_gaps(f->reference, ROWS, x, f->best, f->other, f->divisor);
    for (int32_t r = 0; r < ROWS; r++) {
        count += f->divisor[r] > 1;
        f->divisor[r] = f->divisor[r] > 1 ? f->divisor[r] : 1;
    }
    *margins = (struct loss_margins){f->best, f->other, f->margin};
    f->margins = margins;
    return count;
}

/* ‖gradient of tensor i - central differences‖ / ‖central differences‖, over every `stride`-th
 * element. */
static double gradient_error(struct fixture *f, int32_t i, int64_t stride)
{
    char name[MODEL_NAME_MAX];
    const float *g = model_tensor(f->model, &f->grads, i, name)->data;
    struct reference *r = f->reference;
    double difference = 0, size = 0;

    for (int64_t k = 0; k < r->at[i + 1] - r->at[i]; k += stride) {
        double *p = &r->memory[r->at[i] + k], was = *p, up, down;

        *p = was + STEP;
        up = want_objective(f);
        *p = was - STEP;
        down = want_objective(f);
        *p = was;
        double want = (up - down) / (2 * STEP);
        difference += (want - (double)g[k]) * (want - (double)g[k]);
        size += want * want;
    }
    return sqrt(difference / size);
}

static double worst_error(struct fixture *f)
{
    double worst = 0;

    for (int32_t i = 0; i < f->memory->count; i++) {
        double error = gradient_error(f, i, f->memory->tensor[i].rank == 1 ? 3 : STRIDE);

        worst = error > worst || isnan(error) ? error : worst;
    }
    return worst;
}

/* What a loss is off by, of its size. */
static double loss_error(const struct fixture *f, const struct model_loss *loss)
{
    double want = want_loss(f);

    return fabs(loss->weighted - want) / fabs(want);
}

static void check_fixture(struct fixture *f, double tolerance)
{
    struct model_loss loss = run_model(f, false), again = run_model(f, true);
    double error = loss_error(f, &loss);

    if (!(error < tolerance / 20))
        fail_msg("the loss is off by %g of its size", error);
    assert_true(loss.weighted == again.weighted && loss.correct == again.correct);
    error = worst_error(f);
    if (!(error < tolerance))
        fail_msg("a gradient is off by %g of its size", error);
}

static void check_model(int32_t kv_heads, bool tied, bool bias, bool qk_norm)
{
    struct model_config config = memory_model_config(kv_heads, tied, bias, qk_norm);
    struct fixture *f = open_fixture(&config);

    check_fixture(f, TOLERANCE);
    close_fixture(f);
}

static void test_grouped_tied(void **state)
{
    check_model(2, true, false, false);
}

static void test_multi_head_untied(void **state)
{
    check_model(4, false, false, false);
}

static void test_biases_and_head_norms(void **state)
{
    check_model(1, false, true, true);
}

static void test_gradients_add_up(void **state)
{
    struct model_config config = memory_model_config(2, true, false, false);
    struct fixture *f = open_fixture(&config);
    float *g = f->grads.layer[1].gate.w.data, first;

    run_model(f, true);
    first = g[17];
    run_model(f, true);
    assert_true(fabsf(g[17] - 2 * first) <= 1e-6f * fabsf(first));
    close_fixture(f);
}

/* A token of one document must not reach another: neither its loss nor its gradients. */
static void test_documents_do_not_see_each_other(void **state)
{
    struct model_config config = memory_model_config(2, true, false, false);
    struct fixture *f = open_fixture(&config);
    struct model_loss before, after;

    for (int32_t r = 0; r < ROWS; r++)
        f->weight[r] = r < 10 ? 0 : 1; /* the last document alone */
    before = run_model(f, true);
    float sample = ((float *)f->grads.layer[0].k.w.data)[33];
    for (int32_t r = 0; r < 10; r++)
        f->token[r] = (f->token[r] + 13) % 70;
    memset(f->grads.layer[0].k.w.data, 0, (size_t)tensor_elements(&f->grads.layer[0].k.w) * 4);
    after = run_model(f, true);
    assert_true(before.weighted == after.weighted);
    assert_true(((float *)f->grads.layer[0].k.w.data)[33] == sample);
    close_fixture(f);
}

/* ------------------------------------------------------------------ other losses */

/* The loss that is told is the one without. The best token of row 3 is its own rival: nothing. */
static void test_margins(void **state)
{
    for (int untied = 0; untied < 2; untied++) {
        struct model_config config = memory_model_config(2, !untied, false, untied);
        struct fixture *f = open_fixture(&config);
        struct model_loss plain = run_model(f, false);
        struct loss_margins margins;

        assert_in_range(take_margins(f, &margins), 1, ROWS - 1);
        assert_int_equal(run_model(f, false).correct, plain.correct);
        check_fixture(f, TOLERANCE);
        f->margins = NULL; /* the comparison can fail */
        assert_true(worst_error(f) > 0.1);
        close_fixture(f);
    }
}

/* seed: of its weights, 11 is the model's; `apart`: random steps away from them, all tensors. */
static struct teacher *open_teacher(struct fixture *f, uint64_t seed, float apart)
{
    struct teacher *t = calloc(1, sizeof *t);
    struct err err = {0};
    double x[ROWS * 40];

    assert_non_null(t);
    t->memory = memory_model_new(&f->memory->config, DTYPE_F32, seed);
    for (int32_t i = 0; i < t->memory->count; i++) {
        float *w = t->memory->tensor[i].data;

        for (int64_t k = 0; k < tensor_elements(&t->memory->tensor[i]); k++)
            w[k] += apart * (float)(2 * rng_unit_at(99, (uint64_t)i, (uint64_t)k) - 1);
    }
    t->reference = reference_new(t->memory);
    struct model_source source = memory_model_source(t->memory);
    assert_int_equal(model_open_source(&t->model, &f->backend, &source, &err), 0);
    reference_forward(t->reference, &f->batch, x);
    reference_head(t->reference, ROWS, x, t->logits);
    f->taught_by = model_base_weights(t->model);
    f->teacher_logits = t->logits;
    return t;
}

static void close_teacher(struct teacher *t)
{
    model_free(t->model);
    reference_free(t->reference);
    memory_model_free(t->memory);
    free(t);
}

/* Rows that have a weight and whose best token the references of both find best. */
static int64_t rows_agreed(const struct fixture *f)
{
    double x[ROWS * 40], logits[ROWS * 70];
    int64_t agreed = 0;

    reference_forward(f->reference, &f->batch, x);
    reference_head(f->reference, ROWS, x, logits);
    for (int32_t r = 0; r < ROWS; r++) {
        const double *model = logits + r * 70, *teacher = f->teacher_logits + r * 70;
        int32_t best = 0, best_of_teacher = 0;

        for (int32_t i = 1; i < 70; i++) {
            best = model[i] > model[best] ? i : best;
            best_of_teacher = teacher[i] > teacher[best_of_teacher] ? i : best_of_teacher;
        }
        agreed += f->weight[r] != 0 && best == best_of_teacher;
    }
    return agreed;
}

/* From strangers to twins: of the nearest pair the KL is some 1e-7, of which a difference of
 * float logarithms would leave nothing. Their logits are floats themselves, so less is asked. */
static void test_teacher(void **state)
{
    static const struct {
        uint64_t seed;
        float apart;
        double tolerance, kl_below;
        bool tied;
    } teachers[] = {{12, 0, TOLERANCE, 100, true},
                    {13, 0, TOLERANCE, 100, false},
                    {11, 0.05f, 2 * TOLERANCE, 1, true},
                    {11, 1e-3f, 2e-3, 1e-3, true},
                    {11, 2e-5f, 5e-2, 1e-6, false}};

    for (size_t i = 0; i < sizeof teachers / sizeof teachers[0]; i++) {
        struct model_config config = memory_model_config(2, teachers[i].tied, false, false);
        struct fixture *f = open_fixture(&config);
        struct teacher *t = open_teacher(f, teachers[i].seed, teachers[i].apart);
        struct model_loss loss = run_model(f, false);

        assert_true(loss.nll > 0 && loss.nll < teachers[i].kl_below * (double)loss.rows);
        assert_int_equal(loss.correct, rows_agreed(f));
        check_fixture(f, teachers[i].tolerance);
        close_teacher(t);
        close_fixture(f);
    }
}

/* Not only close. */
static void test_what_a_teacher_gave_can_be_given_again(void **state)
{
    struct model_config config = memory_model_config(2, true, false, false);
    struct fixture *f = open_fixture(&config);
    struct teacher *t = open_teacher(f, 12, 0);
    struct model_loss asked = run_model(f, false), again;
    float rows[ROWS * 40];
    struct err err = {0};

    assert_int_equal(model_teacher_rows(f->training, ROWS, rows, &err), 0);
    f->taught_before = rows;
    again = run_model(f, false);
    assert_memory_equal(&again, &asked, sizeof again);
    for (int i = 0; i < ROWS * 40; i++)
        rows[i] += 1;
    again = run_model(f, false);
    assert_true(again.nll != asked.nll);
    close_teacher(t);
    close_fixture(f);
}

static void test_a_model_is_its_own_teacher(void **state)
{
    const enum dtype precisions[] = {DTYPE_F32, DTYPE_BF16};

    for (int i = 0; i < 2; i++) {
        struct model_config config = memory_model_config(2, true, false, false);
        struct fixture *f = open_fixture_in(&config, precisions[i]);
        char name[MODEL_NAME_MAX];

        f->taught_by = model_base_weights(f->model);
        struct model_loss loss = run_model(f, true);
        assert_true(loss.nll == 0 && loss.weighted == 0);
        assert_int_equal(loss.correct, loss.rows);
        for (int32_t k = 0; k < f->memory->count; k++) {
            const struct tensor *g = model_tensor(f->model, &f->grads, k, name);

            for (int64_t e = 0; e < tensor_elements(g); e++)
                assert_true(((const float *)g->data)[e] == 0);
        }
        close_fixture(f);
    }
}

/* BF16 computes the same of what it has rounded: some percent away from F32. */
static void test_losses_in_bf16(void **state)
{
    struct model_config config = memory_model_config(2, true, false, false);
    struct fixture *f = open_fixture_in(&config, DTYPE_BF16);
    struct teacher *t = open_teacher(f, 12, 0);
    struct loss_margins margins;

    struct model_loss loss = run_model(f, true);
    assert_true(loss_error(f, &loss) < 0.01);
    assert_true(gradient_error(f, 0, STRIDE) < 0.05);
    memset(f->grads.embed.data, 0, (size_t)tensor_elements(&f->grads.embed) * sizeof(float));
    f->taught_by = NULL;
    take_margins(f, &margins);
    loss = run_model(f, true);
    assert_true(loss_error(f, &loss) < 0.01);
    assert_true(gradient_error(f, 0, STRIDE) < 0.05);
    close_teacher(t);
    close_fixture(f);
}

static const struct backend_ops *sound_ops;

/* What the operations saw of a pass: the last x, a teacher's last x, what backward got of layer 1.
 */
static struct {
    float x[ROWS * 40], teacher_x[ROWS * 40], gate[ROWS * 56], attn[ROWS * 40];
} seen;

static void watched_head_loss(struct backend *backend, const struct head_loss_args *args)
{
    memcpy(seen.x, args->x.data, sizeof seen.x);
    if (args->teacher_x.data)
        memcpy(seen.teacher_x, args->teacher_x.data, sizeof seen.teacher_x);
    sound_ops->head_loss(backend, args);
}

static void watched_mlp_backward(struct backend *backend, const struct mlp_backward_args *args)
{
    memcpy(seen.gate, args->gate.data, sizeof seen.gate);
    sound_ops->mlp_backward(backend, args);
}

static void watched_attn_out_backward(struct backend *backend,
                                      const struct attn_out_backward_args *args)
{
    memcpy(seen.attn, args->attn.data, sizeof seen.attn);
    sound_ops->attn_out_backward(backend, args);
}

/* Backward finds what the model left, bit for bit as without a teacher; and the teacher's x is what
 * it would give as a model. */
static void test_a_teacher_leaves_the_activations_alone(void **state)
{
    struct model_config config = memory_model_config(2, true, false, false);
    struct fixture *f = open_fixture(&config);
    struct backend_ops watched = *f->backend.ops;
    struct teacher *t = open_teacher(f, 12, 0);
    const struct model_weights *teacher = f->taught_by;

    sound_ops = f->backend.ops;
    watched.head_loss = watched_head_loss;
    watched.mlp_backward = watched_mlp_backward;
    watched.attn_out_backward = watched_attn_out_backward;
    f->backend.ops = &watched;
    run_model(f, true);
    f->taught_by = NULL;
    float *x = memcpy(malloc(sizeof seen), &seen, sizeof seen);
    run_model(f, true);
    assert_memory_equal(x, seen.x, sizeof seen.x);
    assert_memory_equal(x + 2 * ROWS * 40, seen.gate, sizeof seen.gate);
    assert_memory_equal(x + ROWS * (80 + 56), seen.attn, sizeof seen.attn);
    struct model_loss loss;
    struct err err = {0};
    assert_int_equal(model_loss(f->training,
                                &(struct model_loss_args){.weights = teacher,
                                                          .batch = &f->batch,
                                                          .target = f->target,
                                                          .weight = f->weight},
                                &loss, &err),
                     0);
    assert_memory_equal(x + ROWS * 40, seen.x, sizeof seen.x);
    free(x);
    f->backend.ops = sound_ops;
    close_teacher(t);
    close_fixture(f);
}

/* ------------------------------------------------------------------ the meta-test */

/* One weight's gradient in a thousand is lost. */
static void leaky_mlp_backward(struct backend *backend, const struct mlp_backward_args *args)
{
    float *g = args->grads->up.w.data;

    sound_ops->mlp_backward(backend, args);
    for (int64_t i = 0; i < tensor_elements(&args->grads->up.w); i += 999)
        g[i] = 0;
}

/* The scores are scaled by a thousandth too much. */
static void tilted_attention(struct backend *backend, const struct attention_args *args)
{
    float *q = args->q.data;

    for (int64_t i = 0; i < tensor_elements(&args->q); i++)
        q[i] *= 1.001f;
    sound_ops->attention(backend, args);
}

static double error_with(const struct backend_ops *broken)
{
    struct model_config config = memory_model_config(2, true, false, false);
    struct fixture *f = open_fixture(&config);
    double error;

    f->backend.ops = broken;
    run_model(f, true);
    error = worst_error(f);
    f->backend.ops = sound_ops;
    close_fixture(f);
    return error;
}

static void test_a_broken_operation_is_seen(void **state)
{
    struct backend backend;
    struct err err = {0};
    struct backend_ops broken;

    assert_int_equal(backend_open(&backend, &(struct backend_options){.threads = 1}, &err), 0);
    sound_ops = backend.ops;
    assert_true(error_with(sound_ops) < TOLERANCE);
    broken = *sound_ops;
    broken.mlp_backward = leaky_mlp_backward;
    assert_true(error_with(&broken) > TOLERANCE);
    broken = *sound_ops;
    broken.attention = tilted_attention;
    assert_true(error_with(&broken) > TOLERANCE);
    backend_close(&backend);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_grouped_tied),
        cmocka_unit_test(test_multi_head_untied),
        cmocka_unit_test(test_biases_and_head_norms),
        cmocka_unit_test(test_gradients_add_up),
        cmocka_unit_test(test_documents_do_not_see_each_other),
        cmocka_unit_test(test_margins),
        cmocka_unit_test(test_teacher),
        cmocka_unit_test(test_what_a_teacher_gave_can_be_given_again),
        cmocka_unit_test(test_a_model_is_its_own_teacher),
        cmocka_unit_test(test_losses_in_bf16),
        cmocka_unit_test(test_a_teacher_leaves_the_activations_alone),
        cmocka_unit_test(test_a_broken_operation_is_seen),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
