/* Delta-CoMe: groups and their bytes, plans that use what they are given, and a product that is as
 * near to the difference as so many vectors can be. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/base/rng.h"
#include "engine/codec/delta_come.h"
#include "engine/codec/groups.h"

#define ROWS 150 /* two groups, the second a small one */
#define COLS 300

static float noise(uint64_t seed, int64_t i)
{
    return (float)(rng_at(seed, 1, (uint64_t)i) >> 40) / (float)(1 << 23) - 1;
}

/* Singular values that fall: a difference that training could have made. */
static void fill(float *delta, uint64_t seed)
{
    memset(delta, 0, ROWS * COLS * sizeof *delta);
    for (int v = 0; v < 40; v++)
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < COLS; c++)
                delta[r * COLS + c] += 1e-3f / (float)(1 + v) * noise(seed + (uint64_t)v, r) *
                                       noise(seed + 1000 + (uint64_t)v, c);
}

static double relative_error(const float *delta, int64_t bytes, struct tensor part[],
                             int64_t *taken, const float *h)
{
    static float back[ROWS * COLS];
    uint8_t width[ROWS];
    struct codec_plan plan = {.rows = ROWS, .cols = COLS, .rank = ROWS, .width = width};
    struct codec_matrix m = {.rows = ROWS, .cols = COLS, .delta = delta, .h = h};
    double cost, error = 0, norm = 0;

    assert_int_equal(codec_delta_come.allot(&plan, 1, bytes, &cost, NULL), 0);
    for (int32_t v = 0; v < codec_plan_vectors(&plan); v++) /* the paper's mixture */
        assert_int_equal(width[v], v < 2 ? 8 : v < 34 ? 3 : 2);
    assert_int_equal(codec_delta_come.compress(&m, &plan, part, NULL), 0);
    assert_int_equal(part[0].shape[0], plan.bytes);
    assert_int_equal(codec_delta_come.accept(part, ROWS, COLS, NULL), 0);
    assert_int_equal(codec_delta_come.expand(part, ROWS, COLS, back, NULL), 0);
    for (int i = 0; i < ROWS * COLS; i++) {
        error += pow((double)(back[i] - delta[i]), 2);
        norm += pow((double)delta[i], 2);
    }
    *taken = plan.bytes;
    return sqrt(error / norm);
}

static void codes_of_every_width_come_back(void **state)
{
    enum { N = 300 };
    const struct group group[3] = {{0.5f, 0, 0}, {0.25f, 0, 0}, {2.0f, 0, 0}};

    for (int width = 1; width <= 8; width++) {
        struct group g[3];
        uint8_t code[N];
        unsigned char bytes[N + 16];
        float out[N];

        memcpy(g, group, sizeof g);
        for (int i = 0; i < 3; i++)
            g[i].zero = (uint8_t)((5 * i + 1) & ((1 << width) - 1));
        for (int i = 0; i < N; i++)
            code[i] = (uint8_t)((i * 37 + 11) & ((1 << width) - 1));
        assert_true(groups_bytes(N, width) < sizeof bytes);
        bytes[groups_bytes(N, width)] = 0xa5;
        groups_write(g, code, N, width, bytes);
        assert_int_equal(bytes[groups_bytes(N, width)], 0xa5);
        groups_read(bytes, N, width, out, 1);
        for (int i = 0; i < N; i++)
            assert_true(out[i] == (float)((int)code[i] - g[i / 128].zero) * g[i / 128].scale);
    }
}

static void a_grid_loses_less_than_one_from_end_to_end(void **state)
{
    double x[128], ours = 0, widest = 0, low = 0, high = 0;
    struct group g;

    for (int i = 0; i < 128; i++) { /* bell-shaped: ends that are seldom reached */
        x[i] = (double)(noise(1, i) + noise(2, i) + noise(3, i) + noise(4, i));
        low = fmin(low, x[i]);
        high = fmax(high, x[i]);
    }
    assert_true(group_of(&g, x, 1, 128, 2));
    for (int i = 0; i < 128; i++) {
        double scale = (high - low) / 3, zero = round(-low / scale), value;
        double code = fmin(3, fmax(0, round(x[i] / scale) + zero));

        group_code(&g, x[i], &value);
        ours += pow(value - x[i], 2);
        widest += pow((code - zero) * scale - x[i], 2);
    }
    assert_true(ours < 0.8 * widest);
}

