/* strbuf.h: grows, is NUL-terminated at every moment, and never passes its maximum. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/base/strbuf.h"

static void is_a_string_from_the_start(void **state)
{
    struct strbuf sb;

    strbuf_init(&sb, 10);
    assert_string_equal(sb.data, "");
    strbuf_addf(&sb, "%s", "");
    strbuf_add(&sb, "x", 0);
    assert_string_equal(sb.data, "");
    strbuf_release(&sb);
    strbuf_release(&sb);
}

static void appends_of_every_kind_join(void **state)
{
    struct strbuf sb;

    strbuf_init(&sb, 1000);
    strbuf_addstr(&sb, "one");
    strbuf_addch(&sb, ' ');
    strbuf_addf(&sb, "%d-%s", 2, "three");
    strbuf_add(&sb, "a\0b", 3);
    assert_int_equal(sb.len, 3 + 1 + 7 + 3);
    assert_memory_equal(sb.data, "one 2-threea\0b", sb.len + 1);
    strbuf_reset(&sb);
    assert_string_equal(sb.data, "");
    strbuf_addstr(&sb, "again");
    assert_string_equal(sb.data, "again");
    strbuf_release(&sb);
}

static void content_survives_growth(void **state)
{
    struct strbuf sb;

    strbuf_init(&sb, 1 << 20);
    for (int i = 0; i < 100000; i++) {
        strbuf_addch(&sb, (char)('a' + i % 26));
        assert_int_equal(sb.data[sb.len], '\0');
    }
    assert_false(strbuf_failed(&sb));
    for (size_t i = 0; i < sb.len; i++)
        assert_int_equal(sb.data[i], 'a' + (char)(i % 26));
    strbuf_release(&sb);
}

static void exactly_the_maximum_fits_and_no_more(void **state)
{
    struct strbuf sb;

    strbuf_init(&sb, 8);
    strbuf_addstr(&sb, "12345678");
    assert_false(strbuf_failed(&sb));
    strbuf_addch(&sb, '9');
    assert_true(strbuf_failed(&sb));
    assert_string_equal(sb.data, "12345678");
    strbuf_reset(&sb);
    strbuf_addf(&sb, "%s", "12345678");
    assert_false(strbuf_failed(&sb));
    strbuf_addf(&sb, "%d", 9);
    assert_true(strbuf_failed(&sb));
    strbuf_release(&sb);
}

static void failure_sticks_until_reset(void **state)
{
    struct strbuf sb;

    strbuf_init(&sb, 4);
    strbuf_addstr(&sb, "12345");
    strbuf_addstr(&sb, "1");
    assert_true(strbuf_failed(&sb));
    assert_int_equal(sb.len, 0);
    assert_null(strbuf_detach(&sb, NULL));
    assert_string_equal(sb.data, "");
    assert_false(strbuf_failed(&sb));
    strbuf_addstr(&sb, "1");
    assert_string_equal(sb.data, "1");
    strbuf_release(&sb);
}

static void truncating_forgets_the_failure(void **state)
{
    struct strbuf sb;

    strbuf_init(&sb, 6);
    strbuf_truncate(&sb, 0); /* nothing there yet */
    strbuf_addstr(&sb, "whole");
    strbuf_addstr(&sb, "too long");
    assert_true(strbuf_failed(&sb));
    strbuf_truncate(&sb, 3);
    assert_false(strbuf_failed(&sb));
    assert_string_equal(sb.data, "who");
    strbuf_truncate(&sb, 9);
    assert_int_equal(sb.len, 3);
    strbuf_addstr(&sb, "le");
    assert_string_equal(sb.data, "whole");
    strbuf_release(&sb);
}

static void detach_hands_over_a_string(void **state)
{
    struct strbuf sb;
    size_t len = 99;
    char *s;

    strbuf_init(&sb, 100);
    strbuf_addstr(&sb, "mine");
    s = strbuf_detach(&sb, &len);
    assert_string_equal(s, "mine");
    assert_int_equal(len, 4);
    free(s);
    s = strbuf_detach(&sb, &len); /* an empty buffer is an empty string, not NULL */
    assert_string_equal(s, "");
    assert_int_equal(len, 0);
    free(s);
    strbuf_release(&sb);
}

static void a_huge_maximum_does_not_wrap(void **state)
{
    struct strbuf sb;

    strbuf_init(&sb, SIZE_MAX);
    strbuf_addstr(&sb, "abc");
    strbuf_add(&sb, "x", SIZE_MAX - 3); /* 3 + that + the NUL is more than a size_t holds */
    assert_true(strbuf_failed(&sb));
    assert_string_equal(sb.data, "abc");
    strbuf_release(&sb);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(is_a_string_from_the_start),
        cmocka_unit_test(appends_of_every_kind_join),
        cmocka_unit_test(content_survives_growth),
        cmocka_unit_test(exactly_the_maximum_fits_and_no_more),
        cmocka_unit_test(failure_sticks_until_reset),
        cmocka_unit_test(truncating_forgets_the_failure),
        cmocka_unit_test(detach_hands_over_a_string),
        cmocka_unit_test(a_huge_maximum_does_not_wrap),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
