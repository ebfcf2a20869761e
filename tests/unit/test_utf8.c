/* UTF-8 by the letter, and error messages that are always fit for a database. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "engine/base/err.h"
#include "engine/base/utf8.h"

static bool valid(const char *s)
{
    return utf8_valid(s, strlen(s));
}

static void what_is_and_what_is_not(void **state)
{
    assert_true(valid(""));
    assert_true(valid("a\xc3\xa4\xe2\x82\xac\xf0\x9f\x8c\xb1\xf4\x8f\xbf\xbf\xed\x9f\xbf"));
    assert_false(valid("\x80"));
    assert_false(valid("\xc3"));
    assert_false(valid("\xc0\xaf"));
    assert_false(valid("\xe0\x9f\xbf"));
    assert_false(valid("\xed\xa0\x80"));
    assert_false(valid("\xf0\x8f\xbf\xbf"));
    assert_false(valid("\xf4\x90\x80\x80"));
    assert_false(valid("\xf5\x80\x80\x80"));
}

static void scrubbing_keeps_what_is_valid(void **state)
{
    char text[] = "a\xc3\xa4\xe2\x82z\xff\xf0\x9f\x8c\xb1";

    utf8_scrub(text);
    assert_string_equal(text, "a\xc3\xa4??z?\xf0\x9f\x8c\xb1");
}

static void an_error_message_is_utf8_even_when_cut(void **state)
{
    struct err err = {0};
    char text[1200];

    for (size_t i = 0; i + 3 < sizeof(text); i += 3)
        memcpy(text + i, "\xe2\x82\xac", 4);
    err_set(&err, ERR_INVALID, "x%s", text);
    assert_int_equal(strlen(err.message), sizeof(err.message) - 1);
    assert_true(valid(err.message));
    err_prefix(&err, "\xff");
    assert_true(valid(err.message));
    assert_memory_equal(err.message, "?: x", 4);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_and_what_is_not),
        cmocka_unit_test(scrubbing_keeps_what_is_valid),
        cmocka_unit_test(an_error_message_is_utf8_even_when_cut),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
