#include "tests/unit/tiny_model.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/file_io.h"
#include "engine/base/strbuf.h"
#include "engine/safetensors.h"

struct shape {
    char name[96];
    int64_t rows, columns; /* rows 0: a vector of `columns` */
};

static uint64_t fnv1a(const char *s)
{
    uint64_t h = 0xcbf29ce484222325u;

    for (; *s != '\0'; s++)
        h = (h ^ (unsigned char)*s) * 0x100000001b3u;
    return h;
}

float tiny_model_value(const char *name, int64_t index, int64_t columns, uint64_t seed)
{
    uint64_t z =
        (fnv1a(name) ^ seed * 0xD1342543DE82EF95u) + ((uint64_t)index + 1) * 0x9E3779B97F4A7C15u;
    double u;

    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    u = (double)(z >> 40) * 0x1p-23 - 1;
    if (strstr(name, "norm") != NULL)
        return (float)(1 + u / 10);
    if (strcmp(name, "model.embed_tokens.weight") == 0)
        return (float)u;
    return (float)(u * (2 / sqrt((double)columns)));
}

static struct tiny_model with_defaults(const struct tiny_model *model)
{
    struct tiny_model m = *model;

    m.layers = m.layers ? m.layers : 2;
    m.hidden = m.hidden ? m.hidden : 64;
    m.intermediate = m.intermediate ? m.intermediate : 128;
    m.heads = m.heads ? m.heads : 4;
    m.kv_heads = m.kv_heads ? m.kv_heads : 2;
    m.head_dim = m.head_dim ? m.head_dim : m.hidden / m.heads;
    m.vocabulary = m.vocabulary ? m.vocabulary : 512;
    m.context = m.context ? m.context : 256;
    m.rope_theta = m.rope_theta > 0 ? m.rope_theta : 10000;
    return m;
}

static void add_shape(struct shape *list, int *n, int layer, const char *name, int64_t rows,
                      int64_t columns)
{
    struct shape *s = &list[(*n)++];

    if (layer < 0)
        snprintf(s->name, sizeof s->name, "%s", name);
    else
        snprintf(s->name, sizeof s->name, "model.layers.%d.%s", layer, name);
    s->rows = rows;
    s->columns = columns;
}

static int list_shapes(const struct tiny_model *m, struct shape *list)
{
    int64_t q = (int64_t)m->heads * m->head_dim, kv = (int64_t)m->kv_heads * m->head_dim;
    int n = 0;

    add_shape(list, &n, -1, "model.embed_tokens.weight", m->vocabulary, m->hidden);
    for (int i = 0; i < m->layers; i++) {
        add_shape(list, &n, i, "input_layernorm.weight", 0, m->hidden);
        add_shape(list, &n, i, "self_attn.q_proj.weight", q, m->hidden);
        add_shape(list, &n, i, "self_attn.k_proj.weight", kv, m->hidden);
        add_shape(list, &n, i, "self_attn.v_proj.weight", kv, m->hidden);
        add_shape(list, &n, i, "self_attn.o_proj.weight", m->hidden, q);
        add_shape(list, &n, i, "post_attention_layernorm.weight", 0, m->hidden);
        add_shape(list, &n, i, "mlp.gate_proj.weight", m->intermediate, m->hidden);
        add_shape(list, &n, i, "mlp.up_proj.weight", m->intermediate, m->hidden);
        add_shape(list, &n, i, "mlp.down_proj.weight", m->hidden, m->intermediate);
    }
    add_shape(list, &n, -1, "model.norm.weight", 0, m->hidden);
    if (m->untied)
        add_shape(list, &n, -1, "lm_head.weight", m->vocabulary, m->hidden);
    return n;
}

static int append_values(struct safetensors_writer *w, const struct tiny_model *m,
                         const struct shape *s, struct err *err)
{
    int64_t count = (s->rows ? s->rows : 1) * s->columns;
    int rc = 0;

    for (int64_t i = 0; rc == 0 && i < count; i++) {
        float value = tiny_model_value(s->name, i, s->columns, m->seed);
        uint16_t half = m->dtype == DTYPE_BF16 ? f32_to_bf16(value) : f32_to_f16(value);

        rc = m->dtype == DTYPE_F32 ? safetensors_writer_append(w, &value, 4, err)
                                   : safetensors_writer_append(w, &half, 2, err);
    }
    return rc;
}

