/* The compressions of engine.h on a tiny model that was taught twelve answers: the report is filled
 * in and true, a size that is asked for is met, and what can not be had is refused by name. No
 * TSan: minutes of training, and its threads are those of test_compression and test_trainer. */
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>
#include <jansson.h>

#include "engine/base/file_io.h"
#include "engine/base/json_text.h"
#include "engine/base/strbuf.h"
#include "engine/codec/codec.h"
#include "engine/engine.h"
#include "engine/safetensors.h"
#include "tests/unit/delta_fixture.h"
#include "tests/unit/folder_entries.h"
#include "tests/unit/taught_model.h"
#include "tests/unit/tiny_model.h"

#define NEARLY 2 /* a ratio at which next to nothing is lost */

/* ------------------------------------------------------------------ the report */

static void test_report(void **state)
{
    struct engine_delta_report on_held_out, on_calibration;
    struct stat st;

    on_held_out = taught_compress((struct engine_compress_options){.ratio = 10,
                                                                   .distill_steps = 3,
                                                                   .calibration = taught.questions,
                                                                   .held_out = taught.reworded});
    assert_int_equal(stat(taught.delta_path, &st), 0);
    assert_int_equal(on_held_out.bytes, st.st_size);
    assert_string_equal(on_held_out.codec, "graft");
    assert_true(on_held_out.linear_bytes > on_held_out.bytes / 2);
    assert_true(on_held_out.linear_bytes < on_held_out.bytes);
    assert_true(on_held_out.ratio >= 10 && on_held_out.ratio < 10.4);
    assert_true(on_held_out.linear_ratio > 4);
    assert_true(on_held_out.relative_error > 0 && on_held_out.relative_error < 1);
    assert_true(on_held_out.predicted_kl > 0 && isfinite(on_held_out.predicted_kl));
    assert_true(on_held_out.measured_kl > 0 && isfinite(on_held_out.measured_kl));
    assert_true(on_held_out.answer_kl > 0 && isfinite(on_held_out.answer_kl));
    assert_true(on_held_out.tuned_loss > 0 && isfinite(on_held_out.held_out_loss));
    assert_true(on_held_out.measured_tokens > 0 && on_held_out.calibration_tokens > 0);
    assert_int_equal(on_held_out.distill_steps, 3);
    assert_true(on_held_out.seconds >= on_held_out.statistics_seconds +
                                           on_held_out.distill_seconds +
                                           on_held_out.measure_seconds);
    assert_true(on_held_out.statistics_seconds > 0 && on_held_out.distill_seconds > 0 &&
                on_held_out.measure_seconds > 0);
    taught_expect_report(taught.delta_path, &on_held_out, "held_out");

    on_calibration = taught_compress((struct engine_compress_options){
        .ratio = 10, .distill_steps = 3, .calibration = taught.questions});
    taught_expect_report(taught.delta_path, &on_calibration, "calibration");
    /* What was learnt is known better in its own words. */
    assert_true(on_calibration.tuned_loss < on_held_out.tuned_loss);
    taught_nothing_is_left();
}

static void test_report_without_rows(void **state)
{
    struct engine_delta_report r =
        taught_compress((struct engine_compress_options){.ratio = 10, .distill_steps = -1});

    assert_true(isnan(r.predicted_kl) && isnan(r.measured_kl) && isnan(r.answer_kl));
    assert_true(isnan(r.held_out_loss) && isnan(r.tuned_loss));
    assert_int_equal(r.measured_tokens, 0);
    assert_int_equal(r.calibration_tokens, 0);
    assert_int_equal(r.distill_steps, 0);
    taught_expect_report(taught.delta_path, &r, "calibration");
}

/* What is nearly right already is not shaken by distillation: its steps are small then. */
static void test_distillation_of_what_is_nearly_right(void **state)
{
    struct engine_delta_report by_itself = taught_compress((struct engine_compress_options){
        .ratio = NEARLY, .distill_steps = 0, .calibration = taught.questions});
    struct engine_delta_report distilled = taught_compress((struct engine_compress_options){
        .ratio = NEARLY, .distill_steps = 12, .calibration = taught.questions});

    assert_true(distilled.measured_kl < by_itself.measured_kl);
}

