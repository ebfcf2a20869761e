/* The stages of a layer backward: the CUDA kernels against the CPU, every gradient, and those that
 * nobody wants. */
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

/* Beside the shapes that every stage must get right. */
static const struct parity_shape shapes[] = {
    {.name = "widths that are no vectors of eight, biases",
     .hidden = 52,
     .intermediate = 75,
     .heads = 3,
     .kv_heads = 1,
     .head_dim = 10,
     .bias = true,
     .doc_rows = {5, 2},
     .seed = 21},
    {.name = "heads of 80, normed",
     .heads = 2,
     .kv_heads = 1,
     .head_dim = 80,
     .qk_norm = true,
     .doc_rows = {9},
     .seed = 22},
    {.name = "heads of 192, normed; more rows than strands",
     .heads = 1,
     .kv_heads = 1,
     .head_dim = 192,
     .qk_norm = true,
     .doc_rows = {30, 17},
     .seed = 23},
    {.name = "heads of 264, normed; wider than a block",
     .hidden = 2056,
     .intermediate = 8,
     .heads = 1,
     .kv_heads = 1,
     .head_dim = 264,
     .qk_norm = true,
     .doc_rows = {3},
     .seed = 24},
    {0},
};

struct backward_case {
    struct parity p;
    struct parity_tensor *x, *n, *dn, *dx, *rstd;
    struct parity_tensor *gate, *up, *act, *d_act;              /* mlp */
    struct parity_tensor *attn, *d_attn;                        /* attn_out */
    struct parity_tensor *q_raw, *k_raw, *q, *k, *dq, *dk, *dv; /* attn_in */
    struct layer_weights grads[2];
    struct {
        const char *name;
        struct parity_tensor *tensor;
    } grad[16];
    int32_t grad_count;
};

static struct parity_tensor *rows_of(struct backward_case *c, int64_t width)
{
    return parity_output(&c->p, 2, (int64_t[]){c->p.rows, width});
}

static struct parity_tensor *random_rows(struct backward_case *c, int64_t width, float size)
{
    return parity_random(&c->p, 2, (int64_t[]){c->p.rows, width}, size);
}

/* Of the cases that run now: is no gradient of a parameter wanted? */
static bool frozen;

/* A gradient of the shape of `of`, at `place` in struct layer_weights; starts at random values, to
 * which is added. */
static void want(struct backward_case *c, const char *name, const struct tensor *of, size_t place)
{
    struct parity_tensor *t;

    if (!of->data || frozen)
        return;
    t = parity_random_f32(&c->p, of->rank, of->shape, 1.0f);
    for (int side = 0; side < 2; side++)
        *(struct tensor *)((char *)&c->grads[side] + place) = t->t[side];
    c->grad[c->grad_count].name = name;
    c->grad[c->grad_count++].tensor = t;
}

