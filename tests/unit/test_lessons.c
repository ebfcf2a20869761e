/* What a teacher gave comes back as it was, in any order, and not before all of it is known. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "engine/codec/lessons.h"

static void test_what_was_kept_comes_back(void **state)
{
    static const int32_t length[] = {2, 0, 3, 1}, first[] = {2, 0}, all[] = {3, 0, 1, 2, 0};
    struct lessons l;
    char rows[16] = {0};

    assert_int_equal(lessons_open(&l, length, 4, 2, NULL), 0);
    assert_false(lessons_recall(&l, first, 2, rows));
    lessons_keep(&l, first, 2, "aabbccddee");
    assert_true(lessons_recall(&l, first, 2, rows));
    assert_memory_equal(rows, "aabbccddee", 10);
    assert_false(lessons_recall(&l, all, 5, rows));
    lessons_keep(&l, all, 3, "ffddee");
    assert_true(lessons_recall(&l, all, 5, rows));
    assert_memory_equal(rows, "ffddeeaabbccddee", 16);
    lessons_close(&l);
}

static void test_too_much_is_not_kept(void **state)
{
    static const int32_t length[] = {1, 1 << 20}, one[] = {0};
    struct lessons l;
    char row[512] = {1};

    assert_int_equal(lessons_open(&l, length, 2, sizeof row, NULL), 0);
    lessons_keep(&l, one, 1, row);
    assert_false(lessons_recall(&l, one, 1, row));
    lessons_close(&l);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_what_was_kept_comes_back),
        cmocka_unit_test(test_too_much_is_not_kept),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
