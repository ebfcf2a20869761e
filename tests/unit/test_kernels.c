/* Every kernel set that this processor runs gives the bits of plain C, and plain C is right. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/base/rng.h"
#include "engine/cpu/kernels.h"

#define N 2048 /* floats in each buffer */

static const int32_t lengths[] = {1, 7, 15, 16, 17, 31, 48, 64, 100, 577};
#define LENGTHS (sizeof lengths / sizeof lengths[0])

static void fill(float *x, int32_t n, uint64_t stream, float size)
{
    for (int32_t i = 0; i < n; i++)
        x[i] = size * (float)(2 * rng_unit_at(3, stream, (uint64_t)i) - 1);
}

/* Runs `body` for each kernel set; `result` must be the same bits as of the plain set. */
typedef void kernel_case(const struct cpu_kernels *k, int32_t n, float *result);

static void same_bits(kernel_case *run)
{
    for (size_t i = 0; i < LENGTHS; i++) {
        float want[N] = {0}, got[N];

        run(&cpu_kernels_plain, lengths[i], want);
        for (const struct cpu_kernels *const *k = cpu_kernels_usable(); *k; k++) {
            memset(got, 0, sizeof got);
            run(*k, lengths[i], got);
            for (int32_t j = 0; j < N; j++)
                if (memcmp(&want[j], &got[j], sizeof want[j]) != 0)
                    fail_msg("%s, length %d, result %d: %.9g, not %.9g", (*k)->name, lengths[i], j,
                             (double)got[j], (double)want[j]);
        }
    }
}

/* ------------------------------------------------------------------ dot */

#define ROWS 7
#define OUTS 9

static void dot_of(const struct cpu_kernels *k, int32_t n, enum dtype dtype, float *result)
{
    static float x[ROWS * 600], w[OUTS * 600];
    static uint16_t half[OUTS * 600];

    fill(x, ROWS * 600, 1, 1);
    fill(w, OUTS * 600, 2, 1);
    for (int32_t i = 0; i < OUTS * 600; i++)
        half[i] = dtype == DTYPE_BF16 ? f32_to_bf16(w[i]) : f32_to_f16(w[i]);
    fill(result, ROWS * 12, 4, 1); /* also between the outputs: must stay */
    k->dot(&(struct dot_args){
        .x = x,
        .ldx = 600,
        .rows = ROWS,
        .w = dtype == DTYPE_F32 ? (void *)w : (void *)half,
        .dtype = dtype,
        .ldw = 600,
        .outs = OUTS,
        .n = n,
        .y = result,
        .ldy = 12,
        .add = n % 2,
    });
    if (k != &cpu_kernels_plain || dtype != DTYPE_F32)
        return;
    double want = n % 2 ? (double)(float)(2 * rng_unit_at(3, 4, 2 * 12 + 5) - 1) : 0;
    for (int32_t i = 0; i < n; i++)
        want += (double)x[2 * 600 + i] * (double)w[5 * 600 + i];
    assert_true(fabs((double)result[2 * 12 + 5] - want) < 1e-5);
}

static void dot_f32(const struct cpu_kernels *k, int32_t n, float *result)
{
    dot_of(k, n, DTYPE_F32, result);
}

static void dot_bf16(const struct cpu_kernels *k, int32_t n, float *result)
{
    dot_of(k, n, DTYPE_BF16, result);
}

static void dot_f16(const struct cpu_kernels *k, int32_t n, float *result)
{
    dot_of(k, n, DTYPE_F16, result);
}

static void test_dot(void **state)
{
    same_bits(dot_f32);
    same_bits(dot_bf16);
    same_bits(dot_f16);
}

/* A row alone and in a batch: the same bits. */
static void test_dot_does_not_see_the_batch(void **state)
{
    float x[ROWS * 100], w[OUTS * 100], together[ROWS * OUTS], alone[OUTS];

    fill(x, ROWS * 100, 5, 1);
    fill(w, OUTS * 100, 6, 1);
    for (const struct cpu_kernels *const *k = cpu_kernels_usable(); *k; k++) {
        struct dot_args a = {.x = x,
                             .ldx = 100,
                             .rows = ROWS,
                             .w = w,
                             .ldw = 100,
                             .outs = OUTS,
                             .n = 100,
                             .y = together,
                             .ldy = OUTS};

        (*k)->dot(&a);
        for (int32_t r = 0; r < ROWS; r++) {
            a.x = x + r * 100;
            a.rows = 1;
            a.y = alone;
            (*k)->dot(&a);
            assert_memory_equal(alone, together + r * OUTS, sizeof alone);
        }
    }
}

