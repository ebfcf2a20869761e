/* Text of an answer: whole characters only, stop strings never shown, token borders irrelevant. */
#include "engine/session_text.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/base/strbuf.h"

/* Feeds `bytes` cut into pieces by the bits of `cuts`, checks that each piece of output is whole
 * characters, and returns all of the output. */
static char *run(const char *bytes, uint64_t cuts, const char *const *stop, int stops,
                 bool *stopped)
{
    struct session_text text;
    struct strbuf all;
    size_t len = strlen(bytes), from = 0, out_len;
    const char *out;

    strbuf_init(&all, 4096);
    assert_int_equal(session_text_init(&text, 64, stop, stops, NULL), 0);
    *stopped = false;
    for (size_t i = 1; i <= len && !*stopped; i++) {
        if (i < len && !(cuts >> (i % 64) & 1))
            continue;
        *stopped = session_text_add(&text, bytes + from, i - from, &out, &out_len);
        assert_true(out_len == 0 || ((unsigned char)out[0] & 0xc0) != 0x80);
        strbuf_add(&all, out, out_len);
        from = i;
    }
    if (!*stopped) {
        session_text_finish(&text, &out, &out_len);
        strbuf_add(&all, out, out_len);
    }
    session_text_release(&text);
    return strbuf_detach(&all, NULL);
}

static void expect(const char *bytes, const char *const *stop, int stops, const char *want,
                   bool want_stop)
{
    uint64_t cuts = 0x9e3779b97f4a7c15u;

    for (int k = 0; k < 300; k++) {
        bool stopped;
        char *got = run(bytes, k == 0 ? 0 : k == 1 ? ~(uint64_t)0 : cuts, stop, stops, &stopped);

        assert_string_equal(got, want);
        assert_int_equal(stopped, want_stop);
        free(got);
        cuts = cuts * 6364136223846793005u + 1442695040888963407u;
    }
}

static void text_without_stops_comes_through(void **state)
{
    expect("a\xc3\xa4\xe2\x82\xac\xf0\x9f\x8c\xb1 end", NULL, 0,
           "a\xc3\xa4\xe2\x82\xac\xf0\x9f\x8c\xb1 end", false);
}

static void broken_bytes_become_one_replacement_for_each_part(void **state)
{
    expect("a\xff"
           "b",
           NULL, 0,
           "a\xef\xbf\xbd"
           "b",
           false);
    expect("\xe2\x82x", NULL, 0, "\xef\xbf\xbdx", false);           /* cut character */
    expect("\xe2\x82", NULL, 0, "\xef\xbf\xbd", false);             /* at the end */
    expect("\xc0\xaf", NULL, 0, "\xef\xbf\xbd\xef\xbf\xbd", false); /* overlong */
    expect("\xed\xa0\x80", NULL, 0, "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd", false); /* surrogate */
    expect("\xf0\x9f\xf0\x9f\x8c\xb1", NULL, 0, "\xef\xbf\xbd\xf0\x9f\x8c\xb1", false);
}

static void a_stop_string_ends_the_text_wherever_tokens_end(void **state)
{
    const char *stop[] = {"STOP", "\n\n"};

    expect("one two STOP three", stop, 2, "one two ", true);
    expect("one\ntwo\n\nthree STOP", stop, 2, "one\ntwo", true);
    expect("STOP", stop, 2, "", true);
}

static void what_only_looked_like_a_stop_string_is_shown(void **state)
{
    const char *stop[] = {"aab", "\xe2\x82\xac\xe2\x82\xac"};

    expect("aaaab.", stop, 2, "aa", true);
    expect("aaaac STO", stop, 2, "aaaac STO", false);
    expect("\xe2\x82\xacx\xe2\x82", stop, 2, "\xe2\x82\xacx\xef\xbf\xbd", false);
    expect("x\xe2\x82\xac\xe2\x82\xacy", stop, 2, "x", true);
}

static void the_stop_string_that_ends_first_wins(void **state)
{
    const char *first[] = {"abcd", "bc"}, *longest[] = {"c", "abc"};

    expect("xabcd", first, 2, "xa", true);
    expect("xabcd", longest, 2, "x", true);
}

static void held_back_text_is_given_out_as_soon_as_it_is_certain(void **state)
{
    const char *stop[] = {"END"}, *out;
    struct session_text text;
    size_t len;

    assert_int_equal(session_text_init(&text, 16, stop, 1, NULL), 0);
    assert_false(session_text_add(&text, "xE", 2, &out, &len));
    assert_int_equal(len, 1);
    assert_false(session_text_add(&text, "N", 1, &out, &len));
    assert_int_equal(len, 0);
    assert_false(session_text_add(&text, "d", 1, &out, &len));
    assert_int_equal(len, 3);
    assert_memory_equal(out, "ENd", 3);
    session_text_release(&text);
}

static void bad_stop_strings_are_refused(void **state)
{
    static char many_a[SESSION_TEXT_MAX_STOP + 2];
    const char *bad[] = {"", "\xff", many_a};
    const char *many[SESSION_TEXT_MAX_STOPS + 1];
    struct session_text text;
    struct err err = {0};

    memset(many_a, 'a', sizeof(many_a) - 1);
    for (int i = 0; i < 3; i++) {
        err_clear(&err);
        assert_int_equal(session_text_init(&text, 16, &bad[i], 1, &err), -1);
        assert_int_equal(err.kind, ERR_INVALID);
        assert_string_equal(err.param, "stop");
    }
    for (int i = 0; i <= SESSION_TEXT_MAX_STOPS; i++)
        many[i] = "x";
    err_clear(&err);
    assert_int_equal(session_text_init(&text, 16, many, SESSION_TEXT_MAX_STOPS + 1, &err), -1);
    assert_string_equal(err.param, "stop");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(text_without_stops_comes_through),
        cmocka_unit_test(broken_bytes_become_one_replacement_for_each_part),
        cmocka_unit_test(a_stop_string_ends_the_text_wherever_tokens_end),
        cmocka_unit_test(what_only_looked_like_a_stop_string_is_shown),
        cmocka_unit_test(the_stop_string_that_ends_first_wins),
        cmocka_unit_test(held_back_text_is_given_out_as_soon_as_it_is_certain),
        cmocka_unit_test(bad_stop_strings_are_refused),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
