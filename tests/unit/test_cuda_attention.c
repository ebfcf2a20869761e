/* Attention, forward and backward: the CUDA kernels against the CPU; and in serving, a row's bits
 * do not depend on how its prompt was cut nor on the rows beside it. */
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

/* On tensor cores, small: in every order. */
static const struct parity_shape small_shapes[] = {
    {.name = "heads of 32",
     .heads = 2,
     .kv_heads = 1,
     .head_dim = 32,
     .doc_rows = {35, 3},
     .seed = 10},
    {0},
};

/* The head sizes of tensor cores, and others; documents of several tiles; chunks of keys. */
static const struct parity_shape training_shapes[] = {
    {.name = "heads of 64, four to a kv head, long documents",
     .heads = 4,
     .kv_heads = 1,
     .head_dim = 64,
     .doc_rows = {5, 201, 64, 1},
     .seed = 11},
    {.name = "heads of 128, long documents",
     .heads = 2,
     .kv_heads = 1,
     .head_dim = 128,
     .doc_rows = {130, 63, 33},
     .seed = 12},
    {.name = "heads of 256", .heads = 2, .kv_heads = 1, .head_dim = 256, .seed = 13},
    {.name = "heads of 512", .heads = 1, .kv_heads = 1, .head_dim = 512, .seed = 14},
    {.name = "heads of 32, three to a kv head",
     .heads = 3,
     .kv_heads = 1,
     .head_dim = 32,
     .doc_rows = {34, 65},
     .seed = 16},
    {.name = "heads of 96",
     .heads = 2,
     .kv_heads = 2,
     .head_dim = 96,
     .doc_rows = {3, 70},
     .seed = 15},
    {0},
};

static const struct parity_shape serving_shapes[] = {
    {.name = "heads of 64: decode, prompts, chunks of keys",
     .heads = 4,
     .kv_heads = 1,
     .head_dim = 64,
     .doc_rows = {1, 3, 1, 70, 1, 1},
     .past = {255, 250, 256, 200, 599, 0},
     .cache = true,
     .cache_len = 600,
     .seed = 21},
    {.name = "heads of 128: decode, prompts, chunks of keys",
     .heads = 4,
     .kv_heads = 2,
     .head_dim = 128,
     .doc_rows = {65, 1, 1, 2, 1},
     .past = {0, 299, 12, 254, 256},
     .cache = true,
     .cache_len = 300,
     .seed = 22},
    {.name = "heads of 24, seventeen to a kv head, decode alone",
     .heads = 17,
     .kv_heads = 1,
     .head_dim = 24,
     .doc_rows = {1, 1},
     .past = {513, 30},
     .cache = true,
     .cache_len = 514,
     .seed = 23},
    {.name = "heads of 512: decode and a prompt",
     .heads = 2,
     .kv_heads = 1,
     .head_dim = 512,
     .doc_rows = {1, 2},
     .past = {258, 255},
     .cache = true,
     .cache_len = 260,
     .seed = 24},
    {.name = "heads of 64, whole documents without a cache",
     .heads = 2,
     .kv_heads = 1,
     .head_dim = 64,
     .doc_rows = {1, 80},
     .serving = true,
     .seed = 25},
    {0},
};

struct attention_case {
    struct parity p;
    struct parity_tensor *q, *k, *v, *out, *lse;
    struct parity_tensor *d_out, *delta, *dq, *dk, *dv;
};

/* ------------------------------------------------------------------ forward */

static void run_attention(void *context, int side)
{
    struct attention_case *c = context;
    struct backend *b = c->p.backend[side];

    b->ops->attention(b, &(struct attention_args){
                             .config = &c->p.config,
                             .layer = c->p.layer_index,
                             .batch = &c->p.batch[side],
                             .q = c->q->t[side],
                             .k = c->k->t[side],
                             .v = c->v->t[side],
                             .cache = c->p.shape.cache ? &c->p.kv[side] : NULL,
                             .out = c->out->t[side],
                             .lse = c->lse ? c->lse->t[side] : (struct tensor){0},
                         });
}

static void open_case(struct attention_case *c, struct backend *shim,
                      const struct parity_shape *shape)
{
    int64_t width;

    memset(c, 0, sizeof *c);
    parity_open(&c->p, shim, shape);
    width = (int64_t)c->p.config.heads * c->p.config.head_dim;
    c->q = parity_random(&c->p, 2, (int64_t[]){c->p.rows, width}, 2);
    width = (int64_t)c->p.config.kv_heads * c->p.config.head_dim;
    c->k = parity_random(&c->p, 2, (int64_t[]){c->p.rows, width}, 2);
    c->v = parity_random(&c->p, 2, (int64_t[]){c->p.rows, width}, 1);
    c->out = parity_output(&c->p, 2, (int64_t[]){c->p.rows, c->q->t[0].shape[1]});
    if (!c->p.batch[0].serving)
        c->lse = parity_output_f32(&c->p, 2, (int64_t[]){c->p.rows, c->p.config.heads});
}

