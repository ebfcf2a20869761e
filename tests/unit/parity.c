#include "tests/unit/parity.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/base/rng.h"

#define LAYERS 2
#define CACHE_LEN 96 /* if the shape does not say */
#define SEED 77

const struct parity_shape parity_training_shapes[] = {
    {.name = "grouped heads"},
    {.name = "odd sizes, biases",
     .hidden = 50,
     .intermediate = 77,
     .heads = 3,
     .kv_heads = 1,
     .head_dim = 10,
     .vocabulary = 67,
     .bias = true,
     .doc_rows = {1, 30, 2},
     .seed = 1},
    {.name = "as many kv heads as heads, q and k norms, a long document",
     .kv_heads = 4,
     .head_dim = 32,
     .qk_norm = true,
     .doc_rows = {150, 3},
     .seed = 2},
    {.name = "bf16 weights", .weights = DTYPE_BF16, .seed = 3},
    {.name = "f16 weights, one row", .weights = DTYPE_F16, .doc_rows = {1}, .seed = 4},
    {0},
};

const struct parity_shape parity_serving_shapes[] = {
    {.name = "decode", .doc_rows = {1, 1, 1, 1}, .past = {0, 5, 70, 33}, .cache = true},
    {.name = "prompt chunks beside single tokens, mixed tenants",
     .doc_rows = {17, 1, 5, 1, 1},
     .past = {16, 9, 0, 64, 2},
     .cache = true,
     .tenants = 3,
     .seed = 5},
    {.name = "odd sizes, biases, tenants",
     .hidden = 50,
     .intermediate = 77,
     .heads = 3,
     .kv_heads = 1,
     .head_dim = 10,
     .vocabulary = 67,
     .bias = true,
     .doc_rows = {2, 1, 11},
     .past = {1, 40, 0},
     .cache = true,
     .tenants = 2,
     .seed = 6},
    {.name = "q and k norms, bf16 weights, tenants, whole documents",
     .kv_heads = 4,
     .qk_norm = true,
     .weights = DTYPE_BF16,
     .serving = true,
     .tenants = 4,
     .seed = 7},
    {0},
};

/* ------------------------------------------------------------------ tensors */

static size_t bytes_of(const struct tensor *t)
{
    return (size_t)tensor_elements(t) * (size_t)dtype_size(t->dtype);
}

/* F32 stands for the precision of each side where `activation` is set. */
static struct parity_tensor *add(struct parity *p, enum dtype dtype, bool activation, int rank,
                                 const int64_t *shape)
{
    struct parity_tensor *t = &p->tensor[p->count++];
    struct tensor host = tensor_view(NULL, dtype, rank, shape);
    struct err err = {0};

    assert_true(p->count <= PARITY_MAX_TENSORS);
    t->start = malloc(bytes_of(&host));
    assert_non_null(t->start);
    for (int side = 0; side < 2; side++) {
        struct backend *b = p->backend[side];

        t->t[side] = tensor_view(NULL, activation ? b->activation : dtype, rank, shape);
        t->t[side].data = b->ops->alloc(b, bytes_of(&t->t[side]), &err);
        if (!t->t[side].data)
            fail_msg("%s", err.message);
    }
    return t;
}

static void restart(struct parity *p, const struct parity_tensor *t)
{
    int64_t count = tensor_elements(&t->t[0]);
    uint16_t *half = malloc((size_t)count * sizeof *half);

    assert_non_null(half);
    for (int64_t i = 0; i < count; i++)
        half[i] = f32_to_bf16(((const float *)t->start)[i]);
    for (int side = 0; side < 2; side++)
        p->backend[side]->ops->upload(p->backend[side], t->t[side].data,
                                      t->t[side].dtype == DTYPE_BF16 ? (void *)half : t->start,
                                      bytes_of(&t->t[side]));
    free(half);
}

static float uniform(uint64_t seed, uint64_t stream, int64_t i)
{
    return (float)(2 * rng_unit_at(SEED + seed, stream, (uint64_t)i) - 1);
}

