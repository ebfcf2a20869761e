/* A GGUF file as a source. Names become canonical, and the rows of q and k, which the format keeps
 * interleaved for its own rotary embedding, go back into Hugging Face's order. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/gguf.h"
#include "engine/import.h"
#include "engine/import_gguf_tokenizer.h"

static const struct {
    const char *canonical, *gguf;
} model_names[] = {
    {"model.embed_tokens.weight", "token_embd.weight"},
    {"model.norm.weight", "output_norm.weight"},
    {"lm_head.weight", "output.weight"},
};

static const struct {
    const char *canonical, *gguf;
} layer_names[] = {
    {"input_layernorm.weight", "attn_norm.weight"},
    {"self_attn.q_proj.weight", "attn_q.weight"},
    {"self_attn.k_proj.weight", "attn_k.weight"},
    {"self_attn.v_proj.weight", "attn_v.weight"},
    {"self_attn.o_proj.weight", "attn_output.weight"},
    {"post_attention_layernorm.weight", "ffn_norm.weight"},
    {"mlp.gate_proj.weight", "ffn_gate.weight"},
    {"mlp.up_proj.weight", "ffn_up.weight"},
    {"mlp.down_proj.weight", "ffn_down.weight"},
};

/* The name in the file; false: the format has none for it. */
static bool gguf_name(const char *canonical, char *out, size_t size)
{
    int layer = 0, at = 0;

    for (size_t i = 0; i < sizeof model_names / sizeof *model_names; i++) {
        if (strcmp(canonical, model_names[i].canonical) == 0) {
            snprintf(out, size, "%s", model_names[i].gguf);
            return true;
        }
    }
    if (sscanf(canonical, "model.layers.%d.%n", &layer, &at) != 1 || at == 0)
        return false;
    for (size_t i = 0; i < sizeof layer_names / sizeof *layer_names; i++) {
        if (strcmp(canonical + at, layer_names[i].canonical) == 0) {
            snprintf(out, size, "blk.%d.%s", layer, layer_names[i].gguf);
            return true;
        }
    }
    return false;
}

static const struct gguf_tensor *lookup(const struct import_source *source, const char *canonical)
{
    char name[128];

    return gguf_name(canonical, name, sizeof name) ? gguf_find(source->state, name) : NULL;
}

static int find(struct import_source *source, const struct base_layout_tensor *tensor,
                enum dtype *dtype, struct err *err)
{
    const struct gguf_tensor *t = lookup(source, tensor->name);

    if (t == NULL) {
        char name[128] = "";

        gguf_name(tensor->name, name, sizeof name);
        return err_set(err, ERR_INVALID, "tensor \"%s\" is missing", name);
    }
    if (t->rank != tensor->rank ||
        memcmp(t->shape, tensor->shape, (size_t)tensor->rank * sizeof(int64_t)) != 0)
        return err_set(err, ERR_INVALID,
                       "tensor \"%s\" has another shape than the metadata call for", t->name);
    if (t->rank == 1 && gguf_is_quantized(t->type))
        return err_set(err, ERR_INVALID,
                       "tensor \"%s\" is a quantised vector, which is not "
                       "supported",
                       t->name);
    *dtype = t->type == GGUF_F16 ? DTYPE_F16 : t->type == GGUF_BF16 ? DTYPE_BF16 : DTYPE_F32;
    return 0;
}

/* Row of the file that holds row `row` of Hugging Face's matrix: there each head's rows are first
 * the one half of the rotating pairs, then the other; here pair after pair. */
static int64_t interleaved_row(int64_t row, int64_t head_dim)
{
    int64_t head = row / head_dim, in_head = row % head_dim, half = head_dim / 2;

    return head * head_dim + in_head % half * 2 + in_head / half;
}

static bool is_interleaved(const char *canonical)
{
    return strstr(canonical, ".self_attn.q_proj.") != NULL ||
           strstr(canonical, ".self_attn.k_proj.") != NULL;
}