static void test_progress(void **state)
{
    struct taught_progress told = {.stage = ""};

    taught_compress((struct engine_compress_options){.ratio = 10,
                                                     .distill_steps = 2,
                                                     .calibration = taught.questions,
                                                     .progress = taught_on_progress,
                                                     .context = &told});
    assert_int_equal(told.stages, 7);
    assert_string_equal(told.stage, "measure");
}

/* Whoever says stop, at whatever stage, is asked nothing more, nothing is left of it, and what was
 * there before is as it was. */
static void test_stop(void **state)
{
    static const char *const stages[] = {"read",    "statistics", "decompose", "compress",
                                         "distill", "compare",    "measure"};
    static const double max_kl[] = {0, 10};

    taught_put_older();
    for (size_t i = 0; i < 2 * sizeof stages / sizeof stages[0]; i++) {
        struct taught_progress told = {.stop = stages[i / 2]};
        struct engine_compress_options options = {.ratio = i % 2 ? 0 : 10,
                                                  .max_kl = max_kl[i % 2],
                                                  .distill_steps = 2,
                                                  .calibration = taught.questions,
                                                  .progress = taught_on_progress,
                                                  .context = &told};
        struct engine_delta_report report;
        struct err why = {0};

        assert_int_equal(
            engine_trainer_compress(taught.trainer, &options, taught.delta_path, &report, &why),
            -1);
        assert_int_equal(why.kind, ERR_CANCELLED);
        assert_string_equal(told.stage, told.stop);
        assert_int_equal(told.after, 1);
        taught_expect_older();
        taught_nothing_is_left();
    }
}

/* The last stage is behind everything else: not even then is the file at its place. */
static void test_stop_while_it_is_asked(void **state)
{
    struct taught_progress told = {.stop = "recall"};
    struct engine_compress_options options = {.ratio = 10,
                                              .distill_steps = 2,
                                              .calibration = taught.questions,
                                              .recall_questions = 4,
                                              .progress = taught_on_progress,
                                              .context = &told};
    struct engine_delta_report report;
    struct err why = {0};

    taught_put_older();
    assert_int_equal(engine_model_compress(taught.engine, taught.tuned_dir, &options,
                                           taught.delta_path, &report, &why),
                     -1);
    assert_int_equal(why.kind, ERR_CANCELLED);
    assert_int_equal(told.after, 1);
    assert_true(told.share < 1 / 3.); /* the base has not answered yet */
    taught_expect_older();
    taught_nothing_is_left();
    options.progress = NULL;
    CHECK(engine_model_compress(taught.engine, taught.tuned_dir, &options, taught.delta_path,
                                &report, &err));
    assert_int_equal(report.recall_asked, 4);
    CHECK(engine_delta_check(taught.base_path, taught.delta_path, "it", &err));
}

/* ------------------------------------------------------------------ its place */

static char draft_path[192];

/* What is measured gets a second name, by which it can be told later. */
static bool name_the_draft(void *context, const char *stage, double share)
{
    taught_expect_older();
    if (strcmp(stage, "measure") == 0 && access(taught.other_path, F_OK) != 0)
        assert_int_equal(link(draft_path, taught.other_path), 0);
    return true;
}

/* Written once: the file that is measured is the file that is left. Until it is complete, what was
 * there before can be read. */
static void test_what_is_measured_is_what_is_left(void **state)
{
    struct stat measured, left;

    snprintf(draft_path, sizeof draft_path, "%s.%ld.draft", taught.delta_path, (long)getpid());
    unlink(taught.other_path);
    taught_put_older();
    taught_compress((struct engine_compress_options){.ratio = 10,
                                                     .distill_steps = 2,
                                                     .calibration = taught.questions,
                                                     .progress = name_the_draft});
    assert_int_equal(stat(taught.other_path, &measured), 0);
    assert_int_equal(stat(taught.delta_path, &left), 0);
    assert_int_equal(measured.st_ino, left.st_ino);
    unlink(taught.other_path);
    taught_nothing_is_left();
}

