/* Numbers by counter: fixed for all time (checkpoints and seeds depend on them), even, and
 * permutations that are permutations. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "engine/base/rng.h"

static void test_numbers_never_change(void **state)
{
    /* From the definition, computed apart in Python. */
    assert_true(rng_at(0, 0, 0) == 0x238275bc38fcbe91u);
    assert_true(rng_at(7, 1, 1000000) == 0xa616b7504beb4529u);
}

static void test_unit_numbers_are_even(void **state)
{
    double sum = 0, squares = 0;
    int bins[10] = {0};

    for (uint64_t i = 0; i < 100000; i++) {
        double u = rng_unit_at(3, 4, i);

        assert_true(u >= 0 && u < 1);
        sum += u;
        squares += u * u;
        bins[(int)(u * 10)]++;
    }
    assert_true(fabs(sum / 100000 - 0.5) < 0.005);
    assert_true(fabs(squares / 100000 - 1.0 / 3) < 0.005);
    for (int b = 0; b < 10; b++)
        assert_true(bins[b] > 9600 && bins[b] < 10400);
}

static void test_streams_differ(void **state)
{
    int equal = 0;

    for (uint64_t i = 0; i < 1000; i++)
        equal += (rng_at(1, 1, i) & 7) == (rng_at(1, 2, i) & 7);
    assert_true(equal > 70 && equal < 190); /* 125 by chance */
}

static void test_permutations(void **state)
{
    int32_t order[257], again[257], other[257];
    int first[4] = {0};

    rng_permutation(order, 257, 9, 1);
    rng_permutation(again, 257, 9, 1);
    rng_permutation(other, 257, 9, 2);
    assert_memory_equal(order, again, sizeof order);
    assert_memory_not_equal(order, other, sizeof order);
    for (int32_t i = 0; i < 257; i++) {
        int found = 0;

        for (int32_t j = 0; j < 257; j++)
            found += order[j] == i;
        assert_int_equal(found, 1);
    }
    for (uint64_t s = 0; s < 4000; s++) {
        rng_permutation(order, 4, s, 0);
        first[order[0]]++;
    }
    for (int i = 0; i < 4; i++)
        assert_true(first[i] > 880 && first[i] < 1120);
    rng_permutation(order, 0, 1, 1);
    rng_permutation(order, 1, 1, 1);
    assert_int_equal(order[0], 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_numbers_never_change),
        cmocka_unit_test(test_unit_numbers_are_even),
        cmocka_unit_test(test_streams_differ),
        cmocka_unit_test(test_permutations),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
