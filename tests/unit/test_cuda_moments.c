/* Moments of whole models on the CUDA backend, whose memory is not the host's, against the CPU's:
 * with targets that are given, that are drawn, and with margins beside those; and a calibration,
 * which a device cuts into larger micro-batches. */
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
#include "tests/unit/shim_fixture.h"

#define ROWS 21
#define MAX_TENSORS 64

static const int32_t cu_seqlens[] = {0, 12, 13, ROWS};

static struct model_moments *new_moments(const struct model *model,
                                         const struct memory_model *memory)
{
    struct model_moments *m = calloc(MAX_TENSORS, sizeof *m);

    assert_non_null(m);
    assert_true(memory->count <= MAX_TENSORS);
    for (int32_t i = 0; i < memory->count; i++) {
        const int64_t *shape = memory->tensor[i].shape;

        if (!model_tensor_is_linear(model, i))
            continue;
        m[i].h = calloc((size_t)(shape[1] * shape[1]), sizeof *m[i].h);
        m[i].g = calloc((size_t)(shape[0] * shape[0]), sizeof *m[i].g);
        assert_true(m[i].h && m[i].g);
    }
    return m;
}

static void free_moments(struct model_moments *m)
{
    for (int32_t i = 0; i < MAX_TENSORS; i++) {
        free(m[i].h);
        free(m[i].g);
    }
    free(m);
}

/* Two micro-batches, of which the second is the beginning of the first; targets are given or drawn
 * (NULL), with a margin of some rows or none. */
static struct model_moments *measure(struct backend *b, const struct memory_model *memory,
                                     const int32_t *target, double margin, bool inputs_only)
{
    struct model_source source = memory_model_source(memory);
    struct model_moments_pass *pass;
    struct model_moments *moments;
    struct model *model;
    int32_t token[ROWS], position[ROWS];
    float weight[ROWS], of_row[ROWS];
    struct batch batch = {
        .rows = ROWS, .token = token, .position = position, .docs = 3, .cu_seqlens = cu_seqlens};
    struct model_moments_args args = {.batch = &batch,
                                      .weight = weight,
                                      .target = target,
                                      .margin = margin > 0 ? of_row : NULL,
                                      .seed = 5};
    struct err err = {0};

    args.inputs_only = inputs_only;
    for (int32_t r = 0; r < ROWS; r++) {
        token[r] = r * 13 % 70;
        position[r] = r < 12 ? r : r - (r < 13 ? 12 : 13);
        weight[r] = r % 5 ? 1 : 0;
        of_row[r] = r % 3 ? (float)margin : 0;
    }
    if (model_open_source(&model, b, &source, &err) || model_moments_open(&pass, model, ROWS, &err))
        fail_msg("%s", err.message);
    moments = new_moments(model, memory);
    args.weights = model_base_weights(model);
    for (int i = 0; i < 2; i++) {
        if (model_moments_add(pass, &args, moments, NULL, &err))
            fail_msg("%s", err.message);
        batch.docs = 1;
        batch.rows = cu_seqlens[1];
        args.first = ROWS;
    }
    model_moments_free(pass);
    model_free(model);
    return moments;
}

static double upper_error(const float *got, const float *want, int64_t n)
{
    double off = 0, size = 0;

    for (int64_t i = 0; i < n; i++)
        for (int64_t j = i; j < n; j++) {
            off += pow((double)got[i * n + j] - (double)want[i * n + j], 2);
            size += pow((double)want[i * n + j], 2);
        }
    return sqrt(off / size);
}

static void compare(const struct memory_model *memory, const struct model_moments *got,
                    const struct model_moments *want, bool inputs_only, double tolerance)
{
    for (int32_t i = 0; i < memory->count; i++) {
        if (!want[i].h || (want[i].rows == 0 && got[i].rows == 0))
            continue;
        double of_h = upper_error(got[i].h, want[i].h, memory->tensor[i].shape[1]);
        double of_g =
            inputs_only ? 0 : upper_error(got[i].g, want[i].g, memory->tensor[i].shape[0]);
        double of_weight = fabs(got[i].weight / want[i].weight - 1);
        if (!(of_h <= tolerance && of_g <= tolerance && of_weight <= tolerance))
            fail_msg("%s: h differs by %g, g by %g, the weight by %g", memory->name[i], of_h, of_g,
                     of_weight);
        assert_int_equal(got[i].rows, want[i].rows);
    }
}

