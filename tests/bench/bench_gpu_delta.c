/* The delta alone: one square matrix of the shape's width, with and without the tenants' bits. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/bench/bench_gpu.h"

#define MOST 64
#define TURNS 50
#define COPIES 16 /* of all tenants' bits, in turn: nothing is read from a cache */

struct delta_bench {
    struct bench *b;
    struct layer_weights weights[COPIES];
    struct tensor attn, x, y, rope;
    struct packed_delta *packed[COPIES * MOST];
    int32_t packed_count, copies;
    struct adapter_layer layer[MOST][COPIES];
    struct adapter adapter[MOST];
    int32_t width;
};

static int open_deltas(struct delta_bench *d, int32_t tenants)
{
    struct backend *b = &d->b->backend;
    int32_t words = (d->width + 31) / 32;
    uint32_t *bits = malloc((size_t)d->width * (size_t)words * sizeof *bits);
    float scale = 1e-3f;
    const struct delta_tensor delta = {.kind = DELTA_SIGN,
                                       .rows = d->width,
                                       .cols = d->width,
                                       .bits = bits,
                                       .scale = &scale,
                                       .scale_count = 1};
    int rc = 0;

    if (!bits)
        return err_set(&d->b->err, ERR_NO_MEMORY, "no memory for a delta");
    for (int32_t i = 0; i < d->width * words; i++)
        bits[i] = (uint32_t)(i + 1) * 2654435761u;
    for (int32_t i = 0; i < tenants * d->copies && rc == 0; i++) {
        rc = i == 0 ? b->ops->delta_pack(b, &delta, &d->packed[0], &d->b->err)
                    : cuda_bench_clone(b, d->packed[0], &d->packed[i], &d->b->err);
        if (rc)
            break;
        d->packed_count++;
        d->layer[i % tenants][i / tenants].o.delta = d->packed[i];
        d->adapter[i % tenants].layer = d->layer[i % tenants];
    }
    free(bits);
    return rc;
}

static int take(struct delta_bench *d, struct tensor *out, enum dtype dtype, int64_t rows,
                int64_t cols)
{
    struct backend *b = &d->b->backend;

    *out = tensor_view(NULL, dtype, 2, (const int64_t[]){rows, cols});
    out->data = b->ops->alloc(b, (size_t)(rows * cols) * (size_t)dtype_size(dtype), &d->b->err);
    if (!out->data)
        return -1;
    cuda_bench_fill(b, out, 1);
    return 0;
}

static int open_all(struct delta_bench *d)
{
    const struct cuda_options options = {.ordinal = 0, .precision = DTYPE_BF16};

    if (cuda_backend_open(&d->b->backend, &options, &d->b->err))
        return -1;
    for (int32_t i = 0; i < d->copies; i++)
        if (take(d, &d->weights[i].o.w, DTYPE_BF16, d->width, d->width))
            return -1;
    return take(d, &d->attn, DTYPE_BF16, MOST, d->width) ||
                   take(d, &d->x, DTYPE_BF16, MOST, d->width) ||
                   take(d, &d->y, DTYPE_BF16, MOST, d->width) ||
                   take(d, &d->rope, DTYPE_F32, MOST, 2) || open_deltas(d, d->b->shape->tenants)
               ? -1
               : 0;
}

static void close_all(struct delta_bench *d)
{
    struct backend *b = &d->b->backend;

    if (!b->ops)
        return;
    for (int32_t i = 0; i < d->packed_count; i++)
        b->ops->delta_free(b, d->packed[i]);
    for (int32_t i = 0; i < d->copies; i++)
        b->ops->free(b, d->weights[i].o.w.data);
    b->ops->free(b, d->attn.data);
    b->ops->free(b, d->x.data);
    b->ops->free(b, d->y.data);
    b->ops->free(b, d->rope.data);
    backend_close(b);
}

static struct tensor first(struct tensor t, int32_t rows)
{
    t.shape[0] = rows;
    return t;
}

/* Seconds of a matrix for `rows` rows, each of its own tenant or all of the base. */
static int time_rows(struct delta_bench *d, int32_t rows, bool tenants, double *seconds)
{
    struct backend *b = &d->b->backend;
    struct model_config config = {.layers = d->copies, .hidden = d->width, .head_dim = 2};
    int32_t token[MOST] = {0}, position[MOST] = {0}, cu_seqlens[MOST + 1] = {0};
    const struct adapter *adapter[MOST];
    float inv_freq[1] = {1};
    struct batch batch = {.rows = rows,
                          .token = token,
                          .position = position,
                          .docs = rows,
                          .cu_seqlens = cu_seqlens,
                          .segments = {tenants ? rows : 0, cu_seqlens, adapter},
                          .serving = true};
    double began = 0;

    for (int32_t i = 0; i < rows; i++) {
        cu_seqlens[i + 1] = i + 1;
        adapter[i] = &d->adapter[i];
    }
    b->ops->begin(b, &(struct begin_args){
                         .config = &config,
                         .batch = &batch,
                         .inv_freq = tensor_view(inv_freq, DTYPE_F32, 1, (const int64_t[]){1}),
                         .rope_magnitude = 1,
                         .rope = first(d->rope, rows)});
    for (int32_t i = -d->copies; i < TURNS * d->copies; i++) {
        int32_t copy = (i + d->copies) % d->copies;

        if (i == 0) {
            if (b->ops->check(b, &d->b->err))
                return -1;
            began = bench_now();
        }
        b->ops->attn_out(b, &(struct attn_out_args){.weights = &d->weights[copy],
                                                    .layer = copy,
                                                    .batch = &batch,
                                                    .attn = first(d->attn, rows),
                                                    .x = first(d->x, rows),
                                                    .y = first(d->y, rows)});
    }
    if (b->ops->check(b, &d->b->err))
        return -1;
    *seconds = (bench_now() - began) / (TURNS * d->copies);
    return 0;
}

int bench_delta(struct bench *b)
{
    static struct delta_bench d;
    bool tiny = strcmp(b->shape->name, "tiny") == 0;
    int rc = -1;

    d.b = b;
    d.width = b->config.hidden;
    d.copies = tiny ? 2 : COPIES;
    if (open_all(&d))
        goto out;
    for (int32_t rows = 1; rows <= b->shape->tenants; rows *= 4) {
        double base, own, floor;

        if (time_rows(&d, rows, false, &base) || time_rows(&d, rows, true, &own))
            goto out;
        floor = (double)b->backend.ops->delta_bytes(d.packed[0]) / b->ceilings.read;
        printf("{\"what\": \"delta\", \"matrix\": %d, \"tenants\": %d, \"us_base\": %.3f, "
               "\"us_with_tenants\": %.3f, \"us_per_tenant\": %.3f, \"us_floor_per_tenant\": %.3f, "
               "\"of_read_ceiling\": %.4f}\n",
               d.width, rows, base * 1e6, own * 1e6, (own - base) / rows * 1e6, floor * 1e6,
               own > base ? floor * rows / (own - base) : 0);
        fflush(stdout);
    }
    rc = 0;
out:
    close_all(&d);
    return rc;
}