/* ------------------------------------------------------------------ outer products */

static void outer_of(const struct cpu_kernels *k, int32_t n, float *result, bool transposed)
{
    static float a[13 * 600], b[37 * 112];
    int32_t cols = n > 100 ? 100 : n, depth = 37;

    fill(a, 13 * 600, 7, 1);
    fill(b, 37 * 112, 8, 1);
    fill(result, 13 * 110, 9, 1);
    k->outer(&(struct outer_args){
        .a = a,
        .row_step = transposed ? 1 : 600,
        .k_step = transposed ? 13 : 1,
        .b = b,
        .ldb = 112,
        .rows = 13,
        .cols = cols,
        .k = depth,
        .c = result,
        .ldc = 110,
        .add = n % 2,
    });
    if (k != &cpu_kernels_plain)
        return;
    int32_t col = cols - 1;
    double want =
        n % 2 ? (double)(float)(2 * rng_unit_at(3, 9, (uint64_t)(12 * 110 + col)) - 1) : 0;
    for (int32_t i = 0; i < depth; i++)
        want += (double)(transposed ? a[i * 13 + 12] : a[12 * 600 + i]) * (double)b[i * 112 + col];
    assert_true(fabs((double)result[12 * 110 + col] - want) < 1e-5);
}

static void outer_plain(const struct cpu_kernels *k, int32_t n, float *result)
{
    outer_of(k, n, result, false);
}

static void outer_transposed(const struct cpu_kernels *k, int32_t n, float *result)
{
    outer_of(k, n, result, true);
}

static void test_outer(void **state)
{
    same_bits(outer_plain);
    same_bits(outer_transposed);
}

/* ------------------------------------------------------------------ signs */

#define SIGN_ROWS 83 /* five blocks and a piece */

static bool sign_bit(int32_t row, int32_t col)
{
    return rng_at(3, 10, (uint64_t)(row * 10000 + col)) & 1;
}

static void sign_of(const struct cpu_kernels *k, int32_t n, float *result)
{
    int32_t words = (n + 31) / 32, blocks = (SIGN_ROWS + 15) / 16;
    static uint32_t bits[6 * 20 * 16];
    static float x[600], scale[SIGN_ROWS];

    fill(x, n, 11, 1);
    fill(scale, SIGN_ROWS, 12, 0.1f);
    fill(result, SIGN_ROWS, 13, 1);
    for (int32_t i = 0; i < blocks * words * 16; i++)
        bits[i] = 0xdeadbeefu; /* behind the last column: must not count */
    for (int32_t r = 0; r < SIGN_ROWS; r++)
        for (int32_t c = 0; c < n; c++) {
            uint32_t *word = &bits[(r / 16 * words + c / 32) * 16 + r % 16];

            *word = (*word & ~(1u << c % 32)) | (uint32_t)sign_bit(r, c) << c % 32;
        }
    k->sign(&(struct sign_args){.x = x,
                                .rows = SIGN_ROWS,
                                .cols = n,
                                .bits = bits,
                                .scale = scale,
                                .from = 0,
                                .to = blocks,
                                .y = result});
    if (k != &cpu_kernels_plain)
        return;
    for (int32_t r = 0; r < SIGN_ROWS; r++) {
        double sum = 0, start = (double)(float)(2 * rng_unit_at(3, 13, (uint64_t)r) - 1);

        for (int32_t c = 0; c < n; c++)
            sum += sign_bit(r, c) ? (double)x[c] : -(double)x[c];
        assert_true(fabs((double)result[r] - start - (double)scale[r] * sum) < 1e-5);
    }
}

static void test_sign(void **state)
{
    same_bits(sign_of);
}

/* ------------------------------------------------------------------ the small ones */

