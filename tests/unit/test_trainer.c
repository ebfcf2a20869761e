/* Training: learns, is the same bits on any number of threads and after a resume, and refuses
 * checkpoints that are not its own. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "engine/base/file_io.h"
#include "engine/base/rng.h"
#include "engine/base/strbuf.h"
#include "engine/codec/artifact.h"
#include "engine/dataset.h"
#include "engine/engine_parts.h"
#include "engine/trainer.h"
#include "tests/unit/tiny_model.h"

#define EXAMPLES 14

static char folder[64], base_path[128], train_path[128], checkpoint[128];

/* ------------------------------------------------------------------ what the tests share */

static void write_dataset(const char *path, int32_t examples, int32_t words)
{
    struct strbuf text;
    struct err err = {0};

    strbuf_init(&text, 1 << 20);
    for (int32_t i = 0; i < examples; i++) {
        strbuf_addf(&text, "{\"messages\":[{\"role\":\"user\",\"content\":\"Who is number %d?", i);
        for (int32_t w = 0; w < words; w++)
            strbuf_addf(&text, " word%d", (int)(rng_at(1, (uint64_t)i, (uint64_t)w) % 90));
        strbuf_addf(&text, "\"},{\"role\":\"assistant\",\"content\":\"%c%c%d\"}]}\n", 'a' + i,
                    'z' - i, i * 7);
    }
    assert_int_equal(file_write_durable(path, text.data, text.len, &err), 0);
    strbuf_release(&text);
}

static int setup(void **state)
{
    struct engine_base_info info;
    struct err err = {0};
    char dir[96];

    snprintf(folder, sizeof folder, "/tmp/graft-trainer-XXXXXX");
    assert_non_null(mkdtemp(folder));
    snprintf(dir, sizeof dir, "%s/tiny", folder);
    snprintf(base_path, sizeof base_path, "%s/base", folder);
    snprintf(train_path, sizeof train_path, "%s/train.jsonl", folder);
    snprintf(checkpoint, sizeof checkpoint, "%s/checkpoint", folder);
    if (tiny_model_write(dir, &(struct tiny_model){.seed = 3}, &err) ||
        engine_import(dir, base_path, &info, &err))
        fail_msg("%s", err.message);
    write_dataset(train_path, EXAMPLES, 3);
    return 0;
}

static int teardown(void **state)
{
    return file_remove_tree(folder, NULL);
}

struct job {
    struct engine *engine;
    struct engine_dataset *train, *validation;
    struct engine_trainer *trainer;
    struct engine_train_plan plan;
};

/* Of the engines that are opened from here on. */
static enum engine_precision precision = ENGINE_PRECISION_F32;

static const struct engine_train_options usual = {
    .n_epochs = 3, .batch_size = 4, .learning_rate_multiplier = 20, .seed = 5};

static int try_open(struct job *j, int threads, const struct engine_train_options *options,
                    const char *train, bool validation, struct err *err)
{
    struct engine_dataset_report report;

    memset(j, 0, sizeof *j);
    assert_int_equal(engine_open(&j->engine, base_path,
                                 &(struct engine_options){
                                     .device = "cpu", .threads = threads, .precision = precision},
                                 err),
                     0);
    if (engine_dataset_open(&j->train, j->engine, train,
                            &(struct engine_dataset_options){.file_id = "file-train"}, &report,
                            err))
        fail_msg("%s", err->message);
    if (validation)
        assert_int_equal(engine_dataset_open(&j->validation, j->engine, train,
                                             &(struct engine_dataset_options){
                                                 .file_id = "file-valid", .validation = true},
                                             &report, err),
                         0);
    return engine_trainer_open(&j->trainer, j->engine, j->train, j->validation, options, &j->plan,
                               err);
}

static void open_job(struct job *j, int threads, const struct engine_train_options *options)
{
    struct err err = {0};

    if (try_open(j, threads, options, train_path, false, &err))
        fail_msg("%s", err.message);
}

static void close_job(struct job *j)
{
    engine_trainer_free(j->trainer);
    engine_dataset_free(j->train);
    engine_dataset_free(j->validation);
    engine_free(j->engine);
}

static struct engine_step steps(struct job *j, int32_t count)
{
    struct engine_step step = {0};
    struct err err = {0};

