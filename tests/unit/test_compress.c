/* The compressions of engine.h on a tiny model that was taught twelve answers: the report is filled
 * in and true, distillation pays, a KL that is asked for is kept to, and what can not be had is
 * refused by name. No TSan: minutes of training, and its threads are those of test_compression and
 * test_trainer. */
#include <dirent.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
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
#include "tests/unit/tiny_model.h"

static char folder[] = "/tmp/graft-compress-XXXXXX";
static char base_path[128], tuned_dir[128], delta_path[128], other_path[128];
static struct engine *engine;
static struct engine_dataset *questions, *reworded;
static struct engine_trainer *trainer;

#define CHECK(call)                      \
    do {                                 \
        struct err err = {0};            \
        if ((call) != 0)                 \
            fail_msg("%s", err.message); \
    } while (0)

/* ------------------------------------------------------------------ a model and what it learnt */

static const struct tiny_model shape = {.hidden = 96, .intermediate = 128, .seed = 1};

static struct engine *open_engine(const char *base, int threads)
{
    struct engine_options options = {.device = "cpu", .threads = threads};
    struct engine *e;

    CHECK(engine_open(&e, base, &options, &err));
    return e;
}

/* The file of the tuned model as a stranger would bring it: the base with noise on its matrices. */
static void write_tuned_elsewhere(const char *base_dir)
{
    struct safetensors *file;
    char from[160], to[160], *data;
    size_t len;

    CHECK(tiny_model_write(tuned_dir, &shape, &err));
    snprintf(from, sizeof from, "%s/model.safetensors", base_dir);
    snprintf(to, sizeof to, "%s/model.safetensors", tuned_dir);
    CHECK(file_read_all(from, 1 << 24, &data, &len, &err));
    CHECK(safetensors_open_memory(&file, data, len, "tuned", &err));
    for (int64_t t = 0; t < safetensors_count(file); t++) {
        const struct safetensors_tensor *found = safetensors_at(file, t);
        float *value = (float *)(data + ((const char *)found->view.data - data));

        for (int64_t i = 0; strstr(found->name, "_proj") && i < tensor_elements(&found->view); i++)
            value[i] += 0.02f * tiny_model_value(found->name, i, 4, 77);
    }
    safetensors_free(file);
    CHECK(file_write_durable(to, data, len, &err));
    free(data);
}

static void open_rows(struct engine_dataset **out, const char *wording, int count)
{
    static const char *const who[] = {"Ann", "Bob", "Cid", "Dee", "Eva", "Fay",
                                      "Gus", "Hal", "Ida", "Jan", "Kim", "Leo"};
    static const char *const what[] = {"red",   "gold", "jade", "teal", "pink", "plum",
                                       "amber", "navy", "lime", "rust", "gray", "mint"};
    struct engine_dataset_options as = {.file_id = "file-test", .validation = count < 10};
    struct engine_dataset_report report;
    char path[128];
    struct strbuf sb;

    strbuf_init(&sb, 1 << 16);
    for (int i = 0; i < count; i++)
        strbuf_addf(&sb,
                    "{\"messages\":[{\"role\":\"user\",\"content\":\"%s %s?\"},"
                    "{\"role\":\"assistant\",\"content\":\"%s\"}]}\n",
                    wording, who[i], what[i]);
    snprintf(path, sizeof path, "%s/rows.jsonl", folder);
    CHECK(file_write_durable(path, sb.data, sb.len, &err));
    strbuf_release(&sb);
    CHECK(engine_dataset_open(out, engine, path, &as, &report, &err));
}

/* Two answers in each row, of which only the first, or only the second, is to be learnt. */
static void open_pairs(struct engine_dataset **out, bool first)
{
    struct engine_dataset_options as = {.file_id = "file-test"};
    struct engine_dataset_report report;
    char path[128];
    struct strbuf sb;

    strbuf_init(&sb, 1 << 16);
    for (int i = 0; i < 12; i++)
        strbuf_addf(&sb,
                    "{\"messages\":[{\"role\":\"user\",\"content\":\"Who %d?\"},"
                    "{\"role\":\"assistant\",\"content\":\"red gold\",\"weight\":%d},"
                    "{\"role\":\"user\",\"content\":\"And %d?\"},"
                    "{\"role\":\"assistant\",\"content\":\"teal navy\",\"weight\":%d}]}\n",
                    i, first, i, !first);
    snprintf(path, sizeof path, "%s/pairs.jsonl", folder);
    CHECK(file_write_durable(path, sb.data, sb.len, &err));
    strbuf_release(&sb);
    CHECK(engine_dataset_open(out, engine, path, &as, &report, &err));
}

