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
#include "engine/codec/sparse_signs.h"

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

/* ------------------------------------------------------------------ some entries only */

static void compress_some(const float *delta, int32_t kept, struct packed *out)
{
    const struct codec_plan plan = {
        .rows = ROWS, .cols = COLS, .bytes = 2 * ROWS + sparse_signs_bytes(ROWS, COLS, kept)};
    const struct codec_matrix m = {.rows = ROWS, .cols = COLS, .delta = delta};

    memset(out, 0, sizeof *out);
    assert_int_equal(codec_bitdelta.compress(&m, &plan, out->part, NULL), 0);
    assert_int_equal(out->part[0].dtype, DTYPE_U8);
    assert_int_equal(codec_bitdelta.accept(out->part, ROWS, COLS, NULL), 0);
    out->sign = out->part[0].data;
    out->scale = out->part[1].data;
}

/* As many of each group as were asked for, their signs, and the mean of their sizes. */
static void kept_entries_have_their_signs_and_their_mean(void **state)
{
    float delta[ROWS * COLS], back[ROWS * COLS];
    int zeros = 0;
    struct packed p;

    fill(delta);
    for (int asked = 1; asked < 25; asked++) { /* from there on all signs take as many bytes */
        int32_t kept;                          /* more where that takes no more bytes */

        compress_some(delta, asked, &p);
        memcpy(&kept, p.sign, sizeof kept);
        assert_true(kept >= asked && kept < 32);
        assert_int_equal(codec_bitdelta.expand(p.part, ROWS, COLS, back, NULL), 0);
        for (int r = 0; r < ROWS; r++) {
            double sum = 0;
            int count = 0;

            for (int c = 0, here = 0; c < COLS; c++) {
                float is = back[r * COLS + c], was = delta[r * COLS + c];
                int group = COLS - c / 32 * 32 < 32 ? COLS - c / 32 * 32 : 32;

                here = c % 32 ? here : 0;
                zeros += is == 0;
                if (is != 0) {
                    assert_true((is > 0) == (was >= 0));
                    sum += fabs((double)was);
                    count++;
                    here++;
                }
                if (c % 32 == group - 1)
                    assert_int_equal(here, kept < group ? kept : group);
            }
            assert_true(f16_to_f32(p.scale[r]) == f16_to_f32(f32_to_f16((float)(sum / count))));
        }
        release(&p);
    }
    assert_true(zeros > 0);
}

/* By column, and by what two rows have in common: as often as chance has it, give or take four
 * standard deviations. */
static void masks_are_drawn_evenly(void **state)
{
    enum { MANY = 256, WIDE = 64, KEPT = 8 };
    static float delta[MANY * WIDE];
    static int8_t sign[MANY][WIDE];
    double mean[MANY];
    void *data = malloc((size_t)sparse_signs_bytes(MANY, WIDE, KEPT));
    int common = 0;

    for (int i = 0; i < MANY * WIDE; i++)
        delta[i] = (float)(i % 101 - 50);
    sparse_signs_write(delta, MANY, WIDE, KEPT, data, mean);
    for (int r = 0; r < MANY; r++)
        sparse_signs_row(data, WIDE, r, sign[r]);
    for (int c = 0; c < WIDE; c++) {
        int count = 0;

        for (int r = 0; r < MANY; r++) {
            count += sign[r][c] != 0;
            common += r > 0 && sign[r][c] != 0 && sign[r - 1][c] != 0;
        }
        assert_in_range(count, 64 - 28, 64 + 28);
    }
    assert_in_range(common, 1020 - 124, 1020 + 124);
    free(data);
}

static void sets_of_signs_are_those_of_the_difference(void **state)
{
    float delta[ROWS * COLS], back[ROWS * COLS];
    struct delta_tensor view;
    struct packed p;
    void *memory;

    fill(delta);
    compress_some(delta, 11, &p);
    assert_int_equal(codec_bitdelta.expand(p.part, ROWS, COLS, back, NULL), 0);
    assert_int_equal(codec_bitdelta.view(p.part, ROWS, COLS, &view, &memory, NULL), 0);
    assert_non_null(view.more_bits);
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < COLS; c++) {
            int64_t at = r * WORDS + c / 32;
            int one = (int)(view.bits[at] >> c % 32 & 1),
                other = (int)(view.more_bits[at] >> c % 32 & 1);

            assert_true(back[r * COLS + c] == view.scale[r] * (float)(one + other - 1));
        }
    free(memory);
    release(&p);
}

/* A scale is a factor of its row, or of the matrix where there is one for all: the slope of its
 * logarithm is the sum of gradient * difference. */
