/* The stages of a layer and the head's logits, in training and in serving with mixed tenants: the
 * CUDA kernels against the CPU; and that a served row's bits are its own. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tests/unit/parity.h"
#include "tests/unit/shim_fixture.h"

struct forward_case {
    struct parity p;
    struct parity_tensor *x, *n, *q, *k, *v, *rstd, *q_raw, *k_raw, *attn, *gate, *up, *act, *y;
    struct parity_tensor *logits;
    int32_t head_row[256], head_count;
};

static struct parity_tensor *rows_of(struct forward_case *c, int64_t width)
{
    return parity_output(&c->p, 2, (int64_t[]){c->p.rows, width});
}

/* ------------------------------------------------------------------ attn_in */

static void run_attn_in(void *context, int side)
{
    struct forward_case *c = context;
    struct backend *b = c->p.backend[side];
    struct attn_in_args a = {
        .config = &c->p.config,
        .weights = &c->p.layer[side],
        .layer = c->p.layer_index,
        .batch = &c->p.batch[side],
        .rope = c->p.rope->t[side],
        .x = c->x->t[side],
        .n = c->n->t[side],
        .q = c->q->t[side],
        .k = c->k->t[side],
        .v = c->v->t[side],
        .cache = c->p.shape.cache ? &c->p.kv[side] : NULL,
    };

    if (!c->p.batch[side].serving)
        a.rstd = c->rstd->t[side];
    if (c->q_raw) {
        a.q_raw = c->q_raw->t[side];
        a.k_raw = c->k_raw->t[side];
    }
    b->ops->attn_in(b, &a);
}

static const struct parity_tensor *find(const struct parity *p, const struct tensor *view)
{
    for (int32_t i = 0; i < p->count; i++)
        if (p->tensor[i].t[0].data == view->data)
            return &p->tensor[i];
    fail_msg("no such tensor");
    return NULL;
}

static void attn_in_of_shape(struct backend *shim, const struct parity_shape *shape)
{
    struct forward_case c = {0};
    struct parity *p = &c.p;
    int64_t query, key;

    parity_open(p, shim, shape);
    query = (int64_t)p->config.heads * p->config.head_dim;
    key = (int64_t)p->config.kv_heads * p->config.head_dim;
    c.x = parity_random(p, 2, (int64_t[]){p->rows, p->config.hidden}, 2.0f);
    c.n = rows_of(&c, p->config.hidden);
    c.q = rows_of(&c, query);
    c.k = rows_of(&c, key);
    c.v = rows_of(&c, key);
    c.rstd = parity_output_f32(p, 1, (int64_t[]){p->rows});
    if (p->config.qk_norm && !p->batch[0].serving) {
        c.q_raw = rows_of(&c, query);
        c.k_raw = rows_of(&c, key);
    }
    parity_run(p, run_attn_in, &c);
    parity_equal(p, "q", c.q, parity_tolerance(p));
    parity_equal(p, "k", c.k, parity_tolerance(p));
    parity_equal(p, "v", c.v, parity_tolerance(p));
    if (!p->batch[0].serving)
        parity_equal(p, "rstd", c.rstd, 1e-6);
    if (c.q_raw) {
        parity_equal(p, "q_raw", c.q_raw, parity_tolerance(p));
        parity_equal(p, "k_raw", c.k_raw, parity_tolerance(p));
    }
    if (shape->cache) {
        parity_equal(p, "cached k", find(p, &p->kv[0].k), parity_tolerance(p));
        parity_equal(p, "cached v", find(p, &p->kv[0].v), parity_tolerance(p));
    }
    parity_close(p);
}

static void test_attn_in(void **state)
{
    shim_every_shape(*state, parity_training_shapes, attn_in_of_shape);
    shim_every_shape(*state, parity_serving_shapes, attn_in_of_shape);
}

/* ------------------------------------------------------------------ attn_out */

static void run_attn_out(void *context, int side)
{
    struct forward_case *c = context;
    struct backend *b = c->p.backend[side];

    b->ops->attn_out(b, &(struct attn_out_args){
                            .weights = &c->p.layer[side],
                            .layer = c->p.layer_index,
                            .batch = &c->p.batch[side],
                            .attn = c->attn->t[side],
                            .x = c->x->t[side],
                            .y = c->y->t[side],
                        });
}

