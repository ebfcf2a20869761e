#include "tests/unit/tiny_gguf.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

#include "engine/base/file_io.h"
#include "tests/unit/golden.h"
#include "tests/unit/tiny_model.h"

enum { LAYERS = 2, HIDDEN = 64, INTERMEDIATE = 128, HEADS = 4, KV_HEADS = 2, VOCABULARY = 512 };

static void add_tokenizer(struct gguf_builder *b, const char *pre_tokenizer)
{
    json_t *spec = golden_load("tests/golden/tiny_tokenizer.json");
    json_t *model = json_object_get(spec, "model"), *vocab = json_object_get(model, "vocab");
    json_t *merges = json_object_get(model, "merges"), *value, *merge;
    const char *names[VOCABULARY] = {NULL}, *name;
    size_t i;

    json_object_foreach(vocab, name, value) names[json_integer_value(value)] = name;
    gguf_add_string(b, "tokenizer.ggml.model", "gpt2");
    gguf_add_string(b, "tokenizer.ggml.pre", pre_tokenizer ? pre_tokenizer : "smollm");
    gguf_add_key(b, "tokenizer.ggml.tokens", 9);
    gguf_put_int(&b->entries, 8, 4);
    gguf_put_int(&b->entries, VOCABULARY, 8);
    for (i = 0; i < VOCABULARY; i++)
        gguf_put_string(&b->entries, names[i]);
    gguf_add_key(b, "tokenizer.ggml.token_type", 9);
    gguf_put_int(&b->entries, 5, 4);
    gguf_put_int(&b->entries, VOCABULARY, 8);
    for (i = 0; i < VOCABULARY; i++)
        gguf_put_int(&b->entries, i < 3 ? 3 : 1, 4);
    gguf_add_key(b, "tokenizer.ggml.merges", 9);
    gguf_put_int(&b->entries, 8, 4);
    gguf_put_int(&b->entries, json_array_size(merges), 8);
    json_array_foreach(merges, i, merge)
    {
        char both[128];

        snprintf(both, sizeof both, "%s %s", json_string_value(json_array_get(merge, 0)),
                 json_string_value(json_array_get(merge, 1)));
        gguf_put_string(&b->entries, json_is_string(merge) ? json_string_value(merge) : both);
    }
    json_decref(spec);
}

static void add_metadata(struct gguf_builder *b, const char *pre_tokenizer)
{
    size_t len = 0;
    char *text = golden_text("tests/golden/tiny_template.jinja", &len);

    gguf_add_string(b, "general.architecture", "llama");
    gguf_add_u32(b, "llama.block_count", LAYERS);
    gguf_add_u32(b, "llama.context_length", 256);
    gguf_add_u32(b, "llama.embedding_length", HIDDEN);
    gguf_add_u32(b, "llama.feed_forward_length", INTERMEDIATE);
    gguf_add_u32(b, "llama.attention.head_count", HEADS);
    gguf_add_u32(b, "llama.attention.head_count_kv", KV_HEADS);
    gguf_add_f32(b, "llama.rope.freq_base", 10000);
    gguf_add_f32(b, "llama.attention.layer_norm_rms_epsilon", 1e-5f);
    gguf_add_u32(b, "tokenizer.ggml.bos_token_id", 1);
    gguf_add_u32(b, "tokenizer.ggml.eos_token_id", 2);
    gguf_add_string(b, "tokenizer.chat_template", text);
    add_tokenizer(b, pre_tokenizer);
    free(text);
}

struct weights {
    const char *name, *canonical;
    int64_t rows, columns; /* rows 0: a vector */
    int heads;             /* > 0: rows interleaved, as the format keeps q and k */
};

static void add_weights(struct gguf_builder *b, const struct weights *w, uint64_t seed)
{
    int64_t head_dim = w->heads > 0 ? w->rows / w->heads : 0;

    gguf_add_tensor(b, w->name, w->rows > 0 ? 2 : 1,
                    (uint64_t[]){(uint64_t)w->columns, (uint64_t)w->rows}, 0, gguf_next_offset(b));
    for (int64_t row = 0; row < (w->rows > 0 ? w->rows : 1); row++) {
        int64_t from = row;

        if (w->heads > 0) /* pair p of a head: rows p and p + head_dim/2 of the canonical order */
            from = row / head_dim * head_dim + row % head_dim / 2 + row % 2 * (head_dim / 2);
        for (int64_t i = 0; i < w->columns; i++) {
            float value = tiny_model_value(w->canonical, from * w->columns + i, w->columns, seed);

            strbuf_add(&b->data, &value, sizeof value);
        }
    }
}

static void add_layer(struct gguf_builder *b, int layer, uint64_t seed)
{
    static const struct weights list[] = {
        {"attn_norm", "input_layernorm", 0, HIDDEN, 0},
        {"attn_q", "self_attn.q_proj", 64, HIDDEN, HEADS},
        {"attn_k", "self_attn.k_proj", 32, HIDDEN, KV_HEADS},
        {"attn_v", "self_attn.v_proj", 32, HIDDEN, 0},
        {"attn_output", "self_attn.o_proj", HIDDEN, 64, 0},
        {"ffn_norm", "post_attention_layernorm", 0, HIDDEN, 0},
        {"ffn_gate", "mlp.gate_proj", INTERMEDIATE, HIDDEN, 0},
        {"ffn_up", "mlp.up_proj", INTERMEDIATE, HIDDEN, 0},
        {"ffn_down", "mlp.down_proj", HIDDEN, INTERMEDIATE, 0},
    };

    for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
        struct weights w = list[i];
        char name[64], canonical[96];

        snprintf(name, sizeof name, "blk.%d.%s.weight", layer, w.name);
        snprintf(canonical, sizeof canonical, "model.layers.%d.%s.weight", layer, w.canonical);
        w.name = name;
        w.canonical = canonical;
        add_weights(b, &w, seed);
    }
}

int tiny_gguf_write(const char *path, const struct tiny_gguf *gguf, struct err *err)
{
    static const struct weights first = {"token_embd.weight", "model.embed_tokens.weight",
                                         VOCABULARY, HIDDEN, 0};
    static const struct weights last = {"output_norm.weight", "model.norm.weight", 0, HIDDEN, 0};
    struct gguf_builder b;
    unsigned char *bytes;
    size_t len = 0;
    int rc;

    gguf_builder_init(&b);
    add_metadata(&b, gguf->pre_tokenizer);
    add_weights(&b, &first, gguf->seed);
    for (int i = 0; i < LAYERS; i++)
        add_layer(&b, i, gguf->seed);
    add_weights(&b, &last, gguf->seed);
    if (gguf->spoil != NULL)
        gguf->spoil(&b);
    bytes = gguf_build(&b, &len);
    rc = file_write_durable(path, bytes, len, err);
    free(bytes);
    gguf_builder_release(&b);
    return rc;
}