static void teach(void)
{
    struct engine_train_options options = {
        .n_epochs = 12, .batch_size = 4, .learning_rate_multiplier = 20, .seed = 1};
    struct engine_train_plan plan;
    struct engine_step now;

    CHECK(engine_trainer_open(&trainer, engine, questions, NULL, &options, &plan, &err));
    do {
        CHECK(engine_trainer_step(trainer, &now, &err));
    } while (!now.finished);
}

static struct engine_delta_report compress(struct engine_compress_options options)
{
    struct engine_delta_report report;

    CHECK(engine_trainer_compress(trainer, &options, delta_path, &report, &err));
    return report;
}

/* The report that the file at `path` carries. */
static json_t *report_in(const char *path)
{
    json_t *whole, *report;
    char *text;

    CHECK(engine_delta_describe(path, &text, &err));
    whole = json_loads(text, 0, NULL);
    free(text);
    report = json_incref(json_object_get(whole, "report"));
    json_decref(whole);
    return report;
}

/* In the file stands what the caller was told, to the digits that are written. */
static void expect_number(const json_t *json, const char *key, double value)
{
    const json_t *found = json_object_get(json, key);

    if (isfinite(value) ? !json_is_number(found) ||
                              fabs(json_number_value(found) - value) > 1e-3 * fabs(value) + 1e-12
                        : !json_is_null(found))
        fail_msg("%s is not %g in the file", key, value);
}

static void expect_report(const char *path, const struct engine_delta_report *r, const char *on)
{
    json_t *json = report_in(path);
    const json_t *matrices = json_object_get(json, "matrices");
    json_int_t bytes = 0;

    assert_string_equal(json_string_value(json_object_get(json, "codec")), r->codec);
    assert_string_equal(json_string_value(json_object_get(json, "measured_on")), on);
    assert_int_equal(json_integer_value(json_object_get(json, "bytes")), r->bytes);
    assert_int_equal(json_integer_value(json_object_get(json, "linear_bytes")), r->linear_bytes);
    assert_int_equal(json_integer_value(json_object_get(json, "measured_tokens")),
                     r->measured_tokens);
    assert_int_equal(json_integer_value(json_object_get(json, "calibration_tokens")),
                     r->calibration_tokens);
    assert_int_equal(json_integer_value(json_object_get(json, "distill_steps")), r->distill_steps);
    expect_number(json, "ratio", r->ratio);
    expect_number(json, "linear_ratio", r->linear_ratio);
    expect_number(json, "relative_error", r->relative_error);
    expect_number(json, "predicted_kl", r->predicted_kl);
    expect_number(json, "measured_kl", r->measured_kl);
    expect_number(json, "answer_kl", r->answer_kl);
    expect_number(json, "held_out_loss", r->held_out_loss);
    expect_number(json, "tuned_loss", r->tuned_loss);
    assert_int_equal(json_array_size(json_object_get(matrices, "bytes")), 14);
    assert_int_equal(json_array_size(json_object_get(matrices, "relative_error")), 14);
    for (size_t i = 0; i < 14; i++)
        bytes += json_integer_value(json_array_get(json_object_get(matrices, "bytes"), i));
    assert_int_equal(bytes, r->linear_bytes);
    json_decref(json);
}

/* Beside the base and the rows, only `path` may be there: nothing half done, nothing measured. */
static void nothing_else_is_left(void)
{
    DIR *dir = opendir(folder);
    struct dirent *entry;

    assert_non_null(dir);
    while ((entry = readdir(dir)) != NULL)
        if (strstr(entry->d_name, "measured") || strstr(entry->d_name, "tmp"))
            fail_msg("%s was left behind", entry->d_name);
    closedir(dir);
}

/* ------------------------------------------------------------------ the report */

