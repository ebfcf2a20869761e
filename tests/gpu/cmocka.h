/* cmocka.h: as much of cmocka (https://cmocka.org) as the tests of the CUDA backend use, for
 * machines that have a GPU and no such library: `make check-gpu` finds this file first. */
#ifndef GRAFT_TESTS_GPU_CMOCKA_H
#define GRAFT_TESTS_GPU_CMOCKA_H

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct CMUnitTest {
    const char *name;
    void (*test)(void **state);
    int (*setup)(void **state);
    int (*teardown)(void **state);
};
#define cmocka_unit_test(f) \
    {                       \
#f, f, NULL, NULL   \
    }
#define cmocka_unit_test_setup_teardown(f, setup, teardown) \
    {                                                       \
#f, f, setup, teardown                              \
    }
#define cmocka_run_group_tests(tests, setup, teardown) \
    cmocka_run_group_tests_name(#tests, tests, setup, teardown)
#define cmocka_run_group_tests_name(name, tests, setup, teardown) \
    check_run_group(name, tests, sizeof(tests) / sizeof((tests)[0]), setup, teardown)

/* tests/gpu/check.c */
int check_run_group(const char *name, const struct CMUnitTest *tests, size_t count,
                    int (*setup)(void **), int (*teardown)(void **));
__attribute__((noreturn, format(printf, 3, 4))) void check_fail(const char *file, int line,
                                                                const char *format, ...);
__attribute__((noreturn)) void check_skip(void);

#define fail_msg(...) check_fail(__FILE__, __LINE__, __VA_ARGS__)
#define fail() check_fail(__FILE__, __LINE__, "fail()")
#define skip() check_skip()
#define check_that(condition) \
    ((condition) ? (void)0 : check_fail(__FILE__, __LINE__, "%s", #condition))
#define assert_true(condition) check_that(condition)
#define assert_false(condition) check_that(!(condition))
#define assert_null(p) check_that((p) == NULL)
#define assert_non_null(p) check_that((p) != NULL)
#define assert_int_equal(a, b) check_that((long long)(a) == (long long)(b))
#define assert_int_not_equal(a, b) check_that((long long)(a) != (long long)(b))
#define assert_in_range(x, low, high) check_that((x) >= (low) && (x) <= (high))
#define assert_ptr_equal(a, b) check_that((const void *)(a) == (const void *)(b))
#define assert_string_equal(a, b) check_that(strcmp(a, b) == 0)
#define assert_memory_equal(a, b, size) check_that(memcmp(a, b, size) == 0)
#define assert_memory_not_equal(a, b, size) check_that(memcmp(a, b, size) != 0)

#endif