/* Whoever was killed left one behind, or is still at work. */
static void test_drafts_of_others_stay(void **state)
{
    char path[160], *data;
    size_t len;

    snprintf(path, sizeof path, "%s.1.draft", taught.delta_path);
    CHECK(file_write_durable(path, "half", 4, &err));
    taught_compress((struct engine_compress_options){.ratio = 10});
    CHECK(engine_delta_check(taught.base_path, taught.delta_path, "it", &err));
    CHECK(file_read_all(path, 100, &data, &len, &err));
    assert_string_equal(data, "half");
    free(data);
    unlink(path);
    taught_nothing_is_left();
}

/* Root may write anywhere but where there is no folder, or a folder has the name. */
static void test_place_that_can_not_be_written(void **state)
{
    const struct engine_compress_options plain = {.ratio = 10};
    int before = folder_entries(taught.folder), in_tuned = folder_entries(taught.tuned_dir);
    char place[3][192];

    snprintf(place[0], sizeof place[0], "%s/none/delta.safetensors", taught.folder);
    snprintf(place[1], sizeof place[1], "%s/delta.safetensors", taught.base_path);
    snprintf(place[2], sizeof place[2], "%s", taught.tuned_dir);
    for (int i = 0; i < 6; i++) {
        struct taught_progress told = {.stage = ""};
        struct engine_compress_options options = plain;
        struct engine_delta_report report;
        struct err why = {0};

        options.progress = taught_on_progress;
        options.context = &told;
        assert_int_equal(
            i % 2 ? engine_model_compress(taught.engine, taught.tuned_dir, &options, place[i / 2],
                                          &report, &why)
                  : engine_trainer_compress(taught.trainer, &options, place[i / 2], &report, &why),
            -1);
        if (strstr(why.message, place[i / 2]) == NULL)
            fail_msg("\"%s\" does not name %s", why.message, place[i / 2]);
        assert_int_equal(told.stages, 0); /* refused before there is anything to lose */
        assert_int_equal(folder_entries(taught.folder), before);
        assert_int_equal(folder_entries(taught.tuned_dir), in_tuned);
    }
}

/* As on a disk that is full. */
static void test_file_that_does_not_fit(void **state)
{
    const struct engine_compress_options options = {.ratio = 10, .calibration = taught.questions};
    struct engine_delta_report report;
    struct rlimit unlimited, limited;
    struct err why = {0};
    int rc;

    taught_put_older();
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &unlimited), 0);
    limited = unlimited;
    limited.rlim_cur = 4096;
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limited), 0);
    rc = engine_trainer_compress(taught.trainer, &options, taught.delta_path, &report, &why);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &unlimited), 0);
    signal(SIGXFSZ, SIG_DFL);
    assert_int_equal(rc, -1);
    assert_int_equal(why.kind, ERR_NO_SPACE);
    assert_non_null(strstr(why.message, taught.delta_path));
    taught_expect_older();
    taught_nothing_is_left();
}

/* ------------------------------------------------------------------ sizes and options */

/* So small that most matrices are given no bits at all: it is distilled, measured and served. */
static void smallest_of(const char *codec)
{
    struct engine_compress_options options = {
        .codec = codec, .bytes = 100, .calibration = taught.questions};
    struct engine_delta_report report;
    struct engine_delta *delta;
    struct err why = {0};
    const char *least;
    double kl;

    assert_int_equal(
        engine_trainer_compress(taught.trainer, &options, taught.delta_path, &report, &why), -1);
    least = strstr(why.message, "it takes at least ");
    assert_non_null(least);
    options.bytes = strtoll(least + strlen("it takes at least "), NULL, 10);
    options.distill_steps = 2;
    report = taught_compress(options);
    kl = report.measured_kl;
    assert_true(isfinite(kl) && kl > 0);
    CHECK(engine_delta_open(&delta, taught.engine, taught.delta_path, &err));
    engine_delta_free(delta);
    options.bytes += 4000;
    report = taught_compress(options);
    assert_true(report.measured_kl < kl);
}

static void test_smallest(void **state)
{
    char codec[DELTA_FIXTURE_NAME];

    for (int i = 0; delta_fixture_codec(i, codec); i++)
        if (delta_fixture_sizes(codec))
            smallest_of(codec);
}

