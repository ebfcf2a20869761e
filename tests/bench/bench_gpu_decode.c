#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/bench/bench_gpu.h"

#define WARM_UP 3
#define STEPS 20
#define SPARE ((int64_t)2 << 30)
#define MATRICES 7 /* of a layer: q, k, v, o, gate, up, down */

struct decode_bench {
    struct bench *b;
    struct model_decoder *decoder;
    struct kv_cache cache;
    int32_t tenants;
    struct adapter *tenant;       /* [tenants] */
    struct packed_delta **packed; /* [tenants · layers · MATRICES] */
    int64_t packed_count, delta_bytes;
    struct packed_delta *first[MATRICES]; /* which the others are clones of */
};

/* ------------------------------------------------------------------ tenants */

static const struct tensor *matrix_of(const struct layer_weights *w, int32_t i)
{
    const struct tensor *of[MATRICES] = {&w->q.w,    &w->k.w,  &w->v.w,   &w->o.w,
                                         &w->gate.w, &w->up.w, &w->down.w};

    return of[i];
}

static struct adapter_linear *linear_of(struct adapter_layer *a, int32_t i)
{
    struct adapter_linear *of[MATRICES] = {&a->q, &a->k, &a->v, &a->o, &a->gate, &a->up, &a->down};

    return of[i];
}

static int pack_first(struct bench *b, const struct tensor *w, struct packed_delta **out)
{
    int32_t rows = (int32_t)w->shape[0], cols = (int32_t)w->shape[1];
    size_t words = (size_t)rows * (size_t)((cols + 31) / 32);
    uint32_t *bits = malloc(words * sizeof *bits);
    float scale = 1e-3f;
    int rc;

    if (!bits)
        return err_set(&b->err, ERR_NO_MEMORY, "no memory for a delta");
    for (size_t i = 0; i < words; i++) {
        uint32_t z = (uint32_t)(i + 1) * 2654435761u;

        bits[i] = (z ^ z >> 15) * 2246822519u;
    }
    rc = b->backend.ops->delta_pack(&b->backend,
                                    &(struct delta_tensor){.kind = DELTA_SIGN,
                                                           .rows = rows,
                                                           .cols = cols,
                                                           .bits = bits,
                                                           .scale = &scale,
                                                           .scale_count = 1},
                                    out, &b->err);
    free(bits);
    return rc;
}

static int open_tenant(struct decode_bench *d, struct adapter *tenant)
{
    int32_t layers = d->b->config.layers;

    tenant->layer = calloc((size_t)layers, sizeof *tenant->layer);
    if (!tenant->layer)
        return err_set(&d->b->err, ERR_NO_MEMORY, "no memory for a tenant");
    for (int32_t l = 0; l < layers; l++)
        for (int32_t i = 0; i < MATRICES; i++) {
            struct packed_delta **own = &d->packed[d->packed_count];

            if (cuda_bench_clone(&d->b->backend, d->first[i], own, &d->b->err))
                return -1;
            linear_of(&tenant->layer[l], i)->delta = *own;
            d->packed_count++;
        }
    return 0;
}

/* As many as fit, up to the shape's. */
static int open_tenants(struct decode_bench *d)
{
    struct bench *b = d->b;
    const struct model_weights *w = model_base_weights(b->model);
    int64_t room = b->device.memory_free - SPARE -
                   2 * (bench_block_weights(&b->config) +
                        bench_head_weights(&b->config) * (b->config.tied_embeddings ? 1 : 2)) -
                   model_kv_cache_bytes(&b->config, b->backend.activation, b->shape->tenants,
                                        b->shape->past + STEPS + WARM_UP);

    for (int32_t i = 0; i < MATRICES; i++) {
        if (pack_first(b, matrix_of(&w->layer[0], i), &d->first[i]))
            return -1;
        d->delta_bytes += b->backend.ops->delta_bytes(d->first[i]) * b->config.layers;
    }
    d->tenants = b->shape->tenants;
    while (d->tenants > 1 && d->tenants * d->delta_bytes > room && room > 0)
        d->tenants--;
    d->tenant = calloc((size_t)d->tenants, sizeof *d->tenant);
    d->packed = calloc((size_t)d->tenants * (size_t)b->config.layers * MATRICES, sizeof *d->packed);
    if (!d->tenant || !d->packed)
        return err_set(&b->err, ERR_NO_MEMORY, "no memory for %d tenants", d->tenants);
    for (int32_t t = 0; t < d->tenants; t++)
        if (open_tenant(d, &d->tenant[t]))
            return -1;
    return 0;
}

