#include "engine/model.h"

#include <assert.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LOSS_CHUNK 128 /* rows whose logits are held at once: 25 MB for 49,152 tokens */

struct model {
    struct backend *backend;
    struct model_config config;
    struct model_weights weights;
    struct tensor inv_freq; /* [E/2] host */
    float rope_magnitude;
};

/* ------------------------------------------------------------------ names */

enum width { WIDTH_D, WIDTH_QUERY, WIDTH_KEY, WIDTH_F, WIDTH_E, WIDTH_V, WIDTH_NONE };

/* One tensor of every layer: its canonical name, place in layer_weights and shape. */
struct layer_tensor {
    const char *name;
    size_t offset;
    enum width rows, cols; /* cols WIDTH_NONE: a vector */
    bool linear;
};

static const struct layer_tensor layer_tensors[] = {
    {"input_layernorm.weight", offsetof(struct layer_weights, attn_norm), WIDTH_D, WIDTH_NONE, 0},
    {"self_attn.q_proj.weight", offsetof(struct layer_weights, q.w), WIDTH_QUERY, WIDTH_D, 1},
    {"self_attn.q_proj.bias", offsetof(struct layer_weights, q.b), WIDTH_QUERY, WIDTH_NONE, 0},
    {"self_attn.k_proj.weight", offsetof(struct layer_weights, k.w), WIDTH_KEY, WIDTH_D, 1},
    {"self_attn.k_proj.bias", offsetof(struct layer_weights, k.b), WIDTH_KEY, WIDTH_NONE, 0},
    {"self_attn.v_proj.weight", offsetof(struct layer_weights, v.w), WIDTH_KEY, WIDTH_D, 1},
    {"self_attn.v_proj.bias", offsetof(struct layer_weights, v.b), WIDTH_KEY, WIDTH_NONE, 0},
    {"self_attn.q_norm.weight", offsetof(struct layer_weights, q_norm), WIDTH_E, WIDTH_NONE, 0},
    {"self_attn.k_norm.weight", offsetof(struct layer_weights, k_norm), WIDTH_E, WIDTH_NONE, 0},
    {"self_attn.o_proj.weight", offsetof(struct layer_weights, o.w), WIDTH_D, WIDTH_QUERY, 1},
    {"self_attn.o_proj.bias", offsetof(struct layer_weights, o.b), WIDTH_D, WIDTH_NONE, 0},
    {"post_attention_layernorm.weight", offsetof(struct layer_weights, mlp_norm), WIDTH_D,
     WIDTH_NONE, 0},
    {"mlp.gate_proj.weight", offsetof(struct layer_weights, gate.w), WIDTH_F, WIDTH_D, 1},
    {"mlp.up_proj.weight", offsetof(struct layer_weights, up.w), WIDTH_F, WIDTH_D, 1},
    {"mlp.down_proj.weight", offsetof(struct layer_weights, down.w), WIDTH_D, WIDTH_F, 1},
};
#define LAYER_TENSORS ((int32_t)(sizeof layer_tensors / sizeof layer_tensors[0]))

static int64_t width_of(const struct model_config *c, enum width width)
{
    switch (width) {
    case WIDTH_D:
        return c->hidden;
    case WIDTH_QUERY:
        return (int64_t)c->heads * c->head_dim;
    case WIDTH_KEY:
        return (int64_t)c->kv_heads * c->head_dim;
    case WIDTH_F:
        return c->intermediate;
    case WIDTH_E:
        return c->head_dim;
    case WIDTH_V:
        return c->vocabulary;
    case WIDTH_NONE:
        break;
    }
    return 0;
}

static struct tensor shaped(const struct model_config *c, enum width rows, enum width cols)
{
    const int64_t shape[2] = {width_of(c, rows), width_of(c, cols)};

    return tensor_view(NULL, DTYPE_F32, cols == WIDTH_NONE ? 1 : 2, shape);
}

static struct tensor *layer_tensor_at(struct layer_weights *layer, int32_t i)
{
    return (struct tensor *)((char *)layer + layer_tensors[i].offset);
}

/* The tensors that this model has, in order: embed, those of each layer, final norm, head. A
 * tensor's index counts only what is there. */
static bool layer_has(const struct model *model, int32_t layer, int32_t i)
{
    return layer_tensor_at(&model->weights.layer[layer], i)->data != NULL;
}

int32_t model_tensor_count(const struct model *model)
{
    int32_t count = model->config.tied_embeddings ? 2 : 3;

    for (int32_t l = 0; l < model->config.layers; l++)
        for (int32_t i = 0; i < LAYER_TENSORS; i++)
            count += layer_has(model, l, i);
    return count;
}

