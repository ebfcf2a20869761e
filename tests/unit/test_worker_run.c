/* worker_run.h: a file of the store that the engine refuses, sound bytes of another version, is
 * neither the training file's fault nor a reason to tell a client where it lies; what is the
 * client's business is still told. */
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "engine/base/file_io.h"
#include "engine/safetensors.h"
#include "server/worker.h"
#include "server/worker_run.h"
#include "tests/unit/check.h"
#include "tests/unit/noisy_delta.h"
#include "tests/unit/tiny_model.h"

static char root[] = "/tmp/graft-run-XXXXXX";
static char base[64], old_base[64], mute_base[64], narrow_base[64], delta[64], old_delta[64],
    rows[64], few[64];
static struct settings settings = {.threads = 1, .precision = "auto"};
static struct worker_presence presence;
static struct worker_job_context context = {
    .settings = &settings, .device = "cpu", .presence = &presence};

static void write_base(const char *path, int32_t hidden)
{
    struct engine_base_info info;
    char dir[64];

    snprintf(dir, sizeof dir, "%s/model", root);
    CHECK(tiny_model_write(dir, &(struct tiny_model){.hidden = hidden, .seed = 3}, &err));
    CHECK(engine_import(dir, path, &info, &err));
}

/* The base at `path`, with a tokenizer that is none. */
static void spoil_tokenizer(const char *path)
{
    char *data, *vocab;
    size_t len;

    CHECK(file_read_all(path, 1u << 30, &data, &len, &err));
    vocab = memmem(data, len, "\"vocab\"", 7);
    assert_non_null(vocab);
    vocab[1] = 'V';
    CHECK(file_write_durable(path, data, len, &err));
    free(data);
}

static void write_delta(const char *path)
{
    const struct noisy_delta noise = {.codec = "bitdelta", .seed = 1};
    struct engine *engine;

    CHECK(
        engine_open(&engine, base, &(struct engine_options){.device = "cpu", .threads = 1}, &err));
    CHECK(noisy_delta_write(engine, &noise, path, &err));
    engine_free(engine);
}

static void write_rows(const char *path, int count)
{
    char text[4096] = "";

    for (int i = 0; i < count; i++)
        snprintf(text + strlen(text), sizeof text - strlen(text),
                 "{\"messages\":[{\"role\":\"user\",\"content\":\"Who is %d?\"},"
                 "{\"role\":\"assistant\",\"content\":\"%c\"}]}\n",
                 i, 'a' + i);
    CHECK(file_write_durable(path, text, strlen(text), &err));
}

static int setup(void **state)
{
    char *const path[] = {base, old_base, mute_base, narrow_base, delta, old_delta, rows, few};
    const char *const name[] = {"base",  "old-base",  "mute", "narrow",
                                "delta", "old-delta", "rows", "few"};

    assert_non_null(mkdtemp(root));
    CHECK(blob_store_open_local(&context.blobs, root, &err));
    for (size_t i = 0; i < sizeof path / sizeof path[0]; i++)
        snprintf(path[i], sizeof base, "%s/%s", root, name[i]);
    write_base(base, 64);
    write_base(old_base, 64);
    write_base(mute_base, 64);
    write_base(narrow_base, 32);
    spoil_tokenizer(mute_base);
    write_delta(delta);
    write_delta(old_delta);
    CHECK(safetensors_patch_metadata(old_base, "graft.base_version", "9", &err));
    CHECK(safetensors_patch_metadata(old_delta, "graft.version", "9", &err));
    write_rows(rows, 12);
    write_rows(few, 7);
    return 0;
}

static int teardown(void **state)
{
    blob_store_close(context.blobs);
    return file_remove_tree(root, NULL);
}

/* A run behind worker_prepare_files; of these paths, none is owned. */
static struct worker_run run_of(char *base_path, char *training_path)
{
    return (struct worker_run){.cx = &context,
                               .lease = {.job = "ftjob-1"},
                               .job = {.training_file = "file-abc",
                                       .base_sha256 = "0123456789abcdef",
                                       .tuned_sha256 = "123456789abcdef0",
                                       .start_sha256 = "23456789abcdef01",
                                       .chosen = {.n_epochs = 1, .batch_size = 4},
                                       .schedule = "linear"},
                               .base_path = base_path,
                               .training_path = training_path,
                               .staging = root};
}

