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

/* Beside the shapes that every stage must get right: those of serving's products. */
static const struct parity_shape shapes[] = {
    {.name = "several chunks of columns for each part, tenants",
     .hidden = 1096,
     .intermediate = 520,
     .heads = 2,
     .kv_heads = 1,
     .vocabulary = 37,
     .doc_rows = {2, 1},
     .past = {3, 0},
     .cache = true,
     .tenants = 2,
     .seed = 8},
    {.name = "sixteen rows, a tenant for nearly each",
     .hidden = 136,
     .doc_rows = {9, 1, 6},
     .serving = true,
     .tenants = 7,
     .seed = 9},
    {.name = "more rows than a block has, tenants",
     .hidden = 72,
     .doc_rows = {50, 1, 22},
     .past = {0, 40, 3},
     .cache = true,
     .tenants = 5,
     .seed = 10},
    {.name = "a long chunk of a prompt, tenants",
     .hidden = 136,
     .intermediate = 200,
     .vocabulary = 150,
     .doc_rows = {130, 3},
     .past = {0, 90},
     .cache = true,
     .cache_len = 140,
     .tenants = 3,
     .seed = 14},
    {.name = "more planes than parts have tiles, single rows, other kinds beside",
     .hidden = 88,
     .vocabulary = 37,
     .doc_rows = {1, 1, 1, 1, 1},
     .past = {3, 0, 9, 1, 2},
     .cache = true,
     .tenants = 4,
     .planes = 700,
     .seed = 16},
    {.name = "planes, odd sizes, chunks of prompts",
     .hidden = 50,
     .intermediate = 77,
     .heads = 3,
     .kv_heads = 1,
     .head_dim = 10,
     .bias = true,
     .doc_rows = {19, 1, 14},
     .serving = true,
     .tenants = 3,
     .planes = 33,
     .seed = 17},
    {.name = "planes, a long chunk of a prompt",
     .hidden = 136,
     .vocabulary = 150,
     .doc_rows = {135, 2},
     .serving = true,
     .tenants = 2,
     .planes = 150,
     .seed = 18},
    {.name = "many rows, many columns, the base alone",
     .hidden = 648,
     .intermediate = 40,
     .heads = 1,
     .kv_heads = 1,
     .vocabulary = 37,
     .doc_rows = {140},
     .serving = true,
     .seed = 15},
    {.name = "more rows than a block has, the base alone",
     .bias = true,
     .doc_rows = {66},
     .serving = true,
     .seed = 11},
    {0},
};

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
    shim_large_shapes(*state, shapes, attn_in_of_shape);
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
    shim_large_shapes(*state, shapes, attn_out_of_shape);
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
    shim_large_shapes(*state, shapes, mlp_of_shape);
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
    if (shape->planes) /* what is between their sides is as good as float, in bf16, too */
        parity_equal(p, "logits", c.logits, 1e-4);
    parity_close(p);
}

static void test_head(void **state)
{
    shim_every_shape(*state, parity_training_shapes, head_of_shape);
    shim_every_shape(*state, parity_serving_shapes, head_of_shape);
    shim_large_shapes(*state, shapes, head_of_shape);
}

/* ------------------------------------------------------------------ a row's bits are its own */

#define MOST_ROWS 140
#define MOST_BYTES 8192

/* Stages over batches of our own making, on the other backend alone. */
struct own_bits {
    struct forward_case c;
    const struct adapter *tenant[8];
    int32_t tenants;
    int32_t number[MOST_ROWS + 1]; /* 0, 1, 2, … */
    int32_t token[MOST_ROWS], position[MOST_ROWS];
    const struct adapter *of_row[MOST_ROWS];
    float x[MOST_ROWS * 256];
    char bytes[MOST_BYTES]; /* all that came out for the row */
    size_t used;
};