static void close_decode(struct decode_bench *d)
{
    struct backend *b = &d->b->backend;

    for (int64_t i = 0; i < d->packed_count; i++)
        b->ops->delta_free(b, d->packed[i]);
    for (int32_t i = 0; i < MATRICES; i++)
        if (d->first[i])
            b->ops->delta_free(b, d->first[i]);
    for (int32_t t = 0; d->tenant && t < d->tenants; t++)
        free(d->tenant[t].layer);
    free(d->packed);
    free(d->tenant);
    if (d->cache.k.data)
        model_kv_cache_close(&d->cache, d->b->model);
    model_decoder_free(d->decoder);
    bench_close_model(d->b);
}

/* ------------------------------------------------------------------ steps */

#define MOST 64

/* Each of `sequences` reads one token; of the base, or each of its own tenant. */
static int one_step(struct decode_bench *d, int32_t sequences, bool tenants, int32_t step)
{
    int32_t token[MOST], position[MOST], cu_seqlens[MOST + 1] = {0}, row[MOST], chosen[MOST];
    struct batch_slot slot[MOST];
    struct sample_row sample[MOST] = {{0}};
    const struct adapter *adapter[MOST];
    int32_t past = d->b->shape->past + step;
    const struct batch batch = {.rows = sequences,
                                .token = token,
                                .position = position,
                                .docs = sequences,
                                .cu_seqlens = cu_seqlens,
                                .slot = slot,
                                .segments = {sequences, cu_seqlens, adapter},
                                .serving = true};

    for (int32_t i = 0; i < sequences; i++) {
        token[i] = (int32_t)((uint32_t)(i * 977 + step + 1) * 2654435761u %
                             (uint32_t)d->b->config.vocabulary);
        position[i] = past;
        cu_seqlens[i + 1] = i + 1;
        row[i] = i;
        slot[i] = (struct batch_slot){i, past};
        adapter[i] = tenants ? &d->tenant[i] : NULL;
    }
    return model_decode(d->decoder,
                        &(struct model_decode_args){.batch = &batch,
                                                    .cache = &d->cache,
                                                    .logit_row = row,
                                                    .logit_count = sequences,
                                                    .sample = sample,
                                                    .chosen = chosen},
                        &d->b->err);
}

/* Seconds of a step. */
static int time_steps(struct decode_bench *d, int32_t sequences, bool tenants, double *seconds)
{
    double began = 0;

    for (int32_t i = 0; i < WARM_UP + STEPS; i++) {
        if (i == WARM_UP)
            began = bench_now();
        if (one_step(d, sequences, tenants, i))
            return -1;
    }
    *seconds = (bench_now() - began) / STEPS;
    return 0;
}

/* Bytes that a step must read: weights and head once, each tenant's bits, keys and values. */
static double bytes_of_step(const struct decode_bench *d, int32_t sequences, bool tenants)
{
    const struct model_config *c = &d->b->config;
    double kv = 2.0 * c->layers * c->kv_heads * c->head_dim * 2 * (d->b->shape->past + STEPS / 2);

    return 2.0 * (double)(bench_block_weights(c) + bench_head_weights(c)) + sequences * kv +
           (tenants ? sequences * (double)d->delta_bytes : 0);
}

static int measure(struct decode_bench *d, int32_t sequences)
{
    double base, own, bytes = bytes_of_step(d, sequences, true), rate;

    if (time_steps(d, sequences, false, &base) || time_steps(d, sequences, true, &own))
        return -1;
    rate = bytes / own;
    printf("{\"what\": \"decode\", \"shape\": \"%s\", \"precision\": \"bf16\", \"tenants\": %d, "
           "\"past\": %d, \"s_per_step\": %.6f, \"s_per_step_base_alone\": %.6f, "
           "\"tokens_per_s\": %.1f, \"gb_per_step\": %.4f, \"gb_per_s\": %.1f, "
           "\"of_read_ceiling\": %.4f, \"us_per_tenant\": %.2f}\n",
           d->b->shape->name, sequences, d->b->shape->past, own, base, sequences / own, bytes / 1e9,
           rate / 1e9, rate / d->b->ceilings.read, (own - base) / sequences * 1e6);
    fflush(stdout);
    return 0;
}

int bench_decode(struct bench *b)
{
    static const int32_t sequences[] = {1, 4, 16, 64};
    struct decode_bench d = {.b = b};
    int rc = -1;

    if (bench_open_model(b) || open_tenants(&d) ||
        model_decoder_open(&d.decoder, b->model, d.tenants, d.tenants, &b->err) ||
        model_kv_cache_open(&d.cache, b->model, d.tenants, b->shape->past + STEPS + WARM_UP,
                            &b->err))
        goto out;
    cuda_bench_fill(&b->backend, &d.cache.k, 1);
    cuda_bench_fill(&b->backend, &d.cache.v, 1);
    for (size_t i = 0; i < sizeof sequences / sizeof sequences[0]; i++) {
        int32_t n = sequences[i] < d.tenants ? sequences[i] : d.tenants;

        if (measure(&d, n))
            goto out;
        if (n == d.tenants)
            break;
    }
    rc = 0;
out:
    close_decode(&d);
    return rc;
}