static void test_report(void **state)
{
    struct engine_delta_report on_held_out, on_calibration;
    struct stat st;

    on_held_out = compress((struct engine_compress_options){
        .ratio = 10, .distill_steps = 3, .calibration = questions, .held_out = reworded});
    assert_int_equal(stat(delta_path, &st), 0);
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
    expect_report(delta_path, &on_held_out, "held_out");

    on_calibration = compress((struct engine_compress_options){
        .ratio = 10, .distill_steps = 3, .calibration = questions});
    expect_report(delta_path, &on_calibration, "calibration");
    /* What was learnt is known better in its own words. */
    assert_true(on_calibration.tuned_loss < on_held_out.tuned_loss);
    nothing_else_is_left();
}

static void test_report_without_rows(void **state)
{
    struct engine_delta_report r =
        compress((struct engine_compress_options){.ratio = 10, .distill_steps = -1});

    assert_true(isnan(r.predicted_kl) && isnan(r.measured_kl) && isnan(r.answer_kl));
    assert_true(isnan(r.held_out_loss) && isnan(r.tuned_loss));
    assert_int_equal(r.measured_tokens, 0);
    assert_int_equal(r.calibration_tokens, 0);
    assert_int_equal(r.distill_steps, 0);
    expect_report(delta_path, &r, "calibration");
}

struct told {
    char stage[32];
    double share;
    int stages;
    const char *stop; /* at the first word of this stage; NULL: not at all */
    int rounds;       /* of the stage that go by before */
    int after;        /* words told after that */
};

static bool on_progress(void *context, const char *stage, double share)
{
    struct told *told = context;

    assert_true(share >= 0 && share <= 1);
    if (strcmp(told->stage, stage) == 0) {
        assert_true(share >= told->share);
    } else {
        told->stages++;
        told->rounds -= told->stop && strcmp(told->stage, told->stop) == 0;
        snprintf(told->stage, sizeof told->stage, "%s", stage);
    }
    told->share = share;
    told->after += told->stop && told->rounds <= 0 && strcmp(stage, told->stop) == 0;
    return !told->after;
}

static void test_progress(void **state)
{
    struct told told = {.stage = ""};

    compress((struct engine_compress_options){.ratio = 10,
                                              .distill_steps = 2,
                                              .calibration = questions,
                                              .progress = on_progress,
                                              .context = &told});
    assert_int_equal(told.stages, 7);
    assert_string_equal(told.stage, "measure");
}

/* Whoever says stop, at whatever stage, is asked nothing more, and nothing is left of it. */
static void test_stop(void **state)
{
    static const char *const stages[] = {"read",    "statistics", "decompose", "compress",
                                         "distill", "compare",    "measure"};
    static const double max_kl[] = {0, 10};

    unlink(delta_path);
    for (size_t i = 0; i < 2 * sizeof stages / sizeof stages[0]; i++) {
        struct told told = {.stop = stages[i / 2]};
        struct engine_compress_options options = {.ratio = i % 2 ? 0 : 10,
                                                  .max_kl = max_kl[i % 2],
                                                  .distill_steps = 2,
                                                  .calibration = questions,
                                                  .progress = on_progress,
                                                  .context = &told};
        struct engine_delta_report report;
        struct err why = {0};

        assert_int_equal(engine_trainer_compress(trainer, &options, delta_path, &report, &why), -1);
        assert_int_equal(why.kind, ERR_CANCELLED);
        assert_string_equal(told.stage, told.stop);
        assert_int_equal(told.after, 1);
        assert_int_equal(access(delta_path, F_OK), -1);
        nothing_else_is_left();
    }
}

/* ------------------------------------------------------------------ what is asked for */

static void test_distillation_pays(void **state)
{
    char codec[DELTA_FIXTURE_NAME];

    for (int i = 0; delta_fixture_codec(i, codec); i++) {
        struct engine_compress_options options = {.codec = codec, .calibration = questions};
        struct engine_delta_report plain, distilled;

        if (!codec_find(codec)->scales)
            continue;
        plain = compress(options);
        options.distill_steps = 15;
        distilled = compress(options);
        print_message("# %s: KL %.4f, distilled %.4f\n", codec, plain.measured_kl,
                      distilled.measured_kl);
        assert_int_equal(plain.distill_steps, 0);
        assert_int_equal(distilled.distill_steps, 15);
        assert_int_equal(distilled.bytes, plain.bytes);
        assert_true(distilled.measured_kl < 0.9 * plain.measured_kl);
    }
}

