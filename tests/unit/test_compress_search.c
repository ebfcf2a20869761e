/* Distillation pays, minds the answers, and a KL that is asked for is kept to by the smallest file:
 * the compressions of engine.h on a tiny model that was taught twelve answers. No TSan: minutes of
 * training, and its threads are those of test_compression and test_trainer. */
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
#include "engine/base/strbuf.h"
#include "engine/codec/codec.h"
#include "tests/unit/delta_fixture.h"
#include "tests/unit/taught_model.h"

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
    snprintf(path, sizeof path, "%s/pairs.jsonl", taught.folder);
    CHECK(file_write_durable(path, sb.data, sb.len, &err));
    strbuf_release(&sb);
    CHECK(engine_dataset_open(out, taught.engine, path, &as, &report, &err));
}

static void test_distillation_pays(void **state)
{
    char codec[DELTA_FIXTURE_NAME];

    for (int i = 0; delta_fixture_codec(i, codec); i++) {
        struct engine_compress_options options = {.codec = codec, .calibration = taught.questions};
        struct engine_delta_report plain, distilled;

        if (!codec_find(codec)->scales)
            continue;
        plain = taught_compress(options);
        options.distill_steps = 15;
        distilled = taught_compress(options);
        print_message("# %s: KL %.4f, distilled %.4f\n", codec, plain.measured_kl,
                      distilled.measured_kl);
        assert_int_equal(plain.distill_steps, 0);
        assert_int_equal(distilled.distill_steps, 15);
        assert_int_equal(distilled.bytes, plain.bytes);
        assert_true(distilled.measured_kl < 0.9 * plain.measured_kl);
    }
}

struct heard {
    char stage[32];
    int distillations; /* that began */
};

static bool count_distillations(void *context, const char *stage, double share)
{
    struct heard *heard = context;

    heard->distillations += strcmp(stage, "distill") == 0 && strcmp(heard->stage, stage) != 0;
    snprintf(heard->stage, sizeof heard->stage, "%s", stage);
    return true;
}

/* Of the files that were tried it is the smallest that keeps to the KL. */
static void expect_smallest(const struct engine_delta_report *report, double max_kl)
{
    const struct engine_delta_curve *tried = &report->tried;
    int64_t smallest = INT64_MAX;

    for (int32_t i = 0; i < tried->count; i++)
        if (tried->kl[i] <= max_kl && tried->bytes[i] < smallest)
            smallest = tried->bytes[i];
    assert_int_equal(report->bytes, smallest);
}

/* Undistilled, a little below it there is one that was tried and does not: the search ended where
 * it had to. */
static void expect_bracket(const struct engine_delta_report *report, double max_kl)
{
    int64_t largest = 0;

    for (int32_t i = 0; i < report->tried.count; i++)
        if (report->tried.kl[i] > max_kl && report->tried.bytes[i] > largest)
            largest = report->tried.bytes[i];
    print_message("#   %lld bytes do not\n", (long long)largest);
    assert_true(largest < report->bytes);
    assert_true((double)largest > 0.93 * (double)report->bytes);
    assert_true(report->measured_kl > 0.7 * max_kl);
}

static struct engine_delta_report kept_to(double max_kl, int32_t steps)
{
    struct heard heard = {.stage = ""};
    struct engine_delta_report report =
        taught_compress((struct engine_compress_options){.max_kl = max_kl,
                                                         .distill_steps = steps,
                                                         .calibration = taught.questions,
                                                         .progress = count_distillations,
                                                         .context = &heard});

    print_message("# at most %.2g, %d steps: KL %.4f, %lld bytes; %d tried, %d distilled\n", max_kl,
                  steps, report.measured_kl, (long long)report.bytes, report.tried.count,
                  heard.distillations);
    assert_true(report.measured_kl <= max_kl);
    /* api-spec/deltas.md */
    assert_in_range(report.tried.count, 2, 10);
    assert_in_range(heard.distillations, steps > 0 ? 1 : 0, steps > 0 ? 3 : 0);
    expect_smallest(&report, max_kl);
    if (steps == 0)
        expect_bracket(&report, max_kl);
    taught_expect_report(taught.delta_path, &report, "calibration");
    taught_nothing_is_left();
    return report;
}