/* What is said before anything is trained is what holds afterwards. */
static void test_least(void **state)
{
    char codec[DELTA_FIXTURE_NAME];
    struct engine_delta_size least, with_embeddings;
    struct err why = {0};

    for (int i = 0; delta_fixture_maker(i, codec); i++) {
        struct engine_compress_options options = {.codec = codec};
        struct engine_delta_report report;
        struct err small = {0};

        if (!delta_fixture_sizes(codec))
            continue;
        CHECK(engine_delta_least(taught.base_path, codec, false, &least, &err));
        options.bytes = least.bytes - 1;
        assert_int_equal(
            engine_trainer_compress(taught.trainer, &options, taught.delta_path, &report, &small),
            -1);
        assert_int_equal(small.kind, ERR_INVALID);
        options.bytes = 0;
        options.ratio = least.ratio;
        report = taught_compress(options);
        assert_true(report.bytes <= least.bytes);
        assert_true(report.bytes >= least.bytes * 9 / 10);
        CHECK(engine_delta_least(taught.base_path, codec, true, &with_embeddings, &err));
        assert_true(with_embeddings.bytes > least.bytes);
    }
    CHECK(engine_delta_least(taught.base_path, NULL, false, &least, &err));
    assert_int_equal(engine_delta_least(taught.base_path, "zip", false, &least, &why), -1);
    assert_int_equal(why.kind, ERR_INVALID);
    err_clear(&why);
    assert_int_equal(engine_delta_least("/nonexistent", NULL, false, &least, &why), -1);
    assert_int_not_equal(why.kind, ERR_INVALID);
}

/* The statistics take their time: a size that is refused is refused before them. */
static void test_refused_at_once(void **state)
{
    struct taught_progress told = {.stage = ""};
    struct engine_compress_options options = {.ratio = 1024,
                                              .calibration = taught.questions,
                                              .progress = taught_on_progress,
                                              .context = &told};
    struct engine_delta_report report;
    struct err why = {0};

    assert_int_equal(
        engine_trainer_compress(taught.trainer, &options, taught.delta_path, &report, &why), -1);
    assert_int_equal(why.kind, ERR_INVALID);
    assert_string_equal(told.stage, "read");
    assert_int_equal(told.stages, 1);
}

static void test_bad_options(void **state)
{
    const struct {
        struct engine_compress_options options;
        const char *complaint;
    } bad[] = {
        {{.codec = "zip"}, "\"zip\""},
        {{.codec = ""}, "graft"},
        {{.ratio = 16, .bytes = 5000}, "only one"},
        {{.ratio = 16, .max_kl = 0.1, .calibration = taught.questions}, "only one"},
        {{.bytes = 5000, .max_kl = 0.1, .calibration = taught.questions}, "only one"},
        {{.ratio = 0.5}, "ratio is 0.5"},
        {{.ratio = -3}, "ratio is -3"},
        {{.ratio = 2000}, "ratio is 2000"},
        {{.ratio = NAN}, "ratio is"},
        {{.ratio = INFINITY}, "ratio is inf"},
        {{.bytes = -1}, "-1 bytes"},
        {{.bytes = 100}, "it takes at least"},
        {{.ratio = 1024}, "it takes at least"},
        {{.codec = "bitdelta", .ratio = 1024}, "one of 32 weights at least"},
        {{.codec = "lossless", .ratio = 1}, "lossless has the size that comes of what it keeps"},
        {{.codec = "lossless", .bytes = 1 << 30}, "leave out ratio, bytes and max_kl"},
        {{.max_kl = -0.1, .calibration = taught.questions}, "max_kl is -0.1"},
        {{.max_kl = NAN, .calibration = taught.questions}, "max_kl is"},
        {{.max_kl = INFINITY, .calibration = taught.questions}, "max_kl is inf"},
        {{.max_kl = 0.1}, "rows to measure on"},
    };

    unlink(taught.delta_path);
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        struct engine_delta_report report;
        struct err why = {0};

        assert_int_equal(engine_trainer_compress(taught.trainer, &bad[i].options, taught.delta_path,
                                                 &report, &why),
                         -1);
        assert_int_equal(why.kind, ERR_INVALID);
        if (strstr(why.message, bad[i].complaint) == NULL)
            fail_msg("\"%s\" is not in \"%s\"", bad[i].complaint, why.message);
        assert_int_equal(access(taught.delta_path, F_OK), -1);
    }
    taught_nothing_is_left();
}