#define WANT(c, member) \
    want(c, #member, &(c)->p.layer[0].member, offsetof(struct layer_weights, member))

static void check_gradients(struct backward_case *c)
{
    for (int32_t i = 0; i < c->grad_count; i++)
        parity_equal(&c->p, c->grad[i].name, c->grad[i].tensor, parity_tolerance(&c->p));
}

/* x, and what forward keeps of its norm. */
static void make_x(struct backward_case *c)
{
    struct parity *p = &c->p;
    int64_t d = p->config.hidden;
    float *rstd;

    c->x = random_rows(c, d, 2.0f);
    c->rstd = parity_random_f32(p, 1, (int64_t[]){p->rows}, 1.0f);
    rstd = c->rstd->start;
    for (int64_t r = 0; r < p->rows; r++) {
        const float *x = (const float *)c->x->start + r * d;
        double sum = 0;

        for (int64_t i = 0; i < d; i++)
            sum += (double)x[i] * x[i];
        rstd[r] = (float)(1 / sqrt(sum / (double)d + (double)p->config.rms_norm_eps));
    }
    c->n = rows_of(c, d);
    c->dn = rows_of(c, d);
    c->dx = random_rows(c, d, 1.0f);
}

static void begin_case(struct backward_case *c, struct backend *shim,
                       const struct parity_shape *shape)
{
    memset(c, 0, sizeof *c);
    parity_open(&c->p, shim, shape);
}

/* Each shape in every order with all gradients, and once with none. */
static void every_shape(void **state, shim_shape_case *run)
{
    shim_every_shape(*state, parity_training_shapes, run);
    shim_large_shapes(*state, shapes, run);
    frozen = true;
    for (const struct parity_shape *s = parity_training_shapes; s->name; s++)
        run(*state, s);
    frozen = false;
}

/* ------------------------------------------------------------------ mlp */

static void run_mlp(void *context, int side)
{
    struct backward_case *c = context;
    struct backend *b = c->p.backend[side];

    b->ops->mlp_backward(b, &(struct mlp_backward_args){
                                .config = &c->p.config,
                                .weights = &c->p.layer[side],
                                .grads = &c->grads[side],
                                .x = c->x->t[side],
                                .rstd = c->rstd->t[side],
                                .gate = c->gate->t[side],
                                .up = c->up->t[side],
                                .n = c->n->t[side],
                                .dn = c->dn->t[side],
                                .act = c->act->t[side],
                                .d_act = c->d_act->t[side],
                                .dx = c->dx->t[side],
                            });
}

static void mlp_of_shape(struct backend *shim, const struct parity_shape *shape)
{
    struct backward_case c;

    begin_case(&c, shim, shape);
    make_x(&c);
    c.gate = random_rows(&c, c.p.config.intermediate, 4.0f);
    c.up = random_rows(&c, c.p.config.intermediate, 2.0f);
    c.act = rows_of(&c, c.p.config.intermediate);
    c.d_act = rows_of(&c, c.p.config.intermediate);
    WANT(&c, gate.w);
    WANT(&c, up.w);
    WANT(&c, down.w);
    WANT(&c, gate.b);
    WANT(&c, up.b);
    WANT(&c, down.b);
    WANT(&c, mlp_norm);
    parity_run(&c.p, run_mlp, &c);
    parity_equal(&c.p, "dx", c.dx, parity_tolerance(&c.p));
    parity_equal(&c.p, "d gate", c.gate, parity_tolerance(&c.p));
    parity_equal(&c.p, "d up", c.up, parity_tolerance(&c.p));
    parity_equal(&c.p, "n", c.n, parity_tolerance(&c.p));
    parity_equal(&c.p, "act", c.act, parity_tolerance(&c.p));
    check_gradients(&c);
    parity_close(&c.p);
}

static void test_mlp(void **state)
{
    every_shape(state, mlp_of_shape);
}

/* ------------------------------------------------------------------ attn_out */

static void run_attn_out(void *context, int side)
{
    struct backward_case *c = context;
    struct backend *b = c->p.backend[side];

    b->ops->attn_out_backward(b, &(struct attn_out_backward_args){
                                     .weights = &c->p.layer[side],
                                     .grads = &c->grads[side],
                                     .attn = c->attn->t[side],
                                     .dy = c->dx->t[side],
                                     .d_attn = c->d_attn->t[side],
                                 });
}

static void attn_out_of_shape(struct backend *shim, const struct parity_shape *shape)
{
    struct backward_case c;
    int64_t width;

    begin_case(&c, shim, shape);
    width = (int64_t)c.p.config.heads * c.p.config.head_dim;
    c.dx = random_rows(&c, c.p.config.hidden, 1.0f);
    c.attn = random_rows(&c, width, 1.0f);
    c.d_attn = rows_of(&c, width);
    WANT(&c, o.w);
    WANT(&c, o.b);
    parity_run(&c.p, run_attn_out, &c);
    parity_equal(&c.p, "d attn", c.d_attn, parity_tolerance(&c.p));
    check_gradients(&c);
    parity_close(&c.p);
}

static void test_attn_out(void **state)
{
    every_shape(state, attn_out_of_shape);
}

/* ------------------------------------------------------------------ attn_in */

static void run_attn_in(void *context, int side)
{
    struct backward_case *c = context;
    struct backend *b = c->p.backend[side];
    struct attn_in_backward_args a = {
        .config = &c->p.config,
        .weights = &c->p.layer[side],
        .grads = &c->grads[side],
        .batch = &c->p.batch[side],
        .rope = c->p.rope->t[side],
        .x = c->x->t[side],
        .rstd = c->rstd->t[side],
        .dq = c->dq->t[side],
        .dk = c->dk->t[side],
        .dv = c->dv->t[side],
        .n = c->n->t[side],
        .dn = c->dn->t[side],
        .dx = c->dx->t[side],
    };

    if (c->q_raw) {
        a.q_raw = c->q_raw->t[side];
        a.k_raw = c->k_raw->t[side];
    }
    b->ops->attn_in_backward(b, &a);
}

static void attn_in_of_shape(struct backend *shim, const struct parity_shape *shape)
{
    struct backward_case c;
    int64_t query, key;

    begin_case(&c, shim, shape);
    query = (int64_t)c.p.config.heads * c.p.config.head_dim;
    key = (int64_t)c.p.config.kv_heads * c.p.config.head_dim;
    make_x(&c);
    c.dq = random_rows(&c, query, 1.0f);
    c.dk = random_rows(&c, key, 1.0f);
    c.dv = random_rows(&c, key, 1.0f);
    if (c.p.config.qk_norm) {
        c.q_raw = random_rows(&c, query, 2.0f);
        c.k_raw = random_rows(&c, key, 2.0f);
    }
    WANT(&c, q.w);
    WANT(&c, k.w);
    WANT(&c, v.w);
    WANT(&c, q.b);
    WANT(&c, k.b);
    WANT(&c, v.b);
    WANT(&c, attn_norm);
    WANT(&c, q_norm);
    WANT(&c, k_norm);
    parity_run(&c.p, run_attn_in, &c);
    parity_equal(&c.p, "dx", c.dx, parity_tolerance(&c.p));
    parity_equal(&c.p, "dq", c.dq, parity_tolerance(&c.p));
    parity_equal(&c.p, "dk", c.dk, parity_tolerance(&c.p));
    parity_equal(&c.p, "dv", c.dv, parity_tolerance(&c.p));
    parity_equal(&c.p, "n", c.n, parity_tolerance(&c.p));
    check_gradients(&c);
    parity_close(&c.p);
}

static void test_attn_in(void **state)
{
    every_shape(state, attn_in_of_shape);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_mlp),
        cmocka_unit_test(test_attn_out),
        cmocka_unit_test(test_attn_in),
    };
    int f32 = cmocka_run_group_tests_name("f32", tests, shim_setup, shim_teardown);
    int bf16 = cmocka_run_group_tests_name("bf16", tests, shim_setup_bf16, shim_teardown);

    return f32 || bf16;
}