static void release(struct worker_run *r)
{
    engine_trainer_free(r->trainer);
    engine_dataset_free(r->training);
    engine_free(r->engine);
}

/* job_run.c tells a client of it that there was an internal error, and no more. */
static void is_ours(int rc, const struct err *err, const char *what)
{
    assert_int_equal(rc, -1);
    if (err->kind != ERR_INTERNAL || strstr(err->message, root) != NULL)
        fail_msg("a client would be told: %s", err->message);
    assert_non_null(strstr(err->message, what));
}

static void is_the_clients(int rc, const struct err *err, const char *code, const char *words)
{
    assert_int_equal(rc, -1);
    assert_int_equal(err->kind, ERR_INVALID);
    assert_string_equal(err->code, code);
    if (strstr(err->message, words) == NULL || strstr(err->message, root) != NULL)
        fail_msg("a client is told: %s", err->message);
}

/* ------------------------------------------------------------------ before the first step */

static void a_base_that_is_refused_is_no_fault_of_the_training_file(void **state)
{
    struct worker_run r = run_of(old_base, rows);
    struct err why = {0};

    is_ours(worker_prepare_data(&r, &why), &why, "base 0123456789ab");
    r.base_path = mute_base; /* this one shows when it is opened */
    err_clear(&why);
    is_ours(worker_prepare_data(&r, &why), &why, "base 0123456789ab");
    release(&r);
}

static void a_tuned_model_that_is_refused_is_so_before_anything_is_opened(void **state)
{
    struct worker_run r = run_of(base, NULL);
    struct err why = {0};

    r.tuned_path = old_base;
    is_ours(worker_prepare_data(&r, &why), &why, "tuned model 123456789abc");
    assert_null(r.engine);
    release(&r);
}

static void a_delta_to_start_from_that_is_refused_is_no_fault_of_the_training_file(void **state)
{
    struct worker_run r = run_of(base, rows);
    struct err why = {0};

    r.start_path = delta;
    CHECK(worker_prepare_data(&r, &err));
    CHECK(worker_prepare_trainer(&r, &err));
    r.start_path = old_delta;
    is_ours(worker_prepare_trainer(&r, &why), &why, "delta 23456789abcd");
    release(&r);
}

static void a_training_file_that_is_refused_is_told_of(void **state)
{
    struct worker_run r = run_of(base, few);
    struct err why = {0};

    is_the_clients(worker_prepare_data(&r, &why), &why, "invalid_n_examples", "7 example");
    release(&r);
}

/* On a disk without room for a folder, too; here there is no place for one. */
static void a_run_begins_without_writing_anything(void **state)
{
    struct worker_run r = {.cx = &context, .lease = {.job = "ftjob-0123456789abcdefABCDEFGH"}};
    char staging[64];

    snprintf(staging, sizeof staging, "%s/staging", root);
    assert_int_equal(rmdir(staging), 0);
    CHECK(worker_prepare_files(&r, &err));
    assert_int_equal(mkdir(staging, 0700), 0);
}

/* What it would lose may be hours of work, and at its end it waits for room. */
static void a_model_without_room_is_refused_unless_its_training_has_begun(void **state)
{
    struct worker_run r = run_of(base, rows);
    struct err why = {0};

    r.job.compression.ratio = 1e-12; /* more bytes than a disk has */
    CHECK(worker_prepare_data(&r, &err));
    assert_int_equal(worker_prepare_trainer(&r, &why), -1);
    assert_int_equal(why.kind, ERR_NO_SPACE);
    assert_string_equal(why.code, "insufficient_storage");
    snprintf(r.job.recovery.name, sizeof r.job.recovery.name, "ftjob-1.1.9.0123abcd");
    CHECK(worker_prepare_trainer(&r, &err));
    release(&r);
}

