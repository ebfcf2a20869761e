/* The sampler, as the CPU's table has it: greedy, nucleus, temperature, and what the random numbers
 * depend on. */
#include "engine/sampler.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/base/rng.h"
#include "engine/cpu/cpu_backend.h"

#define V 8
#define LARGE 5000

static struct backend cpu;

static int32_t pick_of(const float *logits, int32_t vocabulary, struct sample_row row)
{
    static float copy[LARGE];
    int32_t token = -2;
    struct err err = {0};

    memcpy(copy, logits, (size_t)vocabulary * sizeof *copy);
    cpu.ops->sample(&cpu, &(struct sample_args){
                              .logits = tensor_view(copy, DTYPE_F32, 2, (int64_t[]){1, vocabulary}),
                              .row = &row,
                              .token = tensor_view(&token, DTYPE_I32, 1, (int64_t[]){1}),
                          });
    assert_int_equal(cpu.ops->check(&cpu, &err), 0);
    return token;
}

static int32_t pick(const float *logits, double temperature, double top_p, uint64_t seed,
                    uint64_t index)
{
    return pick_of(logits, V, (struct sample_row){temperature, top_p, seed, index});
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

/* Of equal ones that are not all needed, those with the lowest ids stay. */
static void nucleus_breaks_ties_by_id(void **state)
{
    const float logits[V] = {0, 1, 0, 1, 1, 0, 1, 0};
    bool seen[V] = {false};

    /* The four ones hold 0.731 of all, 0.183 each: three are needed for a half. */
    for (int k = 0; k < 2000; k++)
        seen[pick(logits, 1, 0.5, 3, (uint64_t)k)] = true;
    assert_true(seen[1] && seen[3] && seen[4]);
    for (int i = 0; i < V; i++)
        assert_true(i == 1 || i == 3 || i == 4 || !seen[i]);
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

/* ------------------------------------------------------------------ a large vocabulary */

static const float *weight_of; /* of the comparison */

static int by_weight(const void *a, const void *b)
{
    int32_t i = *(const int32_t *)a, j = *(const int32_t *)b;

    return weight_of[i] != weight_of[j] ? (weight_of[i] < weight_of[j] ? 1 : -1) : i - j;
}

/* The same choice in doubles, by sorting. */
static int32_t expected(const float *logits, int32_t vocabulary, const struct sample_row *row)
{
    static float weight[LARGE];
    static int32_t order[LARGE];
    double total = 0, kept = 0, point;
    int32_t top = 0, last = 0, count = 0;

    for (int32_t i = 0; i < vocabulary; i++)
        top = logits[i] > logits[top] ? i : top;
    for (int32_t i = 0; i < vocabulary; i++) {
        weight[i] = (float)exp(((double)logits[i] - (double)logits[top]) / row->temperature);
        total += (double)weight[i];
        order[i] = i;
    }
    weight_of = weight;
    qsort(order, (size_t)vocabulary, sizeof *order, by_weight);
    while (count < vocabulary && kept < row->top_p * total)
        kept += (double)weight[order[count++]];
    for (int32_t i = count; i < vocabulary; i++)
        weight[order[i]] = 0;
    point = rng_unit_at(row->seed, SAMPLER_STREAM, row->index) * kept;
    for (int32_t i = 0; i < vocabulary; i++) {
        if (weight[i] <= 0)
            continue;
        last = i;
        point -= (double)weight[i];
        if (point < 0)
            return i;
    }
    return last;
}

static void choices_are_those_of_plain_arithmetic(void **state)
{
    static float logits[LARGE];
    const double temperature[] = {0.3, 1, 1.7}, top_p[] = {0.1, 0.5, 0.9, 0.999, 1};

    for (uint64_t k = 0; k < 300; k++) {
        int32_t vocabulary = k % 3 ? LARGE : 17;
        struct sample_row row = {temperature[k % 3], top_p[k % 5], k, k / 2};

        for (int32_t i = 0; i < vocabulary; i++) {
            logits[i] = (float)(20 * rng_unit_at(k, 1, (uint64_t)i) - 30 * (k % 7 == 0));
            if (k % 4 == 0) /* many equal ones */
                logits[i] = floorf(logits[i]);
        }
        assert_int_equal(pick_of(logits, vocabulary, row), expected(logits, vocabulary, &row));
    }
}

static void weights_are_exponentials(void **state)
{
    for (int i = 0; i <= 27000; i++) {
        float logit = -0.001f * (float)i;
        double want = exp((double)logit);

        assert_true(fabs((double)sampler_weight(logit, 0, 1) - want) <= 3e-7 * want);
    }
    assert_true(sampler_weight(5, 5, sampler_inverse(1e-320)) == 1);
    assert_true(sampler_weight(-INFINITY, 5, 1) == 0);
    assert_int_equal(sampler_share(1), (uint64_t)1 << 40);
}

static int setup(void **state)
{
    struct err err = {0};

    return cpu_backend_open(&cpu, 1, NULL, DTYPE_F32, &err);
}

static int teardown(void **state)
{
    cpu.ops->close(&cpu);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(greedy_takes_the_lowest_of_equal_best),
        cmocka_unit_test(broken_logits_choose_nothing),
        cmocka_unit_test(frequencies_follow_the_softmax),
        cmocka_unit_test(nucleus_keeps_the_smallest_set_that_holds_top_p),
        cmocka_unit_test(nucleus_breaks_ties_by_id),
        cmocka_unit_test(extreme_temperatures_are_the_two_ends),
        cmocka_unit_test(same_seed_and_index_same_choice),
        cmocka_unit_test(choices_are_those_of_plain_arithmetic),
        cmocka_unit_test(weights_are_exponentials),
    };

    return cmocka_run_group_tests(tests, setup, teardown);
}