static void test_max_kl(void **state)
{
    struct engine_compress_options options = {.calibration = taught.questions};
    struct engine_delta_report tight, loose, whole;
    struct err why = {0};

    options.ratio = 6;
    whole = taught_compress(options);
    options.ratio = 0;
    tight = kept_to(4 * whole.measured_kl, 0);
    loose = kept_to(40 * whole.measured_kl, 0);
    assert_true(loose.bytes < tight.bytes && tight.bytes < whole.bytes);

    unlink(taught.delta_path);
    options.max_kl = 1e-12;
    assert_int_equal(
        engine_trainer_compress(taught.trainer, &options, taught.delta_path, &loose, &why), -1);
    assert_int_equal(why.kind, ERR_INVALID);
    assert_non_null(strstr(why.message, "1e-12"));
    assert_int_equal(access(taught.delta_path, F_OK), -1);
    taught_nothing_is_left();
}

static void test_max_kl_counts_on_distillation(void **state)
{
    struct engine_delta_report plain = kept_to(0.05, 0), distilled = kept_to(0.05, 40);

    assert_int_equal(plain.distill_steps, 0);
    assert_int_equal(distilled.distill_steps, 40);
    assert_true(distilled.bytes < 0.95 * (double)plain.bytes);
    kept_to(0.1, 15); /* as many files as there may be */
}

/* KL of a quarter of the model, which is the largest file that is tried. */
static double at_largest(struct engine_compress_options options, int32_t steps)
{
    options.max_kl = 0;
    options.ratio = 4;
    options.distill_steps = steps;
    return taught_compress(options).measured_kl;
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
        kl[k] = taught_compress(options).answer_kl;
    }
    print_message("# KL of answers %.5f, distilled on other ones %.5f\n", kl[0], kl[1]);
    assert_true(kl[0] < 0.95 * kl[1]);
    for (int k = 0; k < 2; k++)
        engine_dataset_free(pairs[k]);
}

/* Where not even the largest file keeps to it, distilled it may. */
static void test_max_kl_that_only_distillation_keeps_to(void **state)
{
    struct engine_compress_options options = {.calibration = taught.questions};
    double plain = at_largest(options, 0), distilled = at_largest(options, 40);
    struct engine_delta_report report;
    struct err why = {0};

    assert_true(distilled < 0.8 * plain);
    options.max_kl = fmax(sqrt(plain * distilled), plain / 2.5);
    assert_int_equal(
        engine_trainer_compress(taught.trainer, &options, taught.delta_path, &report, &why), -1);
    assert_int_equal(why.kind, ERR_INVALID);
    assert_int_equal(kept_to(options.max_kl, 40).distill_steps, 40);
}

