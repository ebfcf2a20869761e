/* The test shim itself: that it runs CUDA's language rightly in any order, and that it sees what it
 * is for: a barrier left out, memory nobody wrote, faults that are asked for. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "tests/unit/shim_fixture.h"

#define ORDERS 20 /* what is wrong in some orders only is seen in one of so many */

static void test_language(void **state)
{
    for (uint64_t seed = 0; seed < ORDERS; seed++)
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
        for (uint64_t seed = 0; seed < ORDERS && wrong == 0; seed++)
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

/* A broken kernel comes out where the host waits, as ERR_DEVICE, and the process does not get the
 * device back. */
static void test_poison(void **state)
{
    const struct cuda_options options = {.ordinal = 2, .precision = DTYPE_F32};
    struct backend backend, again;
    struct err err = {0};
    float number[2] = {1, 2}, back[2] = {7, 7};
    void *memory;

    assert_int_equal(cuda_backend_open(&backend, &options, &err), 0);
    memory = backend.ops->alloc(&backend, sizeof number, &err);
    assert_non_null(memory);
    backend.ops->upload(&backend, memory, number, sizeof number);
    shim_fail(SHIM_FAULT_POISON, 2);
    assert_int_equal(shim_self_test(SHIM_TEST_SUMS), 0);
    assert_int_equal(shim_self_test(SHIM_TEST_SUMS), -1); /* on device 0 */
    assert_int_equal(cuda_backend_open(&again, &(struct cuda_options){.ordinal = 0}, &err), -1);
    assert_int_equal(err.kind, ERR_DEVICE);

    /* The other device lives. */
    err_clear(&err);
    backend.ops->download(&backend, back, memory, sizeof back);
    assert_int_equal(backend.ops->check(&backend, &err), 0);
    assert_memory_equal(back, number, sizeof back);
    shim_fail(SHIM_FAULT_POISON, 0);
    assert_int_equal(shim_self_test(SHIM_TEST_SUMS), 0);
    backend.ops->free(&backend, memory);
    backend.ops->close(&backend);
    assert_int_equal(shim_memory_used(), 0);
}

/* Runs this program again as child_main, with one variable more. */
static int child(const char *name, const char *value, char *out, size_t size)
{
    char program[4096], command[8192];
    ssize_t n = readlink("/proc/self/exe", program, sizeof program - 1);
    FILE *pipe;
    size_t got;

    assert_true(n > 0);
    program[n] = '\0';
    snprintf(command, sizeof command, "%s='%s' '%s' child 2>&1", name, value, program);
    pipe = popen(command, "r");
    assert_non_null(pipe);
    got = fread(out, 1, size - 1, pipe);
    out[got] = '\0';
    return pclose(pipe);
}

static int child_main(void)
{
    struct backend backend[2];
    struct err err = {0};

    for (int i = 0; i < 2; i++)
        if (cuda_backend_open(&backend[i], &(struct cuda_options){.ordinal = i}, &err))
            return 9;
    for (int i = 0; i < 6; i++) {
        struct err why = {0};
        void *memory = backend[i % 2].ops->alloc(&backend[i % 2], 1000, &why);

        printf("%s\n", memory ? "memory" : why.message);
        backend[i % 2].ops->free(&backend[i % 2], memory);
    }
    backend[0].ops->alloc(&backend[0], (1 << 20) + 1, &err);
    printf("%s\n", err.message);
    for (int i = 0; i < 2; i++)
        backend[i].ops->close(&backend[i]);
    printf("launch: %d\n", (int)shim_self_test(SHIM_TEST_MMA));
    return 0;
}

static int allocations_of_opening(void)
{
    struct backend backend;
    struct err err = {0};

    shim_fail(SHIM_FAULT_ALLOC, 0);
    assert_int_equal(cuda_backend_open(&backend, &(struct cuda_options){.ordinal = 1}, &err), 0);
    backend.ops->close(&backend);
    return (int)shim_counted(SHIM_FAULT_ALLOC);
}

static void test_from_outside(void **state)
{
    char out[4096], folder[] = P_tmpdir "/graft-shim-XXXXXX", token[128], value[256];

    assert_non_null(mkdtemp(folder));
    snprintf(token, sizeof token, "%s/token", folder);
    assert_int_equal(child("GRAFT_SHIM_MEMORY", "2097152", out, sizeof out), 0);
    assert_null(strstr(out, "1048577 bytes"));

    /* Behind what opening takes, the second of device 1, which is the fourth of all. */
    snprintf(value, sizeof value, "alloc:%d@1", allocations_of_opening() + 2);
    assert_int_equal(child("GRAFT_SHIM_FAULT", value, out, sizeof out), 0);
    assert_memory_equal(out, "memory\nmemory\nmemory\nshim:1: 1000 bytes", 39);
    assert_non_null(strstr(out, "launch: 0"));

    /* A token is good for one strike, whoever strikes. */
    snprintf(value, sizeof value, "launch:1:%s", token);
    fclose(fopen(token, "w"));
    assert_int_equal(child("GRAFT_SHIM_FAULT", value, out, sizeof out), 0);
    assert_non_null(strstr(out, "launch: -1"));
    assert_int_equal(access(token, F_OK), -1);
    assert_int_equal(child("GRAFT_SHIM_FAULT", value, out, sizeof out), 0);
    assert_non_null(strstr(out, "launch: 0"));

    assert_int_equal(child("GRAFT_SHIM_MEMORY", "1048576", out, sizeof out), 0);
    assert_non_null(strstr(out, "1048577 bytes of device memory wanted, "));
    assert_int_not_equal(child("GRAFT_SHIM_FAULT", "allocation:2", out, sizeof out), 0);
    assert_int_not_equal(child("GRAFT_SHIM_FAULT", "hang:x", out, sizeof out), 0);
    assert_int_equal(rmdir(folder), 0);
}

static void test_counts_are_written(void **state)
{
    char out[4096], folder[] = P_tmpdir "/graft-shim-XXXXXX", command[256], *line;

    assert_non_null(mkdtemp(folder));
    assert_int_equal(child("GRAFT_SHIM_COUNTS", folder, out, sizeof out), 0);
    snprintf(command, sizeof command, "cat %s/*; rm -r %s", folder, folder);
    FILE *pipe = popen(command, "r");
    assert_non_null(pipe);
    out[fread(out, 1, sizeof out - 1, pipe)] = '\0';
    assert_int_equal(pclose(pipe), 0);
    line = strstr(out, "kernel mma_kernel 1\n");
    assert_non_null(line);
    line = strstr(out, "\nalloc ");
    assert_non_null(line);
    assert_true(atoi(line + strlen("\nalloc ")) >= 6);
    assert_memory_equal(out, "program ", 8);
    assert_non_null(strstr(out, "test_cuda_shim\nseconds "));
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_language),
        cmocka_unit_test(test_a_missing_barrier_shows),
        cmocka_unit_test(test_launches_are_counted),
        cmocka_unit_test(test_faults),
        cmocka_unit_test(test_poison),
        cmocka_unit_test(test_from_outside),
        cmocka_unit_test(test_counts_are_written),
    };

    if (argc > 1)
        return child_main();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
