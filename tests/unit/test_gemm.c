/* Products of whole matrices, of every kind, over several blocks and strips with ragged ends: held
 * to sums in double for each instruction set, and the same bits whatever the number of threads. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/base/rng.h"
#include "engine/cpu/cpu.h"
#include "engine/cpu/cpu_backend.h"

#define MARK 12345.0f /* what lies between the rows of C stays */
#define PAD 3         /* elements between rows of each matrix */

struct product {
    struct gemm gemm;
    float *a, *b, *start, *c;
    double *want, *size;
};

static float *random_floats(int64_t n, uint64_t stream)
{
    float *p = malloc((size_t)n * sizeof *p);

    assert_non_null(p);
    for (int64_t i = 0; i < n; i++)
        p[i] = (float)(2 * rng_unit_at(3, stream, (uint64_t)i) - 1);
    return p;
}

static void work_out(struct product *p)
{
    const struct gemm *g = &p->gemm;

    for (int32_t i = 0; i < g->m; i++)
        for (int32_t j = 0; j < g->n; j++) {
            double sum = g->add ? (double)p->start[i * g->ldc + j] : 0, size = 1;

            for (int32_t k = 0; k < g->k; k++) {
                double a =
                    (double)(g->kind == GEMM_TN ? p->a[k * g->lda + i] : p->a[i * g->lda + k]);
                double b =
                    (double)(g->kind == GEMM_NT ? p->b[j * g->ldb + k] : p->b[k * g->ldb + j]);

                sum += a * b;
                size += fabs(a * b);
            }
            p->want[i * g->n + j] = sum;
            p->size[i * g->n + j] = size;
        }
}

static struct product open_product(enum gemm_kind kind, const int32_t shape[3], bool symmetric)
{
    struct product p = {.gemm = {.kind = kind,
                                 .m = shape[0],
                                 .n = shape[1],
                                 .k = shape[2],
                                 .b_dtype = DTYPE_F32,
                                 .add = symmetric || shape[2] % 2,
                                 .symmetric = symmetric}};
    struct gemm *g = &p.gemm;
    int64_t a_rows = kind == GEMM_TN ? g->k : g->m, b_rows = kind == GEMM_NT ? g->n : g->k;

    g->lda = (kind == GEMM_TN ? g->m : g->k) + PAD;
    g->ldb = (kind == GEMM_NT ? g->k : g->n) + PAD;
    g->ldc = g->n + PAD;
    p.a = random_floats(a_rows * g->lda, 1);
    p.b = random_floats(b_rows * g->ldb, 2);
    p.start = random_floats(g->m * g->ldc, 4);
    for (int32_t i = 0; i < g->m; i++)
        for (int32_t j = g->n; j < g->n + PAD; j++)
            p.start[i * g->ldc + j] = MARK;
    p.c = malloc((size_t)(g->m * g->ldc) * sizeof *p.c);
    p.want = malloc((size_t)(g->m * g->n) * sizeof *p.want);
    p.size = malloc((size_t)(g->m * g->n) * sizeof *p.size);
    assert_true(p.c && p.want && p.size);
    g->a = p.a;
    g->b = p.b;
    g->c = p.c;
    work_out(&p);
    return p;
}

static void close_product(struct product *p)
{
    free(p->a);
    free(p->b);
    free(p->start);
    free(p->c);
    free(p->want);
    free(p->size);
}

static void run(struct product *p, const struct cpu_kernels *kernels, int threads)
{
    struct backend b;
    struct err err = {0};

    if (cpu_backend_open(&b, threads, kernels, DTYPE_F32, &err))
        fail_msg("%s", err.message);
    memcpy(p->c, p->start, (size_t)(p->gemm.m * p->gemm.ldc) * sizeof *p->c);
    cpu_gemm(cpu_of(&b), &p->gemm, 1);
    backend_close(&b);
}

static void check(const struct product *p, const char *kernels)
{
    const struct gemm *g = &p->gemm;

    for (int32_t i = 0; i < g->m; i++) {
        for (int32_t j = g->symmetric ? i : 0; j < g->n; j++) {
            double off = (double)p->c[i * g->ldc + j] - p->want[i * g->n + j];

            if (!(fabs(off) <= 1e-6 * p->size[i * g->n + j]))
                fail_msg("%s, kind %d, %dx%dx%d: element %d, %d is off by %g", kernels,
                         (int)g->kind, g->m, g->n, g->k, i, j, off);
        }
        for (int32_t j = g->n; j < g->n + PAD; j++)
            assert_true(p->c[i * g->ldc + j] == MARK);
    }
}

static void check_everywhere(enum gemm_kind kind, const int32_t shape[3], bool symmetric)
{
    struct product p = open_product(kind, shape, symmetric);
    size_t bytes = (size_t)(p.gemm.m * p.gemm.ldc) * sizeof *p.c;
    float *one = malloc(bytes);

    assert_non_null(one);
    for (const struct cpu_kernels *const *k = cpu_kernels_usable(); *k; k++) {
        run(&p, *k, 1);
        check(&p, (*k)->name);
        memcpy(one, p.c, bytes);
        run(&p, *k, 3);
        assert_memory_equal(one, p.c, bytes);
    }
    free(one);
    close_product(&p);
}

static void test_products(void **state)
{
    static const int32_t shape[][3] = {{121, 401, 257}, {24, 192, 256}, {97, 50, 300}, {5, 7, 600}};

    for (size_t i = 0; i < sizeof shape / sizeof shape[0]; i++)
        for (int kind = GEMM_NT; kind <= GEMM_TN; kind++)
            check_everywhere((enum gemm_kind)kind, shape[i], false);
}

/* Sums of outer products: only what is on and above the diagonal counts. */
static void test_symmetric(void **state)
{
    static const int32_t shape[][3] = {{450, 450, 270}, {192, 192, 9}, {40, 40, 512}};

    for (size_t i = 0; i < sizeof shape / sizeof shape[0]; i++)
        check_everywhere(GEMM_TN, shape[i], true);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_products),
        cmocka_unit_test(test_symmetric),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