static void attention_of_shape(struct backend *shim, const struct parity_shape *shape)
{
    struct attention_case c;

    open_case(&c, shim, shape);
    parity_run(&c.p, run_attention, &c);
    parity_equal(&c.p, "out", c.out, parity_tolerance(&c.p));
    if (c.lse)
        parity_equal(&c.p, "lse", c.lse, parity_tolerance(&c.p));
    parity_close(&c.p);
}

static void test_attention_in_training(void **state)
{
    shim_every_shape(*state, parity_training_shapes, attention_of_shape);
    shim_every_shape(*state, small_shapes, attention_of_shape);
    shim_large_shapes(*state, training_shapes, attention_of_shape);
}

static void test_attention_in_serving(void **state)
{
    shim_every_shape(*state, parity_serving_shapes, attention_of_shape);
    shim_large_shapes(*state, serving_shapes, attention_of_shape);
}

/* ------------------------------------------------------------------ bits of a row */

#define PROMPT 150
#define CHUNK 64 /* where prompts are cut: session.h */

/* Rows [from, to) of a prompt in slot 0, with or without others beside it: one that is decoded and
 * three of a prompt. Their queries are the prompt's first ones. */
static void attend(struct parity *p, const struct tensor *q, int32_t from, int32_t to, bool company,
                   float *result)
{
    struct backend *b = p->backend[1];
    int32_t rows = to - from, zero[PROMPT + 4] = {0};
    const int32_t starts[] = {0, rows, rows + 1, rows + 4};
    const struct batch_slot slots[] = {{0, from}, {1, 70}, {2, 9}};
    int64_t width = q->shape[1], size = dtype_size(q->dtype);
    struct batch batch = {.rows = starts[company ? 3 : 1],
                          .token = zero,
                          .position = zero,
                          .docs = company ? 3 : 1,
                          .cu_seqlens = starts,
                          .slot = slots,
                          .serving = true};
    int64_t shape[2] = {batch.rows, width};
    struct tensor query = tensor_view(NULL, q->dtype, 2, shape), out = query, rope;
    size_t row_bytes = (size_t)(width * size), bytes = (size_t)batch.rows * row_bytes;
    char *host = malloc(PROMPT * row_bytes + 4 * row_bytes);
    struct err err = {0};

    assert_non_null(host);
    shape[1] = p->config.head_dim;
    rope = tensor_view(b->ops->alloc(b, (size_t)(batch.rows * shape[1]) * sizeof(float), &err),
                       DTYPE_F32, 2, shape);
    query.data = b->ops->alloc(b, bytes, &err);
    out.data = b->ops->alloc(b, bytes, &err);
    b->ops->download(b, host + 4 * row_bytes, q->data, PROMPT * row_bytes);
    assert_int_equal(b->ops->check(b, &err), 0);
    memmove(host, host + (size_t)(4 + from) * row_bytes, (size_t)rows * row_bytes);
    b->ops->upload(b, query.data, host, bytes);
    b->ops->begin(b, &(struct begin_args){
                         .config = &p->config,
                         .batch = &batch,
                         .inv_freq = tensor_view(p->inv_freq, DTYPE_F32, 1,
                                                 (int64_t[]){p->config.head_dim / 2}),
                         .rope_magnitude = 1,
                         .rope = rope,
                     });
    b->ops->attention(b, &(struct attention_args){
                             .config = &p->config,
                             .layer = p->layer_index,
                             .batch = &batch,
                             .q = query,
                             .cache = &p->kv[1],
                             .out = out,
                         });
    b->ops->download(b, (char *)result + (size_t)from * row_bytes, out.data,
                     (size_t)rows * row_bytes);
    assert_int_equal(b->ops->check(b, &err), 0);
    b->ops->free(b, rope.data);
    b->ops->free(b, query.data);
    b->ops->free(b, out.data);
    free(host);
}