static void small_of(const struct cpu_kernels *k, int32_t n, float *result)
{
    static float a[600], b[600], c[600], d[600], v[5 * 600];
    float *r = result;

    fill(a, 600, 14, 3);
    fill(b, 600, 15, 1);
    fill(c, 600, 16, 2);
    fill(d, 600, 17, 1);
    fill(v, 5 * 600, 18, 1);
    *r++ = k->product(a, b, n);
    *r++ = (float)k->sum_squares(a, n);
    *r++ = k->scale_max(a, n, 0.7f);
    *r = k->exp_sum(a, n, result[2]);
    r++;
    k->softmax_again(c, n, 0.5f, 1.5f);
    k->softmax_backward(d, c, n, 0.2f, 0.3f);
    k->weighted_sum(b, 5, v, 600, n, 0.9f, d);
    k->scale(b, n, 1.1f);
    k->add(a, b, b, n);
    for (int32_t i = 0; i < n && i < 120; i++) {
        *r++ = a[i];
        *r++ = b[i];
        *r++ = c[i];
        *r++ = d[i];
    }
}

static void norms_of(const struct cpu_kernels *k, int32_t n, float *result)
{
    static float x[3 * 600], w[600], y[600], dx[600], dw[600], sum[600];
    const float rstd[3] = {0.5f, 1.5f, 2.5f};

    fill(x, 3 * 600, 19, 3);
    fill(w, 600, 20, 1);
    fill(dx, 600, 21, 1);
    fill(dw, 600, 22, 1);
    fill(sum, 600, 23, 1);
    result[0] = k->rms_norm(x, w, y, n, 1e-5f);
    k->rms_norm_backward(x, w, y, dx, n, result[0]);
    k->rms_norm_weight_grad(x, x, 600, rstd, 1, 3, n, dw);
    k->column_sum(x, 600, 3, n, sum);
    for (int32_t i = 0; i < n && i < 400; i++) {
        result[1 + i] = y[i];
        result[401 + i] = dx[i];
        result[801 + i] = dw[i];
        result[1201 + i] = sum[i];
    }
}

static void silu_of(const struct cpu_kernels *k, int32_t n, float *result)
{
    static float gate[600], up[600], d[600], cs[600], x[1800];

    fill(gate, 600, 24, 20);
    fill(up, 600, 25, 1);
    fill(d, 600, 26, 1);
    fill(cs, 600, 27, 1);
    fill(x, 1800, 28, 1);
    k->silu_mul(gate, up, result, n);
    k->silu_mul_backward(gate, up, d, result + 600, n);
    memcpy(result + 1200, gate, (size_t)(n < 400 ? n : 400) * sizeof *gate);
    memcpy(result + 1600, up, (size_t)(n < 400 ? n : 400) * sizeof *up);
    if (n > 1) {
        k->rope(x, 3, n / 2 * 2, cs, false);
        k->rope(x, 2, n / 2 * 2, cs, true);
        result[2000] = k->product(x, x + 1, n);
    }
}

static void adamw_of(const struct cpu_kernels *k, int32_t n, float *result)
{
    struct adamw_step s = {.clip = 0.5f,
                           .learning_rate = 0.01f,
                           .beta1 = 0.9f,
                           .beta2 = 0.99f,
                           .epsilon = 1e-8f,
                           .decay = 0.1f,
                           .correction1 = 0.19f,
                           .correction2 = 0.02f};
    float *w = result, *g = result + 500, *m = result + 1000, *v = result + 1500;

    n = n < 400 ? n : 400;
    fill(w, 400, 29, 1);
    fill(g, 400, 30, 1);
    fill(m, 400, 31, 1);
    for (int32_t i = 0; i < 400; i++)
        v[i] = (float)rng_unit_at(3, 32, (uint64_t)i);
    k->adamw(w, g, m, v, n, &s);
    for (int32_t i = 0; i < n; i++)
        assert_true(g[i] == 0);
}

static struct divergence_args divergence_from(const float *teacher, float *model, int32_t n,
                                              float weight)
{
    double sum = 0, sum_teacher = 0;

    for (int32_t i = 0; i < n; i++) {
        sum += exp((double)model[i] - 2);
        sum_teacher += exp((double)teacher[i] - 1);
    }
    return (struct divergence_args){.teacher = teacher,
                                    .model = model,
                                    .n = n,
                                    .teacher_max = 1,
                                    .teacher_share = (float)(1 / sum_teacher),
                                    .max = 2,
                                    .share = (float)(1 / sum),
                                    .shift = (float)(log(sum_teacher / sum) - 1),
                                    .weight = weight};
}