static struct parity_tensor *add_random(struct parity *p, bool activation, int rank,
                                        const int64_t *shape, float size)
{
    struct parity_tensor *t = add(p, DTYPE_F32, activation, rank, shape);
    bool round = activation && p->backend[1]->activation == DTYPE_BF16;
    uint64_t stream = ++p->streams;

    for (int64_t i = 0; i < tensor_elements(&t->t[0]); i++) {
        float value = size * uniform(p->shape.seed, stream, i);

        ((float *)t->start)[i] = round ? bf16_to_f32(f32_to_bf16(value)) : value;
    }
    restart(p, t);
    return t;
}

static struct parity_tensor *add_output(struct parity *p, enum dtype dtype, bool activation,
                                        int rank, const int64_t *shape)
{
    struct parity_tensor *t = add(p, dtype, activation, rank, shape);

    memset(t->start, 0xff, (size_t)tensor_elements(&t->t[0]) * 4);
    restart(p, t);
    return t;
}

struct parity_tensor *parity_random(struct parity *p, int rank, const int64_t *shape, float size)
{
    return add_random(p, true, rank, shape, size);
}

struct parity_tensor *parity_random_f32(struct parity *p, int rank, const int64_t *shape,
                                        float size)
{
    return add_random(p, false, rank, shape, size);
}

struct parity_tensor *parity_output(struct parity *p, int rank, const int64_t *shape)
{
    return add_output(p, DTYPE_F32, true, rank, shape);
}

struct parity_tensor *parity_output_f32(struct parity *p, int rank, const int64_t *shape)
{
    return add_output(p, DTYPE_F32, false, rank, shape);
}

struct parity_tensor *parity_integers(struct parity *p, int64_t count)
{
    return add_output(p, DTYPE_I32, false, 1, &count);
}

double parity_tolerance(const struct parity *p)
{
    return p->backend[1]->activation == DTYPE_BF16 ? 2e-2 : 1e-5;
}

/* A base weight: opened as a model's would be. */
static void weight(struct parity *p, struct tensor *out0, struct tensor *out1, int rank,
                   const int64_t *shape, float size)
{
    struct parity_tensor *t = &p->tensor[p->count++];
    enum dtype dtype = rank == 1 ? DTYPE_F32 : p->shape.weights;
    struct tensor host = tensor_view(NULL, dtype, rank, shape);
    int64_t count = tensor_elements(&host);
    uint64_t stream = ++p->streams;
    struct err err = {0};

    assert_true(p->count <= PARITY_MAX_TENSORS);
    t->is_weight = true;
    host.data = t->start = malloc(bytes_of(&host));
    assert_non_null(t->start);
    for (int64_t i = 0; i < count; i++) {
        float value = size * uniform(p->shape.seed, stream, i) + (rank == 1 && size < 1);

        if (rank > 1 && p->backend[1]->activation == DTYPE_BF16)
            value = bf16_to_f32(f32_to_bf16(value));
        if (dtype == DTYPE_F32)
            ((float *)t->start)[i] = value;
        else
            ((uint16_t *)t->start)[i] =
                dtype == DTYPE_BF16 ? f32_to_bf16(value) : f32_to_f16(value);
    }
    for (int side = 0; side < 2; side++)
        if (p->backend[side]->ops->weight_open(p->backend[side], &host, &t->t[side], &err))
            fail_msg("%s", err.message);
    *out0 = t->t[0];
    *out1 = t->t[1];
}

/* ------------------------------------------------------------------ adapters */

#define MAX_TENANTS 8
#define MAX_DELTAS 160

struct parity_adapters {
    struct adapter adapter[2][MAX_TENANTS];
    struct adapter_layer layer[2][MAX_TENANTS][LAYERS];
    const struct adapter *of_segment[2][32];
    struct packed_delta *delta[2][MAX_DELTAS];
    int32_t deltas;
};

#define DELTA_RANK 5
#define MOST_PLANES 700

/* Random memory that a delta of any kind may point into. */
struct delta_source {
    uint32_t *bits, *more_bits;
    float *scale, *value, *row, *col;
    int32_t vector[MOST_PLANES]; /* of 3, 1, 2, 8, 5, 1, 3, … planes */
};

