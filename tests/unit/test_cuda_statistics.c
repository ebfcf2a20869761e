/* Second moments: the CPU against plain sums, and the CUDA kernels against the CPU. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tests/unit/parity.h"
#include "tests/unit/shim_fixture.h"

struct gram_case {
    struct parity p;
    struct parity_tensor *x, *weight, *scaled, *out;
};

static void run_gram(void *context, int side)
{
    struct gram_case *c = context;
    struct backend *b = c->p.backend[side];
    struct gram_args a = {.x = c->x->t[side], .out = c->out->t[side]};

    if (c->weight) {
        a.weight = c->weight->t[side];
        a.scaled = c->scaled->t[side];
    }
    b->ops->gram(b, &a);
}

/* What one side has added, held to sums in double; what lies below the diagonal is nobody's. */
static void plain_sums(struct gram_case *c, int side)
{
    const float *x = c->x->start, *start = c->out->start;
    const float *weight = c->weight ? c->weight->start : NULL;
    int64_t rows = c->x->t[0].shape[0], n = c->x->t[0].shape[1];
    struct backend *b = c->p.backend[side];
    float *out = malloc((size_t)(n * n) * sizeof *out);
    double error = 0, size = 0;

    assert_non_null(out);
    b->ops->download(b, out, c->out->t[side].data, (size_t)(n * n) * sizeof *out);
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = i; j < n; j++) {
            double sum = (double)start[i * n + j];

            for (int64_t r = 0; r < rows; r++)
                sum +=
                    (weight ? (double)weight[r] : 1) * (double)x[r * n + i] * (double)x[r * n + j];
            error += pow(sum - (double)out[i * n + j], 2);
            size += sum * sum;
        }
    free(out);
    assert_true(sqrt(error / size) <= parity_tolerance(&c->p));
}

/* Beside the shapes that every stage must get right: more blocks than one, of uneven sizes. */
static const struct parity_shape shapes[] = {
    {.name = "blocks below the diagonal", .hidden = 200, .intermediate = 310, .seed = 31},
    {0},
};

static void gram_of_shape(struct backend *shim, const struct parity_shape *shape)
{
    for (int weighted = 0; weighted < 2; weighted++) {
        struct gram_case c = {0};
        int64_t n;

        parity_open(&c.p, shim, shape);
        n = weighted ? c.p.config.intermediate : c.p.config.hidden;
        c.x = parity_random(&c.p, 2, (int64_t[]){c.p.rows, n}, 2);
        c.out = parity_random_f32(&c.p, 2, (int64_t[]){n, n}, 1);
        if (weighted) {
            c.weight = parity_random_f32(&c.p, 1, (int64_t[]){c.p.rows}, 3);
            c.scaled = parity_output(&c.p, 2, (int64_t[]){c.p.rows, n});
        }
        parity_run(&c.p, run_gram, &c);
        plain_sums(&c, 0);
        plain_sums(&c, 1);
        parity_close(&c.p);
    }
}

static void test_gram(void **state)
{
    shim_every_shape(*state, parity_training_shapes, gram_of_shape);
    shim_large_shapes(*state, shapes, gram_of_shape);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_gram)};

    return cmocka_run_group_tests_name("f32", tests, shim_setup, shim_teardown) +
           cmocka_run_group_tests_name("bf16", tests, shim_setup_bf16, shim_teardown);
}
