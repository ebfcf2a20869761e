/* Texts are cut where the reference cuts them, for characters of every age too. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/json_text.h"
#include "engine/pretokenizer.h"
#include "tests/unit/golden.h"

static int setup(void **state)
{
    json_text_setup();
    return 0;
}

static void compare(const char *name, const json_t *text, const json_t *expected,
                    const struct pretokenizer *pre)
{
    struct pretokenizer_pieces pieces = {0};

    assert_int_equal(
        pretokenizer_split(pre, json_string_value(text), json_string_length(text), &pieces, NULL),
        0);
    for (size_t i = 0; i < pieces.count && 2 * i < json_array_size(expected); i++) {
        int64_t start = json_integer_value(json_array_get(expected, 2 * i));
        int64_t end = json_integer_value(json_array_get(expected, 2 * i + 1));

        if (pieces.items[i].start != start || pieces.items[i].len != end - start)
            fail_msg("%s: \"%.80s\": piece %zu is %u+%u, the reference has %lld+%lld", name,
                     json_string_value(text), i, pieces.items[i].start, pieces.items[i].len,
                     (long long)start, (long long)(end - start));
    }
    if (2 * pieces.count != json_array_size(expected))
        fail_msg("%s: \"%.80s\": %zu pieces, the reference has %zu", name, json_string_value(text),
                 pieces.count, json_array_size(expected) / 2);
    pretokenizer_pieces_release(&pieces);
}

static void test_pieces_are_the_references(void **state)
{
    json_t *golden = golden_load("tests/golden/pretokenizer.json"), *row, *text;
    json_t *texts = json_object_get(golden, "texts");
    size_t i, k;

    assert_int_equal(json_array_size(json_object_get(golden, "pre_tokenizers")), 6);
    json_array_foreach(json_object_get(golden, "pre_tokenizers"), i, row)
    {
        struct pretokenizer *pre = NULL;
        const char *name = json_string_value(json_object_get(row, "name"));

        assert_int_equal(pretokenizer_open(&pre, json_object_get(row, "spec"), NULL), 0);
        assert_false(pretokenizer_adds_space(pre));
        json_array_foreach(texts, k, text)
            compare(name, text, json_array_get(json_object_get(row, "pieces"), k), pre);
        pretokenizer_free(pre);
    }
    json_decref(golden);
}

static void test_groups_that_capture_cut_like_any_other(void **state)
{
    json_t *spec = json_loads("{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\","
                              "\"pattern\":{\"Regex\":\"(a)(b)|c\"},\"behavior\":\"Isolated\"},"
                              "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,"
                              "\"use_regex\":false}]}",
                              0, NULL);
    json_t *text = json_string("xabycab"), *expected = json_array();
    const int bounds[] = {0, 1, 1, 3, 3, 4, 4, 5, 5, 7};
    struct pretokenizer *pre = NULL;

    for (size_t i = 0; i < sizeof bounds / sizeof *bounds; i++)
        json_array_append_new(expected, json_integer(bounds[i]));
    assert_int_equal(pretokenizer_open(&pre, spec, NULL), 0);
    compare("groups", text, expected, pre);
    pretokenizer_free(pre);
    json_decref(spec);
    json_decref(text);
    json_decref(expected);
}

static void refuses(const char *spec, const char *expected)
{
    json_t *json = json_loads(spec, 0, NULL);
    struct pretokenizer *pre = NULL;
    struct err err = {0};

    assert_non_null(json);
    assert_int_equal(pretokenizer_open(&pre, json, &err), -1);
    if (strstr(err.message, expected) == NULL)
        fail_msg("\"%s\" is not in: %s", expected, err.message);
    json_decref(json);
}

static void test_steps_that_are_not_understood_are_refused(void **state)
{
    refuses("{}", "\"type\" is missing");
    refuses("{\"type\":\"Whitespace\"}", "\"Whitespace\"");
    refuses("{\"type\":\"Sequence\"}", "must be an array");
    refuses("{\"type\":\"Sequence\",\"pretokenizers\":[]}", "no ByteLevel");
    refuses("{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"ByteLevel\"},"
            "{\"type\":\"Digits\"}]}",
            "Digits behind ByteLevel");
    refuses("{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Digits\"},"
            "{\"type\":\"ByteLevel\"}]}",
            "add_prefix_space");
    refuses("{\"type\":\"Split\",\"pattern\":{\"Regex\":\"a\"},\"behavior\":\"MergedWithNext\"}",
            "\"MergedWithNext\"");
    refuses("{\"type\":\"Split\",\"pattern\":{},\"behavior\":\"Isolated\"}", "Regex or a String");
    refuses("{\"type\":\"Split\",\"pattern\":{\"String\":\"\"},\"behavior\":\"Isolated\"}",
            "Regex or a String");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_pieces_are_the_references),
        cmocka_unit_test(test_groups_that_capture_cut_like_any_other),
        cmocka_unit_test(test_steps_that_are_not_understood_are_refused),
    };

    return cmocka_run_group_tests(tests, setup, NULL);
}