static void fill(struct parity *p, uint64_t stream, struct delta_source *s, int32_t rows,
                 int32_t cols)
{
    const int32_t width[] = {3, 1, 2, 8, 5, 1};
    int32_t most = (rows > cols ? rows : cols) + MOST_PLANES;
    int32_t words = most * ((most + 31) / 32);

    for (int32_t i = 0, vector = 0, end = 0; i < MOST_PLANES; i++) {
        if (i == 0)
            end = width[0];
        else if (i == end)
            end += width[++vector % 6];
        s->vector[i] = vector;
    }
    s->bits = malloc((size_t)words * sizeof *s->bits);
    s->more_bits = malloc((size_t)words * sizeof *s->more_bits);
    s->scale = malloc((size_t)most * sizeof *s->scale);
    s->row = malloc((size_t)most * sizeof *s->row);
    s->col = malloc((size_t)most * sizeof *s->col);
    s->value = malloc((size_t)rows * (size_t)cols * sizeof *s->value + (size_t)most * 80);
    assert_true(s->bits && s->more_bits && s->scale && s->row && s->col && s->value);
    for (int32_t i = 0; i < words; i++) {
        s->bits[i] = (uint32_t)rng_at(SEED, stream, (uint64_t)i);
        s->more_bits[i] = (uint32_t)rng_at(SEED, stream, (uint64_t)(words + i));
    }
    for (int32_t i = 0; i < most; i++) {
        s->scale[i] = 0.03f * (1.5f + uniform(p->shape.seed, stream, i));
        s->row[i] = 1.5f + uniform(p->shape.seed, stream, 1000 + i);
        s->col[i] = 1.5f + uniform(p->shape.seed, stream, 2000 + i);
    }
    for (int32_t i = 0; i < rows * cols + 20 * most; i++)
        s->value[i] = 0.05f * uniform(p->shape.seed, stream, i);
}

/* Beside more than a block of planes, a rank that needs the more room of the two where the source
 * has so many numbers. */
static int32_t rank_beside(int32_t planes, int32_t rows, int32_t cols)
{
    int64_t most = (int64_t)rows * cols / (rows + cols),
            rank = planes > 64 ? planes + 7 : DELTA_RANK;

    return (int32_t)(rank < most ? rank : most);
}

/* Signs with one scale or many, signs twice, dense, planes, factors: by turns. */
static struct delta_tensor delta_of_kind(const struct delta_source *s, int32_t turn, int32_t planes,
                                         int32_t rows, int32_t cols)
{
    struct delta_tensor d = {.kind = DELTA_SIGN,
                             .rows = rows,
                             .cols = cols,
                             .bits = s->bits,
                             .more_bits = turn == 2 ? s->more_bits : NULL,
                             .scale = s->scale,
                             .scale_count = turn == 1 ? rows : 1};

    if (turn == 3) {
        d.kind = DELTA_DENSE;
        d.dense = tensor_view(s->value, DTYPE_F32, 2, (int64_t[]){rows, cols});
    } else if (turn == 4) {
        d.kind = DELTA_PLANES;
        d.planes = (struct delta_planes){planes,       s->vector[planes - 1] + 1,
                                         s->vector,    s->bits,
                                         s->more_bits, s->scale,
                                         s->scale,     s->row,
                                         s->col};
    } else if (turn == 5) {
        int32_t rank = rank_beside(planes, rows, cols);

        d.kind = DELTA_FACTORS;
        d.factors.left = tensor_view(s->value, DTYPE_F32, 2, (int64_t[]){rows, rank});
        d.factors.right =
            tensor_view(s->value + rows * rank, DTYPE_F32, 2, (int64_t[]){rank, cols});
        d.factors.scale = 1.7f;
    }
    return d;
}

