#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "engine/model_pass.h"

/* ------------------------------------------------------------------ kv cache */

int64_t model_kv_cache_bytes(const struct model_config *config, enum dtype precision, int32_t slots,
                             int32_t max_len)
{
    int64_t bytes = 2 * dtype_size(precision);

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
    enum dtype precision = model->backend->activation;
    int64_t bytes = model_kv_cache_bytes(c, precision, slots, max_len);

    memset(cache, 0, sizeof *cache);
    if (bytes < 0 || slots < 1 || max_len < 1)
        return err_set(err, ERR_INVALID, "kv cache: %d sequences of %d tokens", slots, max_len);
    cache->slots = slots;
    cache->max_len = max_len;
    cache->k = tensor_view(NULL, precision, 4, shape);
    cache->v = tensor_view(NULL, precision, 4, shape);
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
    struct tensor head_n, logits, chosen;              /* [max_logits, …] */
};

static int64_t place_decoder(struct model_decoder *d, char *memory)
{
    const struct model_config *c = &d->model->config;
    enum dtype precision = d->model->backend->activation;
    struct model_arena a = {.memory = memory};
    int64_t query = model_config_width(c, WIDTH_QUERY), key = model_config_width(c, WIDTH_KEY);

    d->rope = model_arena_carve(&a, DTYPE_F32, d->max_rows, c->head_dim);
    d->x = model_arena_carve(&a, precision, d->max_rows, c->hidden);
    d->n = model_arena_carve(&a, precision, d->max_rows, c->hidden);
    d->q = model_arena_carve(&a, precision, d->max_rows, query);
    d->k = model_arena_carve(&a, precision, d->max_rows, key);
    d->v = model_arena_carve(&a, precision, d->max_rows, key);
    d->attn = model_arena_carve(&a, precision, d->max_rows, query);
    d->gate = model_arena_carve(&a, precision, d->max_rows, c->intermediate);
    d->up = model_arena_carve(&a, precision, d->max_rows, c->intermediate);
    d->head_n = model_arena_carve(&a, precision, d->max_logits, c->hidden);
    d->logits = model_arena_carve(&a, DTYPE_F32, d->max_logits, c->vocabulary);
    d->chosen = model_arena_carve(&a, DTYPE_I32, d->max_logits, 0);
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

/* Logits of the rows that want them, and what is chosen from them. */
static void decode_logits(struct model_decoder *d, const struct model_decode_args *args,
                          const struct model_weights *weights)
{
    struct backend *b = d->model->backend;
    struct tensor logits = model_first_rows(d->logits, args->logit_count);
    struct tensor chosen = model_first_rows(d->chosen, args->logit_count);

    b->ops->head(b, &(struct head_args){
                        .config = &d->model->config,
                        .final_norm = weights->final_norm,
                        .head = weights->head,
                        .batch = args->batch,
                        .x = d->x,
                        .row = args->logit_row,
                        .count = args->logit_count,
                        .n = d->head_n,
                        .logits = logits,
                    });
    if (args->logits)
        b->ops->download(b, args->logits, logits.data,
                         (size_t)tensor_elements(&logits) * sizeof(float));
    if (!args->sample)
        return;
    b->ops->sample(b, &(struct sample_args){logits, args->sample, chosen});
    b->ops->download(b, args->chosen, chosen.data, (size_t)args->logit_count * sizeof(int32_t));
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
    model_assert_batch(d->model, &batch, args->cache);
    model_begin_batch(d->model, &batch, d->rope);
    b->ops->embed(b, &(struct embed_args){.batch = &batch, .embed = weights->embed, .x = d->x});
    for (int32_t l = 0; l < d->model->config.layers; l++)
        decode_layer(d, &a, weights, l);
    if (args->logit_count > 0)
        decode_logits(d, &a, weights);
    return backend_check(b, err);
}
