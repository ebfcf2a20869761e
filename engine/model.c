#include "engine/model.h"

#include <assert.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/progress.h"
#include "engine/base_layout.h"
#include "engine/model_pass.h"

/* ------------------------------------------------------------------ names */

/* Where each tensor of a block lies in layer_weights. */
static const size_t places[] = {
    [BASE_LAYOUT_ATTN_NORM] = offsetof(struct layer_weights, attn_norm),
    [BASE_LAYOUT_Q] = offsetof(struct layer_weights, q.w),
    [BASE_LAYOUT_K] = offsetof(struct layer_weights, k.w),
    [BASE_LAYOUT_V] = offsetof(struct layer_weights, v.w),
    [BASE_LAYOUT_O] = offsetof(struct layer_weights, o.w),
    [BASE_LAYOUT_Q_BIAS] = offsetof(struct layer_weights, q.b),
    [BASE_LAYOUT_K_BIAS] = offsetof(struct layer_weights, k.b),
    [BASE_LAYOUT_V_BIAS] = offsetof(struct layer_weights, v.b),
    [BASE_LAYOUT_Q_NORM] = offsetof(struct layer_weights, q_norm),
    [BASE_LAYOUT_K_NORM] = offsetof(struct layer_weights, k_norm),
    [BASE_LAYOUT_MLP_NORM] = offsetof(struct layer_weights, mlp_norm),
    [BASE_LAYOUT_GATE] = offsetof(struct layer_weights, gate.w),
    [BASE_LAYOUT_UP] = offsetof(struct layer_weights, up.w),
    [BASE_LAYOUT_DOWN] = offsetof(struct layer_weights, down.w),
};
_Static_assert(sizeof places / sizeof places[0] == BASE_LAYOUT_BLOCK, "each has its place");

static struct tensor shaped(const struct model_config *c, enum base_layout_part part)
{
    int64_t shape[TENSOR_MAX_RANK];
    int rank = base_layout_shape(c, part, shape);

    return tensor_view(NULL, DTYPE_F32, rank, shape);
}

static struct tensor *layer_tensor_at(struct layer_weights *layer, int part)
{
    return (struct tensor *)((char *)layer + places[part]);
}

/* `layer` counts for a block's tensors alone. */
static struct tensor *tensor_at(struct model_weights *weights, int32_t layer, int part)
{
    switch (part) {
    case BASE_LAYOUT_EMBED:
        return &weights->embed;
    case BASE_LAYOUT_FINAL_NORM:
        return &weights->final_norm;
    case BASE_LAYOUT_HEAD:
        return &weights->head;
    default:
        return layer_tensor_at(&weights->layer[layer], part);
    }
}

int32_t model_tensor_count(const struct model *model)
{
    const struct model_config *c = &model->config;
    int32_t block = 0;

    for (int part = 0; part < BASE_LAYOUT_BLOCK; part++)
        block += base_layout_has(c, part);
    return c->layers * block + 2 + base_layout_has(c, BASE_LAYOUT_HEAD);
}

/* Tensor `index` in canonical order: which one it is, and of which layer (-1: of none). */
static bool locate(const struct model *model, int32_t index, int32_t *layer, int *part)
{
    const struct model_config *c = &model->config;

    *layer = -1;
    *part = BASE_LAYOUT_EMBED;
    if (index-- == 0)
        return true;
    for (*layer = 0; *layer < c->layers; ++*layer)
        for (*part = 0; *part < BASE_LAYOUT_BLOCK; ++*part)
            if (base_layout_has(c, *part) && index-- == 0)
                return true;
    *layer = -1;
    *part = index == 0 ? BASE_LAYOUT_FINAL_NORM : BASE_LAYOUT_HEAD;
    return index == 0 || (index == 1 && base_layout_has(c, BASE_LAYOUT_HEAD));
}

struct tensor *model_tensor(const struct model *model, struct model_weights *weights, int32_t index,
                            char name[MODEL_NAME_MAX])
{
    int32_t layer;
    int part;

    if (index < 0 || !locate(model, index, &layer, &part))
        return NULL;
    base_layout_name(part, layer, name, MODEL_NAME_MAX);
    return tensor_at(weights, layer, part);
}

bool model_tensor_is_linear(const struct model *model, int32_t index)
{
    int32_t layer;
    int part;

    return locate(model, index, &layer, &part) && base_layout_is_linear(part);
}

bool model_tensor_is_embedding(const struct model *model, int32_t index)
{
    int32_t layer;
    int part;

    return locate(model, index, &layer, &part) &&
           (part == BASE_LAYOUT_EMBED || part == BASE_LAYOUT_HEAD);
}

int model_weights_alloc(struct model_weights *weights, const struct model *model, struct err *err)
{
    const struct model_config *c = &model->config;

    memset(weights, 0, sizeof *weights);
    weights->layer = calloc((size_t)c->layers, sizeof *weights->layer);
    if (!weights->layer)
        return err_set(err, ERR_NO_MEMORY, "no memory for %d layers", c->layers);
    weights->embed = shaped(c, BASE_LAYOUT_EMBED);
    weights->head = shaped(c, BASE_LAYOUT_HEAD);
    weights->final_norm = shaped(c, BASE_LAYOUT_FINAL_NORM);
    for (int32_t l = 0; l < c->layers; l++)
        for (int part = 0; part < BASE_LAYOUT_BLOCK; part++)
            *layer_tensor_at(&weights->layer[l], part) = shaped(c, part);
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

static int open_tensor(const struct opening *o, int32_t layer, int part, struct err *err)
{
    struct backend *b = o->model->backend;
    struct tensor *out = tensor_at(&o->model->weights, layer, part), host, want = *out;
    char name[MODEL_NAME_MAX];
    bool found;

    if (!base_layout_has(&o->model->config, part))
        return 0;
    base_layout_name(part, layer, name, sizeof name);
    found = o->source->tensor(o->source->context, name, &host);
    assert(found && host.rank == want.rank);
    for (int i = 0; i < want.rank; i++)
        assert(host.shape[i] == want.shape[i]);
    if (b->ops->weight_open(b, &host, out, err))
        return err_prefix(err, "%s", name);
    progress_tick();
    return 0;
}

static int open_weights(const struct opening *o, struct err *err)
{
    struct model *model = o->model;
    struct model_weights *w = &model->weights;

    if (model_weights_alloc(w, model, err))
        return -1;
    for (int32_t l = 0; l < model->config.layers; l++)
        for (int part = 0; part < BASE_LAYOUT_BLOCK; part++)
            if (open_tensor(o, l, part, err))
                return -1;
    if (open_tensor(o, -1, BASE_LAYOUT_EMBED, err) ||
        open_tensor(o, -1, BASE_LAYOUT_FINAL_NORM, err) ||
        open_tensor(o, -1, BASE_LAYOUT_HEAD, err))
        return -1;
    if (model->config.tied_embeddings)
        w->head = w->embed;
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
        for (int part = 0; part < BASE_LAYOUT_BLOCK; part++)
            close_tensor(model, layer_tensor_at(&model->weights.layer[l], part));
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
