/* The sampler: greedy, nucleus, temperature, and what the random numbers depend on. */
#include "engine/sampler.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#define V 8

static float weight[V];
static int32_t id[V];
static const struct sampler_scratch scratch = {weight, id};

static int32_t pick(const float *logits, double temperature, double top_p, uint64_t seed,
                    uint64_t index)
{
    struct sampler_options options = {.temperature = temperature, .top_p = top_p, .seed = seed};

    return sampler_pick(logits, V, &options, index, &scratch);
}

static void greedy_takes_the_lowest_of_equal_best(void **state)
{
    const float logits[V] = {0, 3, 1, 3, -1, 3, 2, 0};

    assert_int_equal(pick(logits, 0, 1, 7, 0), 1);
    assert_int_equal(pick(logits, 0, 0.1, 9, 5), 1);
}

static void broken_logits_choose_nothing(void **state)
{
    float logits[V] = {0, 1, NAN, 3};

    assert_int_equal(pick(logits, 0, 1, 1, 0), -1);
    assert_int_equal(pick(logits, 1, 1, 1, 0), -1);
    for (int i = 0; i < V; i++)
        logits[i] = -INFINITY;
    assert_int_equal(pick(logits, 0, 1, 1, 0), -1);
    logits[2] = INFINITY;
    assert_int_equal(pick(logits, 1, 1, 1, 0), -1);
    logits[2] = 0;
    assert_int_equal(pick(logits, 1, 1, 1, 0), 2);
}

static void frequencies_follow_the_softmax(void **state)
{
    float logits[V];
    int count[V] = {0}, draws = 40000;
    double total = 0;

    for (int i = 0; i < V; i++) {
        logits[i] = 0.4f * (float)i;
        total += exp(logits[i] / 0.7);
    }
    for (int k = 0; k < draws; k++)
        count[pick(logits, 0.7, 1, 42, (uint64_t)k)]++;
    for (int i = 0; i < V; i++) {
        double p = exp(logits[i] / 0.7) / total;

        /* Five standard deviations; the draws are fixed, so this never flickers. */
        assert_true(fabs(count[i] - p * draws) < 5 * sqrt(draws * p * (1 - p)) + 1);
    }
}

static void nucleus_keeps_the_smallest_set_that_holds_top_p(void **state)
{
    /* shares .4 .3 .2 .1, in scattered places, and nothing elsewhere */
    float logits[V] = {-INFINITY, logf(.1f), logf(.4f), -INFINITY,
                       logf(.2f), logf(.3f), -100,      -100};
    bool seen[V] = {false};

    for (int k = 0; k < 2000; k++)
        seen[pick(logits, 1, 0.65, 3, (uint64_t)k)] = true;
    assert_true(seen[2] && seen[5]);
    assert_false(seen[4] || seen[1] || seen[0] || seen[6]);
    for (int k = 0; k < 200; k++)
        assert_int_equal(pick(logits, 1, 1e-9, 3, (uint64_t)k), 2);
    assert_int_equal(pick(logits, 1, 0, 3, 0), 2);
}

static void extreme_temperatures_are_the_two_ends(void **state)
{
    const float logits[V] = {0, 1, -INFINITY, 2, 1.999f, -3, -100, 2};
    const double cold[] = {1e-6, 1e-320};
    bool seen[V] = {false};

    for (int i = 0; i < 2; i++)
        for (int k = 0; k < 200; k++) { /* two are the best, and nothing else is ever chosen */
            int32_t token = pick(logits, cold[i], 1, 1, (uint64_t)k);

            assert_true(token == 3 || token == 7);
        }
    for (int k = 0; k < 200; k++)
        seen[pick(logits, 1e300, 1, 1, (uint64_t)k)] = true;
    for (int i = 0; i < V; i++)
        assert_int_equal(seen[i], i != 2);
}

static void same_seed_and_index_same_choice(void **state)
{
    float logits[V] = {0};
    int differ = 0, shifted = 0;

    for (uint64_t k = 0; k < 500; k++) {
        assert_int_equal(pick(logits, 1, 1, 5, k), pick(logits, 1, 1, 5, k));
        differ += pick(logits, 1, 1, 5, k) != pick(logits, 1, 1, 6, k);
        shifted += pick(logits, 1, 1, 5, k + 1) == pick(logits, 1, 1, 6, k);
    }
    assert_true(differ > 400);  /* 7/8 expected */
    assert_true(shifted < 100); /* 1/8 expected */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(greedy_takes_the_lowest_of_equal_best),
        cmocka_unit_test(broken_logits_choose_nothing),
        cmocka_unit_test(frequencies_follow_the_softmax),
        cmocka_unit_test(nucleus_keeps_the_smallest_set_that_holds_top_p),
        cmocka_unit_test(extreme_temperatures_are_the_two_ends),
        cmocka_unit_test(same_seed_and_index_same_choice),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