/* One delta on both sides. */
static void make_delta(struct parity *p, const struct packed_delta **out0,
                       const struct packed_delta **out1, int32_t rows, int32_t cols)
{
    struct parity_adapters *a = p->adapters;
    uint64_t stream = ++p->streams;
    int32_t turn = (int32_t)(stream % 6), planes = stream / 6 % 2 ? 9 : 45;
    struct delta_source source;
    struct delta_tensor d;
    struct err err = {0};

    assert_true(a->deltas < MAX_DELTAS);
    if (p->shape.planes) {
        turn = stream % 2 ? 4 : (int32_t)(stream / 2 % 6);
        planes = p->shape.planes;
    }
    fill(p, stream, &source, rows, cols);
    d = delta_of_kind(&source, turn, planes, rows, cols);
    for (int side = 0; side < 2; side++)
        if (p->backend[side]->ops->delta_pack(p->backend[side], &d, &a->delta[side][a->deltas],
                                              &err))
            fail_msg("%s", err.message);
    *out0 = a->delta[0][a->deltas];
    *out1 = a->delta[1][a->deltas];
    a->deltas++;
    free(source.bits);
    free(source.more_bits);
    free(source.scale);
    free(source.row);
    free(source.col);
    free(source.value);
}

/* Part of adapter tenant's layer: a delta for most matrices, a bias for some. */
static void make_linear(struct parity *p, int32_t tenant, int32_t layer, size_t offset,
                        const struct tensor *base)
{
    struct adapter_linear *l[2];
    int32_t rows = (int32_t)base->shape[0], cols = (int32_t)base->shape[1];

    for (int side = 0; side < 2; side++)
        l[side] = (void *)((char *)&p->adapters->layer[side][tenant][layer] + offset);
    if (++p->streams % 5 != 0)
        make_delta(p, &l[0]->delta, &l[1]->delta, rows, cols);
    if (p->shape.bias && p->streams % 2) {
        struct parity_tensor *t = parity_random_f32(p, 1, (int64_t[]){rows}, 1.0f);

        l[0]->b = t->t[0];
        l[1]->b = t->t[1];
    }
}

static void make_norm(struct parity *p, int32_t tenant, int32_t layer, size_t offset, int64_t width)
{
    struct parity_tensor *t;

    if (++p->streams % 3 == 0)
        return;
    t = parity_random_f32(p, 1, &width, 1.5f);
    for (int side = 0; side < 2; side++)
        *(struct tensor *)((char *)&p->adapters->layer[side][tenant][layer] + offset) = t->t[side];
}

#define AT(member) offsetof(struct adapter_layer, member)

static void make_adapter(struct parity *p, int32_t tenant)
{
    struct parity_adapters *a = p->adapters;
    const struct layer_weights *w = &p->layer[0];
    const struct {
        size_t at;
        const struct tensor *base;
    } linear[] = {
        {AT(q), &w->q.w},       {AT(k), &w->k.w},   {AT(v), &w->v.w},       {AT(o), &w->o.w},
        {AT(gate), &w->gate.w}, {AT(up), &w->up.w}, {AT(down), &w->down.w},
    };

    for (int32_t l = 0; l < LAYERS; l++) {
        for (size_t i = 0; i < sizeof linear / sizeof linear[0]; i++)
            make_linear(p, tenant, l, linear[i].at, linear[i].base);
        make_norm(p, tenant, l, AT(attn_norm), p->config.hidden);
        make_norm(p, tenant, l, AT(mlp_norm), p->config.hidden);
        make_norm(p, tenant, l, AT(q_norm), p->config.head_dim);
        make_norm(p, tenant, l, AT(k_norm), p->config.head_dim);
    }
    for (int side = 0; side < 2; side++)
        a->adapter[side][tenant].layer = a->layer[side][tenant];
    if (tenant % 2 == 0) {
        struct parity_tensor *t = parity_random_f32(p, 1, (int64_t[]){p->config.hidden}, 1.5f);

        for (int side = 0; side < 2; side++)
            a->adapter[side][tenant].final_norm = t->t[side];
        make_delta(p, &a->adapter[0][tenant].embed, &a->adapter[1][tenant].embed,
                   p->config.vocabulary, p->config.hidden);
    }
    if (tenant != 1)
        make_delta(p, &a->adapter[0][tenant].head, &a->adapter[1][tenant].head,
                   p->config.vocabulary, p->config.hidden);
}