static int read_rows(struct import_source *source, const struct base_layout_tensor *tensor,
                     int64_t first, int64_t rows, void *out, struct err *err)
{
    const struct gguf_tensor *t = lookup(source, tensor->name);
    bool interleaved = is_interleaved(tensor->name);

    if (t->rank == 1) {
        int64_t size = t->row_bytes / t->columns;

        memcpy(out, t->data + first * size, (size_t)(rows * size));
        return 0;
    }
    for (int64_t i = first; i < first + rows; i++) {
        int64_t row = interleaved ? interleaved_row(i, source->config.head_dim) : i;

        if (gguf_is_quantized(t->type))
            gguf_row_to_f32(t, row, (float *)out + (i - first) * t->columns);
        else
            memcpy((char *)out + (i - first) * t->row_bytes, t->data + row * t->row_bytes,
                   (size_t)t->row_bytes);
    }
    return 0;
}

static void done(struct import_source *source, const struct base_layout_tensor *tensor)
{
    gguf_done_with(source->state, lookup(source, tensor->name));
}

static int by_string(const void *a, const void *b)
{
    return strcmp(a, b);
}

static int check_rest(struct import_source *source, const struct base_layout_tensor *list,
                      int64_t count, struct err *err)
{
    const struct gguf *file = source->state;
    char(*names)[128] = calloc((size_t)count, sizeof *names);
    int rc = 0;

    if (names == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    for (int64_t i = 0; i < count; i++)
        gguf_name(list[i].name, names[i], sizeof names[i]);
    qsort(names, (size_t)count, sizeof *names, by_string);
    for (int64_t i = 0; rc == 0 && i < gguf_count(file); i++) {
        const char *name = gguf_at(file, i)->name;

        if (bsearch(name, names, (size_t)count, sizeof *names, by_string) == NULL)
            rc = err_set(err, ERR_INVALID,
                         "tensor \"%s\" is not supported yet; a %s model of this configuration "
                         "has none of that name",
                         name, source->config.architecture);
    }
    free(names);
    return rc;
}

static void close_gguf(struct import_source *source)
{
    gguf_free(source->state);
}

static const struct import_ops ops = {
    .find = find,
    .read = read_rows,
    .done = done,
    .check_rest = check_rest,
    .close = close_gguf,
};

/* An integer that must fit; fallback -1: the key must be there. */
static int get_size(const struct gguf *file, const char *key, int64_t fallback, int32_t *out,
                    struct err *err)
{
    int64_t value = 0;

    if (gguf_get_int(file, key, fallback, &value, err) != 0)
        return -1;
    if (value < 0 || value > INT32_MAX)
        return err_set(err, ERR_INVALID, "metadata \"%s\" %s", key,
                       value == -1 && fallback == -1 ? "is missing" : "is out of range");
    *out = (int32_t)value;
    return 0;
}

static int get_token(const struct gguf *file, const char *key, int32_t *out, struct err *err)
{
    int64_t value = -1;

    if (gguf_get_int(file, key, -1, &value, err) != 0)
        return -1;
    if (value < -1 || value > INT32_MAX)
        return err_set(err, ERR_INVALID, "metadata \"%s\" is out of range", key);
    *out = (int32_t)value;
    return 0;
}

static int check_architecture(const struct gguf *file, struct model_config *c, struct err *err)
{
    struct gguf_string name;

    if (gguf_get_string(file, "general.architecture", &name, err) != 0)
        return -1;
    if (name.len != 5 || memcmp(name.data, "llama", 5) != 0)
        return err_set(err, ERR_INVALID,
                       "architecture \"%.*s\" is not supported yet; supported: llama",
                       (int)(name.len < 64 ? name.len : 64), name.data != NULL ? name.data : "");
    snprintf(c->architecture, sizeof c->architecture, "llama");
    return 0;
}

static int read_rope(const struct gguf *file, struct model_config *c, struct err *err)
{
    struct gguf_string type;
    double theta = 0, old = 0, factor = 0;
    bool none;

    if (gguf_get_float(file, "llama.rope.freq_base", 10000, &theta, err) != 0 ||
        gguf_get_string(file, "llama.rope.scaling.type", &type, err) != 0 ||
        gguf_get_float(file, "llama.rope.scale_linear", 1, &old, err) != 0 || /* before the type */
        gguf_get_float(file, "llama.rope.scaling.factor", old, &factor, err) != 0)
        return -1;
    c->rope_theta = (float)theta;
    /* As llama.cpp does: a factor without a type is linear, and one of 0 is none. */
    if (type.data == NULL)
        none = factor == 0 || factor == 1;
    else
        none = type.len == 4 && memcmp(type.data, "none", 4) == 0;
    if (none)
        return 0;
    if (type.data != NULL && (type.len != 6 || memcmp(type.data, "linear", 6) != 0))
        return err_set(err, ERR_INVALID,
                       "rope scaling \"%.*s\" is not supported yet; supported: none, linear",
                       (int)(type.len < 32 ? type.len : 32), type.data);
    c->rope_scaling = ROPE_SCALING_LINEAR;
    c->rope_factor = (float)factor;
    return 0;
}

static int read_heads(const struct gguf *file, struct model_config *c, struct err *err)
{
    int32_t value_length = 0, rotated = 0, experts = 0;

    if (get_size(file, "llama.attention.head_count", -1, &c->heads, err) != 0 ||
        get_size(file, "llama.attention.head_count_kv", c->heads, &c->kv_heads, err) != 0 ||
        get_size(file, "llama.expert_count", 0, &experts, err) != 0)
        return -1;
    if (c->heads == 0)
        return err_set(err, ERR_INVALID, "metadata \"llama.attention.head_count\" is 0");
    if (get_size(file, "llama.attention.key_length", c->hidden / c->heads, &c->head_dim, err) !=
            0 ||
        get_size(file, "llama.attention.value_length", c->head_dim, &value_length, err) != 0 ||
        get_size(file, "llama.rope.dimension_count", c->head_dim, &rotated, err) != 0)
        return -1;
    if (value_length != c->head_dim || rotated != c->head_dim)
        return err_set(err, ERR_INVALID,
                       "heads whose keys, values and rotated parts differ in size are not "
                       "supported yet");
    if (experts != 0)
        return err_set(err, ERR_INVALID, "mixtures of experts are not supported yet");
    return 0;
}

static int read_config(const struct gguf *file, struct model_config *c, struct err *err)
{
    const struct gguf_tensor *embedding = gguf_find(file, "token_embd.weight");
    double epsilon = 0;

    if (check_architecture(file, c, err) != 0)
        return -1;
    if (embedding == NULL || embedding->rank != 2)
        return err_set(err, ERR_INVALID, "tensor \"token_embd.weight\" is missing");
    if (get_size(file, "llama.block_count", -1, &c->layers, err) != 0 ||
        get_size(file, "llama.embedding_length", -1, &c->hidden, err) != 0 ||
        get_size(file, "llama.feed_forward_length", -1, &c->intermediate, err) != 0 ||
        get_size(file, "llama.context_length", -1, &c->context, err) != 0 ||
        get_size(file, "llama.vocab_size", embedding->rows, &c->vocabulary, err) != 0 ||
        read_heads(file, c, err) != 0 || read_rope(file, c, err) != 0 ||
        gguf_get_float(file, "llama.attention.layer_norm_rms_epsilon", NAN, &epsilon, err) != 0 ||
        get_token(file, "tokenizer.ggml.bos_token_id", &c->bos_token, err) != 0 ||
        get_token(file, "tokenizer.ggml.eos_token_id", &c->eos_token, err) != 0)
        return -1;
    c->rms_norm_eps = (float)epsilon;
    c->tied_embeddings = gguf_find(file, "output.weight") == NULL;
    return model_config_check(c, err);
}

static int read_chat_template(struct import_source *source, struct err *err)
{
    struct gguf_string text;

    if (gguf_get_string(source->state, "tokenizer.chat_template", &text, err) != 0)
        return -1;
    if (text.len == 0)
        return 0;
    if (text.len > IMPORT_MAX_CHAT_TEMPLATE)
        return err_set(err, ERR_INVALID, "the chat template has %zu bytes; at most %u are allowed",
                       text.len, IMPORT_MAX_CHAT_TEMPLATE);
    source->chat_template = malloc(text.len);
    if (source->chat_template == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    memcpy(source->chat_template, text.data, text.len);
    source->chat_template_len = text.len;
    return 0;
}

int import_gguf_open(struct import_source *source, const char *path, struct err *err)
{
    struct gguf *file = NULL;

    *source = (struct import_source){.ops = &ops};
    if (gguf_open(&file, path, err) != 0)
        return -1;
    source->state = file;
    if (read_config(file, &source->config, err) == 0 &&
        import_gguf_tokenizer(file, &source->tokenizer_json, &source->tokenizer_len, err) == 0 &&
        read_chat_template(source, err) == 0)
        return 0;
    free(source->tokenizer_json);
    free(source->chat_template);
    gguf_free(file);
    return err_prefix(err, "%s", path);
}
