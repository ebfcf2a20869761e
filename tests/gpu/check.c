/* Runs a group of tests as cmocka would (cmocka.h beside this file). */
#include "tests/gpu/cmocka.h"

static jmp_buf escape;
enum { RAN = 0, FAILED, SKIPPED };

void check_fail(const char *file, int line, const char *format, ...)
{
    va_list arguments;

    fprintf(stderr, "  %s:%d: ", file, line);
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fprintf(stderr, "\n");
    longjmp(escape, FAILED);
}

void check_skip(void)
{
    longjmp(escape, SKIPPED);
}

static int guarded_step(int (*step)(void **), void **state)
{
    int how = setjmp(escape);

    if (how)
        return -1;
    return step ? step(state) : 0;
}

static int guarded_test(const struct CMUnitTest *test, void **state)
{
    int how = setjmp(escape);

    if (how == 0)
        test->test(state);
    return how;
}

static int run_one(const struct CMUnitTest *test, void **state)
{
    int how = guarded_step(test->setup, state) ? FAILED : guarded_test(test, state);

    if (guarded_step(test->teardown, state))
        how = FAILED;
    printf("  %s %s\n",
           how == RAN       ? "ok     "
           : how == SKIPPED ? "skipped"
                            : "FAILED ",
           test->name);
    fflush(stdout);
    return how;
}

int check_run_group(const char *name, const struct CMUnitTest *tests, size_t count,
                    int (*setup)(void **), int (*teardown)(void **))
{
    static int groups; /* a program runs one or more */
    void *state = NULL;
    int failed = 0;

    groups++;
    if (guarded_step(setup, &state)) {
        printf("  FAILED  setup of group %d (%s)\n", groups, name);
        return (int)count;
    }
    for (size_t i = 0; i < count; i++)
        failed += run_one(&tests[i], &state) == FAILED;
    if (guarded_step(teardown, &state)) {
        printf("  FAILED  teardown of group %d (%s)\n", groups, name);
        failed++;
    }
    return failed;
}
