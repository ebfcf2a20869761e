/* engine_bench_decode: the speed of a continuous batch: sequences of several tenants that read a
 * prompt of random tokens, then write one token each in every step. Tenants are adapters of random
 * signs over all matrices of the blocks, as large as real ones and too weak to matter. */
#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "engine/base/clock.h"
#include "engine/base/rng.h"
#include "engine/bench.h"
#include "engine/bench_delta.h"
#include "engine/engine_parts.h"
#include "engine/model.h"

#define PREFILL_ROWS 256 /* of one step while the prompts are read */
#define MAX_SHAPES 7     /* of a layer's matrices */

struct decode_bench {
    const struct engine_bench_decode_options *o;
    struct engine *engine;
    struct kv_cache cache;
    struct model_decoder *decoder;
    struct adapter *tenant; /* [tenants] */
    struct packed_delta **packed;
    int32_t packed_count;
    int64_t delta_bytes; /* of one tenant */
    struct bench_delta delta[MAX_SHAPES];
    int32_t shapes;
    int32_t vocabulary;

    /* One step's batch. */
    int32_t *token, *position, *cu_seqlens, *segment_start, *logit_row;
    struct batch_slot *slot;
    const struct adapter **owner;
    struct sample_row *sample; /* [sequences] all greedy */
    double *seconds;           /* [tokens] */
    double *base_seconds;      /* [tokens] of the same step without tenants */
    int32_t *written;          /* [sequences] the token to read next */
};

/* ------------------------------------------------------------------ tenants */

/* The difference that stands for every matrix of its shape: compressed once. */
static int compressed(struct decode_bench *b, const struct codec *codec, int32_t rows, int32_t cols,
                      const struct delta_tensor **out, struct err *err)
{
    int32_t i = 0;

    while (i < b->shapes && (b->delta[i].rows != rows || b->delta[i].cols != cols))
        i++;
    if (i == b->shapes) {
        assert(i < MAX_SHAPES);
        b->shapes++; /* freed after a failure too */
        if (bench_delta_make(&b->delta[i], codec, rows, cols, b->o->ratio, err))
            return -1;
    }
    *out = &b->delta[i].tensor;
    return 0;
}

static int pack(struct decode_bench *b, struct adapter_linear *l, const struct tensor *w,
                const uint32_t *bits, struct err *err)
{
    struct backend *backend = b->engine->backend;
    const float scale = 1e-6f;
    const struct delta_tensor signs = {.kind = DELTA_SIGN,
                                       .rows = (int32_t)w->shape[0],
                                       .cols = (int32_t)w->shape[1],
                                       .bits = bits,
                                       .scale = &scale,
                                       .scale_count = 1};
    const struct delta_tensor *delta = &signs;

    if (b->o->codec && compressed(b, codec_find(b->o->codec), signs.rows, signs.cols, &delta, err))
        return -1;
    if (backend->ops->delta_pack(backend, delta, &b->packed[b->packed_count], err))
        return -1;
    l->delta = b->packed[b->packed_count];
    b->delta_bytes += backend->ops->delta_bytes(l->delta);
    b->packed_count++;
    return 0;
}

static int open_tenant(struct decode_bench *b, struct adapter *tenant, const uint32_t *bits,
                       struct err *err)
{
    const struct model_weights *weights = model_base_weights(b->engine->model);
    int32_t layers = engine_info(b->engine)->layers;

    tenant->layer = calloc((size_t)layers, sizeof *tenant->layer);
    if (!tenant->layer)
        return err_set(err, ERR_NO_MEMORY, "no memory for a tenant");
    b->delta_bytes = 0;
    for (int32_t i = 0; i < layers; i++) {
        const struct layer_weights *w = &weights->layer[i];
        struct adapter_layer *a = &tenant->layer[i];

        if (pack(b, &a->q, &w->q.w, bits, err) || pack(b, &a->k, &w->k.w, bits, err) ||
            pack(b, &a->v, &w->v.w, bits, err) || pack(b, &a->o, &w->o.w, bits, err) ||
            pack(b, &a->gate, &w->gate.w, bits, err) || pack(b, &a->up, &w->up.w, bits, err) ||
            pack(b, &a->down, &w->down.w, bits, err))
            return -1;
    }
    return 0;
}

static int open_tenants(struct decode_bench *b, struct err *err)
{
    const struct engine_base_info *info = engine_info(b->engine);
    const struct model_config *c = model_get_config(b->engine->model);
    int32_t query = c->heads * c->head_dim;
    int32_t rows = info->intermediate > query ? info->intermediate : query;
    size_t words, widest;
    uint32_t *bits;
    int rc = 0;

    rows = rows > info->hidden ? rows : info->hidden;
    widest = ((size_t)rows + 31) / 32;
    words = (size_t)rows * widest;
    bits = malloc(words * sizeof *bits);
    b->tenant = calloc((size_t)b->o->tenants + 1, sizeof *b->tenant);
    b->packed = calloc((size_t)b->o->tenants * (size_t)info->layers * 7 + 1, sizeof *b->packed);
    if (!bits || !b->tenant || !b->packed)
        rc = err_set(err, ERR_NO_MEMORY, "no memory for %d tenants", b->o->tenants);
    for (int32_t t = 0; rc == 0 && t < b->o->tenants; t++) {
        for (size_t i = 0; i < words; i++)
            bits[i] = (uint32_t)rng_at(1, (uint64_t)t, i);
        rc = open_tenant(b, &b->tenant[t], bits, err);
    }
    free(bits);
    return rc;
}

