/* What compression measured, as the client reads it: the line, and JSON without a NaN in it. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include <cmocka.h>
#include <jansson.h>

#include "server/delta_report.h"

static struct engine_delta_report full(void)
{
    return (struct engine_delta_report){.codec = "graft",
                                        .bytes = 8412345,
                                        .linear_bytes = 8000000,
                                        .ratio = 31.98,
                                        .linear_ratio = 26.5,
                                        .relative_error = 0.4,
                                        .predicted_kl = 0.002,
                                        .measured_kl = 0.0214,
                                        .answer_kl = 0.03,
                                        .held_out_loss = 1.5,
                                        .tuned_loss = 1.25,
                                        .measured_tokens = 600,
                                        .calibration_tokens = 16384,
                                        .distill_steps = 60,
                                        .seconds = 170,
                                        .statistics_seconds = 60,
                                        .distill_seconds = 50,
                                        .measure_seconds = 5};
}

static json_t *format(const struct engine_delta_report *report, const char *message)
{
    char *text = NULL, *data = NULL;
    json_t *json;

    assert_int_equal(delta_report_format(report, &text, &data, NULL), 0);
    assert_string_equal(text, message);
    json = json_loads(data, 0, NULL); /* strict: a NaN would not be read */
    assert_non_null(json);
    free(text);
    free(data);
    return json;
}

static double real(const json_t *json, const char *key)
{
    assert_true(json_is_real(json_object_get(json, key)));
    return json_real_value(json_object_get(json, key));
}

static void all_of_a_full_report_is_there(void **state)
{
    struct engine_delta_report r = full();
    json_t *json = format(&r, "Compressed by graft: 8.4 MB, 1/32 of the 16-bit model, KL 0.021");

    assert_int_equal(json_object_size(json), 18);
    assert_string_equal(json_string_value(json_object_get(json, "codec")), "graft");
    assert_int_equal(json_integer_value(json_object_get(json, "bytes")), 8412345);
    assert_int_equal(json_integer_value(json_object_get(json, "linear_bytes")), 8000000);
    assert_int_equal(json_integer_value(json_object_get(json, "measured_tokens")), 600);
    assert_int_equal(json_integer_value(json_object_get(json, "calibration_tokens")), 16384);
    assert_int_equal(json_integer_value(json_object_get(json, "distill_steps")), 60);
    assert_true(real(json, "ratio") == 31.98 && real(json, "linear_ratio") == 26.5);
    assert_true(real(json, "relative_error") == 0.4 && real(json, "predicted_kl") == 0.002);
    assert_true(real(json, "measured_kl") == 0.0214 && real(json, "answer_kl") == 0.03);
    assert_true(real(json, "held_out_loss") == 1.5 && real(json, "tuned_loss") == 1.25);
    assert_true(real(json, "seconds") == 170 && real(json, "statistics_seconds") == 60);
    assert_true(real(json, "distill_seconds") == 50 && real(json, "measure_seconds") == 5);
    json_decref(json);
}

static void what_was_not_measured_is_null(void **state)
{
    static const char *const keys[] = {"predicted_kl", "measured_kl", "answer_kl", "held_out_loss",
                                       "tuned_loss"};
    struct engine_delta_report r = full();
    json_t *json;

    r.predicted_kl = r.measured_kl = r.answer_kl = r.held_out_loss = r.tuned_loss = NAN;
    json = format(&r, "Compressed by graft: 8.4 MB, 1/32 of the 16-bit model");
    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++)
        assert_true(json_is_null(json_object_get(json, keys[i])));
    json_decref(json);
}

static void small_files_and_large_ones_read_well(void **state)
{
    struct engine_delta_report r = full();

    r.bytes = 13084;
    r.ratio = 8.08;
    r.measured_kl = 0.0001;
    json_decref(format(&r, "Compressed by graft: 13.1 kB, 1/8.1 of the 16-bit model, KL 0.0001"));
    r.bytes = 4200000000;
    r.ratio = INFINITY;
    json_decref(format(&r, "Compressed by graft: 4200.0 MB, KL 0.0001"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(all_of_a_full_report_is_there),
        cmocka_unit_test(what_was_not_measured_is_null),
        cmocka_unit_test(small_files_and_large_ones_read_well),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