/* Where tensor `index` is: layer and number within it; layer -1: embed (0), final norm (1), head
 * (2). */
static bool locate(const struct model *model, int32_t index, int32_t *layer, int32_t *i)
{
    *layer = -1;
    *i = 0;
    if (index-- == 0)
        return true;
    for (*layer = 0; *layer < model->config.layers; ++*layer)
        for (*i = 0; *i < LAYER_TENSORS; ++*i)
            if (layer_has(model, *layer, *i) && index-- == 0)
                return true;
    *layer = -1;
    *i = index == 0 ? 1 : 2;
    return index == 0 || (index == 1 && !model->config.tied_embeddings);
}

struct tensor *model_tensor(const struct model *model, struct model_weights *weights, int32_t index,
                            char name[MODEL_NAME_MAX])
{
    static const char *const outer[] = {"model.embed_tokens.weight", "model.norm.weight",
                                        "lm_head.weight"};
    int32_t layer, i;

    if (index < 0 || !locate(model, index, &layer, &i))
        return NULL;
    if (layer >= 0) {
        snprintf(name, MODEL_NAME_MAX, "model.layers.%d.%s", layer, layer_tensors[i].name);
        return layer_tensor_at(&weights->layer[layer], i);
    }
    snprintf(name, MODEL_NAME_MAX, "%s", outer[i]);
    return i == 0 ? &weights->embed : i == 1 ? &weights->final_norm : &weights->head;
}

bool model_tensor_is_linear(const struct model *model, int32_t index)
{
    int32_t layer, i;

    return locate(model, index, &layer, &i) && layer >= 0 && layer_tensors[i].linear;
}

bool model_tensor_is_embedding(const struct model *model, int32_t index)
{
    int32_t layer, i;

    return locate(model, index, &layer, &i) && layer < 0 && i != 1;
}

int model_weights_alloc(struct model_weights *weights, const struct model *model, struct err *err)
{
    const struct model_config *c = &model->config;

    memset(weights, 0, sizeof *weights);
    weights->layer = calloc((size_t)c->layers, sizeof *weights->layer);
    if (!weights->layer)
        return err_set(err, ERR_NO_MEMORY, "no memory for %d layers", c->layers);
    weights->embed = shaped(c, WIDTH_V, WIDTH_D);
    weights->head = shaped(c, WIDTH_V, WIDTH_D);
    weights->final_norm = shaped(c, WIDTH_D, WIDTH_NONE);
    for (int32_t l = 0; l < c->layers; l++)
        for (int32_t i = 0; i < LAYER_TENSORS; i++)
            *layer_tensor_at(&weights->layer[l], i) =
                shaped(c, layer_tensors[i].rows, layer_tensors[i].cols);
    return 0;
}

void model_weights_release(struct model_weights *weights)
{
    free(weights->layer);
    memset(weights, 0, sizeof *weights);
}

/* ------------------------------------------------------------------ RoPE frequencies */

/* Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, between them a blend. */
static double scale_llama3(const struct model_config *c, double freq)
{
    double wavelength = 2 * M_PI / freq, context = c->rope_original_context;
    double low = c->rope_low_freq_factor, high = c->rope_high_freq_factor;

    if (wavelength < context / high)
        return freq;
    if (wavelength > context / low)
        return freq / c->rope_factor;
    double smooth = (context / wavelength - low) / (high - low);
    return (1 - smooth) * freq / c->rope_factor + smooth * freq;
}

/* YaRN (https://arxiv.org/abs/2309.00071), with its usual bounds of 32 and 1 rotations. */
static double scale_yarn(const struct model_config *c, double freq, int32_t i)
{
    double fast = 32, slow = 1, e = c->head_dim, log_theta = log((double)c->rope_theta);
    double low = floor(e * log(c->rope_original_context / (fast * 2 * M_PI)) / (2 * log_theta));
    double high = ceil(e * log(c->rope_original_context / (slow * 2 * M_PI)) / (2 * log_theta));

    low = low < 0 ? 0 : low;
    high = high > e - 1 ? e - 1 : high;
    double ramp = (i - low) / (high > low ? high - low : 0.001);
    ramp = ramp < 0 ? 0 : ramp > 1 ? 1 : ramp;
    return freq / c->rope_factor * ramp + freq * (1 - ramp);
}