/* Segments of one to three rows; tenants come back, and some rows are the base's. */
static void make_segments(struct parity *p)
{
    int32_t count = 0, row = 0;

    for (int32_t i = 0; i < p->shape.tenants; i++)
        make_adapter(p, i);
    for (; row < p->rows && count < 31; count++) {
        int32_t tenant = (int32_t)(rng_at(SEED, p->shape.seed, (uint64_t)count) %
                                   (uint64_t)(p->shape.tenants + 1));

        p->segment_start[count] = row;
        for (int side = 0; side < 2; side++)
            p->adapters->of_segment[side][count] =
                tenant < p->shape.tenants ? &p->adapters->adapter[side][tenant] : NULL;
        row += 1 + count % 3;
    }
    p->segment_start[count] = p->rows;
    for (int side = 0; side < 2; side++)
        p->batch[side].segments = (struct row_segments){
            .count = count, .start = p->segment_start, .adapter = p->adapters->of_segment[side]};
}

/* ------------------------------------------------------------------ open */

static void choose_config(struct parity *p)
{
    const struct parity_shape *s = &p->shape;

    p->config = (struct model_config){
        .architecture = "llama",
        .layers = LAYERS,
        .hidden = s->hidden ? s->hidden : 64,
        .intermediate = s->intermediate ? s->intermediate : 96,
        .heads = s->heads ? s->heads : 4,
        .kv_heads = s->kv_heads ? s->kv_heads : 2,
        .head_dim = s->head_dim ? s->head_dim : 16,
        .vocabulary = s->vocabulary ? s->vocabulary : 101,
        .context = 256,
        .rms_norm_eps = 1e-5f,
        .rope_theta = 10000,
        .attention_bias = s->bias,
        .qk_norm = s->qk_norm,
    };
    if (s->doc_rows[0] == 0)
        memcpy(p->shape.doc_rows, (int32_t[]){13, 1, 9}, 3 * sizeof(int32_t));
}

static void make_batch(struct parity *p)
{
    const struct parity_shape *s = &p->shape;
    int32_t half = p->config.head_dim / 2, row = 0;

    while (p->docs < 6 && s->doc_rows[p->docs])
        p->rows += s->doc_rows[p->docs++];
    p->token = calloc((size_t)p->rows, sizeof *p->token);
    p->position = calloc((size_t)p->rows, sizeof *p->position);
    p->cu_seqlens = calloc((size_t)p->docs + 1, sizeof *p->cu_seqlens);
    p->segment_start = calloc(32, sizeof *p->segment_start);
    p->slot = calloc((size_t)p->docs, sizeof *p->slot);
    p->inv_freq = calloc((size_t)half, sizeof *p->inv_freq);
    assert_true(p->token && p->position && p->cu_seqlens && p->segment_start && p->slot &&
                p->inv_freq);
    for (int32_t d = 0; d < p->docs; d++) {
        p->slot[d] = (struct batch_slot){p->docs - 1 - d, s->past[d]};
        for (int32_t i = 0; i < s->doc_rows[d]; i++, row++) {
            /* Tokens repeat: their gradients meet. */
            p->token[row] =
                (int32_t)(rng_at(SEED + s->seed, 1, (uint64_t)row) % 7 * 14) % p->config.vocabulary;
            p->position[row] = s->past[d] + i;
        }
        p->cu_seqlens[d + 1] = row;
    }
    for (int32_t i = 0; i < half; i++)
        p->inv_freq[i] = (float)pow(10000, -2.0 * i / p->config.head_dim);
    for (int side = 0; side < 2; side++)
        p->batch[side] = (struct batch){
            .rows = p->rows,
            .token = p->token,
            .position = p->position,
            .docs = p->docs,
            .cu_seqlens = p->cu_seqlens,
            .slot = s->cache ? p->slot : NULL,
            .serving = s->cache || s->serving,
        };
    p->rope = parity_output_f32(p, 2, (int64_t[]){p->rows, p->config.head_dim});
}