static void upload_rows(struct own_bits *o, struct parity_tensor *t, int32_t rows, int64_t width)
{
    struct backend *b = o->c.p.backend[1];
    uint16_t *half = malloc((size_t)(rows * width) * sizeof *half);

    assert_non_null(half);
    for (int64_t i = 0; i < rows * width; i++)
        half[i] = f32_to_bf16(o->x[i]);
    b->ops->upload(b, t->t[1].data, b->activation == DTYPE_BF16 ? (void *)half : o->x,
                   (size_t)(rows * width * dtype_size(b->activation)));
    free(half);
}

static void keep_row(struct own_bits *o, const struct parity_tensor *t, int32_t row)
{
    struct backend *b = o->c.p.backend[1];
    size_t bytes = (size_t)(t->t[1].shape[1] * dtype_size(t->t[1].dtype));

    assert_true(o->used + bytes <= MOST_BYTES);
    b->ops->download(b, o->bytes + o->used, (char *)t->t[1].data + (size_t)row * bytes, bytes);
    o->used += bytes;
}

static float value_of(int32_t row, int64_t column)
{
    return (float)((row * 131 + column * 37 + row * column % 29) % 101 - 50) * 0.02f;
}

/* Row `place` of `rows` is always the same, and tenant 0's; the others are `mix`'s. */
static void make_rows(struct own_bits *o, int32_t rows, int32_t place, int32_t mix)
{
    int64_t width = o->c.p.config.hidden;

    for (int32_t r = 0; r < rows; r++) {
        int32_t which = r == place ? 0 : 1 + r + 50 * mix;

        o->token[r] = which % 7;
        o->position[r] = which % 60;
        o->of_row[r] =
            which % (o->tenants + 1) < o->tenants ? o->tenant[which % (o->tenants + 1)] : NULL;
        for (int64_t i = 0; i < width; i++)
            o->x[r * width + i] = value_of(which, i);
    }
}

static void run_stages(struct own_bits *o, int32_t rows, int32_t place)
{
    struct forward_case *c = &o->c;
    struct parity *p = &c->p;
    struct backend *b = p->backend[1];
    struct err err = {0};

    p->batch[1] = (struct batch){.rows = rows,
                                 .token = o->token,
                                 .position = o->position,
                                 .docs = rows,
                                 .cu_seqlens = o->number,
                                 .segments = {rows, o->number, o->of_row},
                                 .serving = true};
    upload_rows(o, c->x, rows, p->config.hidden);
    upload_rows(o, c->attn, rows, p->config.hidden);
    b->ops->begin(b, &(struct begin_args){
                         .config = &p->config,
                         .batch = &p->batch[1],
                         .inv_freq = tensor_view(p->inv_freq, DTYPE_F32, 1,
                                                 (int64_t[]){p->config.head_dim / 2}),
                         .rope_magnitude = 1,
                         .rope = p->rope->t[1],
                     });
    run_attn_in(c, 1);
    run_attn_out(c, 1);
    o->used = 0;
    keep_row(o, c->q, place);
    keep_row(o, c->k, place);
    keep_row(o, c->v, place);
    keep_row(o, c->y, place);
    run_mlp(c, 1);
    run_head(c, 1);
    keep_row(o, c->y, place);
    keep_row(o, c->logits, c->head_count == rows ? place : 0);
    assert_int_equal(b->ops->check(b, &err), 0);
}