static int open_rope(struct model *model, struct err *err)
{
    const struct model_config *c = &model->config;
    const int64_t half = c->head_dim / 2;
    float *inv_freq = malloc((size_t)half * sizeof *inv_freq);

    if (!inv_freq)
        return err_set(err, ERR_NO_MEMORY, "no memory for RoPE frequencies");
    for (int32_t i = 0; i < half; i++) {
        double freq = pow((double)c->rope_theta, -2.0 * i / c->head_dim);

        switch (c->rope_scaling) {
        case ROPE_SCALING_NONE:
            break;
        case ROPE_SCALING_LINEAR:
            freq /= c->rope_factor;
            break;
        case ROPE_SCALING_LLAMA3:
            freq = scale_llama3(c, freq);
            break;
        case ROPE_SCALING_YARN:
            freq = scale_yarn(c, freq, i);
            break;
        }
        inv_freq[i] = (float)freq;
    }
    model->inv_freq = tensor_view(inv_freq, DTYPE_F32, 1, &half);
    model->rope_magnitude = 1.0f;
    if (c->rope_scaling == ROPE_SCALING_YARN && c->rope_factor > 1)
        model->rope_magnitude = 0.1f * logf(c->rope_factor) + 1.0f;
    return 0;
}

/* ------------------------------------------------------------------ open */

struct opening {
    struct model *model;
    const struct model_source *source;
};

static int open_tensor(const struct opening *o, const char *name, struct tensor *out,
                       struct err *err)
{
    struct backend *b = o->model->backend;
    struct tensor host, want = *out;

    out->data = NULL;
    if (!o->source->tensor(o->source->context, name, &host))
        return 0;
    assert(host.rank == want.rank);
    for (int i = 0; i < want.rank; i++)
        assert(host.shape[i] == want.shape[i]);
    if (b->ops->weight_open(b, &host, out, err))
        return err_prefix(err, "%s", name);
    return 0;
}

static int open_weights(const struct opening *o, struct err *err)
{
    struct model *model = o->model;
    struct model_weights *w = &model->weights;
    char name[MODEL_NAME_MAX];

    if (model_weights_alloc(w, model, err))
        return -1;
    for (int32_t l = 0; l < model->config.layers; l++)
        for (int32_t i = 0; i < LAYER_TENSORS; i++) {
            snprintf(name, sizeof name, "model.layers.%d.%s", l, layer_tensors[i].name);
            if (open_tensor(o, name, layer_tensor_at(&w->layer[l], i), err))
                return -1;
            assert(!layer_tensors[i].linear || layer_has(model, l, i));
        }
    if (open_tensor(o, "model.embed_tokens.weight", &w->embed, err) ||
        open_tensor(o, "model.norm.weight", &w->final_norm, err))
        return -1;
    if (model->config.tied_embeddings)
        w->head = w->embed;
    else if (open_tensor(o, "lm_head.weight", &w->head, err))
        return -1;
    assert(w->embed.data && w->final_norm.data && w->head.data);
    return 0;
}

int model_open_source(struct model **out, struct backend *backend,
                      const struct model_source *source, struct err *err)
{
    struct model *model = calloc(1, sizeof *model);
    struct opening opening = {.model = model, .source = source};

    *out = NULL;
    if (!model)
        return err_set(err, ERR_NO_MEMORY, "no memory for a model");
    model->backend = backend;
    model->config = *source->config;
    if (open_rope(model, err) || open_weights(&opening, err)) {
        model_free(model);
        return -1;
    }
    *out = model;
    return 0;
}

static bool base_tensor(const void *context, const char *name, struct tensor *out)
{
    return base_file_tensor(context, name, out);
}

int model_open(struct model **out, struct backend *backend, const struct base_file *base,
               struct err *err)
{
    struct model_source source = {
        .config = base_file_config(base),
        .tensor = base_tensor,
        .context = base,
    };

    return model_open_source(out, backend, &source, err);
}

static void close_tensor(struct model *model, struct tensor *t)
{
    if (t->data)
        model->backend->ops->weight_close(model->backend, t);
}

void model_free(struct model *model)
{
    if (!model)
        return;
    for (int32_t l = 0; model->weights.layer && l < model->config.layers; l++)
        for (int32_t i = 0; i < LAYER_TENSORS; i++)
            close_tensor(model, layer_tensor_at(&model->weights.layer[l], i));
    if (!model->config.tied_embeddings)
        close_tensor(model, &model->weights.head);
    close_tensor(model, &model->weights.embed);
    close_tensor(model, &model->weights.final_norm);
    model_weights_release(&model->weights);
    free(model->inv_freq.data);
    free(model);
}

const struct model_config *model_get_config(const struct model *model)
{
    return &model->config;
}

struct backend *model_backend(const struct model *model)
{
    return model->backend;
}