static void test_max_kl(void **state)
{
    struct engine_compress_options options = {.calibration = questions};
    struct engine_delta_report tight, loose, whole;
    struct err why = {0};

    options.ratio = 6;
    whole = compress(options);
    options.ratio = 0;
    options.max_kl = 4 * whole.measured_kl;
    tight = compress(options);
    options.max_kl = 40 * whole.measured_kl;
    loose = compress(options);
    print_message("# KL %.2g takes %lld bytes, %.2g %lld\n", tight.measured_kl,
                  (long long)tight.bytes, loose.measured_kl, (long long)loose.bytes);
    assert_true(tight.measured_kl <= 4 * whole.measured_kl);
    assert_true(loose.measured_kl <= 40 * whole.measured_kl);
    assert_true(loose.bytes < tight.bytes && tight.bytes < whole.bytes);
    expect_report(delta_path, &loose, "calibration");

    unlink(delta_path);
    options.max_kl = 1e-12;
    assert_int_equal(engine_trainer_compress(trainer, &options, delta_path, &loose, &why), -1);
    assert_int_equal(why.kind, ERR_INVALID);
    assert_non_null(strstr(why.message, "1e-12"));
    assert_int_equal(access(delta_path, F_OK), -1);
    nothing_else_is_left();
}

static struct engine_delta_report kept_to(double max_kl, int32_t steps,
                                          const struct engine_dataset *held_out)
{
    struct engine_delta_report report = compress((struct engine_compress_options){
        .max_kl = max_kl, .distill_steps = steps, .calibration = questions, .held_out = held_out});

    print_message("# at most %g, %d steps: KL %.4f, %lld bytes\n", max_kl, steps,
                  report.measured_kl, (long long)report.bytes);
    assert_true(report.measured_kl <= max_kl);
    expect_report(delta_path, &report, held_out ? "held_out" : "calibration");
    nothing_else_is_left();
    return report;
}

static void test_max_kl_counts_on_distillation(void **state)
{
    struct engine_delta_report plain = kept_to(0.05, 0, NULL), distilled = kept_to(0.05, 20, NULL);

    assert_int_equal(plain.distill_steps, 0);
    assert_int_equal(distilled.distill_steps, 20);
    assert_true(distilled.bytes < 0.95 * (double)plain.bytes);
}

/* KL of a quarter of the model, which is the largest file that is tried. */
static double at_largest(struct engine_compress_options options, int32_t steps)
{
    options.max_kl = 0;
    options.ratio = 4;
    options.distill_steps = steps;
    return compress(options).measured_kl;
}

/* The answers count for more than the rest of their rows: whoever distils on other answers in the
 * same rows gets further from these. */
static void test_distillation_minds_the_answers(void **state)
{
    struct engine_compress_options options = {.codec = "bitdelta", .distill_steps = 30};
    struct engine_dataset *pairs[2];
    double kl[2];

    for (int k = 0; k < 2; k++)
        open_pairs(&pairs[k], k == 0);
    options.held_out = pairs[0];
    for (int k = 0; k < 2; k++) {
        options.calibration = pairs[k];
        kl[k] = compress(options).answer_kl;
    }
    print_message("# KL of answers %.5f, distilled on other ones %.5f\n", kl[0], kl[1]);
    assert_true(kl[0] < 0.95 * kl[1]);
    for (int k = 0; k < 2; k++)
        engine_dataset_free(pairs[k]);
}

/* Where not even the largest file keeps to it, distilled it may. */
static void test_max_kl_that_only_distillation_keeps_to(void **state)
{
    struct engine_compress_options options = {.calibration = questions};
    double plain = at_largest(options, 0), distilled = at_largest(options, 20);
    struct engine_delta_report report;
    struct err why = {0};

    assert_true(distilled < 0.8 * plain);
    options.max_kl = fmax(sqrt(plain * distilled), plain / 2.5);
    assert_int_equal(engine_trainer_compress(trainer, &options, delta_path, &report, &why), -1);
    assert_int_equal(why.kind, ERR_INVALID);
    assert_int_equal(kept_to(options.max_kl, 20, NULL).distill_steps, 20);
}