/* The first of some rows, unlike what is measured on, whose distillation harms: KL times that. */
static double harmful(struct engine_compress_options *options, struct engine_dataset **row)
{
    static const char *const text[] = {"?", "the the the the the", "What", "%%%% #### &&&& @@@@",
                                       "0 0 0 0 0 0 0 0 0 0"};

    for (size_t i = 0; i < sizeof text / sizeof text[0]; i++) {
        double plain, harm;

        taught_rows(row, text[i], 1);
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
    struct engine_compress_options options = {.held_out = taught.questions, .distill_steps = 70};
    struct engine_delta_report report;
    struct engine_dataset *row;

    print_message("# 70 steps on another row: KL times %.3f\n", harmful(&options, &row));
    report = taught_compress(options);
    assert_true(report.measured_kl <= options.max_kl);
    assert_int_equal(report.distill_steps, 0);
    engine_dataset_free(row);
}

/* Embeddings are kept as they are: more than a quarter of this model. The matrices are searched
 * over the same ratios as without them. */
static void test_max_kl_where_embeddings_changed(void **state)
{
    const struct engine_train_options train = {.n_epochs = 6,
                                               .batch_size = 4,
                                               .learning_rate_multiplier = 20,
                                               .seed = 1,
                                               .train_embeddings = true};
    struct engine_compress_options options = {.max_kl = 0.02, .calibration = taught.questions};
    struct engine_delta_report report;
    struct engine_trainer *trainer;
    struct engine_train_plan plan;
    struct engine_step now;

    CHECK(
        engine_trainer_open(&trainer, taught.engine, taught.questions, NULL, &train, &plan, &err));
    do {
        CHECK(engine_trainer_step(trainer, &now, &err));
    } while (!now.finished);
    CHECK(engine_trainer_compress(trainer, &options, taught.delta_path, &report, &err));
    print_message("# at most 0.02: KL %.4f, matrices 1/%.1f, all 1/%.1f\n", report.measured_kl,
                  report.linear_ratio, report.ratio);
    assert_true(report.ratio < 4);
    assert_true(report.linear_ratio > 8);
    assert_true(report.measured_kl > 0.005 && report.measured_kl <= 0.02);
    assert_true(report.predicted.count > 2);
    for (int32_t i = 1; i < report.predicted.count; i++)
        assert_true(report.predicted.bytes[i] < report.predicted.bytes[i - 1]);
    engine_trainer_free(trainer);
    taught_nothing_is_left();
}

static void test_max_kl_of_a_codec_that_has_its_own_size(void **state)
{
    const struct engine_compress_options options = {
        .codec = "lossless", .max_kl = 1, .calibration = taught.questions};
    struct engine_delta_report report;
    struct err why = {0};

    assert_int_equal(
        engine_trainer_compress(taught.trainer, &options, taught.delta_path, &report, &why), -1);
    assert_int_equal(why.kind, ERR_INVALID);
    assert_non_null(strstr(why.message, "leave out ratio, bytes and max_kl"));
}

/* Of a model in which no matrix changed every size costs nothing: none says what others would. */
static void test_max_kl_of_what_loses_nothing(void **state)
{
    struct engine_compress_options options = {
        .max_kl = 0.01, .distill_steps = 2, .calibration = taught.questions};
    struct engine_delta_report report;

    CHECK(engine_model_compress(taught.engine, taught.base_path, &options, taught.delta_path,
                                &report, &err));
    assert_true(report.measured_kl <= 0);
    assert_int_equal(report.linear_bytes, 0);
    CHECK(engine_delta_check(taught.base_path, taught.delta_path, "it", &err));
    taught_nothing_is_left();
}

/* When it is stopped a smaller file is being tried: the one that would do goes, too, and the one
 * that was there before stays. */
static void test_stop_of_a_search(void **state)
{
    struct taught_progress told = {.stage = "", .stop = "distill", .rounds = 1};
    struct engine_compress_options options = {.max_kl = 0.05,
                                              .distill_steps = 20,
                                              .calibration = taught.questions,
                                              .progress = taught_on_progress,
                                              .context = &told};
    struct engine_delta_report report;
    struct err why = {0};

    taught_put_older();
    assert_int_equal(
        engine_trainer_compress(taught.trainer, &options, taught.delta_path, &report, &why), -1);
    assert_int_equal(why.kind, ERR_CANCELLED);
    assert_int_equal(told.after, 1);
    taught_expect_older();
    taught_nothing_is_left();
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_distillation_pays),
        cmocka_unit_test(test_distillation_minds_the_answers),
        cmocka_unit_test(test_max_kl),
        cmocka_unit_test(test_max_kl_counts_on_distillation),
        cmocka_unit_test(test_max_kl_that_only_distillation_keeps_to),
        cmocka_unit_test(test_max_kl_without_a_distillation_that_harms),
        cmocka_unit_test(test_max_kl_where_embeddings_changed),
        cmocka_unit_test(test_max_kl_of_a_codec_that_has_its_own_size),
        cmocka_unit_test(test_max_kl_of_what_loses_nothing),
        cmocka_unit_test(test_stop_of_a_search),
    };

    return cmocka_run_group_tests(tests, taught_setup, taught_teardown);
}