static void open_own_bits(struct own_bits *o, struct backend *shim,
                          const struct parity_shape *shape)
{
    struct forward_case *c = &o->c;
    struct parity *p = &c->p;
    int64_t width = shape->hidden, key = (int64_t)shape->kv_heads * shape->head_dim;

    parity_open(p, shim, shape);
    for (int32_t s = 0; s < p->batch[1].segments.count; s++) {
        const struct adapter *a = p->batch[1].segments.adapter[s];
        bool known = !a;

        for (int32_t i = 0; i < o->tenants; i++)
            known = known || o->tenant[i] == a;
        if (!known)
            o->tenant[o->tenants++] = a;
    }
    assert_true(o->tenants > 2);
    p->rope = parity_output_f32(p, 2, (int64_t[]){MOST_ROWS, shape->head_dim});
    c->x = parity_output(p, 2, (int64_t[]){MOST_ROWS, width});
    c->attn = parity_output(p, 2, (int64_t[]){MOST_ROWS, width});
    c->n = parity_output(p, 2, (int64_t[]){MOST_ROWS, width});
    c->q = parity_output(p, 2, (int64_t[]){MOST_ROWS, width});
    c->k = parity_output(p, 2, (int64_t[]){MOST_ROWS, key});
    c->v = parity_output(p, 2, (int64_t[]){MOST_ROWS, key});
    c->y = parity_output(p, 2, (int64_t[]){MOST_ROWS, width});
    c->gate = c->act = parity_output(p, 2, (int64_t[]){MOST_ROWS, p->config.intermediate});
    c->up = parity_output(p, 2, (int64_t[]){MOST_ROWS, p->config.intermediate});
    c->logits = parity_output_f32(p, 2, (int64_t[]){MOST_ROWS, p->config.vocabulary});
    for (int32_t i = 0; i <= MOST_ROWS; i++)
        o->number[i] = i;
}

static void own_bits_of_shape(struct backend *shim, const struct parity_shape *shape)
{
    const struct {
        int32_t rows, place;
    } batch[] = {{3, 0}, {3, 2}, {8, 5}, {13, 1}, {29, 28}, {40, 17}, {76, 70}, {133, 129}};
    struct own_bits *o = calloc(1, sizeof *o);
    char alone[MOST_BYTES];
    size_t bytes;

    assert_non_null(o);
    open_own_bits(o, shim, shape);
    o->c.head_count = 1;
    make_rows(o, 1, 0, 0);
    run_stages(o, 1, 0);
    memcpy(alone, o->bytes, bytes = o->used);
    for (int32_t i = 0; i < (int32_t)(sizeof batch / sizeof batch[0]); i++) {
        int32_t rows = batch[i].rows;

        /* The logits of all rows, or of this one. */
        o->c.head_count = i % 2 ? rows : 1;
        for (int32_t r = 0; r < rows; r++)
            o->c.head_row[r] = i % 2 ? r : batch[i].place;
        make_rows(o, rows, batch[i].place, i);
        run_stages(o, rows, batch[i].place);
        assert_int_equal(o->used, bytes);
        if (memcmp(alone, o->bytes, bytes) != 0)
            fail_msg("%s: row %d of %d has other bits than alone", shape->name, (int)batch[i].place,
                     (int)rows);
    }
    parity_close(&o->c.p);
    free(o);
}

static void test_bits_of_a_row_are_its_own(void **state)
{
    const struct parity_shape own_shapes[] = {
        {.name = "own bits",
         .hidden = 192,
         .intermediate = 712,
         .heads = 12,
         .kv_heads = 3,
         .head_dim = 16,
         .bias = true,
         .qk_norm = true,
         .doc_rows = {40},
         .serving = true,
         .tenants = 4,
         .seed = 12},
        {.name = "own bits, odd sizes",
         .hidden = 66,
         .intermediate = 77,
         .heads = 11,
         .kv_heads = 1,
         .head_dim = 6,
         .doc_rows = {40},
         .serving = true,
         .tenants = 5,
         .seed = 13},
        {.name = "own bits, planes",
         .hidden = 64,
         .intermediate = 96,
         .heads = 4,
         .kv_heads = 2,
         .head_dim = 16,
         .doc_rows = {40},
         .serving = true,
         .tenants = 4,
         .planes = 600,
         .seed = 19},
    };

    for (int i = 0; i < 3; i++)
        own_bits_of_shape(*state, &own_shapes[i]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_attn_in),
        cmocka_unit_test(test_attn_out),
        cmocka_unit_test(test_mlp),
        cmocka_unit_test(test_head),
        cmocka_unit_test(test_bits_of_a_row_are_its_own),
    };

    return cmocka_run_group_tests_name("f32", tests, shim_setup, shim_teardown) +
           cmocka_run_group_tests_name("bf16", tests, shim_setup_bf16, shim_teardown);
}
