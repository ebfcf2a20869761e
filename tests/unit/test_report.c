/* The report that a delta carries: what stands in it for each matrix, and that it takes the room
 * that files are laid out with, however long its numbers are. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/codec/report.h"
#include "tests/unit/check.h"

enum { TENSORS = 3 };

static const int64_t bytes[TENSORS] = {0, 10, 20};
static const double error[TENSORS] = {0, 4, 9}, norm[TENSORS] = {0, 16, 81};

/* What the text takes in a header, where each '"' and '\' is escaped once more. */
static size_t taken(const char *text)
{
    size_t size = strlen(text);

    for (; *text; text++)
        size += *text == '"' || *text == '\\';
    return size;
}

static char *text_of(const struct engine_delta_report *report)
{
    char *text;

    CHECK(report_json(&text, report, true, TENSORS, bytes, error, norm, &err));
    assert_int_equal(taken(text), report_room(TENSORS));
    return text;
}

static json_t *json_of(const struct engine_delta_report *report)
{
    char *text = text_of(report);
    json_t *json = json_loads(text, 0, NULL);

    assert_non_null(json);
    free(text);
    return json;
}

static double number_at(const json_t *list, size_t i)
{
    assert_true(json_is_number(json_array_get(list, i)));
    return json_number_value(json_array_get(list, i));
}

/* The first is no matrix, or did not change. */
static void each_matrix_has_its_bytes_and_its_relative_error(void **state)
{
    const struct engine_delta_report report = {.codec = "graft"};
    json_t *json = json_of(&report);
    const json_t *matrices = json_object_get(json, "matrices");
    const json_t *sizes = json_object_get(matrices, "bytes");
    const json_t *errors = json_object_get(matrices, "relative_error");

    assert_int_equal(json_array_size(sizes), 2);
    assert_int_equal(json_integer_value(json_array_get(sizes, 0)), 10);
    assert_int_equal(json_integer_value(json_array_get(sizes, 1)), 20);
    assert_int_equal(json_array_size(errors), 2);
    assert_true(number_at(errors, 0) == 0.5);
    assert_true(number_at(errors, 1) == 0.3333); /* to four digits */
    json_decref(json);
}

/* As many points as there can be, of a file of hundreds of gigabytes; no shorter number is longer
 * in decimal. */
static void fill_curve(struct engine_delta_curve *c)
{
    c->count = ENGINE_DELTA_POINTS;
    for (int i = 0; i < ENGINE_DELTA_POINTS; i++) {
        c->bytes[i] = 999999999999 - i;
        c->kl[i] = -1.234e-300;
    }
}

static void the_longest_report_has_room(void **state)
{
    const double longest = -1.234e-300;
    struct engine_delta_report report = {.codec = "a-name-of-thirty-one-characters",
                                         .bytes = 999999999999,
                                         .linear_bytes = 999999999999,
                                         .ratio = longest,
                                         .linear_ratio = longest,
                                         .relative_error = longest,
                                         .predicted_kl = longest,
                                         .measured_kl = longest,
                                         .answer_kl = longest,
                                         .held_out_loss = longest,
                                         .tuned_loss = longest,
                                         .measured_tokens = 999999999999,
                                         .calibration_tokens = 999999999999,
                                         .distill_steps = INT32_MAX};
    struct engine_delta_curve back;
    json_t *json;

    fill_curve(&report.predicted);
    fill_curve(&report.tried);
    json = json_of(&report);
    assert_true(json_number_value(json_object_get(json, "measured_kl")) == longest);
    report_read_points(json_object_get(json, "tried"), &back);
    assert_int_equal(back.count, ENGINE_DELTA_POINTS);
    for (int i = 0; i < ENGINE_DELTA_POINTS; i++)
        assert_true(back.bytes[i] == report.tried.bytes[i] && back.kl[i] == longest);
    json_decref(json);
}

static void no_report_is_as_long_in_blanks(void **state)
{
    char *text = text_of(NULL);

    assert_int_equal(strspn(text, " "), report_room(TENSORS));
    free(text);
}

/* Its curves too: JSON has no such number. */
static void what_is_not_known_is_null(void **state)
{
    const struct engine_delta_report report = {
        .codec = "graft", .measured_kl = NAN, .ratio = INFINITY, .tried = {1, {7}, {NAN}}};
    json_t *json = json_of(&report);

    assert_true(json_is_null(json_object_get(json, "measured_kl")));
    assert_true(json_is_null(json_object_get(json, "ratio")));
    assert_true(json_is_null(json_array_get(json_array_get(json_object_get(json, "tried"), 0), 1)));
    json_decref(json);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_matrix_has_its_bytes_and_its_relative_error),
        cmocka_unit_test(the_longest_report_has_room),
        cmocka_unit_test(no_report_is_as_long_in_blanks),
        cmocka_unit_test(what_is_not_known_is_null),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