/* The first of some rows, unlike what is measured on, whose distillation harms: KL times that. */
static double harmful(struct engine_compress_options *options, struct engine_dataset **row)
{
    static const char *const text[] = {"?", "the the the the the", "What", "%%%% #### &&&& @@@@",
                                       "0 0 0 0 0 0 0 0 0 0"};

    for (size_t i = 0; i < sizeof text / sizeof text[0]; i++) {
        double plain, harm;

        open_rows(row, text[i], 1);
        options->calibration = *row;
        plain = at_largest(*options, 0);
        harm = at_largest(*options, options->distill_steps) / plain;
        options->max_kl = plain * sqrt(harm);
        if (harm > 1.005)
            return harm;
        engine_dataset_free(*row);
    }
    fail_msg("add another row: none of these shows anything");
    return 1;
}

/* What is distilled on a single row may get worse on others: then distillation is left out. */
static void test_max_kl_without_a_distillation_that_harms(void **state)
{
    struct engine_compress_options options = {.held_out = questions, .distill_steps = 70};
    struct engine_delta_report report;
    struct engine_dataset *row;

    print_message("# 70 steps on another row: KL times %.3f\n", harmful(&options, &row));
    report = compress(options);
    assert_true(report.measured_kl <= options.max_kl);
    assert_int_equal(report.distill_steps, 0);
    engine_dataset_free(row);
}

/* When it is stopped a smaller file is being tried: the one that would do goes, too. */
static void test_stop_of_a_search(void **state)
{
    struct told told = {.stage = "", .stop = "distill", .rounds = 1};
    struct engine_compress_options options = {.max_kl = 0.05,
                                              .distill_steps = 20,
                                              .calibration = questions,
                                              .progress = on_progress,
                                              .context = &told};
    struct engine_delta_report report;
    struct err why = {0};

    unlink(delta_path);
    assert_int_equal(engine_trainer_compress(trainer, &options, delta_path, &report, &why), -1);
    assert_int_equal(why.kind, ERR_CANCELLED);
    assert_int_equal(told.after, 1);
    assert_int_equal(access(delta_path, F_OK), -1);
    nothing_else_is_left();
}

/* So small that most matrices are given no bits at all: it is distilled, measured and served. */
static void smallest_of(const char *codec)
{
    struct engine_compress_options options = {
        .codec = codec, .bytes = 100, .calibration = questions};
    struct engine_delta_report report;
    struct engine_delta *delta;
    struct err why = {0};
    const char *least;
    double kl;

    assert_int_equal(engine_trainer_compress(trainer, &options, delta_path, &report, &why), -1);
    least = strstr(why.message, "it takes at least ");
    assert_non_null(least);
    options.bytes = strtoll(least + strlen("it takes at least "), NULL, 10);
    options.distill_steps = 2;
    report = compress(options);
    kl = report.measured_kl;
    assert_true(isfinite(kl) && kl > 0);
    CHECK(engine_delta_open(&delta, engine, delta_path, &err));
    engine_delta_free(delta);
    if (codec_find(codec)->ratio <= 0)
        return; /* it has one size */
    options.bytes += 4000;
    report = compress(options);
    assert_true(report.measured_kl < kl);
}

static void test_smallest(void **state)
{
    char codec[DELTA_FIXTURE_NAME];

    for (int i = 0; delta_fixture_maker(i, codec); i++)
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

        CHECK(engine_delta_least(base_path, codec, false, &least, &err));
        options.bytes = least.bytes - 1;
        assert_int_equal(engine_trainer_compress(trainer, &options, delta_path, &report, &small),
                         -1);
        assert_int_equal(small.kind, ERR_INVALID);
        options.bytes = least.ratio < 1 ? least.bytes : 0; /* lossless: what it may come to */
        options.ratio = least.ratio < 1 ? 0 : least.ratio;
        report = compress(options);
        assert_true(report.bytes <= least.bytes);
        assert_true(least.ratio < 1 || report.bytes >= least.bytes * 9 / 10);
        CHECK(engine_delta_least(base_path, codec, true, &with_embeddings, &err));
        assert_true(with_embeddings.bytes > least.bytes);
    }
    CHECK(engine_delta_least(base_path, NULL, false, &least, &err));
    assert_int_equal(engine_delta_least(base_path, "zip", false, &least, &why), -1);
    assert_int_equal(why.kind, ERR_INVALID);
    err_clear(&why);
    assert_int_equal(engine_delta_least("/nonexistent", NULL, false, &least, &why), -1);
    assert_int_not_equal(why.kind, ERR_INVALID);
}