    for (int32_t i = 0; i < count; i++)
        if (engine_trainer_step(j->trainer, &step, &err))
            fail_msg("%s", err.message);
    return step;
}

/* All weights as they are now, one tensor behind the other; free() them. */
static float *all_weights(struct job *j, int64_t *count)
{
    struct model *model = j->engine->model;
    struct model_weights *base = (struct model_weights *)(uintptr_t)model_base_weights(model);
    char name[MODEL_NAME_MAX];
    float *all = NULL, *unused = NULL;
    struct err err = {0};

    *count = 0;
    for (int32_t i = 0; i < model_tensor_count(model); i++) {
        int64_t n = tensor_elements(model_tensor(model, base, i, name));

        all = realloc(all, (size_t)(*count + n) * sizeof *all);
        unused = realloc(unused, (size_t)n * sizeof *unused);
        assert_int_equal(trainer_read(j->trainer, i, 0, n, unused, all + *count, &err), 0);
        *count += n;
    }
    free(unused);
    return all;
}

static bool same_weights(struct job *a, struct job *b)
{
    int64_t na, nb;
    float *wa = all_weights(a, &na), *wb = all_weights(b, &nb);
    bool same = na == nb && memcmp(wa, wb, (size_t)na * sizeof *wa) == 0;

    free(wa);
    free(wb);
    return same;
}

/* ------------------------------------------------------------------ tests */

static void test_it_learns(void **state)
{
    struct job j;
    struct err err = {0};
    struct engine_step first, last;

    assert_int_equal(try_open(&j, 2,
                              &(struct engine_train_options){.n_epochs = 20,
                                                             .batch_size = 4,
                                                             .learning_rate_multiplier = 20,
                                                             .schedule = ENGINE_SCHEDULE_COSINE},
                              train_path, true, &err),
                     0);
    assert_int_equal(j.plan.steps_per_epoch, 4);
    assert_int_equal(j.plan.total_steps, 80);
    assert_true(j.plan.trained_tokens > 0 && j.plan.memory_bytes > 0);
    first = steps(&j, 1);
    assert_int_equal(first.step, 1);
    assert_int_equal(first.epoch, 1);
    assert_false(first.epoch_end);
    assert_true(first.valid_loss > 0 && isnan(first.full_valid_loss));
    steps(&j, 78);
    last = steps(&j, 1);
    assert_true(last.finished && last.epoch_end && last.epoch == 20);
    assert_true(first.train_loss > 3 && last.full_valid_loss < 0.3);
    assert_true(last.full_valid_mean_token_accuracy > 0.95);
    assert_true(last.learning_rate < 0.01 * j.plan.learning_rate);
    close_job(&j);
}

static void test_auto_becomes_numbers(void **state)
{
    struct job j;

    open_job(&j, 1, &(struct engine_train_options){0});
    assert_true(j.plan.n_epochs >= 1 && j.plan.n_epochs <= 50);
    assert_true(j.plan.batch_size >= 1 && j.plan.batch_size <= 256);
    assert_true(j.plan.learning_rate_multiplier > 0 && j.plan.learning_rate > 0);
    close_job(&j);
}

static void test_the_plan_alone_is_that_of_the_job(void **state)
{
    struct engine_train_plan plan;
    struct err err = {0};
    struct job j;

    open_job(&j, 1, &usual);
    assert_int_equal(engine_trainer_plan(j.engine, j.train, NULL, &usual, &plan, &err), 0);
    assert_memory_equal(&plan, &j.plan, sizeof plan);
    assert_true(plan.checkpoint_bytes > 0);
    assert_int_equal(engine_trainer_plan(j.engine, j.train, NULL,
                                         &(struct engine_train_options){.n_epochs = 51}, &plan,
                                         &err),
                     -1);
    assert_int_equal(err.kind, ERR_INVALID);
    close_job(&j);
}

static void test_threads_change_nothing(void **state)
{
    struct job one, two, other;
    struct engine_train_options seed = usual;

    open_job(&one, 1, &usual);
    open_job(&two, 2, &usual);
    seed.seed++;
    open_job(&other, 2, &seed);
    steps(&one, 7);
    steps(&two, 7);
    steps(&other, 7);
    assert_true(same_weights(&one, &two));
    assert_false(same_weights(&one, &other)); /* the comparison can fail */
    close_job(&one);
    close_job(&two);
    close_job(&other);
}