static void make_weights(struct parity *p)
{
    const struct model_config *c = &p->config;
    int64_t d = c->hidden, f = c->intermediate, e = c->head_dim;
    int64_t query = c->heads * e, key = c->kv_heads * e;
    struct layer_weights *l = p->layer;
    float in_d = 1.7f / sqrtf((float)d), in_f = 1.7f / sqrtf((float)f);

    weight(p, &l[0].attn_norm, &l[1].attn_norm, 1, (int64_t[]){d}, 0.3f);
    weight(p, &l[0].mlp_norm, &l[1].mlp_norm, 1, (int64_t[]){d}, 0.3f);
    weight(p, &p->final_norm[0], &p->final_norm[1], 1, (int64_t[]){d}, 0.3f);
    weight(p, &l[0].q.w, &l[1].q.w, 2, (int64_t[]){query, d}, in_d);
    weight(p, &l[0].k.w, &l[1].k.w, 2, (int64_t[]){key, d}, in_d);
    weight(p, &l[0].v.w, &l[1].v.w, 2, (int64_t[]){key, d}, in_d);
    weight(p, &l[0].o.w, &l[1].o.w, 2, (int64_t[]){d, query}, 1.7f / sqrtf((float)query));
    weight(p, &l[0].gate.w, &l[1].gate.w, 2, (int64_t[]){f, d}, in_d);
    weight(p, &l[0].up.w, &l[1].up.w, 2, (int64_t[]){f, d}, in_d);
    weight(p, &l[0].down.w, &l[1].down.w, 2, (int64_t[]){d, f}, in_f);
    weight(p, &p->embed[0], &p->embed[1], 2, (int64_t[]){c->vocabulary, d}, 1.0f);
    weight(p, &p->head[0], &p->head[1], 2, (int64_t[]){c->vocabulary, d}, in_d);
    if (c->attention_bias) {
        weight(p, &l[0].q.b, &l[1].q.b, 1, (int64_t[]){query}, 1.0f);
        weight(p, &l[0].k.b, &l[1].k.b, 1, (int64_t[]){key}, 1.0f);
        weight(p, &l[0].v.b, &l[1].v.b, 1, (int64_t[]){key}, 1.0f);
        weight(p, &l[0].o.b, &l[1].o.b, 1, (int64_t[]){d}, 1.0f);
    }
    if (c->qk_norm) {
        weight(p, &l[0].q_norm, &l[1].q_norm, 1, (int64_t[]){e}, 0.3f);
        weight(p, &l[0].k_norm, &l[1].k_norm, 1, (int64_t[]){e}, 0.3f);
    }
}

static void make_cache(struct parity *p)
{
    int32_t len = p->shape.cache_len ? p->shape.cache_len : CACHE_LEN;
    const int64_t shape[4] = {LAYERS, p->docs, len,
                              (int64_t)p->config.kv_heads * p->config.head_dim};
    struct parity_tensor *k, *v;

    if (!p->shape.cache)
        return;
    k = parity_random(p, 4, shape, 1.0f);
    v = parity_random(p, 4, shape, 1.0f);
    for (int side = 0; side < 2; side++)
        p->kv[side] = (struct kv_cache){k->t[side], v->t[side], p->docs, len};
}

static void begin(struct parity *p, int side)
{
    p->backend[side]->ops->begin(
        p->backend[side],
        &(struct begin_args){
            .config = &p->config,
            .batch = &p->batch[side],
            .inv_freq = tensor_view(p->inv_freq, DTYPE_F32, 1, (int64_t[]){p->config.head_dim / 2}),
            .rope_magnitude = 1.25f,
            .rope = p->rope->t[side],
        });
}