static void agree(struct backend *shim, const int32_t *target, double margin, bool inputs_only,
                  double tolerance)
{
    struct backend cpu;
    struct err err = {0};

    if (backend_open(&cpu, &(struct backend_options){.precision = shim->activation}, &err))
        fail_msg("%s", err.message);
    for (uint64_t seed = 0; seed < (shim_orders() + 3) / 4; seed++) {
        struct model_config config =
            memory_model_config(seed % 2 ? 4 : 2, seed % 2, seed % 2, seed % 2);
        struct memory_model *memory = memory_model_new(&config, DTYPE_F32, 11 + seed);

        shim_seed(seed);
        struct model_moments *want = measure(&cpu, memory, target, margin, inputs_only);
        struct model_moments *got = measure(shim, memory, target, margin, inputs_only);
        compare(memory, got, want, inputs_only, tolerance);
        free_moments(want);
        free_moments(got);
        memory_model_free(memory);
    }
    backend_close(&cpu);
}

static void test_given_targets(void **state)
{
    struct backend *shim = *state;
    int32_t target[ROWS];

    for (int32_t r = 0; r < ROWS; r++)
        target[r] = r * 29 % 70;
    agree(shim, target, 0, false, shim->activation == DTYPE_BF16 ? 6e-2 : 2e-5);
}

/* In F32 both draw the same; in BF16 a logit's last bit may decide. */
static void test_drawn_targets(void **state)
{
    agree(*state, NULL, 0, false, 2e-5);
}

static void test_margins(void **state)
{
    agree(*state, NULL, 3, false, 2e-5);
}

static void test_inputs_alone(void **state)
{
    struct backend *shim = *state;

    agree(shim, NULL, 0, true, shim->activation == DTYPE_BF16 ? 3e-2 : 2e-5);
}

static struct dataset_example example(const void *context, int64_t i)
{
    static const int32_t token[8] = {5, 61, 12, 33, 40, 2, 69, 8};
    static const float weight[8] = {0, 0, 0, 1, 1, 0, 1, 1};

    return (struct dataset_example){token + i % 3, weight + i % 3, 2 + (int32_t)(i % 4)};
}

static struct calibration calibrate(struct backend *b, const struct memory_model *memory)
{
    struct model_source source = memory_model_source(memory);
    struct trainer_source examples = {.count = 212, .example = example};
    struct calibration_options options = {.seed = 3, .margin = 2};
    struct calibration c = {0};
    struct model *model;
    struct err err = {0};

    if (model_open_source(&model, b, &source, &err) ||
        calibration_measure(&c, model, model_base_weights(model), &examples, &options, &err))
        fail_msg("%s", err.message);
    model_free(model);
    return c;
}

static void test_calibration(void **state)
{
    struct model_config config = memory_model_config(2, true, false, false);
    struct memory_model *memory = memory_model_new(&config, DTYPE_F32, 11);
    struct backend cpu;
    struct err err = {0};

    if (backend_open(&cpu, &(struct backend_options){0}, &err))
        fail_msg("%s", err.message);
    struct calibration want = calibrate(&cpu, memory), got = calibrate(*state, memory);
    assert_true(got.tokens == 530 && want.tokens == 530); /* two micro-batches of the CPU's */
    for (int32_t i = 0; i < want.count; i++)
        if (want.h[i]) {
            assert_true(upper_error(got.h[i], want.h[i], memory->tensor[i].shape[1]) < 2e-5);
            assert_true(upper_error(got.g[i], want.g[i], memory->tensor[i].shape[0]) < 2e-5);
        }
    calibration_free(&want);
    calibration_free(&got);
    memory_model_free(memory);
    backend_close(&cpu);
}

int main(void)
{
    const struct CMUnitTest f32[] = {
        cmocka_unit_test(test_given_targets), cmocka_unit_test(test_drawn_targets),
        cmocka_unit_test(test_margins),       cmocka_unit_test(test_inputs_alone),
        cmocka_unit_test(test_calibration),
    };
    const struct CMUnitTest bf16[] = {cmocka_unit_test(test_given_targets),
                                      cmocka_unit_test(test_inputs_alone)};

    return cmocka_run_group_tests_name("f32", f32, shim_setup, shim_teardown) +
           cmocka_run_group_tests_name("bf16", bf16, shim_setup_bf16, shim_teardown);
}