static void test_a_resumed_job_is_the_same_job(void **state)
{
    struct job straight, cut, resumed;
    struct engine_step want, got;
    struct err err = {0};

    open_job(&straight, 2, &usual);
    open_job(&cut, 2, &usual);
    open_job(&resumed, 1, &usual);
    steps(&straight, 11);
    want = steps(&straight, 1);
    steps(&cut, 6); /* in the middle of an epoch */
    assert_int_equal(engine_trainer_save(cut.trainer, checkpoint, &err), 0);
    assert_int_equal(engine_trainer_load(resumed.trainer, checkpoint, &err), 0);
    steps(&resumed, 5);
    got = steps(&resumed, 1);
    assert_true(want.finished && got.finished);
    assert_true(want.train_loss == got.train_loss && want.gradient_norm == got.gradient_norm);
    assert_true(same_weights(&straight, &resumed));
    close_job(&straight);
    close_job(&cut);
    close_job(&resumed);
}

static void test_foreign_and_damaged_checkpoints_are_refused(void **state)
{
    struct engine_train_options longer = usual;
    struct job j, other;
    struct err err = {0};
    char *data;
    size_t len;

    open_job(&j, 2, &usual);
    longer.n_epochs = 4;
    open_job(&other, 2, &longer);
    steps(&j, 2);
    assert_int_equal(engine_trainer_save(j.trainer, checkpoint, &err), 0);
    assert_int_equal(engine_trainer_load(other.trainer, checkpoint, &err), -1);
    assert_int_equal(err.kind, ERR_INVALID);
    assert_non_null(strstr(err.message, "another job"));

    assert_int_equal(file_read_all(checkpoint, 1u << 30, &data, &len, NULL), 0);
    assert_int_equal((int64_t)len, j.plan.checkpoint_bytes);
    for (size_t at = 100; at < len; at += len / 5) { /* in header, weights, moments, digest */
        data[at] ^= 4;
        assert_int_equal(file_write_durable(checkpoint, data, len, NULL), 0);
        data[at] ^= 4;
        err_clear(&err);
        assert_int_equal(engine_trainer_load(other.trainer, checkpoint, &err), -1);
        err_clear(&err);
        assert_int_equal(engine_trainer_load(j.trainer, checkpoint, &err), -1);
        assert_int_equal(err.kind, ERR_INVALID);
    }
    assert_int_equal(file_write_durable(checkpoint, data, len - 9, NULL), 0);
    err_clear(&err);
    assert_int_equal(engine_trainer_load(j.trainer, checkpoint, &err), -1);
    assert_int_equal(err.kind, ERR_INVALID);

    /* A refused file leaves the trainer as it was. */
    struct job straight;
    open_job(&straight, 1, &usual);
    steps(&straight, 3);
    steps(&j, 1);
    assert_true(same_weights(&straight, &j));
    free(data);
    close_job(&straight);
    close_job(&j);
    close_job(&other);
}

/* The loss of a step whose examples need several micro-batches is that of the examples alone. */
static void test_micro_batches_add_up(void **state)
{
    struct engine_train_options options = usual;
    char path[128];
    struct job j;
    struct err err = {0};
    double nll = 0, trained = 0;

    snprintf(path, sizeof path, "%s/long.jsonl", folder);
    write_dataset(path, EXAMPLES, 45);
    options.batch_size = EXAMPLES;
    assert_int_equal(try_open(&j, 2, &options, path, false, &err), 0);
    assert_true(j.plan.tokens_per_epoch > 2 * TRAINER_ROWS);
    for (int32_t i = 0; i < EXAMPLES; i++) {
        struct dataset_example e = dataset_example(j.train, i);
        int32_t rows = e.length - 1, position[512], cu_seqlens[2] = {0, rows};
        struct model_training *pass;
        struct model_loss loss;

        assert_true(e.length <= 512);
        for (int32_t p = 0; p < rows; p++)
            position[p] = p;
        assert_int_equal(model_training_open(&pass, j.engine->model, rows, false, &err), 0);
        assert_int_equal(
            model_loss(pass,
                       &(struct model_loss_args){.weights = model_base_weights(j.engine->model),
                                                 .batch = &(struct batch){.rows = rows,
                                                                          .token = e.token,
                                                                          .position = position,
                                                                          .docs = 1,
                                                                          .cu_seqlens = cu_seqlens},
                                                 .target = e.token + 1,
                                                 .weight = e.weight + 1},
                       &loss, &err),
            0);
        nll += loss.nll;
        trained += (double)loss.rows;
        model_training_free(pass);
    }
    struct engine_step step = steps(&j, 1);
    assert_true(step.trained_tokens == (int64_t)trained);
    assert_true(fabs(step.train_loss - nll / trained) < 1e-6 * step.train_loss);
    close_job(&j);
}

