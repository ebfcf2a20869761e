/* The whole model's loss and gradients against a double-precision reference: every tensor of small
 * models with each flag, documents packed. And a meta-test: an operation broken on purpose must
 * turn the comparison red. */
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
    float weight[ROWS];
};

static void fill_batch(struct fixture *f)
{
    static const int32_t cu_seqlens[4] = {0, 9, 10, ROWS};

    memcpy(f->cu_seqlens, cu_seqlens, sizeof cu_seqlens);
    for (int32_t d = 0; d < 3; d++)
        for (int32_t r = cu_seqlens[d]; r < cu_seqlens[d + 1]; r++) {
            f->token[r] = (int32_t)(rng_at(5, 1, (uint64_t)r) % 70);
            f->target[r] = (int32_t)(rng_at(5, 2, (uint64_t)r) % 70);
            f->weight[r] = r % 4 == 2 ? 0 : 0.05f + 0.01f * (float)r;
            f->position[r] = r - cu_seqlens[d];
        }
    f->batch = (struct batch){.rows = ROWS,
                              .token = f->token,
                              .position = f->position,
                              .docs = 3,
                              .cu_seqlens = f->cu_seqlens};
}

static struct fixture *open_fixture(const struct model_config *config)
{
    struct fixture *f = calloc(1, sizeof *f);
    struct err err = {0};
    char name[MODEL_NAME_MAX];

    assert_non_null(f);
    f->memory = memory_model_new(config, DTYPE_F32, 11);
    f->reference = reference_new(f->memory);
    struct model_source source = memory_model_source(f->memory);
    assert_int_equal(backend_open(&f->backend, &(struct backend_options){.threads = 2}, &err), 0);
    assert_int_equal(model_open_source(&f->model, &f->backend, &source, &err), 0);
    assert_int_equal(model_training_open(&f->training, f->model, ROWS, &err), 0);
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
                                    .target = f->target,
                                    .weight = f->weight,
                                },
                                &loss, &err),
                     0);
    return loss;
}

/* ‖gradient of tensor i - central differences‖ / ‖central differences‖, every `stride`-th element
 */
static double gradient_error(struct fixture *f, int32_t i, int64_t stride)
{
    char name[MODEL_NAME_MAX];
    const float *g = model_tensor(f->model, &f->grads, i, name)->data;
    struct reference *r = f->reference;
    double difference = 0, size = 0;

    for (int64_t k = 0; k < r->at[i + 1] - r->at[i]; k += stride) {
        double *p = &r->memory[r->at[i] + k], was = *p, up, down;

        *p = was + STEP;
        up = reference_loss(r, &f->batch, f->target, f->weight);
        *p = was - STEP;
        down = reference_loss(r, &f->batch, f->target, f->weight);
        *p = was;
        double want = (up - down) / (2 * STEP);
        difference += (want - (double)g[k]) * (want - (double)g[k]);
        size += want * want;
    }
    return sqrt(difference / size);
}

static double worst_error(struct fixture *f, int64_t stride)
{
    double worst = 0;

    for (int32_t i = 0; i < f->memory->count; i++) {
        double error = gradient_error(f, i, f->memory->tensor[i].rank == 1 ? 1 : stride);

        worst = error > worst || isnan(error) ? error : worst;
    }
    return worst;
}

static void check_model(int32_t kv_heads, bool tied, bool bias, bool qk_norm)
{
    struct model_config config = memory_model_config(kv_heads, tied, bias, qk_norm);
    struct fixture *f = open_fixture(&config);
    struct model_loss loss = run_model(f, false), again = run_model(f, true);
    double want = reference_loss(f->reference, &f->batch, f->target, f->weight);

    assert_true(fabs(loss.weighted - want) < 1e-6 * fabs(want));
    assert_true(loss.weighted == again.weighted);
    double error = worst_error(f, 27);
    if (!(error < TOLERANCE))
        fail_msg("a gradient is off by %g of its size", error);
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

/* ------------------------------------------------------------------ the meta-test */

static const struct backend_ops *sound_ops;

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
    error = worst_error(f, 27);
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
        cmocka_unit_test(test_a_broken_operation_is_seen),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
