#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/bench/bench_gpu.h"

#define WARM_UP 2
#define SPARE ((int64_t)1 << 30) /* what the driver and the products' workspace take */
#define BYTES_PER_WEIGHT 14      /* BF16 itself, F32 gradient and two moments */

struct train_bench {
    struct bench *b;
    struct model_training *pass;
    struct model_weights weights, grads;
    struct parameter *parameter;
    int32_t count, rows;
    void *memory; /* gradients and moments, one behind the other */
    struct tensor norm;
    int32_t *token, *position, *target, *cu_seqlens;
    float *weight;
};

/* ------------------------------------------------------------------ what fits */

static int64_t bytes_of(const struct bench *b, int32_t layers, int32_t rows)
{
    struct model_config c = b->config;

    c.layers = layers;
    return bench_block_weights(&c) * BYTES_PER_WEIGHT +
           2 * bench_head_weights(&c) * (c.tied_embeddings ? 1 : 2) +
           model_training_bytes(&b->backend, &c, rows, false) + SPARE;
}

static int choose_layers(struct bench *b, int32_t rows)
{
    int64_t room = b->device.memory_free;

    if (strcmp(b->shape->name, "tiny") == 0)
        return 0;
    while (b->config.layers > 0 && bytes_of(b, b->config.layers, rows) > room)
        b->config.layers--;
    if (b->config.layers > 0)
        return 0;
    return err_set(&b->err, ERR_NO_MEMORY, "one layer takes %lld bytes, %lld are free",
                   (long long)bytes_of(b, 1, rows), (long long)room);
}

/* ------------------------------------------------------------------ open */

/* The model's own weights are trained, in place: matrices of the blocks, and norms. */
static int open_parameters(struct train_bench *t)
{
    struct backend *b = &t->b->backend;
    struct model *model = t->b->model;
    int32_t tensors = model_tensor_count(model);
    int64_t at = 0, total = 0;
    char name[MODEL_NAME_MAX];

    t->parameter = calloc((size_t)tensors, sizeof *t->parameter);
    if (!t->parameter)
        return err_set(&t->b->err, ERR_NO_MEMORY, "no memory for %d tensors", tensors);
    if (model_weights_alloc(&t->weights, model, &t->b->err) ||
        model_weights_alloc(&t->grads, model, &t->b->err))
        return -1;
    for (int pass = 0; pass < 2; pass++) {
        for (int32_t i = 0; i < tensors; i++) {
            const struct model_weights *base = model_base_weights(model);
            struct tensor *w = model_tensor(model, &t->weights, i, name);
            struct tensor *g = model_tensor(model, &t->grads, i, name);
            struct parameter *p = &t->parameter[t->count];
            int64_t n;

            *w = *model_tensor(model, (struct model_weights *)(uintptr_t)base, i, name);
            n = (tensor_elements(w) + 63) / 64 * 64;
            if (model_tensor_is_embedding(model, i))
                continue;
            if (pass == 0) {
                total += n;
                continue;
            }
            p->w = *w;
            p->g = p->m = p->v = tensor_view(NULL, DTYPE_F32, w->rank, w->shape);
            p->g.data = (float *)t->memory + at;
            p->m.data = (float *)t->memory + total + at;
            p->v.data = (float *)t->memory + 2 * total + at;
            p->decay = w->rank == 2;
            *g = p->g;
            at += n;
            t->count++;
        }
        if (pass == 0)
            t->memory = b->ops->alloc(b, (size_t)total * 3 * sizeof(float), &t->b->err);
        if (!t->memory)
            return -1;
    }
    if (t->b->config.tied_embeddings)
        t->weights.head = t->weights.embed;
    return 0;
}

static int open_batch(struct train_bench *t)
{
    const struct bench_shape *s = t->b->shape;
    size_t rows = (size_t)t->rows;

    t->token = malloc(rows * sizeof *t->token);
    t->position = malloc(rows * sizeof *t->position);
    t->target = malloc(rows * sizeof *t->target);
    t->weight = malloc(rows * sizeof *t->weight);
    t->cu_seqlens = malloc(((size_t)s->documents + 1) * sizeof *t->cu_seqlens);
    if (!t->token || !t->position || !t->target || !t->weight || !t->cu_seqlens)
        return err_set(&t->b->err, ERR_NO_MEMORY, "no memory for a batch");
    for (int32_t i = 0; i <= s->documents; i++)
        t->cu_seqlens[i] = i * s->document;
    for (int32_t r = 0; r < t->rows; r++) {
        t->token[r] = (int32_t)((uint32_t)r * 2654435761u % (uint32_t)t->b->config.vocabulary);
        t->position[r] = r % s->document;
        t->target[r] =
            (int32_t)((uint32_t)(r + 1) * 2654435761u % (uint32_t)t->b->config.vocabulary);
        t->weight[r] = 1.0f / (float)t->rows;
    }
    t->norm = tensor_view(t->b->backend.ops->alloc(&t->b->backend, sizeof(float), &t->b->err),
                          DTYPE_F32, 1, (const int64_t[]){1});
    return t->norm.data ? 0 : -1;
}

