/* The test shim itself: that it runs CUDA's language rightly in any order, and that it sees what it
 * is for: a barrier left out, memory nobody wrote, faults that are asked for. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "tests/unit/shim_fixture.h"

static void test_language(void **state)
{
    for (uint64_t seed = 0; seed < SHIM_ORDERS; seed++)
        for (int test = 0; test < SHIM_TEST_COUNT; test++) {
            shim_seed(seed);
            int64_t wrong = shim_self_test(test);

            if (test == SHIM_TEST_UNWRITTEN)
                assert_true(wrong >= 3 * 256);
            else if (wrong != 0)
                fail_msg("self-test %d, order %d: %d wrong", test, (int)seed, (int)wrong);
        }
}

/* Some order shows that a barrier is missing: each barrier of the self-tests. */
static void test_a_missing_barrier_shows(void **state)
{
    int barriers = shim_barrier_count(), of_tests = 0;

    for (int i = 0; i < barriers; i++) {
        const char *place = shim_barrier_skip(i);
        int64_t wrong = 0;

        if (!strstr(place, "self_test.cu") && !strstr(place, "device.cuh"))
            continue;
        of_tests++;
        for (uint64_t seed = 0; seed < SHIM_ORDERS && wrong == 0; seed++)
            for (int test = 0; test < SHIM_TEST_COUNT; test++) {
                shim_seed(seed);
                if (test != SHIM_TEST_UNWRITTEN)
                    wrong += shim_self_test(test) != 0;
            }
        shim_barrier_skip(-1);
        if (wrong == 0)
            fail_msg("nothing is wrong without the barrier at %s", place);
    }
    assert_true(of_tests >= 8);
}

static void test_launches_are_counted(void **state)
{
    int64_t before = shim_launches("mma_kernel");

    shim_self_test(SHIM_TEST_MMA);
    assert_int_equal(shim_launches("mma_kernel"), before + 1);
    assert_int_equal(shim_launches("no_kernel"), 0);
}

static void test_faults(void **state)
{
    struct backend backend;
    struct err err = {0};
    void *memory;

    assert_int_equal(cuda_backend_open(&backend, &(struct cuda_options){.ordinal = 1}, &err), 0);
    shim_fail(SHIM_FAULT_ALLOC, 2);
    memory = backend.ops->alloc(&backend, 100, &err);
    assert_non_null(memory);
    assert_null(backend.ops->alloc(&backend, 100, &err));
    assert_int_equal(err.kind, ERR_NO_MEMORY);
    assert_int_equal(shim_counted(SHIM_FAULT_ALLOC), 2);
    shim_fail(SHIM_FAULT_ALLOC, 0);
    backend.ops->free(&backend, memory);

    err_clear(&err);
    shim_memory_limit(1 << 20);
    assert_null(backend.ops->alloc(&backend, (1 << 20) + 1, &err));
    assert_non_null(strstr(err.message, "1048577 bytes"));
    shim_memory_limit(0);

    shim_fail(SHIM_FAULT_LAUNCH, 1);
    assert_int_equal(shim_self_test(SHIM_TEST_SUMS), -1);
    shim_fail(SHIM_FAULT_LAUNCH, 0);
    assert_int_equal(shim_self_test(SHIM_TEST_SUMS), 0);
    backend.ops->close(&backend);
    assert_int_equal(shim_memory_used(), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_language),
        cmocka_unit_test(test_a_missing_barrier_shows),
        cmocka_unit_test(test_launches_are_counted),
        cmocka_unit_test(test_faults),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