const struct model_weights *model_base_weights(const struct model *model)
{
    return &model->weights;
}

/* ------------------------------------------------------------------ memory of a pass */

/* Tensors carved out of one allocation: first counted, then placed. */
struct arena {
    char *memory; /* NULL: counting */
    int64_t used; /* bytes */
};

static struct tensor carve(struct arena *arena, enum dtype dtype, int64_t rows, int64_t cols)
{
    const int64_t shape[2] = {rows, cols};
    struct tensor t = tensor_view(arena->memory ? arena->memory + arena->used : NULL, dtype,
                                  cols > 0 ? 2 : 1, shape);

    arena->used += (tensor_elements(&t) * dtype_size(dtype) + 127) / 64 * 64;
    return t;
}

/* The first `rows` rows of a tensor that was made for more. */
static struct tensor first_rows(struct tensor t, int64_t rows)
{
    assert(rows <= t.shape[0]);
    t.shape[0] = rows;
    return t;
}

static void begin_batch(const struct model *model, const struct batch *batch, struct tensor rope)
{
    model->backend->ops->begin(model->backend, &(struct begin_args){
                                                   .batch = batch,
                                                   .inv_freq = model->inv_freq,
                                                   .rope_magnitude = model->rope_magnitude,
                                                   .rope = rope,
                                               });
}

/* ------------------------------------------------------------------ kv cache */

int64_t model_kv_cache_bytes(const struct model_config *config, int32_t slots, int32_t max_len)
{
    int64_t bytes = 2 * (int64_t)sizeof(float);

    if (__builtin_mul_overflow(bytes, config->layers, &bytes) ||
        __builtin_mul_overflow(bytes, slots, &bytes) ||
        __builtin_mul_overflow(bytes, max_len, &bytes) ||
        __builtin_mul_overflow(bytes, (int64_t)config->kv_heads * config->head_dim, &bytes))
        return -1;
    return bytes;
}

int model_kv_cache_open(struct kv_cache *cache, const struct model *model, int32_t slots,
                        int32_t max_len, struct err *err)
{
    const struct model_config *c = &model->config;
    const int64_t shape[4] = {c->layers, slots, max_len, (int64_t)c->kv_heads * c->head_dim};
    int64_t bytes = model_kv_cache_bytes(c, slots, max_len);

    memset(cache, 0, sizeof *cache);
    if (bytes < 0 || slots < 1 || max_len < 1)
        return err_set(err, ERR_INVALID, "kv cache: %d sequences of %d tokens", slots, max_len);
    cache->slots = slots;
    cache->max_len = max_len;
    cache->k = tensor_view(NULL, DTYPE_F32, 4, shape);
    cache->v = tensor_view(NULL, DTYPE_F32, 4, shape);
    cache->k.data = model->backend->ops->alloc(model->backend, (size_t)bytes / 2, err);
    if (cache->k.data)
        cache->v.data = model->backend->ops->alloc(model->backend, (size_t)bytes / 2, err);
    if (!cache->v.data) {
        model_kv_cache_close(cache, model);
        return -1;
    }
    return 0;
}

void model_kv_cache_close(struct kv_cache *cache, const struct model *model)
{
    if (cache->k.data)
        model->backend->ops->free(model->backend, cache->k.data);
    if (cache->v.data)
        model->backend->ops->free(model->backend, cache->v.data);
    memset(cache, 0, sizeof *cache);
}

/* ------------------------------------------------------------------ serving */

struct model_decoder {
    struct model *model;
    int32_t max_rows, max_logits;
    void *memory;
    struct tensor rope, x, n, q, k, v, attn, gate, up; /* [max_rows, …] */
    struct tensor head_n, logits;                      /* [max_logits, …] */
};

static int64_t place_decoder(struct model_decoder *d, char *memory)
{
    const struct model_config *c = &d->model->config;
    struct arena a = {.memory = memory};
    int64_t query = width_of(c, WIDTH_QUERY), key = width_of(c, WIDTH_KEY);

    d->rope = carve(&a, DTYPE_F32, d->max_rows, c->head_dim);
    d->x = carve(&a, DTYPE_F32, d->max_rows, c->hidden);
    d->n = carve(&a, DTYPE_F32, d->max_rows, c->hidden);
    d->q = carve(&a, DTYPE_F32, d->max_rows, query);
    d->k = carve(&a, DTYPE_F32, d->max_rows, key);
    d->v = carve(&a, DTYPE_F32, d->max_rows, key);
    d->attn = carve(&a, DTYPE_F32, d->max_rows, query);
    d->gate = carve(&a, DTYPE_F32, d->max_rows, c->intermediate);
    d->up = carve(&a, DTYPE_F32, d->max_rows, c->intermediate);
    d->head_n = carve(&a, DTYPE_F32, d->max_logits, c->hidden);
    d->logits = carve(&a, DTYPE_F32, d->max_logits, c->vocabulary);
    return a.used;
}

