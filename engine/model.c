#include "engine/model.h"

#include <assert.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/progress.h"
#include "engine/model_pass.h"

/* ------------------------------------------------------------------ names */

/* One tensor of every layer: its canonical name, place in layer_weights and shape. */
struct layer_tensor {
    const char *name;
    size_t offset;
    enum model_width rows, cols; /* cols WIDTH_NONE: a vector */
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

int64_t model_width(const struct model_config *c, enum model_width width)
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

static struct tensor shaped(const struct model_config *c, enum model_width rows,
                            enum model_width cols)
{
    const int64_t shape[2] = {model_width(c, rows), model_width(c, cols)};

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
    progress_tick();
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