static void attn_out_of_shape(struct backend *shim, const struct parity_shape *shape)
{
    struct forward_case c = {0};
    struct parity *p = &c.p;

    for (int in_place = 0; in_place < 2; in_place++) {
        parity_open(p, shim, shape);
        c.x = parity_random(p, 2, (int64_t[]){p->rows, p->config.hidden}, 2.0f);
        c.attn = parity_random(
            p, 2, (int64_t[]){p->rows, (int64_t)p->config.heads * p->config.head_dim}, 1.0f);
        c.y = in_place ? c.x : rows_of(&c, p->config.hidden);
        parity_run(p, run_attn_out, &c);
        parity_equal(p, "y", c.y, parity_tolerance(p));
        parity_close(p);
    }
}

static void test_attn_out(void **state)
{
    shim_every_shape(*state, parity_training_shapes, attn_out_of_shape);
    shim_every_shape(*state, parity_serving_shapes, attn_out_of_shape);
}

/* ------------------------------------------------------------------ mlp */

static void run_mlp(void *context, int side)
{
    struct forward_case *c = context;
    struct backend *b = c->p.backend[side];
    struct mlp_args a = {
        .config = &c->p.config,
        .weights = &c->p.layer[side],
        .layer = c->p.layer_index,
        .batch = &c->p.batch[side],
        .x = c->x->t[side],
        .n = c->n->t[side],
        .gate = c->gate->t[side],
        .up = c->up->t[side],
        .act = c->act->t[side],
        .y = c->y->t[side],
    };

    if (!c->p.batch[side].serving)
        a.rstd = c->rstd->t[side];
    b->ops->mlp(b, &a);
}

/* Training keeps gate and up; serving works in place. */
static void mlp_of_shape(struct backend *shim, const struct parity_shape *shape)
{
    struct forward_case c = {0};
    struct parity *p = &c.p;
    bool serving;

    parity_open(p, shim, shape);
    serving = p->batch[0].serving;
    c.x = parity_random(p, 2, (int64_t[]){p->rows, p->config.hidden}, 2.0f);
    c.n = rows_of(&c, p->config.hidden);
    c.gate = rows_of(&c, p->config.intermediate);
    c.up = rows_of(&c, p->config.intermediate);
    c.act = serving ? c.gate : rows_of(&c, p->config.intermediate);
    c.rstd = parity_output_f32(p, 1, (int64_t[]){p->rows});
    c.y = serving ? c.x : rows_of(&c, p->config.hidden);
    parity_run(p, run_mlp, &c);
    parity_equal(p, "y", c.y, parity_tolerance(p));
    if (!serving) {
        parity_equal(p, "gate", c.gate, parity_tolerance(p));
        parity_equal(p, "up", c.up, parity_tolerance(p));
        parity_equal(p, "rstd", c.rstd, 1e-6);
    }
    parity_close(p);
}

static void test_mlp(void **state)
{
    shim_every_shape(*state, parity_training_shapes, mlp_of_shape);
    shim_every_shape(*state, parity_serving_shapes, mlp_of_shape);
}

/* ------------------------------------------------------------------ head */

static void run_head(void *context, int side)
{
    struct forward_case *c = context;
    struct backend *b = c->p.backend[side];

    b->ops->head(b, &(struct head_args){
                        .config = &c->p.config,
                        .final_norm = c->p.final_norm[side],
                        .head = c->p.head[side],
                        .batch = &c->p.batch[side],
                        .x = c->x->t[side],
                        .row = c->head_row,
                        .count = c->head_count,
                        .n = c->n->t[side],
                        .logits = c->logits->t[side],
                    });
}

static void head_of_shape(struct backend *shim, const struct parity_shape *shape)
{
    struct forward_case c = {0};
    struct parity *p = &c.p;

    parity_open(p, shim, shape);
    for (int32_t r = 0; r < p->rows; r++)
        if (r % 3 != 1)
            c.head_row[c.head_count++] = r;
    c.x = parity_random(p, 2, (int64_t[]){p->rows, p->config.hidden}, 2.0f);
    c.n = parity_output(p, 2, (int64_t[]){c.head_count, p->config.hidden});
    c.logits = parity_output_f32(p, 2, (int64_t[]){c.head_count, p->config.vocabulary});
    parity_run(p, run_head, &c);
    parity_equal(p, "logits", c.logits, parity_tolerance(p));
    parity_close(p);
}

static void test_head(void **state)
{
    shim_every_shape(*state, parity_training_shapes, head_of_shape);
    shim_every_shape(*state, parity_serving_shapes, head_of_shape);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_attn_in),
        cmocka_unit_test(test_attn_out),
        cmocka_unit_test(test_mlp),
        cmocka_unit_test(test_head),
    };

    return cmocka_run_group_tests_name("f32", tests, shim_setup, shim_teardown) +
           cmocka_run_group_tests_name("bf16", tests, shim_setup_bf16, shim_teardown);
}
