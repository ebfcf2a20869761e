/* Rope's angles, embeddings with mixed tenants and their gradient: the CUDA kernels against the
 * CPU. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/unit/parity.h"
#include "tests/unit/shim_fixture.h"

struct embed_case {
    struct parity p;
    struct parity_tensor *x, *dx, *d_embed;
};

static void run_embed(void *context, int side)
{
    struct embed_case *c = context;
    struct backend *b = c->p.backend[side];

    b->ops->embed(b, &(struct embed_args){
                         .batch = &c->p.batch[side],
                         .embed = c->p.embed[side],
                         .x = c->x->t[side],
                     });
}

static void embed_of_shape(struct backend *shim, const struct parity_shape *shape)
{
    struct embed_case c;

    parity_open(&c.p, shim, shape);
    c.x = parity_output(&c.p, 2, (int64_t[]){c.p.rows, c.p.config.hidden});
    parity_run(&c.p, run_embed, &c);
    parity_equal(&c.p, "x", c.x, c.p.backend[1]->activation == DTYPE_BF16 ? 2e-2 : 0);
    parity_equal(&c.p, "rope", c.p.rope, 1e-7);
    parity_close(&c.p);
}

static void test_embed(void **state)
{
    shim_every_shape(*state, parity_training_shapes, embed_of_shape);
    shim_every_shape(*state, parity_serving_shapes, embed_of_shape);
}

static void run_embed_backward(void *context, int side)
{
    struct embed_case *c = context;
    struct backend *b = c->p.backend[side];

    b->ops->embed_backward(b, &(struct embed_backward_args){
                                  .batch = &c->p.batch[side],
                                  .dx = c->dx->t[side],
                                  .d_embed = c->d_embed->t[side],
                              });
}

static void embed_backward_of_shape(struct backend *shim, const struct parity_shape *shape)
{
    struct embed_case c;

    parity_open(&c.p, shim, shape);
    c.dx = parity_random(&c.p, 2, (int64_t[]){c.p.rows, c.p.config.hidden}, 1);
    c.d_embed =
        parity_random_f32(&c.p, 2, (int64_t[]){c.p.config.vocabulary, c.p.config.hidden}, 1);
    parity_run(&c.p, run_embed_backward, &c);
    parity_equal(&c.p, "d_embed", c.d_embed, 0);
    parity_close(&c.p);
}

static void test_embed_backward(void **state)
{
    shim_every_shape(*state, parity_training_shapes, embed_backward_of_shape);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_embed),
        cmocka_unit_test(test_embed_backward),
    };

    return cmocka_run_group_tests_name("f32", tests, shim_setup, shim_teardown) +
           cmocka_run_group_tests_name("bf16", tests, shim_setup_bf16, shim_teardown);
}