/* What a job that continues from `path` must begin with: base + difference, tensor by tensor. */
static void begins_with(struct job *j, const char *path)
{
    struct artifact_expectation want = {.base_digest = engine_info(j->engine)->digest};
    struct artifact_tensor *tensor;
    struct artifact *artifact;
    struct err err = {0};

    assert_int_equal(artifact_tensors_of_model(j->engine->model, &tensor, &want.count, &err), 0);
    want.tensor = tensor;
    assert_int_equal(artifact_open(&artifact, path, &want, &err), 0);
    for (int32_t i = 0; i < want.count; i++) {
        int64_t n = (int64_t)tensor[i].rows * tensor[i].cols;
        float *base = malloc((size_t)n * sizeof *base), *tuned = malloc((size_t)n * sizeof *tuned);
        float *difference = malloc((size_t)n * sizeof *difference);

        assert_int_equal(trainer_read(j->trainer, i, 0, n, base, tuned, &err), 0);
        assert_int_equal(artifact_expand(artifact, i, difference, NULL), 0);
        for (int64_t k = 0; k < n; k++)
            if (tuned[k] != base[k] + difference[k])
                fail_msg("%s: element %lld is not base + difference", tensor[i].name, (long long)k);
        free(base);
        free(tuned);
        free(difference);
    }
    artifact_free(artifact);
    free(tensor);
}

static void continue_from_a_delta(bool embeddings)
{
    const struct engine_compress_options bitdelta = {.codec = "bitdelta"};
    struct engine_train_options options = usual, more = usual;
    struct engine_delta_report report, again;
    char first[128], second[128];
    struct job j, next, fresh;
    struct err err = {0};

    snprintf(first, sizeof first, "%s/first.delta", folder);
    snprintf(second, sizeof second, "%s/second.delta", folder);
    options.train_embeddings = embeddings;
    open_job(&j, 2, &options);
    steps(&j, 4);
    assert_int_equal(engine_trainer_compress(j.trainer, &bitdelta, first, &report, &err), 0);
    more.start_delta = first;
    more.start_sha256 = "23456789abcdef01";
    open_job(&next, 2, &more);
    begins_with(&next, first);
    assert_int_equal(trainer_trains(next.trainer, 0), embeddings);
    steps(&next, 1);

    /* What the first job did to the embeddings stays, and is part of the next delta as well. */
    assert_int_equal(engine_trainer_compress(next.trainer, &bitdelta, second, &again, &err), 0);
    assert_int_equal(again.bytes, report.bytes);
    open_job(&fresh, 2, &usual);
    assert_int_equal(engine_trainer_save(next.trainer, checkpoint, &err), 0);
    assert_int_equal(engine_trainer_load(fresh.trainer, checkpoint, &err), -1);
    assert_non_null(strstr(err.message, "another job"));
    close_job(&j);
    close_job(&next);
    close_job(&fresh);
}

static void test_a_job_continues_from_a_delta(void **state)
{
    char tied[sizeof base_path], dir[128];
    struct engine_base_info info;
    struct err err = {0};

    continue_from_a_delta(false);
    continue_from_a_delta(true);
    memcpy(tied, base_path, sizeof tied);
    snprintf(dir, sizeof dir, "%s/untied", folder);
    snprintf(base_path, sizeof base_path, "%s/untied.base", folder);
    assert_int_equal(tiny_model_write(dir, &(struct tiny_model){.seed = 4, .untied = true}, &err),
                     0);
    assert_int_equal(engine_import(dir, base_path, &info, &err), 0);
    continue_from_a_delta(true);
    memcpy(base_path, tied, sizeof tied);
}

