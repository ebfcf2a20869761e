/* json_text.h: what the strict reader takes and what it refuses, with words. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/base/json_text.h"

static void expect(const char *text, size_t len, size_t flags, const char *words)
{
    struct err err = {0};
    json_t *value = json_text_load(text, len, flags, &err);

    if (words == NULL) {
        if (value == NULL)
            fail_msg("%.*s: %s", (int)len, text, err.message);
        assert_false(err_is_set(&err));
        json_decref(value);
        return;
    }
    if (value != NULL)
        fail_msg("%.*s was taken", (int)len, text);
    assert_int_equal(err.kind, ERR_INVALID);
    if (strstr(err.message, words) == NULL)
        fail_msg("%.*s: \"%s\" does not say \"%s\"", (int)len, text, err.message, words);
}

#define EXPECT(text, words) expect(text, sizeof(text) - 1, 0, words)

static void plain_values(void **state)
{
    EXPECT("{}", NULL);
    EXPECT(" [1, 2.5e3, \"\\u00e9\\n\", null, true] \r\n", NULL);
    EXPECT("{\"a\": {\"a\": []}}", NULL);
    expect("3", 1, JSON_DECODE_ANY, NULL);
    EXPECT("3", "not valid JSON");
}

static void refused_with_words(void **state)
{
    EXPECT("", "not valid JSON");
    EXPECT("{", "not valid JSON");
    EXPECT("{\"a\": 1, \"a\": 2}", "duplicate");
    EXPECT("{\"a\": 1} x", "end of file");
    EXPECT("\xef\xbb\xbf{}", "byte order mark");
    EXPECT("{\"a\": \"\xff\"}", "unable to decode");
    EXPECT("{\"a\": \"\xed\xa0\x80\"}", "unable to decode"); /* a surrogate */
    EXPECT("{\"a\": \"\xc0\xaf\"}", "unable to decode");     /* an overlong slash */
    EXPECT("{\"a\": \"b\0c\"}", "line 1");
    EXPECT("{\"a\": \"\\u0000\"}", "not valid JSON");
    EXPECT("{\"a\": 01}", "not valid JSON");
    EXPECT("{\"a\": NaN}", "not valid JSON");
    EXPECT("{'a': 1}", "not valid JSON");
    EXPECT("{\"a\": 1e999}", "not valid JSON");
    EXPECT("{\"a\": 99999999999999999999}", "not valid JSON");
    EXPECT("[1,\n2,\n}", "line 3");
}

static void depth_is_bounded_before_parsing(void **state)
{
    size_t n = 1 << 20;
    char *bomb = malloc(n);
    char just[2 * JSON_TEXT_DEPTH + 2];

    assert_non_null(bomb);
    memset(bomb, '[', n);
    expect(bomb, n, 0, "nested deeper");
    for (size_t i = 0; i < n; i += 5)
        memcpy(bomb + i, "{\"a\":", n - i < 5 ? n - i : 5);
    expect(bomb, n, 0, "nested deeper");
    free(bomb);
    memset(just, '[', JSON_TEXT_DEPTH);
    memset(just + JSON_TEXT_DEPTH, ']', JSON_TEXT_DEPTH);
    expect(just, 2 * JSON_TEXT_DEPTH, 0, NULL);
    memset(just, '[', JSON_TEXT_DEPTH + 1);
    memset(just + JSON_TEXT_DEPTH + 1, ']', JSON_TEXT_DEPTH + 1);
    expect(just, 2 * JSON_TEXT_DEPTH + 2, 0, "nested deeper");
}

static void brackets_in_strings_do_not_count(void **state)
{
    EXPECT("{\"a\": \"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[\\\"[[[[[[[[[\"}", NULL);
    EXPECT("[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]],[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]",
           "end of file");
}

static int setup(void **state)
{
    json_text_setup();
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(plain_values),
        cmocka_unit_test(refused_with_words),
        cmocka_unit_test(depth_is_bounded_before_parsing),
        cmocka_unit_test(brackets_in_strings_do_not_count),
    };

    return cmocka_run_group_tests(tests, setup, NULL);
}