/* A prompt's rows have the same bits at once, in chunks, and with others beside them. */
static void test_bits_of_a_prompt(void **state)
{
    static float whole[PROMPT * 256], again[PROMPT * 256];
    const struct parity_shape shape = {.name = "prompts",
                                       .heads = 2,
                                       .kv_heads = 1,
                                       .head_dim = 64,
                                       .doc_rows = {PROMPT, 2, 2},
                                       .cache = true,
                                       .cache_len = PROMPT,
                                       .seed = 31};
    struct parity p;
    struct parity_tensor *q;

    parity_open(&p, *state, &shape);
    q = parity_random(&p, 2, (int64_t[]){PROMPT, 128}, 2);
    attend(&p, &q->t[1], 0, PROMPT, false, whole);
    for (uint64_t seed = 0; seed < 4; seed++) {
        shim_seed(seed);
        memset(again, 0xff, sizeof again);
        for (int32_t from = 0; from < PROMPT; from += CHUNK)
            attend(&p, &q->t[1], from, from + CHUNK < PROMPT ? from + CHUNK : PROMPT, seed % 2,
                   again);
        assert_memory_equal(whole, again, (size_t)(PROMPT * 128 * dtype_size(q->t[1].dtype)));
    }
    parity_close(&p);
}

/* ------------------------------------------------------------------ backward */

static void run_backward(void *context, int side)
{
    struct attention_case *c = context;
    struct backend *b = c->p.backend[side];

    run_attention(context, side); /* gives out and lse */
    b->ops->attention_backward(b, &(struct attention_backward_args){
                                      .config = &c->p.config,
                                      .batch = &c->p.batch[side],
                                      .q = c->q->t[side],
                                      .k = c->k->t[side],
                                      .v = c->v->t[side],
                                      .out = c->out->t[side],
                                      .lse = c->lse->t[side],
                                      .d_out = c->d_out->t[side],
                                      .delta = c->delta->t[side],
                                      .dq = c->dq->t[side],
                                      .dk = c->dk->t[side],
                                      .dv = c->dv->t[side],
                                  });
}

/* Where each document is one row, softmax has one key and no gradient: dq and dk are 0 but for
 * rounding, and a relative error says nothing. */
static void all_near_zero(struct parity *p, const struct parity_tensor *t)
{
    const struct tensor *x = &t->t[1];
    int64_t count = tensor_elements(x);
    size_t bytes = (size_t)count * (size_t)dtype_size(x->dtype);
    void *host = malloc(bytes);
    struct err err = {0};

    assert_non_null(host);
    p->backend[1]->ops->download(p->backend[1], host, x->data, bytes);
    assert_int_equal(p->backend[1]->ops->check(p->backend[1], &err), 0);
    for (int64_t i = 0; i < count; i++) {
        float value = x->dtype == DTYPE_BF16 ? bf16_to_f32(((const uint16_t *)host)[i])
                                             : ((const float *)host)[i];

        assert_true(fabsf(value) <= (float)parity_tolerance(p));
    }
    free(host);
}

static void backward_of_shape(struct backend *shim, const struct parity_shape *shape)
{
    struct attention_case c;

    open_case(&c, shim, shape);
    c.d_out = parity_random(&c.p, 2, c.q->t[0].shape, 1);
    c.delta = parity_output_f32(&c.p, 2, (int64_t[]){c.p.rows, c.p.config.heads});
    c.dq = parity_output(&c.p, 2, c.q->t[0].shape);
    c.dk = parity_output(&c.p, 2, c.k->t[0].shape);
    c.dv = parity_output(&c.p, 2, c.v->t[0].shape);
    parity_run(&c.p, run_backward, &c);
    if (c.p.rows > c.p.docs) {
        parity_equal(&c.p, "dq", c.dq, parity_tolerance(&c.p));
        parity_equal(&c.p, "dk", c.dk, parity_tolerance(&c.p));
    } else {
        all_near_zero(&c.p, c.dq);
        all_near_zero(&c.p, c.dk);
    }
    parity_equal(&c.p, "dv", c.dv, parity_tolerance(&c.p));
    parity_close(&c.p);
}

static void test_attention_backward(void **state)
{
    shim_every_shape(*state, parity_training_shapes, backward_of_shape);
    shim_every_shape(*state, small_shapes, backward_of_shape);
    shim_large_shapes(*state, training_shapes, backward_of_shape);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_attention_in_training),
        cmocka_unit_test(test_attention_in_serving),
        cmocka_unit_test(test_bits_of_a_prompt),
        cmocka_unit_test(test_attention_backward),
    };

    return cmocka_run_group_tests_name("f32", tests, shim_setup, shim_teardown) +
           cmocka_run_group_tests_name("bf16", tests, shim_setup_bf16, shim_teardown);
}