/* Else the system would kill its worker, when all has been trained. */
static void what_compressing_takes_counts_before_training(void **state)
{
    const struct engine_options options = {.device = "cpu"};
    struct worker_run r = run_of(base, rows);
    int64_t compression;

    r.job.compression.max_kl = 0.1;
    CHECK(worker_prepare_data(&r, &err));
    CHECK(worker_prepare_trainer(&r, &err));
    compression = engine_compress_bytes(
        engine_info(r.engine), &options,
        &(struct engine_compress_options){.max_kl = 0.1, .distill_steps = 0}, r.report.tokens);
    assert_true(compression > engine_weight_bytes(engine_info(r.engine), &options));
    assert_int_equal(worker_prepare_bytes(&r) +
                         engine_weight_bytes(engine_info(r.engine), &options),
                     r.plan.memory_bytes + compression); /* both count the base */
    release(&r);
}

/* What says that another try, room or another device may do is no refusal. */
static void other_errors_stay_what_they_are(void **state)
{
    const struct err errors[] = {
        {.kind = ERR_NO_MEMORY, .message = "no memory"},
        {.kind = ERR_DEVICE, .message = "gone"},
        {.kind = ERR_IO, .code = "damaged_file", .message = "rotten"},
        {.kind = ERR_INVALID, .code = "invalid_n_examples", .message = "too few"}};

    for (size_t i = 0; i < sizeof errors / sizeof errors[0]; i++) {
        struct err why = errors[i];

        assert_int_equal(worker_hide_place("base", "01", &why), -1);
        assert_memory_equal(&why, &errors[i], sizeof why);
    }
}

/* ------------------------------------------------------------------ compression */

/* It was read before; but what the codecs say of a file is never for a client. */
static void a_tuned_model_that_the_codecs_refuse_is_not_placed(void **state)
{
    struct worker_run r = run_of(base, NULL);
    struct err why = {0};

    CHECK(worker_prepare_data(&r, &err));
    r.tuned_path = old_base;
    is_ours(worker_space_artifact(&r, &why), &why, "tuned model 123456789abc");
    release(&r);
}

static void a_compression_that_can_not_be_had_is_told_of(void **state)
{
    struct worker_run r = run_of(base, NULL);
    struct err why = {0};

    r.tuned_path = narrow_base;
    CHECK(worker_prepare_data(&r, &err));
    is_the_clients(worker_space_artifact(&r, &why), &why, "compression_failed",
                   "they do not belong together");
    release(&r);
}

/* ------------------------------------------------------------------ the end */

/* The job is handed back, and does not fail for what a stopped worker does not wait for any more.
 * The last test: from then on this process is to stop. */
static void a_database_without_room_fails_no_job_of_a_worker_that_stops(void **state)
{
    struct worker_run r = run_of(base, rows);
    struct err why = {0};

    CHECK(worker_setup(-1, &err));
    raise(SIGTERM);
    err_set(&why, ERR_NO_SPACE, "database: could not extend file");
    assert_false(worker_run_again(&r, &why));
    assert_int_equal(why.kind, ERR_UNAVAILABLE);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_base_that_is_refused_is_no_fault_of_the_training_file),
        cmocka_unit_test(a_tuned_model_that_is_refused_is_so_before_anything_is_opened),
        cmocka_unit_test(a_delta_to_start_from_that_is_refused_is_no_fault_of_the_training_file),
        cmocka_unit_test(a_training_file_that_is_refused_is_told_of),
        cmocka_unit_test(a_run_begins_without_writing_anything),
        cmocka_unit_test(a_model_without_room_is_refused_unless_its_training_has_begun),
        cmocka_unit_test(what_compressing_takes_counts_before_training),
        cmocka_unit_test(other_errors_stay_what_they_are),
        cmocka_unit_test(a_tuned_model_that_the_codecs_refuse_is_not_placed),
        cmocka_unit_test(a_compression_that_can_not_be_had_is_told_of),
        cmocka_unit_test(a_database_without_room_fails_no_job_of_a_worker_that_stops),
    };

    return cmocka_run_group_tests(tests, setup, teardown);
}