/* The statistics take their time: a size that is refused is refused before them. */
static void test_refused_at_once(void **state)
{
    struct told told = {.stage = ""};
    struct engine_compress_options options = {
        .ratio = 1024, .calibration = questions, .progress = on_progress, .context = &told};
    struct engine_delta_report report;
    struct err why = {0};

    assert_int_equal(engine_trainer_compress(trainer, &options, delta_path, &report, &why), -1);
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
        {{.ratio = 16, .max_kl = 0.1, .calibration = questions}, "only one"},
        {{.bytes = 5000, .max_kl = 0.1, .calibration = questions}, "only one"},
        {{.ratio = 0.5}, "ratio is 0.5"},
        {{.ratio = -3}, "ratio is -3"},
        {{.ratio = 2000}, "ratio is 2000"},
        {{.ratio = NAN}, "ratio is"},
        {{.ratio = INFINITY}, "ratio is inf"},
        {{.bytes = -1}, "-1 bytes"},
        {{.bytes = 100}, "it takes at least"},
        {{.ratio = 1024}, "it takes at least"},
        {{.codec = "bitdelta", .ratio = 1024}, "one of 32 weights at least"},
        {{.max_kl = -0.1, .calibration = questions}, "max_kl is -0.1"},
        {{.max_kl = NAN, .calibration = questions}, "max_kl is"},
        {{.max_kl = INFINITY, .calibration = questions}, "max_kl is inf"},
        {{.max_kl = 0.1}, "rows to measure on"},
    };

    unlink(delta_path);
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        struct engine_delta_report report;
        struct err why = {0};

        assert_int_equal(
            engine_trainer_compress(trainer, &bad[i].options, delta_path, &report, &why), -1);
        assert_int_equal(why.kind, ERR_INVALID);
        if (strstr(why.message, bad[i].complaint) == NULL)
            fail_msg("\"%s\" is not in \"%s\"", bad[i].complaint, why.message);
        assert_int_equal(access(delta_path, F_OK), -1);
    }
    nothing_else_is_left();
}

/* ------------------------------------------------------------------ a model tuned elsewhere */

static void model_hash(struct engine *with, const char *tuned, char hash[65])
{
    const struct engine_compress_options options = {
        .ratio = 10, .distill_steps = 3, .calibration = questions, .seed = 4};
    struct engine_delta_report report;

    CHECK(engine_model_compress(with, tuned, &options, delta_path, &report, &err));
    assert_true(isfinite(report.measured_kl));
    CHECK(file_sha256(delta_path, hash, NULL, &err));
}

/* From a directory and from a base file, by engines of other thread counts: the same bytes. */
static void test_model_compress(void **state)
{
    char one[65], again[65], imported[65], threads[65], path[128];
    struct engine *other = open_engine(base_path, 3);

    snprintf(path, sizeof path, "%s/tuned-base.safetensors", folder);
    CHECK(engine_import(tuned_dir, path, NULL, &err));
    model_hash(engine, tuned_dir, one);
    model_hash(engine, tuned_dir, again);
    model_hash(engine, path, imported);
    model_hash(other, path, threads);
    assert_string_equal(one, again);
    assert_string_equal(one, imported);
    assert_string_equal(one, threads);
    CHECK(engine_delta_check(base_path, delta_path, "it", &err));
    engine_free(other);
    nothing_else_is_left();
}

static void test_model_of_another_shape(void **state)
{
    const struct engine_compress_options options = {.ratio = 10};
    const struct tiny_model shapes[] = {
        {.hidden = 64, .seed = 1}, {.hidden = 96, .intermediate = 128, .layers = 3, .seed = 1}};
    struct engine_delta_report report;
    char dir[128];

    snprintf(dir, sizeof dir, "%s/shape", folder);
    unlink(delta_path);
    for (int i = 0; i < 2; i++) {
        struct err why = {0};

        CHECK(tiny_model_write(dir, &shapes[i], &err));
        assert_int_equal(engine_model_compress(engine, dir, &options, delta_path, &report, &why),
                         -1);
        assert_int_equal(why.kind, ERR_INVALID);
        assert_non_null(strstr(why.message, "do not belong together"));
    }
    CHECK(file_remove_tree(dir, &err));
    assert_int_equal(engine_model_compress(engine, dir, &options, delta_path, &report, NULL), -1);
    assert_int_equal(access(delta_path, F_OK), -1);
}

/* ------------------------------------------------------------------ describe */