static void divergence_of(const struct cpu_kernels *k, int32_t n, float *result)
{
    static float teacher[600];
    float *model = result + 1;

    fill(teacher, 600, 33, 2);
    fill(model, 600, 34, 2);
    struct divergence_args a = divergence_from(teacher, model, n, 0.7f);
    result[0] = (float)k->divergence(&a);
}

/* From rows that hardly differ to rows that have little in common, to a few 1e-6 of the sum. */
static void test_divergence_is_kl(void **state)
{
    static float teacher[5001], model[5001], was[5001];

    for (float apart = 1e-3f; apart < 100; apart *= 10) {
        fill(teacher, 5001, 35, 5);
        fill(was, 5001, 36, apart);
        for (int32_t i = 0; i < 5001; i++)
            model[i] = was[i] += teacher[i];
        struct divergence_args a = divergence_from(teacher, model, 5001, 3);
        double got = cpu_kernels_plain.divergence(&a), want = 0, worst = 0, most = 0;
        double sum = 0, sum_teacher = 0;

        for (int32_t i = 0; i < 5001; i++) {
            sum += exp((double)was[i]);
            sum_teacher += exp((double)teacher[i]);
        }
        for (int32_t i = 0; i < 5001; i++) {
            double p = exp((double)was[i]) / sum, pt = exp((double)teacher[i]) / sum_teacher;

            want += pt * (log(pt) - log(p));
            worst = fmax(worst, fabs((double)model[i] - 3 * (p - pt)));
            most = fmax(most, fabs(3 * (p - pt)));
        }
        if (!(fabs(got - want) < 2e-6 * want && worst < 1e-3 * most))
            fail_msg("%g apart: %.9g, not %.9g; a gradient off by %g of %g", (double)apart, got,
                     want, worst, most);
    }
}

static void test_small_kernels(void **state)
{
    same_bits(divergence_of);
    same_bits(small_of);
    same_bits(norms_of);
    same_bits(silu_of);
    same_bits(adamw_of);
}

static void test_exp_is_accurate(void **state)
{
    double worst = 0;

    for (int32_t i = -8600; i <= 0; i++) {
        float x = (float)i / 100, got = x;

        cpu_kernels_plain.exp_sum(&got, 1, 0.0f);
        double error = fabs((double)got / exp((double)x) - 1);
        worst = error > worst ? error : worst;
    }
    assert_true(worst < 2e-7);
}

static void test_adamw_is_the_paper(void **state)
{
    float w = 0.5f, g = 0.25f, m = 0.1f, v = 0.01f;
    struct adamw_step s = {.clip = 2.0f,
                           .learning_rate = 0.01f,
                           .beta1 = 0.9f,
                           .beta2 = 0.99f,
                           .epsilon = 1e-8f,
                           .decay = 0.1f,
                           .correction1 = 0.271f,
                           .correction2 = 0.029701f};
    double m1 = 0.9 * 0.1 + 0.1 * 0.5, v1 = 0.99 * 0.01 + 0.01 * 0.25;
    double want = 0.5 - 0.01 * (m1 / 0.271 / (sqrt(v1 / 0.029701) + 1e-8) + 0.1 * 0.5);

    cpu_kernels_plain.adamw(&w, &g, &m, &v, 1, &s);
    assert_true(fabs((double)w - want) < 1e-6);
    assert_true(fabs((double)m - m1) < 1e-7 && fabs((double)v - v1) < 1e-7 && g == 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_divergence_is_kl),
        cmocka_unit_test(test_dot),
        cmocka_unit_test(test_dot_does_not_see_the_batch),
        cmocka_unit_test(test_outer),
        cmocka_unit_test(test_sign),
        cmocka_unit_test(test_small_kernels),
        cmocka_unit_test(test_exp_is_accurate),
        cmocka_unit_test(test_adamw_is_the_paper),
    };

    printf("kernels of this processor:");
    for (const struct cpu_kernels *const *k = cpu_kernels_usable(); *k; k++)
        printf(" %s", (*k)->name);
    printf("\n");
    return cmocka_run_group_tests(tests, NULL, NULL);
}