static void close_tenants(struct decode_bench *b)
{
    for (int32_t i = 0; i < b->packed_count; i++)
        b->engine->backend->ops->delta_free(b->engine->backend, b->packed[i]);
    for (int32_t t = 0; b->tenant && t < b->o->tenants; t++)
        free(b->tenant[t].layer);
    for (int32_t i = 0; i < b->shapes; i++)
        bench_delta_free(&b->delta[i]);
    free(b->packed);
    free(b->tenant);
}

/* ------------------------------------------------------------------ steps */

enum step_kind { STEP_READ, STEP_WRITE, STEP_WRITE_BASE };

/* Documents [from, to) read `count` tokens each, `past` of theirs are in the cache. */
static int step(struct decode_bench *b, int32_t from, int32_t to, int32_t past, int32_t count,
                enum step_kind kind, struct err *err)
{
    struct batch batch = {.token = b->token,
                          .position = b->position,
                          .docs = to - from,
                          .cu_seqlens = b->cu_seqlens,
                          .slot = b->slot,
                          .segments = {.start = b->segment_start, .adapter = b->owner}};
    struct model_decode_args args = {.batch = &batch,
                                     .cache = &b->cache,
                                     .logit_row = b->logit_row,
                                     .sample = b->sample,
                                     .chosen = b->written};

    for (int32_t s = from; s < to; s++) {
        b->slot[s - from] = (struct batch_slot){s, past};
        b->cu_seqlens[s - from] = b->segment_start[s - from] = batch.rows;
        b->owner[s - from] =
            b->o->tenants && kind != STEP_WRITE_BASE ? &b->tenant[s % b->o->tenants] : NULL;
        for (int32_t i = 0; i < count; i++, batch.rows++) {
            b->token[batch.rows] = count == 1 && past >= b->o->prompt
                                       ? b->written[s]
                                       : (int32_t)(rng_at(0, (uint64_t)s, (uint64_t)(past + i)) %
                                                   (uint64_t)b->vocabulary);
            b->position[batch.rows] = past + i;
        }
        if (kind != STEP_READ)
            b->logit_row[args.logit_count++] = batch.rows - 1;
    }
    b->cu_seqlens[to - from] = b->segment_start[to - from] = batch.rows;
    batch.segments.count = to - from;
    return model_decode(b->decoder, &args, err);
}

static int read_prompts(struct decode_bench *b, struct err *err)
{
    for (int32_t s = 0; s < b->o->sequences; s++)
        for (int32_t past = 0; past < b->o->prompt; past += PREFILL_ROWS) {
            int32_t left = b->o->prompt - past;

            if (step(b, s, s + 1, past, left < PREFILL_ROWS ? left : PREFILL_ROWS, STEP_READ, err))
                return -1;
            b->written[s] = 1;
        }
    return 0;
}

static int timed_step(struct decode_bench *b, int32_t i, enum step_kind kind, double *seconds,
                      struct err *err)
{
    double began = clock_now();

    if (step(b, 0, b->o->sequences, b->o->prompt + i, 1, kind, err))
        return -1;
    *seconds = clock_now() - began;
    return 0;
}

/* The base's step in between writes the same places of the caches, and the tenants' then again. */
static int write_tokens(struct decode_bench *b, struct err *err)
{
    for (int32_t i = 0; i < b->o->tokens; i++)
        if ((b->o->tenants && timed_step(b, i, STEP_WRITE_BASE, &b->base_seconds[i], err)) ||
            timed_step(b, i, STEP_WRITE, &b->seconds[i], err))
            return -1;
    return 0;
}

/* ------------------------------------------------------------------ the bench */

static int open_batch(struct decode_bench *b, struct err *err)
{
    size_t docs = (size_t)b->o->sequences;
    size_t rows = docs > PREFILL_ROWS ? docs : PREFILL_ROWS;

    b->vocabulary = engine_info(b->engine)->vocabulary;
    b->token = calloc(rows, sizeof *b->token);
    b->position = calloc(rows, sizeof *b->position);
    b->cu_seqlens = calloc(docs + 1, sizeof *b->cu_seqlens);
    b->segment_start = calloc(docs + 1, sizeof *b->segment_start);
    b->logit_row = calloc(docs, sizeof *b->logit_row);
    b->slot = calloc(docs, sizeof *b->slot);
    b->owner = calloc(docs, sizeof *b->owner);
    b->sample = calloc(docs, sizeof *b->sample);
    b->seconds = calloc((size_t)b->o->tokens, sizeof *b->seconds);
    b->base_seconds = calloc((size_t)b->o->tokens, sizeof *b->base_seconds);
    b->written = calloc(docs, sizeof *b->written);
    if (!b->token || !b->position || !b->cu_seqlens || !b->segment_start || !b->logit_row ||
        !b->slot || !b->owner || !b->sample || !b->seconds || !b->base_seconds || !b->written)
        return err_set(err, ERR_NO_MEMORY, "no memory for %d sequences", b->o->sequences);
    if (model_kv_cache_open(&b->cache, b->engine->model, b->o->sequences,
                            b->o->prompt + b->o->tokens, err))
        return -1;
    return model_decoder_open(&b->decoder, b->engine->model, (int32_t)rows, b->o->sequences, err);
}

