#include "engine/base_layout.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TENSORS_PER_LAYER = 14 }; /* at most: with biases and head norms */

struct list {
    struct base_layout_tensor *items;
    int64_t count, capacity;
};

/* rows 0: a vector. layer -1: a tensor of the model, not of a block. */
static void add(struct list *list, int layer, const char *name, int64_t rows, int64_t columns)
{
    struct base_layout_tensor *t = &list->items[list->count++];

    assert(list->count <= list->capacity);
    if (layer < 0)
        snprintf(t->name, sizeof t->name, "%s", name);
    else
        snprintf(t->name, sizeof t->name, "model.layers.%d.%s", layer, name);
    t->rank = rows > 0 ? 2 : 1;
    t->shape[0] = rows > 0 ? rows : columns;
    t->shape[1] = columns;
    t->linear = layer >= 0 && rows > 0;
}

static void add_layer(struct list *list, const struct model_config *c, int layer)
{
    int64_t d = c->hidden, q = (int64_t)c->heads * c->head_dim;
    int64_t kv = (int64_t)c->kv_heads * c->head_dim;

    add(list, layer, "input_layernorm.weight", 0, d);
    add(list, layer, "self_attn.q_proj.weight", q, d);
    add(list, layer, "self_attn.k_proj.weight", kv, d);
    add(list, layer, "self_attn.v_proj.weight", kv, d);
    add(list, layer, "self_attn.o_proj.weight", d, q);
    if (c->attention_bias) {
        add(list, layer, "self_attn.q_proj.bias", 0, q);
        add(list, layer, "self_attn.k_proj.bias", 0, kv);
        add(list, layer, "self_attn.v_proj.bias", 0, kv);
    }
    if (c->qk_norm) {
        add(list, layer, "self_attn.q_norm.weight", 0, c->head_dim);
        add(list, layer, "self_attn.k_norm.weight", 0, c->head_dim);
    }
    add(list, layer, "post_attention_layernorm.weight", 0, d);
    add(list, layer, "mlp.gate_proj.weight", c->intermediate, d);
    add(list, layer, "mlp.up_proj.weight", c->intermediate, d);
    add(list, layer, "mlp.down_proj.weight", d, c->intermediate);
}

int base_layout_list(const struct model_config *config, struct base_layout_tensor **out,
                     int64_t *count, struct err *err)
{
    struct list list = {.capacity = (int64_t)config->layers * TENSORS_PER_LAYER + 3};

    list.items = calloc((size_t)list.capacity, sizeof *list.items);
    if (list.items == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    add(&list, -1, "model.embed_tokens.weight", config->vocabulary, config->hidden);
    for (int i = 0; i < config->layers; i++)
        add_layer(&list, config, i);
    add(&list, -1, "model.norm.weight", 0, config->hidden);
    if (!config->tied_embeddings)
        add(&list, -1, "lm_head.weight", config->vocabulary, config->hidden);
    *out = list.items;
    *count = list.count;
    return 0;
}

int64_t base_layout_elements(const struct base_layout_tensor *tensor)
{
    return tensor->rank == 2 ? tensor->shape[0] * tensor->shape[1] : tensor->shape[0];
}

void base_layout_info(const struct model_config *config, const struct base_layout_tensor *list,
                      int64_t count, struct engine_base_info *info)
{
    *info = (struct engine_base_info){
        .layers = config->layers,
        .hidden = config->hidden,
        .intermediate = config->intermediate,
        .heads = config->heads,
        .kv_heads = config->kv_heads,
        .vocabulary = config->vocabulary,
        .context = config->context,
        .tied_embeddings = config->tied_embeddings,
    };
    snprintf(info->architecture, sizeof info->architecture, "%s", config->architecture);
    for (int64_t i = 0; i < count; i++) {
        info->parameters += base_layout_elements(&list[i]);
        if (list[i].linear)
            info->linear_parameters += base_layout_elements(&list[i]);
    }
    info->bytes_16bit = 2 * info->parameters;
}

int base_layout_digest(const struct base_layout_tensor *list, int64_t count,
                       const char (*hex)[SHA256_HEX], char digest[SHA256_HEX], struct err *err)
{
    struct sha256 *h = sha256_new();
    char line[256];
    int n;

    if (h == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    for (int64_t i = 0; i < count; i++) {
        if (list[i].rank == 2)
            n = snprintf(line, sizeof line, "%s %lldx%lld %s\n", list[i].name,
                         (long long)list[i].shape[0], (long long)list[i].shape[1], hex[i]);
        else
            n = snprintf(line, sizeof line, "%s %lld %s\n", list[i].name,
                         (long long)list[i].shape[0], hex[i]);
        sha256_update(h, line, (size_t)n);
    }
    sha256_final_hex(h, digest);
    sha256_free(h);
    return 0;
}
