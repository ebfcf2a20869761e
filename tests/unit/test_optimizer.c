/* AdamW on the CPU: the arithmetic of F32 to the bit, the copy for the stages, and weights of BF16
 * with stochastic rounding. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/base/rng.h"
#include "engine/cpu/cpu_backend.h"

#define N 300000 /* more than one task has */

static float w[N], g[N], m[N], v[N];
static uint16_t narrow[N], copy[N];

static const struct adamw_args usual = {
    .count = 1,
    .max_norm = 1.0f,
    .learning_rate = 0.001f,
    .beta1 = 0.9f,
    .beta2 = 0.99f,
    .epsilon = 1e-8f,
    .weight_decay = 0.1f,
    .seed = 7,
};

static struct backend open_cpu(int threads, const struct cpu_kernels *kernels)
{
    struct backend b;
    struct err err = {0};

    if (cpu_backend_open(&b, threads, kernels, DTYPE_F32, &err))
        fail_msg("%s", err.message);
    return b;
}

static struct parameter parameter_of(enum dtype dtype, int64_t n)
{
    return (struct parameter){
        .w = tensor_view(dtype == DTYPE_BF16 ? (void *)narrow : (void *)w, dtype, 1, &n),
        .g = tensor_view(g, DTYPE_F32, 1, &n),
        .m = tensor_view(m, DTYPE_F32, 1, &n),
        .v = tensor_view(v, DTYPE_F32, 1, &n),
        .decay = true,
    };
}

static void step_of(struct backend *b, const struct parameter *p, int32_t step, float norm)
{
    struct adamw_args args = usual;
    struct err err = {0};

    args.parameter = p;
    args.norm = tensor_view(&norm, DTYPE_F32, 1, (int64_t[]){1});
    args.step = step;
    b->ops->adamw(b, &args);
    if (b->ops->check(b, &err))
        fail_msg("%s", err.message);
}

static void random_values(float *x, uint64_t stream)
{
    for (int64_t i = 0; i < N; i++)
        x[i] = (float)(rng_unit_at(1, stream, (uint64_t)i) - 0.5);
}

static void start(void)
{
    random_values(w, 1);
    for (int64_t i = 0; i < N; i++)
        narrow[i] = f32_to_bf16(w[i]);
    memset(m, 0, sizeof m);
    memset(v, 0, sizeof v);
}

/* ------------------------------------------------------------------ F32 */

/* One weight, written out: the order of roundings that checkpoints rely on. */
static void expected_step(float *x, float *m1, float *v1, float gradient, int32_t step, float norm)
{
    float rate = usual.learning_rate, decay = usual.weight_decay;
    float clip = norm > usual.max_norm ? usual.max_norm / norm : 1.0f;
    float correction1 = (float)(1.0 - pow((double)usual.beta1, step));
    float correction2 = (float)(1.0 - pow((double)usual.beta2, step));

    gradient *= clip;
    *m1 = fmaf(gradient - *m1, 1.0f - usual.beta1, *m1);
    *v1 = fmaf(gradient * gradient - *v1, 1.0f - usual.beta2, *v1);
    float root = sqrtf(*v1 * (1.0f / correction2));
    float update = *m1 * (1.0f / correction1) / (root + usual.epsilon);
    *x = fmaf(fmaf(*x, decay, update), -rate, *x);
}

static void check_f32(const struct cpu_kernels *kernels)
{
    struct backend b = open_cpu(2, kernels);
    struct parameter p = parameter_of(DTYPE_F32, N);
    float *x = malloc(sizeof w), *m1 = calloc(N, sizeof *m1), *v1 = calloc(N, sizeof *v1);

    assert_true(x && m1 && v1);
    start();
    p.copy = tensor_view(copy, DTYPE_BF16, 1, (int64_t[]){N});
    memcpy(x, w, sizeof w);
    for (int32_t step = 1; step <= 3; step++) {
        float norm = step == 2 ? 0.3f : 3.7f;

        if (step == 3)
            p.copy.data = NULL; /* is not touched then */
        random_values(g, 10 + (uint64_t)step);
        for (int64_t i = 0; i < N; i++)
            expected_step(&x[i], &m1[i], &v1[i], g[i], step, norm);
        step_of(&b, &p, step, norm);
        for (int64_t i = 0; i < N; i++) {
            if (step == 2)
                assert_int_equal(copy[i], f32_to_bf16(w[i]));
            assert_true(g[i] == 0);
        }
        assert_memory_equal(w, x, sizeof w);
        assert_memory_equal(m, m1, sizeof m);
        assert_memory_equal(v, v1, sizeof v);
    }
    free(v1);
    free(m1);
    free(x);
    b.ops->close(&b);
}

static void test_f32_has_the_same_bits_everywhere(void **state)
{
    for (const struct cpu_kernels *const *k = cpu_kernels_usable(); *k; k++)
        check_f32(*k);
}

/* ------------------------------------------------------------------ BF16 */

/* All weights at `from`, all gradients alike: what they should become is one number, between two
 * neighbours. The mean of many roundings must be that number. */