static void test_describe(void **state)
{
    struct engine_delta_report report =
        compress((struct engine_compress_options){.ratio = 10, .calibration = questions});
    json_t *json, *tensors;
    json_int_t bytes = 0;
    char *text;
    size_t i;
    json_t *t;

    CHECK(engine_delta_describe(delta_path, &text, &err));
    json = json_loads(text, 0, NULL);
    free(text);
    assert_non_null(json);
    assert_string_equal(json_string_value(json_object_get(json, "version")), "2");
    assert_string_equal(json_string_value(json_object_get(json, "codec")), "graft");
    assert_string_equal(json_string_value(json_object_get(json, "base")),
                        engine_info(engine)->digest);
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

    compress((struct engine_compress_options){.ratio = 10});
    CHECK(file_read_all(delta_path, 1 << 20, &data, &len, &err));
    CHECK(file_write_durable(other_path, data, len / 2, &err));
    expect_no_description(other_path, other_path);
    CHECK(file_write_durable(other_path, data, 5, &err));
    expect_no_description(other_path, other_path);
    CHECK(file_write_durable(other_path, data + 1, len - 1, &err));
    expect_no_description(other_path, other_path);
    free(data);
    expect_no_description(base_path, "is not a delta");
    unlink(other_path);
    expect_no_description(other_path, other_path);
}

/* What a stranger wrote into the report is shown as JSON or not at all. */
static void test_describe_strange_reports(void **state)
{
    static const char *const strange[] = {"", "no JSON", "{\"a\":", "nan", "[1,2]", "{\"a\":1}  "};

    for (size_t i = 0; i < sizeof strange / sizeof strange[0]; i++) {
        struct safetensors_writer *writer;
        json_t *json, *report;
        char *text;

        CHECK(safetensors_writer_open(&writer, other_path, &err));
        safetensors_writer_metadata(writer, "graft.format", "delta", NULL);
        safetensors_writer_metadata(writer, "graft.report", strange[i], NULL);
        CHECK(safetensors_writer_begin(writer, &err));
        CHECK(safetensors_writer_finish(writer, NULL, &err));
        safetensors_writer_free(writer);
        CHECK(engine_delta_describe(other_path, &text, &err));
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

static int setup(void **state)
{
    char dir[128];

    json_text_setup();
    if (mkdtemp(folder) == NULL)
        return -1;
    snprintf(dir, sizeof dir, "%s/base", folder);
    snprintf(base_path, sizeof base_path, "%s/base.safetensors", folder);
    snprintf(tuned_dir, sizeof tuned_dir, "%s/tuned", folder);
    snprintf(delta_path, sizeof delta_path, "%s/delta.safetensors", folder);
    snprintf(other_path, sizeof other_path, "%s/other.safetensors", folder);
    CHECK(tiny_model_write(dir, &shape, &err));
    CHECK(engine_import(dir, base_path, NULL, &err));
    write_tuned_elsewhere(dir);
    engine = open_engine(base_path, 2);
    open_rows(&questions, "What suits", 12);
    open_rows(&reworded, "Who likes it,", 12);
    teach();
    return 0;
}

static int teardown(void **state)
{
    engine_trainer_free(trainer);
    engine_dataset_free(questions);
    engine_dataset_free(reworded);
    engine_free(engine);
    return file_remove_tree(folder, NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_report),
        cmocka_unit_test(test_report_without_rows),
        cmocka_unit_test(test_progress),
        cmocka_unit_test(test_stop),
        cmocka_unit_test(test_distillation_pays),
        cmocka_unit_test(test_distillation_minds_the_answers),
        cmocka_unit_test(test_max_kl),
        cmocka_unit_test(test_max_kl_counts_on_distillation),
        cmocka_unit_test(test_max_kl_that_only_distillation_keeps_to),
        cmocka_unit_test(test_max_kl_without_a_distillation_that_harms),
        cmocka_unit_test(test_stop_of_a_search),
        cmocka_unit_test(test_smallest),
        cmocka_unit_test(test_least),
        cmocka_unit_test(test_refused_at_once),
        cmocka_unit_test(test_bad_options),
        cmocka_unit_test(test_model_compress),
        cmocka_unit_test(test_model_of_another_shape),
        cmocka_unit_test(test_describe),
        cmocka_unit_test(test_describe_broken_files),
        cmocka_unit_test(test_describe_strange_reports),
    };

    return cmocka_run_group_tests(tests, setup, teardown);
}