int model_decoder_open(struct model_decoder **out, struct model *model, int32_t max_rows,
                       int32_t max_logits, struct err *err)
{
    struct model_decoder *d = calloc(1, sizeof *d);

    *out = NULL;
    if (!d)
        return err_set(err, ERR_NO_MEMORY, "no memory for a decoder");
    assert(max_rows > 0 && max_logits > 0);
    d->model = model;
    d->max_rows = max_rows;
    d->max_logits = max_logits;
    d->memory = model->backend->ops->alloc(model->backend, (size_t)place_decoder(d, NULL), err);
    if (!d->memory) {
        free(d);
        return -1;
    }
    place_decoder(d, d->memory);
    *out = d;
    return 0;
}

void model_decoder_free(struct model_decoder *decoder)
{
    if (!decoder)
        return;
    decoder->model->backend->ops->free(decoder->model->backend, decoder->memory);
    free(decoder);
}

static void decode_layer(struct model_decoder *d, const struct model_decode_args *args,
                         const struct model_weights *weights, int32_t layer)
{
    struct backend *b = d->model->backend;
    const struct model_config *c = &d->model->config;
    const struct layer_weights *w = &weights->layer[layer];

    b->ops->attn_in(b, &(struct attn_in_args){
                           .config = c,
                           .weights = w,
                           .layer = layer,
                           .batch = args->batch,
                           .rope = d->rope,
                           .x = d->x,
                           .n = d->n,
                           .q = d->q,
                           .k = d->k,
                           .v = d->v,
                           .cache = args->cache,
                       });
    b->ops->attention(b, &(struct attention_args){
                             .config = c,
                             .layer = layer,
                             .batch = args->batch,
                             .q = d->q,
                             .k = d->k,
                             .v = d->v,
                             .cache = args->cache,
                             .out = d->attn,
                         });
    b->ops->attn_out(b, &(struct attn_out_args){
                            .weights = w,
                            .layer = layer,
                            .batch = args->batch,
                            .attn = d->attn,
                            .x = d->x,
                            .y = d->x,
                        });
    b->ops->mlp(b, &(struct mlp_args){
                       .config = c,
                       .weights = w,
                       .layer = layer,
                       .batch = args->batch,
                       .x = d->x,
                       .n = d->n,
                       .gate = d->gate,
                       .up = d->up,
                       .act = d->gate,
                       .y = d->x,
                   });
}

static void assert_batch(const struct model *model, const struct batch *batch,
                         const struct kv_cache *cache)
{
    assert(batch->docs > 0 && batch->cu_seqlens[0] == 0);
    assert(batch->cu_seqlens[batch->docs] == batch->rows);
    for (int32_t r = 0; r < batch->rows; r++)
        assert(batch->token[r] >= 0 && batch->token[r] < model->config.vocabulary);
    for (int32_t d = 0; cache && d < batch->docs; d++) {
        const struct batch_slot *s = &batch->slot[d];
        int32_t rows = batch->cu_seqlens[d + 1] - batch->cu_seqlens[d];

        assert(s->slot >= 0 && s->slot < cache->slots);
        assert(s->past >= 0 && s->past <= cache->max_len - rows);
        assert(batch->position[batch->cu_seqlens[d]] == s->past);
    }
}

int model_decode(struct model_decoder *d, const struct model_decode_args *args, struct err *err)
{
    struct backend *b = d->model->backend;
    const struct model_weights *weights = args->weights ? args->weights : &d->model->weights;
    struct batch batch = *args->batch;
    struct model_decode_args a = *args;

    batch.serving = true;
    a.batch = &batch;
    assert(batch.rows <= d->max_rows && args->logit_count <= d->max_logits);
    assert_batch(d->model, &batch, args->cache);
    begin_batch(d->model, &batch, d->rope);
    b->ops->embed(b, &(struct embed_args){.batch = &batch, .embed = weights->embed, .x = d->x});
    for (int32_t l = 0; l < d->model->config.layers; l++)
        decode_layer(d, &a, weights, l);
    if (args->logit_count > 0) {
        b->ops->head(b, &(struct head_args){
                            .config = &d->model->config,
                            .final_norm = weights->final_norm,
                            .head = weights->head,
                            .batch = &batch,
                            .x = d->x,
                            .row = args->logit_row,
                            .count = args->logit_count,
                            .n = d->head_n,
                            .logits = d->logits,
                        });
        b->ops->download(b, args->logits, d->logits.data,
                         (size_t)args->logit_count * (size_t)d->model->config.vocabulary *
                             sizeof(float));
    }
    return b->ops->check(b, err);
}

