/* Examples longer than a pass: what a delta costs is measured to their end, where the answer is. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/base/file_io.h"
#include "engine/base/json_text.h"
#include "engine/codec/fidelity.h"
#include "engine/engine_parts.h"
#include "engine/twin.h"
#include "tests/unit/check.h"
#include "tests/unit/tiny_model.h"

enum { LENGTH = 700, ANSWER = 5, SHORT = 40 };

static char folder[] = "/tmp/graft-long-rows-XXXXXX";
static struct engine *engine;
static struct twin other;
static int32_t token[LENGTH];
static float weight[LENGTH];

static void make_base(const char *name, uint64_t seed, char *path, size_t size)
{
    struct tiny_model model = {.seed = seed, .context = 1024};
    char source[128];

    snprintf(source, sizeof source, "%s/%s", folder, name);
    snprintf(path, size, "%s/%s.safetensors", folder, name);
    CHECK(tiny_model_write(source, &model, &err));
    CHECK(engine_import(source, path, NULL, &err));
}

static struct dataset_example example(const void *context, int64_t i)
{
    int32_t length = i == 0 ? LENGTH : SHORT;

    return (struct dataset_example){
        .token = token + LENGTH - length, .weight = weight + LENGTH - length, .length = length};
}

/* [LENGTH, V] logits of a whole example in one pass; malloc'ed. */
static float *logits_of(struct model *model, const struct dataset_example *e)
{
    const int32_t ends[2] = {0, e->length};
    int32_t vocabulary = model_get_config(model)->vocabulary, position[LENGTH];
    float *logits = malloc((size_t)e->length * (size_t)vocabulary * sizeof *logits);
    struct batch batch = {
        .rows = e->length, .token = e->token, .position = position, .docs = 1, .cu_seqlens = ends};
    struct model_decode_args args = {
        .batch = &batch, .logit_row = position, .logit_count = e->length, .logits = logits};
    struct model_decoder *decoder;

    assert_non_null(logits);
    for (int32_t i = 0; i < e->length; i++)
        position[i] = i;
    CHECK(model_decoder_open(&decoder, model, e->length, e->length, &err));
    CHECK(model_decode(decoder, &args, &err));
    model_decoder_free(decoder);
    return logits;
}

static double log_sum(const float *logit, int32_t n)
{
    double sum = 0;

    for (int32_t i = 0; i < n; i++)
        sum += exp((double)logit[i]);
    return log(sum);
}

/* KL and the losses of answers, from the definition, of every example or of some at a stride. */
static struct fidelity by_definition(int64_t count, int64_t stride)
{
    int32_t n = model_get_config(engine->model)->vocabulary;
    struct fidelity f = {0};

    for (int64_t k = 0; k < count; k += stride) {
        struct dataset_example e = example(NULL, k);
        float *p = logits_of(engine->model, &e), *q = logits_of(other.model, &e);

        for (int32_t r = 0; r + 1 < e.length; r++) {
            const float *exact = p + r * n, *served = q + r * n;
            double a = log_sum(exact, n), b = log_sum(served, n), kl = 0;

            for (int32_t i = 0; i < n; i++)
                kl += exp((double)exact[i] - a) * ((double)exact[i] - a - (double)served[i] + b);
            f.kl += kl;
            f.tokens++;
            if (e.weight[r + 1] > 0) {
                f.answer_kl += kl;
                f.loss += b - (double)served[e.token[r + 1]];
                f.tuned_loss += a - (double)exact[e.token[r + 1]];
                f.answer_tokens++;
            }
        }
        free(p);
        free(q);
    }
    f.kl /= (double)f.tokens;
    f.answer_kl /= (double)f.answer_tokens;
    f.loss /= (double)f.answer_tokens;
    f.tuned_loss /= (double)f.answer_tokens;
    return f;
}

static void expect_near(double found, double want)
{
    assert_true(want > 1e-3);
    assert_true(fabs(found / want - 1) < 1e-4);
}

/* About max_tokens of them: examples at that stride. */
static void measured_is(int64_t max_tokens, int64_t stride, int64_t tokens, int64_t answer_tokens)
{
    const struct trainer_source rows = {.count = 3, .example = example};
    struct fidelity_args args = {.engine = engine,
                                 .tuned = model_base_weights(engine->model),
                                 .other = model_base_weights(other.model),
                                 .examples = &rows,
                                 .max_tokens = max_tokens};
    struct fidelity want = by_definition(rows.count, stride), found;

    CHECK(fidelity_measure(&found, &args, &err));
    assert_int_equal(found.tokens, tokens);
    assert_int_equal(found.answer_tokens, answer_tokens);
    expect_near(found.kl, want.kl);
    expect_near(found.answer_kl, want.answer_kl);
    expect_near(found.loss, want.loss);
    expect_near(found.tuned_loss, want.tuned_loss);
}

static void test_a_long_row_is_measured_to_its_end(void **state)
{
    measured_is(0, 1, LENGTH + 2 * SHORT - 3, 3 * ANSWER);
}

static void test_some_examples_are_measured_of_many_tokens(void **state)
{
    measured_is(400, 2, LENGTH + SHORT - 2, 2 * ANSWER);
}

static int set_up(void **state)
{
    struct engine_options options = {.device = "cpu", .threads = 1};
    char base[128], tuned[128];

    json_text_setup();
    assert_non_null(mkdtemp(folder));
    make_base("base", 1, base, sizeof base);
    make_base("tuned", 2, tuned, sizeof tuned);
    CHECK(engine_open(&engine, base, &options, &err));
    CHECK(twin_open(&other, engine, tuned, "tuned", &err));
    for (int32_t i = 0; i < LENGTH; i++) {
        token[i] = (i * 7919 + i / 3) % model_get_config(engine->model)->vocabulary;
        weight[i] = i >= LENGTH - ANSWER ? 1 : 0;
    }
    return 0;
}

static int tear_down(void **state)
{
    twin_close(&other);
    engine_free(engine);
    return file_remove_tree(folder, NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_long_row_is_measured_to_its_end),
        cmocka_unit_test(test_some_examples_are_measured_of_many_tokens),
    };

    return cmocka_run_group_tests(tests, set_up, tear_down);
}