static void more_bytes_lose_less_and_are_used(void **state)
{
    float *delta = malloc(ROWS * COLS * sizeof *delta);
    double before = 1;

    fill(delta, 7);
    for (int64_t bytes = 600; bytes <= 10000; bytes *= 2) {
        struct tensor part[CODEC_MAX_PARTS] = {{0}};
        int64_t taken;
        double error = relative_error(delta, bytes, part, &taken, NULL);

        assert_true(taken <= bytes && taken > bytes - 500);
        assert_true(error < before);
        before = error;
        free(part[0].data);
    }
    assert_true(before < 0.25);
    free(delta);
}

/* Inputs that only ever use some columns: what happens in the others costs nothing. */
static void the_inputs_decide_what_is_kept(void **state)
{
    float *delta = malloc(ROWS * COLS * sizeof *delta);
    float *h = calloc((size_t)COLS * COLS, sizeof *h), *back = malloc(ROWS * COLS * sizeof *back);
    double cost[2];

    fill(delta, 9);
    for (int i = 0; i < COLS; i++)
        h[i * COLS + i] = i % 4 ? 1e-3f : 1;
    for (int with = 0; with < 2; with++) {
        struct tensor part[CODEC_MAX_PARTS] = {{0}};
        int64_t taken;

        relative_error(delta, 8000, part, &taken, with ? h : NULL);
        assert_int_equal(codec_delta_come.expand(part, ROWS, COLS, back, NULL), 0);
        cost[with] = 0;
        for (int i = 0; i < ROWS * COLS; i++)
            cost[with] += pow((double)(back[i] - delta[i]), 2) * (double)h[i % COLS * (COLS + 1)];
        free(part[0].data);
    }
    assert_true(cost[1] < 0.8 * cost[0]);
    free(back);
    free(h);
    free(delta);
}

static void a_difference_that_is_not_finite_is_refused(void **state)
{
    float *delta = malloc(ROWS * COLS * sizeof *delta);
    uint8_t width[ROWS] = {8};
    struct codec_plan plan = {
        .rows = ROWS, .cols = COLS, .rank = ROWS, .width = width, .bytes = 1000};
    struct tensor part[CODEC_MAX_PARTS] = {{0}};
    struct err err = {0};

    fill(delta, 3);
    delta[77] = NAN;
    assert_int_equal(
        codec_delta_come.compress(
            &(struct codec_matrix){.rows = ROWS, .cols = COLS, .delta = delta}, &plan, part, &err),
        -1);
    assert_non_null(strstr(err.message, "diverged"));
    free(part[0].data);
    free(delta);
}

static void bytes_from_outside_are_checked(void **state)
{
    float *delta = malloc(ROWS * COLS * sizeof *delta);
    struct tensor part[CODEC_MAX_PARTS] = {{0}};
    unsigned char *data;
    uint32_t rank;
    int64_t taken;

    fill(delta, 5);
    relative_error(delta, 3000, part, &taken, NULL);
    data = part[0].data;
    for (int64_t size = 0; size < taken; size++) { /* cut anywhere */
        part[0].shape[0] = size;
        assert_int_equal(codec_delta_come.accept(part, ROWS, COLS, NULL), -1);
    }
    part[0].shape[0] = taken;
    assert_int_equal(codec_delta_come.accept(part, ROWS + 128, COLS, NULL), -1);
    memcpy(&rank, data, sizeof rank);
    for (int bad = 0; bad < 3; bad++) {
        unsigned char was = data[4];

        data[4] = (unsigned char[]){0, 9, 255}[bad];
        assert_int_equal(codec_delta_come.accept(part, ROWS, COLS, NULL), -1);
        data[4] = was;
    }
    data[4 + rank + 1] = 0x7c; /* the first scale: infinity */
    assert_int_equal(codec_delta_come.accept(part, ROWS, COLS, NULL), -1);
    memset(data, 0xff, 4); /* four milliards of vectors */
    assert_int_equal(codec_delta_come.accept(part, ROWS, COLS, NULL), -1);
    free(part[0].data);
    free(delta);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(codes_of_every_width_come_back),
        cmocka_unit_test(a_grid_loses_less_than_one_from_end_to_end),
        cmocka_unit_test(more_bytes_lose_less_and_are_used),
        cmocka_unit_test(the_inputs_decide_what_is_kept),
        cmocka_unit_test(a_difference_that_is_not_finite_is_refused),
        cmocka_unit_test(bytes_from_outside_are_checked),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
