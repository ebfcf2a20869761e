/* Sampling: the CUDA kernel draws the CPU's tokens. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "engine/base/rng.h"
#include "tests/unit/parity.h"
#include "tests/unit/shim_fixture.h"

#define ROWS 12

struct sample_case {
    struct parity p;
    struct sample_row row[ROWS];
    struct parity_tensor *logits, *token;
};

static void run_sample(void *context, int side)
{
    struct sample_case *c = context;
    struct backend *b = c->p.backend[side];

    b->ops->sample(b, &(struct sample_args){c->logits->t[side], c->row, c->token->t[side]});
}

/* Every mixture of temperature and top_p; rows of few different logits, of NaN and of infinities.
 */
static void fill(struct sample_case *c, uint64_t draw)
{
    static const double temperature[] = {0, 0.4, 1, 2.5}, top_p[] = {1, 0.3, 0.9, 0.999, 0};
    int32_t v = c->p.config.vocabulary;

    for (int32_t r = 0; r < ROWS; r++) {
        float *logit = (float *)c->logits->start + (int64_t)r * v;
        uint64_t which = draw * ROWS + (uint64_t)r;

        c->row[r] = (struct sample_row){temperature[which % 4], top_p[which / 4 % 5], 7, which};
        for (int32_t i = 0; i < v; i++) {
            logit[i] = (float)(16 * rng_unit_at(draw, (uint64_t)r, (uint64_t)i));
            if (r % 3 == 1)
                logit[i] = floorf(logit[i] / 4);
            if (r % 4 == 2 && i % 3)
                logit[i] = -INFINITY;
        }
    }
    ((float *)c->logits->start)[v / 2] = NAN;
    for (int32_t i = 0; i < v; i++)
        ((float *)c->logits->start)[v + i] = -INFINITY;
    ((float *)c->logits->start)[2 * v + v - 1] = INFINITY;
}

static void sample_of_shape(struct backend *shim, const struct parity_shape *shape)
{
    static uint64_t draw;
    struct sample_case c = {0};
    int32_t token[ROWS];

    parity_open(&c.p, shim, shape);
    assert_true(c.p.rows >= ROWS);
    c.logits = parity_output_f32(&c.p, 2, (int64_t[]){ROWS, c.p.config.vocabulary});
    c.token = parity_integers(&c.p, ROWS);
    fill(&c, draw++);
    parity_run(&c.p, run_sample, &c);
    parity_equal(&c.p, "token", c.token, 0);
    shim->ops->download(shim, token, c.token->t[1].data, sizeof token);
    for (int32_t r = 0; r < ROWS; r++)
        assert_true(r < 3 ? token[r] == -1 : token[r] >= 0 && token[r] < c.p.config.vocabulary);
    parity_close(&c.p);
}

static void test_sample(void **state)
{
    static const struct parity_shape shapes[] = {
        {.name = "a small vocabulary", .doc_rows = {12}, .serving = true},
        {.name = "a large one", .hidden = 8, .vocabulary = 3001, .doc_rows = {12}, .serving = true},
        {.name = "two tokens", .hidden = 8, .vocabulary = 2, .doc_rows = {12}, .serving = true},
        {0},
    };

    shim_every_shape(*state, shapes, sample_of_shape);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_sample)};

    return cmocka_run_group_tests_name("f32", tests, shim_setup, shim_teardown) +
           cmocka_run_group_tests_name("bf16", tests, shim_setup_bf16, shim_teardown);
}