static void close_train(struct train_bench *t)
{
    struct backend *b = &t->b->backend;

    if (b->ops) {
        b->ops->free(b, t->norm.data);
        b->ops->free(b, t->memory);
    }
    model_training_free(t->pass);
    model_weights_release(&t->grads);
    model_weights_release(&t->weights);
    free(t->parameter);
    free(t->cu_seqlens);
    free(t->weight);
    free(t->target);
    free(t->position);
    free(t->token);
    bench_close_model(t->b);
}

/* ------------------------------------------------------------------ steps */

static int one_step(struct train_bench *t, int32_t step, struct model_loss *loss)
{
    struct backend *b = &t->b->backend;
    const struct batch batch = {.rows = t->rows,
                                .token = t->token,
                                .position = t->position,
                                .docs = t->b->shape->documents,
                                .cu_seqlens = t->cu_seqlens};

    if (model_loss(t->pass,
                   &(struct model_loss_args){.weights = &t->weights,
                                             .grads = &t->grads,
                                             .batch = &batch,
                                             .target = t->target,
                                             .weight = t->weight},
                   loss, &t->b->err))
        return -1;
    b->ops->gradient_norm(b, &(struct gradient_norm_args){t->parameter, t->count, t->norm});
    b->ops->adamw(b, &(struct adamw_args){.parameter = t->parameter,
                                          .count = t->count,
                                          .norm = t->norm,
                                          .max_norm = 1,
                                          .learning_rate = 1e-5f,
                                          .beta1 = 0.9f,
                                          .beta2 = 0.999f,
                                          .epsilon = 1e-8f,
                                          .step = step + 1,
                                          .seed = 1});
    return b->ops->check(b, &t->b->err);
}

/* Products of a token, forward and backward: 6 a weight of the blocks; of the head 4, since it is
 * frozen; causal attention of a document half of its square, twice a product, 3 times over. */
static double flops_of_token(const struct bench *b)
{
    const struct model_config *c = &b->config;

    return 6.0 * (double)bench_block_weights(c) + 4.0 * (double)bench_head_weights(c) +
           6.0 * c->layers * (double)c->heads * c->head_dim * b->shape->document;
}

static void report(const struct bench *b, double seconds, int32_t rows, double loss)
{
    double rate = rows / seconds, flops = rate * flops_of_token(b), peak = bench_peak(b);
    char mfu[32] = "null";

    if (peak > 0)
        snprintf(mfu, sizeof mfu, "%.4f", flops / peak);
    printf(
        "{\"what\": \"train\", \"shape\": \"%s\", \"precision\": \"bf16\", \"trained\": "
        "\"linear layers and norms\", \"layers\": %d, \"of_layers\": %d, \"tokens_per_step\": %d, "
        "\"s_per_step\": %.4f, \"tokens_per_s\": %.1f, \"tflops\": %.2f, \"mfu\": %s, "
        "\"of_gemm_ceiling\": %.4f, \"loss\": %.4f}\n",
        b->shape->name, b->config.layers, b->shape->config.layers, rows, seconds, rate,
        flops / 1e12, mfu, flops / b->ceilings.gemm_bf16, loss);
}

static int check_table(struct bench *b)
{
    const struct backend_ops *ops = b->backend.ops;

    if (ops->mlp_backward && ops->attn_out_backward && ops->attn_in_backward)
        return 0;
    return err_set(&b->err, ERR_UNAVAILABLE, "the %s backend has no backward stages", ops->name);
}

int bench_train(struct bench *b)
{
    struct train_bench t = {.b = b, .rows = b->shape->document * b->shape->documents};
    struct model_loss loss = {0};
    double began = 0;
    int rc = -1;

    if (choose_layers(b, t.rows) || bench_open_model(b) || check_table(b) ||
        model_training_open(&t.pass, b->model, t.rows, false, &b->err) || open_parameters(&t) ||
        open_batch(&t))
        goto out;
    for (int32_t i = 0; i < WARM_UP + b->shape->repeats; i++) {
        if (i == WARM_UP)
            began = bench_now();
        if (one_step(&t, i, &loss))
            goto out;
    }
    report(b, (bench_now() - began) / b->shape->repeats, t.rows, loss.weighted);
    rc = 0;
out:
    close_train(&t);
    return rc;
}