/* ------------------------------------------------------------------ a model tuned elsewhere */

static void model_hash(struct engine *with, const char *tuned, char hash[65])
{
    const struct engine_compress_options options = {
        .ratio = 10, .distill_steps = 3, .calibration = taught.questions, .seed = 4};
    struct engine_delta_report report;

    CHECK(engine_model_compress(with, tuned, &options, taught.delta_path, &report, &err));
    assert_true(isfinite(report.measured_kl));
    CHECK(file_sha256(taught.delta_path, hash, NULL, &err));
}

/* From a directory and from a base file, by engines of other thread counts: the same bytes. */
static void test_model_compress(void **state)
{
    char one[65], again[65], imported[65], threads[65], path[128];
    struct engine *other = taught_engine(taught.base_path, 3);

    snprintf(path, sizeof path, "%s/tuned-base.safetensors", taught.folder);
    CHECK(engine_import(taught.tuned_dir, path, NULL, &err));
    model_hash(taught.engine, taught.tuned_dir, one);
    model_hash(taught.engine, taught.tuned_dir, again);
    model_hash(taught.engine, path, imported);
    model_hash(other, path, threads);
    assert_string_equal(one, again);
    assert_string_equal(one, imported);
    assert_string_equal(one, threads);
    CHECK(engine_delta_check(taught.base_path, taught.delta_path, "it", &err));
    engine_free(other);
    taught_nothing_is_left();
}

/* Of another shape, or one that does something else with the same weights. */
static void test_model_that_does_not_belong(void **state)
{
    const struct engine_compress_options options = {.ratio = 10};
    const struct tiny_model shapes[] = {
        {.hidden = 64, .seed = 1},
        {.hidden = 96, .intermediate = 128, .layers = 3, .seed = 1},
        {.hidden = 96, .intermediate = 128, .heads = 8, .kv_heads = 4, .seed = 1},
        {.hidden = 96, .intermediate = 128, .rope_theta = 500000, .seed = 1}};
    struct engine_delta_report report;
    char dir[128];

    snprintf(dir, sizeof dir, "%s/shape", taught.folder);
    unlink(taught.delta_path);
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        struct err why = {0};

        CHECK(tiny_model_write(dir, &shapes[i], &err));
        assert_int_equal(
            engine_model_compress(taught.engine, dir, &options, taught.delta_path, &report, &why),
            -1);
        assert_int_equal(why.kind, ERR_INVALID);
        assert_non_null(strstr(why.message, "do not belong together"));
    }
    CHECK(file_remove_tree(dir, &err));
    assert_int_equal(
        engine_model_compress(taught.engine, dir, &options, taught.delta_path, &report, NULL), -1);
    assert_int_equal(access(taught.delta_path, F_OK), -1);
}

/* ------------------------------------------------------------------ describe */

static void test_describe(void **state)
{
    struct engine_delta_report report = taught_compress(
        (struct engine_compress_options){.ratio = 10, .calibration = taught.questions});
    json_t *json, *tensors;
    json_int_t bytes = 0;
    char *text;
    size_t i;
    json_t *t;

    CHECK(engine_delta_describe(taught.delta_path, &text, &err));
    json = json_loads(text, 0, NULL);
    free(text);
    assert_non_null(json);
    assert_string_equal(json_string_value(json_object_get(json, "version")), "2");
    assert_string_equal(json_string_value(json_object_get(json, "codec")), "graft");
    assert_string_equal(json_string_value(json_object_get(json, "base")),
                        engine_info(taught.engine)->digest);
    assert_non_null(strstr(json_string_value(json_object_get(json, "created_by")), "graft "));
    assert_true(json_is_object(json_object_get(json, "report")));
    tensors = json_object_get(json, "tensors");
    assert_int_equal(json_array_size(tensors), 14 + 5); /* two layers' matrices and all norms */
    json_array_foreach(tensors, i, t) bytes += json_integer_value(json_object_get(t, "bytes"));
    assert_int_equal(json_integer_value(json_object_get(json, "tensor_bytes")), bytes);
    assert_true(bytes > report.linear_bytes && bytes < report.bytes);
    t = json_array_get(tensors, 18);
    assert_string_equal(json_string_value(json_object_get(t, "dtype")), "U8");
    assert_int_equal(json_integer_value(json_array_get(json_object_get(t, "shape"), 0)),
                     json_integer_value(json_object_get(t, "bytes")));
    json_decref(json);
}