/* ------------------------------------------------------------------ training */

struct layer_activations { /* what backward needs of one layer */
    struct tensor x, attn_rstd, q_raw, k_raw, q, k, v, lse, attn, x_mid, mlp_rstd, gate, up;
};

struct model_training {
    struct model *model;
    int32_t max_rows;
    void *memory;
    struct layer_activations *layer; /* [layers] */
    struct tensor rope, x_out, n, dn, dx, act, d_act, dq, dk, dv, d_attn, delta, nll, correct;
    struct tensor head_n, head_dn, logits; /* [LOSS_CHUNK, …] */
    float *host_nll;                       /* [max_rows] */
    int32_t *host_correct;
};

static void place_layer(struct layer_activations *l, struct arena *a, const struct model_config *c,
                        int32_t rows)
{
    int64_t query = width_of(c, WIDTH_QUERY), key = width_of(c, WIDTH_KEY);

    l->x = carve(a, DTYPE_F32, rows, c->hidden);
    l->attn_rstd = carve(a, DTYPE_F32, rows, 0);
    if (c->qk_norm) {
        l->q_raw = carve(a, DTYPE_F32, rows, query);
        l->k_raw = carve(a, DTYPE_F32, rows, key);
    }
    l->q = carve(a, DTYPE_F32, rows, query);
    l->k = carve(a, DTYPE_F32, rows, key);
    l->v = carve(a, DTYPE_F32, rows, key);
    l->lse = carve(a, DTYPE_F32, rows, c->heads);
    l->attn = carve(a, DTYPE_F32, rows, query);
    l->x_mid = carve(a, DTYPE_F32, rows, c->hidden);
    l->mlp_rstd = carve(a, DTYPE_F32, rows, 0);
    l->gate = carve(a, DTYPE_F32, rows, c->intermediate);
    l->up = carve(a, DTYPE_F32, rows, c->intermediate);
}

static int64_t place_training(struct model_training *t, const struct model_config *c, char *memory)
{
    struct arena a = {.memory = memory};
    int64_t query = width_of(c, WIDTH_QUERY), key = width_of(c, WIDTH_KEY);
    int64_t chunk = t->max_rows < LOSS_CHUNK ? t->max_rows : LOSS_CHUNK;

    for (int32_t l = 0; l < c->layers; l++) {
        struct layer_activations scratch = {0};

        place_layer(t->layer ? &t->layer[l] : &scratch, &a, c, t->max_rows);
    }
    t->rope = carve(&a, DTYPE_F32, t->max_rows, c->head_dim);
    t->x_out = carve(&a, DTYPE_F32, t->max_rows, c->hidden);
    t->n = carve(&a, DTYPE_F32, t->max_rows, c->hidden);
    t->dn = carve(&a, DTYPE_F32, t->max_rows, c->hidden);
    t->dx = carve(&a, DTYPE_F32, t->max_rows, c->hidden);
    t->act = carve(&a, DTYPE_F32, t->max_rows, c->intermediate);
    t->d_act = carve(&a, DTYPE_F32, t->max_rows, c->intermediate);
    t->dq = carve(&a, DTYPE_F32, t->max_rows, query);
    t->dk = carve(&a, DTYPE_F32, t->max_rows, key);
    t->dv = carve(&a, DTYPE_F32, t->max_rows, key);
    t->d_attn = carve(&a, DTYPE_F32, t->max_rows, query);
    t->delta = carve(&a, DTYPE_F32, t->max_rows, c->heads);
    t->nll = carve(&a, DTYPE_F32, t->max_rows, 0);
    t->correct = carve(&a, DTYPE_I32, t->max_rows, 0);
    t->head_n = carve(&a, DTYPE_F32, chunk, c->hidden);
    t->head_dn = carve(&a, DTYPE_F32, chunk, c->hidden);
    t->logits = carve(&a, DTYPE_F32, chunk, c->vocabulary);
    return a.used;
}

int64_t model_training_bytes(const struct model_config *config, int32_t max_rows)
{
    struct model_training t = {.max_rows = max_rows};

    return place_training(&t, config, NULL);
}

int model_training_open(struct model_training **out, struct model *model, int32_t max_rows,
                        struct err *err)
{
    const struct model_config *c = &model->config;
    struct model_training *t = calloc(1, sizeof *t);

