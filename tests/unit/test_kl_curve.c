/* What a size costs that was not tried. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "engine/codec/kl_curve.h"

static void expect(double got, double want)
{
    if (!(fabs(got - want) <= 1e-9 * want))
        fail_msg("%.12g instead of %.12g", got, want);
}

static void test_powers_are_found(void **state)
{
    static const double ratios[] = {32, 4, 64, 8}; /* in any order */

    for (double power = 1; power <= 4; power++) {
        struct kl_curve c = {0};

        for (int i = 0; i < 4; i++)
            kl_curve_add(&c, ratios[i], pow(ratios[i], power));
        for (double ratio = 2; ratio < 300; ratio *= 1.7) {
            expect(kl_curve_ratio(&c, pow(ratio, power)), ratio);
            expect(kl_curve_kl(&c, ratio), pow(ratio, power));
        }
    }
}

static void test_each_stretch_has_its_own_slope(void **state)
{
    struct kl_curve c = {0};

    kl_curve_add(&c, 10, 1);
    kl_curve_add(&c, 20, 2);   /* 1 */
    kl_curve_add(&c, 40, 16);  /* 3 */
    kl_curve_add(&c, 20, 100); /* there already */
    expect(kl_curve_ratio(&c, 1), 10);
    expect(kl_curve_ratio(&c, 2), 20);
    expect(kl_curve_ratio(&c, 16), 40);
    expect(kl_curve_ratio(&c, sqrt(2)), 10 * sqrt(2));
    expect(kl_curve_ratio(&c, sqrt(32)), sqrt(800));
    expect(kl_curve_ratio(&c, 128), 80);
    expect(kl_curve_ratio(&c, 0.5), 5);
    expect(kl_curve_kl(&c, 20), 2);
    expect(kl_curve_kl(&c, 80), 128);
    expect(kl_curve_kl(&c, sqrt(800)), sqrt(32));
}

static void test_little_is_known(void **state)
{
    struct kl_curve c = {0};

    kl_curve_add(&c, 10, 0);
    kl_curve_add(&c, 10, NAN);
    kl_curve_add(&c, 10, INFINITY);
    assert_int_equal(c.count, 0);
    kl_curve_add(&c, 10, 1);
    expect(kl_curve_ratio(&c, 4), 20);
    expect(kl_curve_kl(&c, 20), 4);
    kl_curve_add(&c, 20, 0.9); /* chance */
    assert_true(kl_curve_ratio(&c, 1.8) >= 20 && isfinite(kl_curve_ratio(&c, 1.8)));
    for (int i = 0; i < 2 * KL_CURVE_MAX; i++)
        kl_curve_add(&c, 30 + i, 5);
    assert_int_equal(c.count, KL_CURVE_MAX);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_powers_are_found),
        cmocka_unit_test(test_each_stretch_has_its_own_slope),
        cmocka_unit_test(test_little_is_known),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