static void expect_no_description(const char *path, const char *complaint)
{
    struct err why = {0};
    char *text = (char *)"not set";

    assert_int_equal(engine_delta_describe(path, &text, &why), -1);
    assert_null(text);
    if (strstr(why.message, complaint) == NULL)
        fail_msg("\"%s\" is not in \"%s\"", complaint, why.message);
}

static void test_describe_broken_files(void **state)
{
    char *data;
    size_t len;

    taught_compress((struct engine_compress_options){.ratio = 10});
    CHECK(file_read_all(taught.delta_path, 1 << 20, &data, &len, &err));
    CHECK(file_write_durable(taught.other_path, data, len / 2, &err));
    expect_no_description(taught.other_path, taught.other_path);
    CHECK(file_write_durable(taught.other_path, data, 5, &err));
    expect_no_description(taught.other_path, taught.other_path);
    CHECK(file_write_durable(taught.other_path, data + 1, len - 1, &err));
    expect_no_description(taught.other_path, taught.other_path);
    free(data);
    expect_no_description(taught.base_path, "is not a delta");
    unlink(taught.other_path);
    expect_no_description(taught.other_path, taught.other_path);
}

/* What a stranger wrote into the report is shown as JSON or not at all. */
static void test_describe_strange_reports(void **state)
{
    static const char *const strange[] = {"", "no JSON", "{\"a\":", "nan", "[1,2]", "{\"a\":1}  "};

    for (size_t i = 0; i < sizeof strange / sizeof strange[0]; i++) {
        struct safetensors_writer *writer;
        json_t *json, *report;
        char *text;

        CHECK(safetensors_writer_open(&writer, taught.other_path, &err));
        safetensors_writer_metadata(writer, "graft.format", "delta", NULL);
        safetensors_writer_metadata(writer, "graft.report", strange[i], NULL);
        CHECK(safetensors_writer_begin(writer, &err));
        CHECK(safetensors_writer_finish(writer, NULL, &err));
        safetensors_writer_free(writer);
        CHECK(engine_delta_describe(taught.other_path, &text, &err));
        json = json_loads(text, 0, NULL);
        assert_non_null(json);
        report = json_object_get(json, "report");
        assert_true(i < 4 ? json_is_null(report) : json_is_array(report) || json_is_object(report));
        assert_true(json_is_null(json_object_get(json, "codec")));
        json_decref(json);
        free(text);
    }
}

/* ------------------------------------------------------------------ */

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_report),
        cmocka_unit_test(test_report_without_rows),
        cmocka_unit_test(test_distillation_of_what_is_nearly_right),
        cmocka_unit_test(test_progress),
        cmocka_unit_test(test_stop),
        cmocka_unit_test(test_stop_while_it_is_asked),
        cmocka_unit_test(test_what_is_measured_is_what_is_left),
        cmocka_unit_test(test_drafts_of_others_stay),
        cmocka_unit_test(test_place_that_can_not_be_written),
        cmocka_unit_test(test_file_that_does_not_fit),
        cmocka_unit_test(test_smallest),
        cmocka_unit_test(test_least),
        cmocka_unit_test(test_refused_at_once),
        cmocka_unit_test(test_bad_options),
        cmocka_unit_test(test_model_compress),
        cmocka_unit_test(test_model_that_does_not_belong),
        cmocka_unit_test(test_describe),
        cmocka_unit_test(test_describe_broken_files),
        cmocka_unit_test(test_describe_strange_reports),
    };

    return cmocka_run_group_tests(tests, taught_setup, taught_teardown);
}