static void expect_slopes(const struct packed *p)
{
    float back[ROWS * COLS], gradient[ROWS * COLS], slope[ROWS] = {NAN, NAN, NAN};
    int scales = codec_bitdelta.scales(p->part, ROWS, COLS);
    double want[ROWS] = {0};

    assert_int_equal(scales, p->part[1].shape[0]);
    assert_int_equal(codec_bitdelta.expand(p->part, ROWS, COLS, back, NULL), 0);
    for (int i = 0; i < ROWS * COLS; i++) {
        gradient[i] = (float)(i % 7 - 3);
        want[scales == 1 ? 0 : i / COLS] += (double)back[i] * (double)gradient[i];
    }
    assert_int_equal(codec_bitdelta.slope(p->part, ROWS, COLS, gradient, slope, NULL), 0);
    for (int s = 0; s < scales; s++)
        assert_true(fabs((double)slope[s] - want[s]) <= 1e-5 * (fabs(want[s]) + 1e-3));
}

static void slopes_are_those_of_the_difference(void **state)
{
    float delta[ROWS * COLS];

    fill(delta);
    for (int some = 0; some < 2; some++) {
        struct packed p;

        if (some)
            compress_some(delta, 11, &p);
        else
            assert_int_equal(compress(delta, &p, NULL), 0);
        expect_slopes(&p);
        p.part[1].shape[0] = 1;
        expect_slopes(&p);
        release(&p);
    }
}

static void masks_from_outside_are_checked(void **state)
{
    float delta[ROWS * COLS];
    struct packed p;
    uint32_t kept;

    fill(delta);
    compress_some(delta, 11, &p);
    for (int i = 0; i < 4; i++) {
        struct tensor part[2] = {p.part[0], p.part[1]};

        kept = i == 0 ? 0 : i == 1 ? 32 : i == 2 ? 12 : 11;
        memcpy(p.sign, &kept, sizeof kept);
        part[0].shape[0] -= i == 3;
        assert_int_equal(codec_bitdelta.accept(part, ROWS, COLS, NULL), -1);
        part[0].shape[0] = 5;
        assert_int_equal(codec_bitdelta.accept(part, ROWS, COLS, NULL), -1);
    }
    assert_int_equal(codec_bitdelta.accept(p.part, ROWS, COLS, NULL), 0);
    release(&p);
}

/* Also where it would have been dropped. */
static void a_value_that_is_dropped_must_be_a_number(void **state)
{
    const struct codec_plan plan = {.bytes = 2 * ROWS + sparse_signs_bytes(ROWS, COLS, 1)};
    float delta[ROWS * COLS];

    for (int i = 0; i < COLS; i++) {
        struct tensor part[2] = {{0}};

        fill(delta);
        delta[COLS + i] = NAN;
        assert_int_equal(codec_bitdelta.compress(
                             &(struct codec_matrix){.rows = ROWS, .cols = COLS, .delta = delta},
                             &plan, part, NULL),
                         -1);
        free(part[0].data);
        free(part[1].data);
    }
}

/* As many as fit, in every matrix as in any other. */
static void a_size_is_kept_to(void **state)
{
    struct codec_plan plan[3] = {
        {.rows = 64, .cols = 96}, {.rows = 64, .cols = 96}, {.rows = 32, .cols = 640}};
    int64_t whole = 0, last = 0;
    double cost;

    assert_int_equal(codec_bitdelta.allot(plan, 3, INT64_MAX, &cost, NULL), 0);
    for (int i = 0; i < 3; i++)
        whole += plan[i].bytes;
    for (int64_t bytes = whole / 8; bytes <= whole; bytes += whole / 100) {
        int64_t sum = 0;

        assert_int_equal(codec_bitdelta.allot(plan, 3, bytes, &cost, NULL), 0);
        for (int i = 0; i < 3; i++)
            sum += plan[i].bytes;
        assert_true(sum <= bytes && sum >= last && sum > bytes - whole / 32 - 100);
        last = sum;
    }
    assert_int_equal(codec_bitdelta.allot(plan, 3, 300, &cost, NULL), -1);
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
        cmocka_unit_test(kept_entries_have_their_signs_and_their_mean),
        cmocka_unit_test(masks_are_drawn_evenly),
        cmocka_unit_test(sets_of_signs_are_those_of_the_difference),
        cmocka_unit_test(slopes_are_those_of_the_difference),
        cmocka_unit_test(masks_from_outside_are_checked),
        cmocka_unit_test(a_value_that_is_dropped_must_be_a_number),
        cmocka_unit_test(a_size_is_kept_to),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