static void mean_of_roundings(struct backend *b, float from, float gradient)
{
    struct parameter p = parameter_of(DTYPE_BF16, N);
    float want = from, m1 = 0, v1 = 0, low = INFINITY, high = -INFINITY;
    double sum = 0;

    expected_step(&want, &m1, &v1, gradient, 1, 0);
    memset(m, 0, sizeof m);
    memset(v, 0, sizeof v);
    for (int64_t i = 0; i < N; i++) {
        narrow[i] = f32_to_bf16(from);
        g[i] = gradient;
    }
    step_of(b, &p, 1, 0);
    for (int64_t i = 0; i < N; i++) {
        float x = bf16_to_f32(narrow[i]);

        sum += (double)x;
        low = fminf(low, x);
        high = fmaxf(high, x);
    }
    /* Neighbours: their bits differ by one. */
    assert_true(low < want && want < high);
    assert_int_equal(abs((int)f32_to_bf16(low) - (int)f32_to_bf16(high)), 1);
    assert_true(f32_to_bf16(want) == f32_to_bf16(from)); /* nearest would stand still */
    /* A rounding's deviation is at most half their distance; five of the mean's. */
    assert_true(fabs(sum / N - (double)want) < 5 * 0.5 * (double)(high - low) / sqrt(N));
}

static void test_stochastic_rounding_is_unbiased(void **state)
{
    struct backend b = open_cpu(2, NULL);

    mean_of_roundings(&b, 1.0f, 0.5f);
    mean_of_roundings(&b, -1.0f, 0.5f);
    mean_of_roundings(&b, -3.0f, -0.5f);
    mean_of_roundings(&b, 0.625f, -2.0f);
    b.ops->close(&b);
}

static void narrow_steps(struct backend *b, int32_t from, int32_t to)
{
    struct parameter p = parameter_of(DTYPE_BF16, N);

    for (int32_t step = from; step <= to; step++) {
        random_values(g, 20 + (uint64_t)step);
        step_of(b, &p, step, 2.0f);
    }
}

/* One thread in one go; two threads and another process's backend in the middle. */
static void test_resume_gives_the_same_bits(void **state)
{
    static uint16_t whole[N];
    struct backend one = open_cpu(1, NULL), two = open_cpu(2, NULL);
    int64_t moved = 0;

    start();
    narrow_steps(&one, 1, 4);
    memcpy(whole, narrow, sizeof whole);
    start();
    narrow_steps(&two, 1, 2);
    two.ops->close(&two);
    two = open_cpu(2, NULL);
    narrow_steps(&two, 3, 4);
    assert_memory_equal(narrow, whole, sizeof whole);
    for (int64_t i = 0; i < N; i++)
        moved += narrow[i] != f32_to_bf16(w[i]);
    assert_true(moved > N / 2);
    one.ops->close(&one);
    two.ops->close(&two);
}

/* Another step and another place in the list draw other numbers. */
static void test_every_step_and_parameter_draws_anew(void **state)
{
    static uint16_t of_step_2[N];
    struct backend b = open_cpu(1, NULL);
    struct adamw_args args = usual;
    float norm = 0;
    struct parameter p[2] = {parameter_of(DTYPE_F32, 16), parameter_of(DTYPE_BF16, N)};
    int64_t different = 0;

    start();
    random_values(g, 3);
    narrow_steps(&b, 2, 2);
    memcpy(of_step_2, narrow, sizeof narrow);
    start();
    random_values(g, 22);
    memset(p[0].g.data, 0, 16 * sizeof(float)); /* shared with p[1]: those 16 do not count */
    args.parameter = p;
    args.count = 2;
    args.norm = tensor_view(&norm, DTYPE_F32, 1, (int64_t[]){1});
    args.step = 2;
    b.ops->adamw(&b, &args);
    for (int64_t i = 16; i < N; i++) {
        different += narrow[i] != of_step_2[i];
        assert_true(abs((int)narrow[i] - (int)of_step_2[i]) <= 1);
    }
    assert_in_range(different, N / 20, N / 2);
    b.ops->close(&b);
}

static void test_not_a_number_stays_one(void **state)
{
    struct backend b = open_cpu(1, NULL);
    struct parameter p = parameter_of(DTYPE_BF16, 3);

    start();
    g[0] = g[1] = 0;
    g[2] = NAN;
    narrow[1] = 0x7f7f; /* the largest */
    step_of(&b, &p, 1, 0);
    assert_true(isfinite(bf16_to_f32(narrow[0])));
    assert_true(isfinite(bf16_to_f32(narrow[1])));
    assert_true(isnan(bf16_to_f32(narrow[2])));
    b.ops->close(&b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_f32_has_the_same_bits_everywhere),
        cmocka_unit_test(test_stochastic_rounding_is_unbiased),
        cmocka_unit_test(test_resume_gives_the_same_bits),
        cmocka_unit_test(test_every_step_and_parameter_draws_anew),
        cmocka_unit_test(test_not_a_number_stays_one),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
