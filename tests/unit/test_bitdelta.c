/* BitDelta: signs, scales, and what it refuses. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/codec/bitdelta.h"

#define ROWS 3
#define COLS 37 /* two words, the second mostly padding */
#define WORDS 2

struct packed {
    struct tensor part[2];
    uint32_t *sign;
    uint16_t *scale;
};

static int compress(const float *delta, struct packed *out, struct err *err)
{
    struct codec_plan plan = {.rows = ROWS, .cols = COLS};
    double cost;

    memset(out, 0, sizeof(*out));
    assert_int_equal(codec_bitdelta.allot(&plan, 1, INT64_MAX, &cost, NULL), 0);
    assert_int_equal(plan.bytes, sizeof(uint32_t) * ROWS * WORDS + sizeof(uint16_t) * ROWS);
    int rc = codec_bitdelta.compress(
        &(struct codec_matrix){.rows = ROWS, .cols = COLS, .delta = delta}, &plan, out->part, err);

    out->sign = out->part[0].data;
    out->scale = out->part[1].data;
    return rc;
}

static void release(struct packed *p)
{
    free(p->sign);
    free(p->scale);
}

static void fill(float *delta)
{
    uint32_t x = 1;

    for (int i = 0; i < ROWS * COLS; i++) {
        x = x * 1664525u + 1013904223u;
        delta[i] = ((float)(x >> 8) / 8388608.0f - 1) * (float)(1 + i / COLS) * 1e-3f;
    }
}

static void a_row_becomes_its_signs_times_its_mean_absolute_value(void **state)
{
    float delta[ROWS * COLS], back[ROWS * COLS];
    struct packed p;

    fill(delta);
    assert_int_equal(compress(delta, &p, NULL), 0);
    assert_int_equal(codec_bitdelta.accept(p.part, ROWS, COLS, NULL), 0);
    assert_int_equal(codec_bitdelta.expand(p.part, ROWS, COLS, back, NULL), 0);
    for (int r = 0; r < ROWS; r++) {
        double mean = 0;

        for (int c = 0; c < COLS; c++)
            mean += fabs(delta[r * COLS + c]) / COLS;
        for (int c = 0; c < COLS; c++) {
            float want = (float)mean * (delta[r * COLS + c] >= 0 ? 1 : -1);

            assert_true(fabsf(back[r * COLS + c] - want) <= 5e-4f * fabsf(want));
        }
        assert_int_equal(p.sign[r * WORDS + 1] >> (COLS - 32), 0); /* padding is zero */
    }
    release(&p);
}

static void no_other_scale_has_a_smaller_error(void **state)
{
    float delta[ROWS * COLS], back[ROWS * COLS];
    struct packed p;

    fill(delta);
    assert_int_equal(compress(delta, &p, NULL), 0);
    assert_int_equal(codec_bitdelta.expand(p.part, ROWS, COLS, back, NULL), 0);
    for (int r = 0; r < ROWS; r++) {
        double at = 0, more = 0, less = 0;

        for (int c = r * COLS; c < (r + 1) * COLS; c++) {
            at += pow(back[c] - delta[c], 2);
            more += pow(back[c] * 1.01 - delta[c], 2);
            less += pow(back[c] * 0.99 - delta[c], 2);
        }
        assert_true(at < more && at < less);
    }
    release(&p);
}

static void a_row_that_did_not_change_stays(void **state)
{
    float delta[ROWS * COLS] = {0}, back[ROWS * COLS];
    struct packed p;

    delta[COLS] = 1; /* only row 1 has anything */
    assert_int_equal(compress(delta, &p, NULL), 0);
    assert_int_equal(codec_bitdelta.expand(p.part, ROWS, COLS, back, NULL), 0);
    for (int c = 0; c < COLS; c++) {
        assert_true(back[c] == 0);
        assert_true(back[2 * COLS + c] == 0);
    }
    release(&p);
}

static void divergence_is_refused(void **state)
{
    const float bad[] = {NAN, INFINITY, -INFINITY, 1e9f};

    for (int i = 0; i < 4; i++) {
        float delta[ROWS * COLS] = {0};
        struct err err = {0};
        struct packed p;

        delta[COLS + 3] = bad[i];
        assert_int_equal(compress(delta, &p, &err), -1);
        assert_int_equal(err.kind, ERR_INVALID);
        assert_non_null(strstr(err.message, "row 1"));
        release(&p);
    }
}

static void view_and_expand_say_the_same(void **state)
{
    float delta[ROWS * COLS], back[ROWS * COLS];
    void *memory;
    struct delta_tensor view;
    struct packed p;

    fill(delta);
    assert_int_equal(compress(delta, &p, NULL), 0);
    for (int whole = 0; whole < 2; whole++) {
        if (whole)
            p.part[1].shape[0] = 1; /* one scale for the matrix is allowed in a file */
        assert_int_equal(codec_bitdelta.accept(p.part, ROWS, COLS, NULL), 0);
        assert_int_equal(codec_bitdelta.expand(p.part, ROWS, COLS, back, NULL), 0);
        assert_int_equal(codec_bitdelta.view(p.part, ROWS, COLS, &view, &memory, NULL), 0);
        assert_int_equal(view.kind, DELTA_SIGN);
        assert_int_equal(view.scale_count, whole ? 1 : ROWS);
        for (int i = 0; i < ROWS * COLS; i++) {
            int r = i / COLS, c = i % COLS;
            float a = view.scale[whole ? 0 : r];

            assert_true(back[i] == (view.bits[r * WORDS + c / 32] >> (c % 32) & 1 ? a : -a));
        }
        free(memory);
    }
    release(&p);
}

static void parts_from_outside_are_checked(void **state)
{
    float delta[ROWS * COLS];
    struct packed p;

    fill(delta);
    assert_int_equal(compress(delta, &p, NULL), 0);
    assert_int_equal(codec_bitdelta.accept(p.part, ROWS + 1, COLS, NULL), -1);
    assert_int_equal(codec_bitdelta.accept(p.part, ROWS, COLS + 32, NULL), -1);
    p.part[0].dtype = DTYPE_F32;
    assert_int_equal(codec_bitdelta.accept(p.part, ROWS, COLS, NULL), -1);
    p.part[0].dtype = DTYPE_I32;
    p.part[1].shape[0] = 2;
    assert_int_equal(codec_bitdelta.accept(p.part, ROWS, COLS, NULL), -1);
    p.part[1].shape[0] = ROWS;
    assert_int_equal(codec_bitdelta.accept(p.part, ROWS, COLS, NULL), 0);
    for (int i = 0; i < 3; i++) {
        const uint16_t bad[] = {0x7c00, 0x7e00, 0x8001};

        p.scale[2] = bad[i];
        assert_int_equal(codec_bitdelta.accept(p.part, ROWS, COLS, NULL), -1);
    }
    release(&p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_row_becomes_its_signs_times_its_mean_absolute_value),
        cmocka_unit_test(no_other_scale_has_a_smaller_error),
        cmocka_unit_test(a_row_that_did_not_change_stays),
        cmocka_unit_test(divergence_is_refused),
        cmocka_unit_test(view_and_expand_say_the_same),
        cmocka_unit_test(parts_from_outside_are_checked),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