    *out = NULL;
    if (!t)
        return err_set(err, ERR_NO_MEMORY, "no memory for a training pass");
    t->model = model;
    t->max_rows = max_rows;
    t->layer = calloc((size_t)c->layers, sizeof *t->layer);
    t->host_nll = calloc((size_t)max_rows, sizeof *t->host_nll);
    t->host_correct = calloc((size_t)max_rows, sizeof *t->host_correct);
    if (!t->layer || !t->host_nll || !t->host_correct) {
        err_set(err, ERR_NO_MEMORY, "no memory for a training pass of %d tokens", max_rows);
        goto fail;
    }
    t->memory = model->backend->ops->alloc(model->backend, (size_t)place_training(t, c, NULL), err);
    if (!t->memory)
        goto fail;
    place_training(t, c, t->memory);
    *out = t;
    return 0;
fail:
    model_training_free(t);
    return -1;
}

void model_training_free(struct model_training *training)
{
    if (!training)
        return;
    if (training->memory)
        training->model->backend->ops->free(training->model->backend, training->memory);
    free(training->host_correct);
    free(training->host_nll);
    free(training->layer);
    free(training);
}

/* Every tensor of a layer cut to the rows of this batch. */
static struct layer_activations activations_of(const struct model_training *t, int32_t layer,
                                               int32_t rows)
{
    struct layer_activations l = t->layer[layer];
    struct tensor *const all[] = {&l.x,    &l.attn_rstd, &l.q,        &l.k,    &l.v, &l.lse,
                                  &l.attn, &l.x_mid,     &l.mlp_rstd, &l.gate, &l.up};

    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        *all[i] = first_rows(*all[i], rows);
    if (l.q_raw.data) {
        l.q_raw = first_rows(l.q_raw, rows);
        l.k_raw = first_rows(l.k_raw, rows);
    }
    return l;
}

static void forward_layer(const struct model_training *t, const struct model_loss_args *args,
                          int32_t layer, struct tensor y)
{
    struct backend *b = t->model->backend;
    const struct model_config *c = &t->model->config;
    const struct layer_weights *w = &args->weights->layer[layer];
    int32_t rows = args->batch->rows;
    struct layer_activations l = activations_of(t, layer, rows);

    b->ops->attn_in(b, &(struct attn_in_args){
                           .config = c,
                           .weights = w,
                           .layer = layer,
                           .batch = args->batch,
                           .rope = first_rows(t->rope, rows),
                           .x = l.x,
                           .n = first_rows(t->n, rows),
                           .q = l.q,
                           .k = l.k,
                           .v = l.v,
                           .rstd = l.attn_rstd,
                           .q_raw = l.q_raw,
                           .k_raw = l.k_raw,
                       });
    b->ops->attention(b, &(struct attention_args){
                             .config = c,
                             .layer = layer,
                             .batch = args->batch,
                             .q = l.q,
                             .k = l.k,
                             .v = l.v,
                             .out = l.attn,
                             .lse = l.lse,
                         });
    b->ops->attn_out(b, &(struct attn_out_args){
                            .weights = w,
                            .layer = layer,
                            .batch = args->batch,
                            .attn = l.attn,
                            .x = l.x,
                            .y = l.x_mid,
                        });
    b->ops->mlp(b, &(struct mlp_args){
                       .config = c,
                       .weights = w,
                       .layer = layer,
                       .batch = args->batch,
                       .x = l.x_mid,
                       .n = first_rows(t->n, rows),
                       .gate = l.gate,
                       .up = l.up,
                       .act = first_rows(t->act, rows),
                       .rstd = l.mlp_rstd,
                       .y = y,
                   });
}