void parity_open(struct parity *p, struct backend *other, const struct parity_shape *shape)
{
    static struct backend cpus[2]; /* for all cases: opening one checks its products */
    struct backend *cpu = &cpus[other->activation == DTYPE_BF16];
    struct err err = {0};

    memset(p, 0, sizeof *p);
    if (!cpu->ops &&
        backend_open(cpu, &(struct backend_options){.precision = other->activation, .threads = 1},
                     &err))
        fail_msg("%s", err.message);
    p->backend[0] = cpu;
    p->backend[1] = other;
    p->shape = *shape;
    p->streams = 100;
    p->layer_index = LAYERS - 1;
    choose_config(p);
    make_batch(p);
    make_weights(p);
    make_cache(p);
    p->adapters = calloc(1, sizeof *p->adapters);
    assert_non_null(p->adapters);
    if (p->shape.tenants)
        make_segments(p);
    for (int side = 0; side < 2; side++)
        begin(p, side);
}

void parity_close(struct parity *p)
{
    struct backend **b = p->backend;

    for (int32_t i = 0; i < p->adapters->deltas; i++)
        for (int side = 0; side < 2; side++)
            b[side]->ops->delta_free(b[side], p->adapters->delta[side][i]);
    for (int32_t i = 0; i < p->count; i++) {
        for (int side = 0; side < 2; side++)
            if (p->tensor[i].is_weight)
                b[side]->ops->weight_close(b[side], &p->tensor[i].t[side]);
            else
                b[side]->ops->free(b[side], p->tensor[i].t[side].data);
        free(p->tensor[i].start);
    }
    free(p->adapters);
    free(p->inv_freq);
    free(p->slot);
    free(p->segment_start);
    free(p->cu_seqlens);
    free(p->position);
    free(p->token);
}

/* ------------------------------------------------------------------ run and compare */

void parity_run(struct parity *p, parity_case *run, void *context)
{
    struct err err = {0};

    for (int32_t i = 0; i < p->count; i++)
        if (!p->tensor[i].is_weight)
            restart(p, &p->tensor[i]);
    for (int side = 0; side < 2; side++) {
        begin(p, side);
        run(context, side);
        if (p->backend[side]->ops->check(p->backend[side], &err))
            fail_msg("%s: %s", p->backend[side]->ops->name, err.message);
    }
}

static bool integers_equal(const int32_t *a, const int32_t *b, int64_t count, double *error)
{
    *error = 0;
    for (int64_t i = 0; i < count; i++)
        *error += a[i] != b[i];
    return *error == 0;
}

static double value_at(const void *data, enum dtype dtype, int64_t i)
{
    return (double)(dtype == DTYPE_BF16 ? bf16_to_f32(((const uint16_t *)data)[i])
                                        : ((const float *)data)[i]);
}

bool parity_is_equal(struct parity *p, const struct parity_tensor *t, double tolerance,
                     double *error)
{
    int64_t count = tensor_elements(&t->t[0]);
    double difference = 0, size = 0, unused;
    void *side[2];
    struct err err = {0};
    bool same;

    error = error ? error : &unused;
    for (int i = 0; i < 2; i++) {
        side[i] = malloc(bytes_of(&t->t[i]));
        assert_non_null(side[i]);
        p->backend[i]->ops->download(p->backend[i], side[i], t->t[i].data, bytes_of(&t->t[i]));
        if (p->backend[i]->ops->check(p->backend[i], &err))
            fail_msg("%s", err.message);
    }
    if (t->t[0].dtype == DTYPE_I32) {
        same = integers_equal(side[0], side[1], count, error);
    } else {
        for (int64_t i = 0; i < count; i++) {
            double want = value_at(side[0], t->t[0].dtype, i);
            double d = value_at(side[1], t->t[1].dtype, i) - want;

            difference += d * d;
            size += want * want;
        }
        *error = difference == 0 ? 0 : sqrt(difference / size);
        same = *error <= tolerance; /* false for NaN */
    }
    free(side[0]);
    free(side[1]);
    return same;
}

void parity_equal(struct parity *p, const char *name, const struct parity_tensor *t,
                  double tolerance)
{
    double error;

    if (!parity_is_equal(p, t, tolerance, &error))
        fail_msg("%s: %s: relative error %.3g, more than %.3g",
                 p->shape.name ? p->shape.name : "default", name, error, tolerance);
}
