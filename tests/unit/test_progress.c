/* progress.h: work that takes the host minutes at the size of real models shows signs of life:
 * a watcher of devices that hears nothing ends the process. */
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
#include "engine/base/progress.h"
#include "engine/codec/artifact.h"
#include "engine/engine_parts.h"
#include "tests/unit/check.h"
#include "tests/unit/noisy_delta.h"
#include "tests/unit/tiny_model.h"

#define PORTION (4 << 20) /* bytes of a checkpoint from one sign of life to the next, at most */
#define LAYERS 2

static char folder[64], base_path[128], train_path[128], delta_path[128];
static struct engine *engine;
static struct engine_dataset *train;

static const struct engine_train_options usual = {
    .n_epochs = 1, .batch_size = 4, .learning_rate_multiplier = 1, .seed = 5};

/* So large that a block of a checkpoint has several portions, an embedding several of a delta's. */
static int setup(void **state)
{
    const struct tiny_model model = {
        .layers = LAYERS, .hidden = 256, .intermediate = 2048, .vocabulary = 1024, .seed = 3};
    struct engine_dataset_report report;
    struct engine_base_info info;
    char dir[96], rows[4096] = "";

    snprintf(folder, sizeof folder, "/tmp/graft-progress-XXXXXX");
    assert_non_null(mkdtemp(folder));
    snprintf(dir, sizeof dir, "%s/tiny", folder);
    snprintf(base_path, sizeof base_path, "%s/base", folder);
    snprintf(train_path, sizeof train_path, "%s/train.jsonl", folder);
    snprintf(delta_path, sizeof delta_path, "%s/delta", folder);
    for (int i = 0; i < 12; i++)
        snprintf(rows + strlen(rows), sizeof rows - strlen(rows),
                 "{\"messages\":[{\"role\":\"user\",\"content\":\"Who is %d?\"},"
                 "{\"role\":\"assistant\",\"content\":\"%c\"}]}\n",
                 i, 'a' + i);
    CHECK(file_write_durable(train_path, rows, strlen(rows), &err));
    CHECK(tiny_model_write(dir, &model, &err));
    CHECK(engine_import(dir, base_path, &info, &err));
    CHECK(engine_open(&engine, base_path, &(struct engine_options){.device = "cpu", .threads = 2},
                      &err));
    CHECK(engine_dataset_open(&train, engine, train_path,
                              &(struct engine_dataset_options){.file_id = "file-train"}, &report,
                              &err));
    return 0;
}

static int teardown(void **state)
{
    engine_dataset_free(train);
    engine_free(engine);
    return file_remove_tree(folder, NULL);
}

static int64_t signs_since(uint64_t begin)
{
    return (int64_t)(progress_count() - begin);
}

/* ------------------------------------------------------------------ recovery checkpoints */

static void a_checkpoint_is_written_and_read_with_signs_of_life(void **state)
{
    struct engine_trainer *trainer;
    struct engine_train_plan plan;
    int64_t portions;
    char path[128];
    uint64_t begin;

    snprintf(path, sizeof path, "%s/checkpoint", folder);
    CHECK(engine_trainer_open(&trainer, engine, train, NULL, &usual, &plan, &err));
    portions = plan.checkpoint_bytes / PORTION;
    assert_true(portions >= 9); /* else a sign at each block's end would do */

    begin = progress_count();
    CHECK(engine_trainer_save(trainer, path, &err));
    assert_true(signs_since(begin) >= portions);

    begin = progress_count();
    CHECK(engine_trainer_load(trainer, path, &err));
    assert_true(signs_since(begin) >= 2 * portions); /* it is hashed, then taken */
    engine_trainer_free(trainer);
}

/* ------------------------------------------------------------------ deltas */

#define MATRICES (LAYERS * 7)
#define NORMS (LAYERS * 2 + 1)
#define EMBEDDING_PORTIONS 4 /* of 2^16 elements */
#define TENSORS (MATRICES + NORMS + 1)

/* By itself: signs that the rest of engine_delta_open shows are not its. */
static int64_t signs_of_reading(void)
{
    struct artifact_expectation want = {.base_digest = engine_info(engine)->digest};
    struct artifact_tensor *tensor;
    struct artifact *artifact;
    uint64_t begin;
    int64_t signs;

    CHECK(artifact_tensors_of_model(engine->model, &tensor, &want.count, &err));
    want.tensor = tensor;
    begin = progress_count();
    CHECK(artifact_open(&artifact, delta_path, &want, &err));
    signs = signs_since(begin);
    artifact_free(artifact);
    free(tensor);
    return signs;
}

static void a_delta_is_written_and_opened_with_signs_of_life(void **state)
{
    const struct noisy_delta noise = {.codec = "lossless", .seed = 1, .embeddings = true};
    struct engine_delta *delta;
    uint64_t begin = progress_count();
    int64_t reading;

    CHECK(noisy_delta_write(engine, &noise, delta_path, &err));
    assert_true(signs_since(begin) >= MATRICES + NORMS + EMBEDDING_PORTIONS);

    reading = signs_of_reading();
    assert_true(reading >= TENSORS);

    begin = progress_count();
    CHECK(engine_delta_open(&delta, engine, delta_path, &err));
    assert_true(signs_since(begin) - reading >= TENSORS);
    engine_delta_free(delta);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_checkpoint_is_written_and_read_with_signs_of_life),
        cmocka_unit_test(a_delta_is_written_and_opened_with_signs_of_life),
    };

    return cmocka_run_group_tests(tests, setup, teardown);
}