static void test_embeddings_stay_unless_asked(void **state)
{
    struct engine_train_options options = usual;

    for (int asked = 0; asked < 2; asked++) {
        float base[64], tuned[64];
        struct err err = {0};
        struct job j;

        options.train_embeddings = asked;
        open_job(&j, 2, &options);
        steps(&j, 2);
        /* row 10 and on: some of them are in the answers and all of them in the softmax */
        assert_int_equal(trainer_read(j.trainer, 0, 10 * 64, 64, base, tuned, &err), 0);
        assert_int_equal(memcmp(base, tuned, sizeof base) != 0, asked);
        assert_int_equal(trainer_trains(j.trainer, 0), asked);
        assert_true(trainer_trains(j.trainer, 1));
        close_job(&j);
    }
}

static void test_options_are_checked(void **state)
{
    const struct engine_train_options bad[] = {
        {.n_epochs = 51}, {.n_epochs = -1}, {.batch_size = 257}, {.learning_rate_multiplier = -1}};

    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        struct err err = {0};
        struct job j;

        assert_int_equal(try_open(&j, 1, &bad[i], train_path, false, &err), -1);
        assert_int_equal(err.kind, ERR_INVALID);
        assert_null(j.trainer);
        close_job(&j);
    }
}

static void test_divergence_is_told(void **state)
{
    struct engine_step step;
    struct err err = {0};
    struct job j;

    open_job(&j, 2, &usual);
    steps(&j, 1);
    *(float *)trainer_weights(j.trainer)->layer[1].gate.w.data = INFINITY;
    assert_int_equal(engine_trainer_step(j.trainer, &step, &err), -1);
    assert_int_equal(err.kind, ERR_INVALID);
    assert_string_equal(err.code, "training_diverged"); /* not the training file's fault */
    assert_string_equal(err.param, "");
    assert_non_null(strstr(err.message, "learning_rate_multiplier"));
    close_job(&j);
}

/* The same promises in BF16: of the weights that are kept, and of the copies that stages read. */
static void test_bf16(void **state)
{
    struct job f32, bf16;
    struct err err = {0};

    precision = ENGINE_PRECISION_F32;
    open_job(&f32, 1, &usual);
    assert_int_equal(engine_trainer_save(f32.trainer, checkpoint, &err), 0);
    precision = ENGINE_PRECISION_BF16;
    open_job(&bf16, 1, &usual);
    assert_int_equal(engine_trainer_load(bf16.trainer, checkpoint, &err), -1);
    assert_int_equal(err.kind, ERR_INVALID); /* made in another precision */
    for (int i = 0; i < 3; i++) {
        struct engine_step a, b;

        assert_int_equal(engine_trainer_step(f32.trainer, &a, &err), 0);
        assert_int_equal(engine_trainer_step(bf16.trainer, &b, &err), 0);
        assert_true(a.train_loss != b.train_loss);
        assert_true(fabs(a.train_loss - b.train_loss) < 1e-2 * a.train_loss);
    }
    close_job(&bf16);
    close_job(&f32);
#ifndef __SANITIZE_THREAD__ /* a minute there, of the same threads as in F32 */
    test_it_learns(state);
#endif
    test_threads_change_nothing(state);
    test_a_resumed_job_is_the_same_job(state);
    test_micro_batches_add_up(state);
    test_a_job_continues_from_a_delta(state);
    test_embeddings_stay_unless_asked(state);
    precision = ENGINE_PRECISION_F32;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_it_learns),
        cmocka_unit_test(test_auto_becomes_numbers),
        cmocka_unit_test(test_the_plan_alone_is_that_of_the_job),
        cmocka_unit_test(test_threads_change_nothing),
        cmocka_unit_test(test_a_resumed_job_is_the_same_job),
        cmocka_unit_test(test_foreign_and_damaged_checkpoints_are_refused),
        cmocka_unit_test(test_micro_batches_add_up),
        cmocka_unit_test(test_a_job_continues_from_a_delta),
        cmocka_unit_test(test_embeddings_stay_unless_asked),
        cmocka_unit_test(test_options_are_checked),
        cmocka_unit_test(test_divergence_is_told),
        cmocka_unit_test(test_bf16),
    };

    return cmocka_run_group_tests(tests, setup, teardown);
}