static void backward_layer(const struct model_training *t, const struct model_loss_args *args,
                           int32_t layer)
{
    struct backend *b = t->model->backend;
    const struct model_config *c = &t->model->config;
    const struct layer_weights *w = &args->weights->layer[layer];
    struct layer_weights *grads = &args->grads->layer[layer];
    int32_t rows = args->batch->rows;
    struct layer_activations l = activations_of(t, layer, rows);
    struct tensor dx = first_rows(t->dx, rows), d_attn = first_rows(t->d_attn, rows);
    struct tensor n = first_rows(t->n, rows), dn = first_rows(t->dn, rows);
    struct tensor dq = first_rows(t->dq, rows), dk = first_rows(t->dk, rows);
    struct tensor dv = first_rows(t->dv, rows);

    b->ops->mlp_backward(b, &(struct mlp_backward_args){
                                .config = c,
                                .weights = w,
                                .grads = grads,
                                .x = l.x_mid,
                                .rstd = l.mlp_rstd,
                                .gate = l.gate,
                                .up = l.up,
                                .n = n,
                                .dn = dn,
                                .act = first_rows(t->act, rows),
                                .d_act = first_rows(t->d_act, rows),
                                .dx = dx,
                            });
    b->ops->attn_out_backward(b, &(struct attn_out_backward_args){
                                     .weights = w,
                                     .grads = grads,
                                     .attn = l.attn,
                                     .dy = dx,
                                     .d_attn = d_attn,
                                 });
    b->ops->attention_backward(b, &(struct attention_backward_args){
                                      .config = c,
                                      .batch = args->batch,
                                      .q = l.q,
                                      .k = l.k,
                                      .v = l.v,
                                      .out = l.attn,
                                      .lse = l.lse,
                                      .d_out = d_attn,
                                      .delta = first_rows(t->delta, rows),
                                      .dq = dq,
                                      .dk = dk,
                                      .dv = dv,
                                  });
    b->ops->attn_in_backward(b, &(struct attn_in_backward_args){
                                    .config = c,
                                    .weights = w,
                                    .grads = grads,
                                    .batch = args->batch,
                                    .rope = first_rows(t->rope, rows),
                                    .x = l.x,
                                    .rstd = l.attn_rstd,
                                    .q_raw = l.q_raw,
                                    .k_raw = l.k_raw,
                                    .dq = dq,
                                    .dk = dk,
                                    .dv = dv,
                                    .n = n,
                                    .dn = dn,
                                    .dx = dx,
                                });
}

static void forward(const struct model_training *t, const struct model_loss_args *args)
{
    struct backend *b = t->model->backend;
    int32_t rows = args->batch->rows, layers = t->model->config.layers;

    begin_batch(t->model, args->batch, first_rows(t->rope, rows));
    b->ops->embed(b, &(struct embed_args){
                         .batch = args->batch,
                         .embed = args->weights->embed,
                         .x = first_rows(layers > 0 ? t->layer[0].x : t->x_out, rows),
                     });
    for (int32_t l = 0; l < layers; l++)
        forward_layer(t, args, l, first_rows(l + 1 < layers ? t->layer[l + 1].x : t->x_out, rows));
}

static void loss_and_gradient(const struct model_training *t, const struct model_loss_args *args)
{
    struct backend *b = t->model->backend;
    int32_t rows = args->batch->rows;
    struct head_loss_args head = {
        .config = &t->model->config,
        .final_norm = args->weights->final_norm,
        .head = args->weights->head,
        .batch = args->batch,
        .target = args->target,
        .weight = args->weight,
        .x = first_rows(t->x_out, rows),
        .nll = first_rows(t->nll, rows),
        .correct = first_rows(t->correct, rows),
        .n = t->head_n,
        .dn = t->head_dn,
        .logits = t->logits,
    };

    if (args->grads) {
        head.dx = first_rows(t->dx, rows);
        head.d_final_norm = args->grads->final_norm;
        head.d_head = args->grads->head;
    }
    b->ops->head_loss(b, &head);
    if (!args->grads)
        return;
    for (int32_t l = t->model->config.layers - 1; l >= 0; l--)
        backward_layer(t, args, l);
    b->ops->embed_backward(b, &(struct embed_backward_args){
                                  .batch = args->batch,
                                  .dx = first_rows(t->dx, rows),
                                  .d_embed = args->grads->embed,
                              });
}

int model_loss(struct model_training *t, const struct model_loss_args *args, struct model_loss *out,
               struct err *err)
{
    struct backend *b = t->model->backend;
    struct batch batch = *args->batch;
    struct model_loss_args a = *args;

    batch.serving = false;
    a.batch = &batch;
    assert(batch.rows > 0 && batch.rows <= t->max_rows);
    assert(!batch.slot && batch.segments.count == 0);
    assert_batch(t->model, &batch, NULL);
    forward(t, &a);
    loss_and_gradient(t, &a);
    b->ops->download(b, t->host_nll, t->nll.data, (size_t)batch.rows * sizeof *t->host_nll);
    b->ops->download(b, t->host_correct, t->correct.data,
                     (size_t)batch.rows * sizeof *t->host_correct);
    if (b->ops->check(b, err))
        return -1;
    *out = (struct model_loss){0};
    for (int32_t r = 0; r < batch.rows; r++) {
        if (args->weight[r] == 0)
            continue;
        out->nll += (double)t->host_nll[r];
        out->weighted += (double)args->weight[r] * (double)t->host_nll[r];
        out->correct += t->host_correct[r];
        out->rows++;
    }
    return 0;
}