static void close_batch(struct decode_bench *b)
{
    model_decoder_free(b->decoder);
    if (b->cache.k.data)
        model_kv_cache_close(&b->cache, b->engine->model);
    close_tenants(b);
    free(b->written);
    free(b->seconds);
    free(b->base_seconds);
    free(b->sample);
    free(b->owner);
    free(b->slot);
    free(b->logit_row);
    free(b->segment_start);
    free(b->cu_seqlens);
    free(b->position);
    free(b->token);
    engine_free(b->engine);
}

/* Every weight that a step reads, once: the matrices of the blocks and the head. */
static int64_t bytes_of_step(const struct decode_bench *b)
{
    const struct model_weights *w = model_base_weights(b->engine->model);
    const struct engine_base_info *info = engine_info(b->engine);

    return info->linear_parameters * dtype_size(w->layer[0].q.w.dtype) +
           tensor_elements(&w->head) * dtype_size(w->head.dtype) + b->o->tenants * b->delta_bytes;
}

static int report(struct decode_bench *b, double prefill, char *json, size_t size, struct err *err)
{
    const struct engine_bench_decode_options *o = b->o;
    double each = bench_median(b->seconds, o->tokens);
    char tenants[192] = "";
    struct rusage usage;
    int n;

    if (o->tenants) {
        double base = bench_median(b->base_seconds, o->tokens);

        snprintf(tenants, sizeof tenants,
                 "\"codec\": \"%s\", \"tenant_bytes\": %lld, \"base_s_per_step\": %.5f, "
                 "\"tenant_cost\": %.4f, ",
                 o->codec ? o->codec : "random signs", (long long)b->delta_bytes, base,
                 each / base - 1);
    }

    getrusage(RUSAGE_SELF, &usage);
    n = snprintf(json, size,
                 "{\"what\": \"graft decode\", \"device\": \"%s\", \"precision\": \"%s\", "
                 "\"batch\": %d, \"tenants\": %d, \"prompt\": %d, \"tokens\": %d, "
                 "\"threads\": %d, \"prefill_tokens_per_s\": %.1f, \"tokens_per_s\": %.1f, "
                 "\"s_per_step\": %.5f, %s\"bytes_per_step\": %lld, \"gb_per_s\": %.2f, "
                 "\"peak_rss_mib\": %ld}",
                 o->device, b->engine->backend->activation == DTYPE_BF16 ? "bf16" : "f32",
                 o->sequences, o->tenants, o->prompt, o->tokens, b->engine->backend->threads,
                 (double)o->sequences * o->prompt / prefill, o->sequences / each, each, tenants,
                 (long long)bytes_of_step(b), (double)bytes_of_step(b) / each / 1e9,
                 usage.ru_maxrss / 1024);
    if (n < 0 || (size_t)n >= size)
        return err_set(err, ERR_INTERNAL, "the bench's line needs %d bytes", n + 1);
    return 0;
}

int engine_bench_decode(const struct engine_bench_decode_options *o, char *json, size_t json_size,
                        struct err *err)
{
    const struct engine_options device = {
        .device = o->device, .threads = o->threads, .precision = o->precision};
    struct decode_bench b = {.o = o};
    double began;
    int rc = -1;

    if (o->sequences < 1 || o->sequences > 1024 || o->tenants < 0 || o->tenants > o->sequences ||
        o->prompt < 1 || o->tokens < 1 || o->tokens > 10000)
        return err_set(err, ERR_INVALID,
                       "bench decode: 1 to 1024 sequences, no more tenants than those, a prompt, 1 "
                       "to 10000 tokens");
    if (o->codec && !codec_find(o->codec))
        return err_set(err, ERR_INVALID, "there is no codec \"%.32s\": %s", o->codec,
                       codec_names());
    if (engine_open_model(&b.engine, o->model, &device, err))
        return -1;
    if (o->prompt > engine_info(b.engine)->context - o->tokens) {
        err_set(err, ERR_INVALID, "bench decode: the model's context is %d tokens",
                engine_info(b.engine)->context);
        goto out;
    }
    if (open_batch(&b, err) || open_tenants(&b, err))
        goto out;
    began = clock_now();
    if (read_prompts(&b, err))
        goto out;
    began = clock_now() - began;
    if (write_tokens(&b, err) == 0)
        rc = report(&b, began, json, json_size, err);
out:
    close_batch(&b);
    return rc;
}
