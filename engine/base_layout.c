#include "engine/base_layout.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct {
    const char *name;
    enum model_width rows, columns; /* rows NONE: a vector */
} parts[BASE_LAYOUT_PARTS] = {
    [BASE_LAYOUT_ATTN_NORM] = {"input_layernorm.weight", WIDTH_NONE, WIDTH_D},
    [BASE_LAYOUT_Q] = {"self_attn.q_proj.weight", WIDTH_QUERY, WIDTH_D},
    [BASE_LAYOUT_K] = {"self_attn.k_proj.weight", WIDTH_KEY, WIDTH_D},
    [BASE_LAYOUT_V] = {"self_attn.v_proj.weight", WIDTH_KEY, WIDTH_D},
    [BASE_LAYOUT_O] = {"self_attn.o_proj.weight", WIDTH_D, WIDTH_QUERY},
    [BASE_LAYOUT_Q_BIAS] = {"self_attn.q_proj.bias", WIDTH_NONE, WIDTH_QUERY},
    [BASE_LAYOUT_K_BIAS] = {"self_attn.k_proj.bias", WIDTH_NONE, WIDTH_KEY},
    [BASE_LAYOUT_V_BIAS] = {"self_attn.v_proj.bias", WIDTH_NONE, WIDTH_KEY},
    [BASE_LAYOUT_Q_NORM] = {"self_attn.q_norm.weight", WIDTH_NONE, WIDTH_E},
    [BASE_LAYOUT_K_NORM] = {"self_attn.k_norm.weight", WIDTH_NONE, WIDTH_E},
    [BASE_LAYOUT_MLP_NORM] = {"post_attention_layernorm.weight", WIDTH_NONE, WIDTH_D},
    [BASE_LAYOUT_GATE] = {"mlp.gate_proj.weight", WIDTH_F, WIDTH_D},
    [BASE_LAYOUT_UP] = {"mlp.up_proj.weight", WIDTH_F, WIDTH_D},
    [BASE_LAYOUT_DOWN] = {"mlp.down_proj.weight", WIDTH_D, WIDTH_F},
    [BASE_LAYOUT_EMBED] = {"model.embed_tokens.weight", WIDTH_V, WIDTH_D},
    [BASE_LAYOUT_FINAL_NORM] = {"model.norm.weight", WIDTH_NONE, WIDTH_D},
    [BASE_LAYOUT_HEAD] = {"lm_head.weight", WIDTH_V, WIDTH_D},
};

bool base_layout_has(const struct model_config *config, enum base_layout_part part)
{
    switch (part) {
    case BASE_LAYOUT_Q_BIAS:
    case BASE_LAYOUT_K_BIAS:
    case BASE_LAYOUT_V_BIAS:
        return config->attention_bias;
    case BASE_LAYOUT_Q_NORM:
    case BASE_LAYOUT_K_NORM:
        return config->qk_norm;
    case BASE_LAYOUT_HEAD:
        return !config->tied_embeddings;
    default:
        return true;
    }
}

bool base_layout_is_linear(enum base_layout_part part)
{
    return part < BASE_LAYOUT_BLOCK && parts[part].rows != WIDTH_NONE;
}

int base_layout_shape(const struct model_config *config, enum base_layout_part part,
                      int64_t shape[TENSOR_MAX_RANK])
{
    bool vector = parts[part].rows == WIDTH_NONE;
    int64_t columns = model_config_width(config, parts[part].columns);

    shape[0] = vector ? columns : model_config_width(config, parts[part].rows);
    shape[1] = columns;
    return vector ? 1 : 2;
}

void base_layout_name(enum base_layout_part part, int layer, char *out, size_t size)
{
    if (part < BASE_LAYOUT_BLOCK)
        snprintf(out, size, "model.layers.%d.%s", layer, parts[part].name);
    else
        snprintf(out, size, "%s", parts[part].name);
}

static void add(struct base_layout_tensor *list, int64_t *count, const struct model_config *config,
                enum base_layout_part part, int layer)
{
    struct base_layout_tensor *t = &list[*count];

    if (!base_layout_has(config, part))
        return;
    base_layout_name(part, layer, t->name, sizeof t->name);
    t->rank = base_layout_shape(config, part, t->shape);
    t->linear = base_layout_is_linear(part);
    ++*count;
}

int base_layout_list(const struct model_config *config, struct base_layout_tensor **out,
                     int64_t *count, struct err *err)
{
    struct base_layout_tensor *list =
        calloc((size_t)config->layers * BASE_LAYOUT_BLOCK + 3, sizeof *list);

    if (list == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    *count = 0;
    add(list, count, config, BASE_LAYOUT_EMBED, 0);
    for (int layer = 0; layer < config->layers; layer++)
        for (int part = 0; part < BASE_LAYOUT_BLOCK; part++)
            add(list, count, config, part, layer);
    add(list, count, config, BASE_LAYOUT_FINAL_NORM, 0);
    add(list, count, config, BASE_LAYOUT_HEAD, 0);
    *out = list;
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
        .head_dim = config->head_dim,
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