static int write_weights(const char *path, const struct tiny_model *m, struct err *err)
{
    struct safetensors_writer *w = NULL;
    struct shape *list = calloc((size_t)m->layers * 9 + 3, sizeof *list);
    int n, rc = -1;

    if (list == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    n = list_shapes(m, list);
    if (safetensors_writer_open(&w, path, err) != 0 ||
        safetensors_writer_metadata(w, "format", "pt", err) != 0)
        goto out;
    for (int i = 0; i < n; i++) {
        int64_t shape[2] = {list[i].rows, list[i].columns};
        int vector = list[i].rows == 0;

        if (safetensors_writer_declare(w, list[i].name, m->dtype, 2 - vector, shape + vector,
                                       err) != 0)
            goto out;
    }
    if (safetensors_writer_begin(w, err) != 0)
        goto out;
    for (int i = 0; i < n; i++) {
        if (append_values(w, m, &list[i], err) != 0)
            goto out;
    }
    rc = safetensors_writer_finish(w, NULL, err);
out:
    safetensors_writer_free(w);
    free(list);
    return rc;
}

static void config_text(const struct tiny_model *m, struct strbuf *sb)
{
    strbuf_addf(sb,
                "{\n  \"architectures\": [\"LlamaForCausalLM\"],\n  \"model_type\": \"llama\",\n"
                "  \"attention_bias\": false,\n  \"mlp_bias\": false,\n"
                "  \"hidden_act\": \"silu\",\n  \"hidden_size\": %d,\n"
                "  \"intermediate_size\": %d,\n  \"num_hidden_layers\": %d,\n",
                m->hidden, m->intermediate, m->layers);
    strbuf_addf(sb,
                "  \"num_attention_heads\": %d,\n  \"num_key_value_heads\": %d,\n"
                "  \"head_dim\": %d,\n  \"max_position_embeddings\": %d,\n",
                m->heads, m->kv_heads, m->head_dim, m->context);
    strbuf_addf(sb,
                "  \"rms_norm_eps\": 1e-05,\n  \"rope_theta\": %.17g,\n"
                "  \"tie_word_embeddings\": %s,\n  \"vocab_size\": %d,\n"
                "  \"bos_token_id\": 1,\n  \"eos_token_id\": 2\n}\n",
                m->rope_theta, m->untied ? "false" : "true", m->vocabulary);
}

static int copy_file(const char *from, const char *to, struct err *err)
{
    char *data = NULL;
    size_t len = 0;
    int rc = file_read_all(from, 1 << 20, &data, &len, err);

    if (rc == 0)
        rc = file_write_durable(to, data, len, err);
    free(data);
    return rc;
}

int tiny_model_write(const char *dir, const struct tiny_model *model, struct err *err)
{
    static const char tokenizer_config[] =
        "{\n  \"tokenizer_class\": \"PreTrainedTokenizerFast\",\n"
        "  \"bos_token\": \"<|im_start|>\",\n  \"eos_token\": \"<|im_end|>\"\n}\n";
    struct tiny_model m = with_defaults(model);
    struct strbuf config;
    char path[512];
    int rc = -1;

    strbuf_init(&config, 1 << 16);
    config_text(&m, &config);
    if (file_make_dirs(dir, 0755, err) != 0)
        goto out;
    snprintf(path, sizeof path, "%s/config.json", dir);
    if (file_write_durable(path, config.data, config.len, err) != 0)
        goto out;
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    if (write_weights(path, &m, err) != 0)
        goto out;
    snprintf(path, sizeof path, "%s/tokenizer.json", dir);
    if (copy_file("tests/golden/tiny_tokenizer.json", path, err) != 0)
        goto out;
    snprintf(path, sizeof path, "%s/tokenizer_config.json", dir);
    if (file_write_durable(path, tokenizer_config, sizeof tokenizer_config - 1, err) != 0)
        goto out;
    snprintf(path, sizeof path, "%s/chat_template.jinja", dir);
    rc = copy_file("tests/golden/tiny_template.jinja", path, err);
out:
    strbuf_release(&config);
    return rc;
}

int tiny_model_brief_template(const char *dir, struct err *err)
{
    static const char brief[] = "{% for message in messages %}{{'<|im_start|>' + message['role'] + "
                                "'\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
                                "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
                                "{% endif %}";
    char path[512];

    snprintf(path, sizeof path, "%s/chat_template.jinja", dir);
    return file_write_durable(path, brief, sizeof brief - 1, err);
}
