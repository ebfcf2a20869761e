#include "engine/model_config.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "engine/base/json_text.h"

/* Far above every model there is, far below where a product of two overflows unseen. */
enum {
    MAX_LAYERS = 1024,
    MAX_WIDTH = 1 << 20,
    MAX_HEADS = 4096,
    MAX_HEAD_DIM = 512,
    MAX_VOCABULARY = 1 << 21,
    MAX_CONTEXT = 1 << 24,
};

/* An integer of `object`; absent or null: `fallback`, an error if that is negative. */
static int get_int(const json_t *object, const char *key, int32_t fallback, int32_t *out,
                   struct err *err)
{
    const json_t *value = json_object_get(object, key);

    if (value == NULL || json_is_null(value)) {
        *out = fallback;
        if (fallback < 0)
            return err_set(err, ERR_INVALID, "\"%s\" is missing", key);
        return 0;
    }
    if (!json_is_integer(value) || json_integer_value(value) < 0 ||
        json_integer_value(value) > INT32_MAX)
        return err_set(err, ERR_INVALID, "\"%s\" must be an integer from 0 to 2147483647", key);
    *out = (int32_t)json_integer_value(value);
    return 0;
}

static int get_float(const json_t *object, const char *key, double fallback, float *out,
                     struct err *err)
{
    const json_t *value = json_object_get(object, key);

    if (value == NULL || json_is_null(value)) {
        *out = (float)fallback;
        if (isnan(fallback))
            return err_set(err, ERR_INVALID, "\"%s\" is missing", key);
        return 0;
    }
    if (!json_is_number(value))
        return err_set(err, ERR_INVALID, "\"%s\" must be a number", key);
    *out = (float)json_number_value(value) + 0.0f; /* one zero: JSON's -0 is another when written */
    return 0;
}

static int get_bool(const json_t *object, const char *key, bool fallback, bool *out,
                    struct err *err)
{
    const json_t *value = json_object_get(object, key);

    if (value == NULL || json_is_null(value)) {
        *out = fallback;
        return 0;
    }
    if (!json_is_boolean(value))
        return err_set(err, ERR_INVALID, "\"%s\" must be true or false", key);
    *out = json_is_true(value);
    return 0;
}

/* A token id, the first of a list of them, or none. */
static int get_token(const json_t *object, const char *key, int32_t *out, struct err *err)
{
    const json_t *value = json_object_get(object, key);

    *out = -1;
    if (json_is_array(value) && json_array_size(value) > 0)
        value = json_array_get(value, 0);
    if (value == NULL || json_is_null(value))
        return 0;
    if (!json_is_integer(value) || json_integer_value(value) < 0 ||
        json_integer_value(value) > INT32_MAX)
        return err_set(err, ERR_INVALID, "\"%s\" must be a token id or a list of them", key);
    *out = (int32_t)json_integer_value(value);
    return 0;
}

static int check_architecture(const json_t *root, struct model_config *config, struct err *err)
{
    const json_t *type = json_object_get(root, "model_type");
    const char *class =
        json_string_value(json_array_get(json_object_get(root, "architectures"), 0));
    const char *name = json_is_string(type) ? json_string_value(type) : class;

    if (name == NULL)
        return err_set(err, ERR_INVALID, "\"model_type\" is missing");
    if (class == NULL)
        class = "LlamaForCausalLM"; /* older files name the type alone */
    if ((json_is_string(type) && strcmp(name, "llama") != 0) ||
        strcmp(class, "LlamaForCausalLM") != 0)
        return err_set(err, ERR_INVALID,
                       "architecture \"%.64s\" is not supported yet; supported: llama",
                       strcmp(name, "llama") != 0 ? name : class);
    snprintf(config->architecture, sizeof config->architecture, "llama");
    return 0;
}

/* What would change the arithmetic and is not computed here. */
static int check_unsupported(const json_t *root, struct err *err)
{
    const json_t *act = json_object_get(root, "hidden_act");
    const json_t *quantization = json_object_get(root, "quantization_config");
    bool mlp_bias = false, attention_bias = false;
    float rotary = 1;

    if (act != NULL && (!json_is_string(act) || strcmp(json_string_value(act), "silu") != 0))
        return err_set(err, ERR_INVALID,
                       "\"hidden_act\" must be \"silu\"; others are not "
                       "supported yet");
    if (quantization != NULL && !json_is_null(quantization))
        return err_set(err, ERR_INVALID,
                       "\"quantization_config\": quantised checkpoints are not supported; import "
                       "the original weights");
    if (get_bool(root, "mlp_bias", false, &mlp_bias, err) != 0 ||
        get_bool(root, "attention_bias", false, &attention_bias, err) != 0 ||
        get_float(root, "partial_rotary_factor", 1, &rotary, err) != 0)
        return -1;
    if (mlp_bias || attention_bias)
        return err_set(err, ERR_INVALID, "\"%s\": true is not supported yet",
                       mlp_bias ? "mlp_bias" : "attention_bias");
    if (rotary != 1)
        return err_set(err, ERR_INVALID,
                       "\"partial_rotary_factor\" other than 1 is not supported "
                       "yet");
    return 0;
}

static const char *rope_type(const json_t *rope)
{
    const json_t *type = json_object_get(rope, "rope_type");

    if (type == NULL)
        type = json_object_get(rope, "type"); /* spelling of older files */
    if (type == NULL)
        return "default";
    return json_is_string(type) ? json_string_value(type) : "";
}

static int read_rope_kind(const json_t *rope, struct model_config *config, struct err *err)
{
    const char *type = rope_type(rope);

    if (strcmp(type, "default") == 0)
        return 0;
    if (strcmp(type, "linear") == 0) {
        config->rope_scaling = ROPE_SCALING_LINEAR;
        return get_float(rope, "factor", NAN, &config->rope_factor, err);
    }
    if (strcmp(type, "llama3") == 0) {
        config->rope_scaling = ROPE_SCALING_LLAMA3;
        if (get_float(rope, "factor", NAN, &config->rope_factor, err) != 0 ||
            get_float(rope, "low_freq_factor", NAN, &config->rope_low_freq_factor, err) != 0 ||
            get_float(rope, "high_freq_factor", NAN, &config->rope_high_freq_factor, err) != 0)
            return -1;
        return get_int(rope, "original_max_position_embeddings", -1, &config->rope_original_context,
                       err);
    }
    return err_set(err, ERR_INVALID,
                   "rope scaling \"%.32s\" is not supported yet; supported: default, linear, "
                   "llama3",
                   type);
}

/* Newer files have it all in rope_parameters, older ones in rope_theta and rope_scaling. */
static int read_rope(const json_t *root, struct model_config *config, struct err *err)
{
    const json_t *parameters = json_object_get(root, "rope_parameters");
    const json_t *scaling = json_object_get(root, "rope_scaling");
    float theta;

    if (get_float(root, "rope_theta", 10000, &theta, err) != 0)
        return -1;
    if (parameters == NULL || json_is_null(parameters))
        parameters = scaling;
    if (parameters == NULL || json_is_null(parameters)) {
        config->rope_theta = theta;
        return 0;
    }
    if (!json_is_object(parameters))
        return err_set(err, ERR_INVALID,
                       "\"rope_parameters\" (or \"rope_scaling\") must be an "
                       "object");
    if (get_float(parameters, "rope_theta", (double)theta, &config->rope_theta, err) != 0)
        return -1;
    return read_rope_kind(parameters, config, err);
}

static int read_sizes(const json_t *root, struct model_config *c, struct err *err)
{
    if (get_int(root, "num_hidden_layers", -1, &c->layers, err) != 0 ||
        get_int(root, "hidden_size", -1, &c->hidden, err) != 0 ||
        get_int(root, "intermediate_size", -1, &c->intermediate, err) != 0 ||
        get_int(root, "num_attention_heads", -1, &c->heads, err) != 0 ||
        get_int(root, "vocab_size", -1, &c->vocabulary, err) != 0 ||
        get_int(root, "max_position_embeddings", 2048, &c->context, err) != 0)
        return -1;
    if (get_int(root, "num_key_value_heads", c->heads, &c->kv_heads, err) != 0 ||
        get_int(root, "head_dim", c->heads > 0 ? c->hidden / c->heads : 0, &c->head_dim, err) != 0)
        return -1;
    if (json_object_get(root, "head_dim") == NULL && c->heads > 0 && c->hidden % c->heads != 0)
        return err_set(err, ERR_INVALID, "\"hidden_size\" %d can not be divided among %d heads",
                       c->hidden, c->heads);
    return 0;
}

int model_config_from_json(struct model_config *config, const char *text, unsigned long len,
                           struct err *err)
{
    struct model_config c = {0};
    json_t *root;
    int rc = -1;

    if (len > MODEL_CONFIG_MAX_JSON)
        return err_set(err, ERR_INVALID, "has %lu bytes; at most %u are allowed", len,
                       MODEL_CONFIG_MAX_JSON);
    root = json_text_load(text, len, 0, err);
    if (root == NULL)
        return -1;
    if (!json_is_object(root)) {
        err_set(err, ERR_INVALID, "must be a JSON object");
        goto out;
    }
    if (check_architecture(root, &c, err) != 0 || check_unsupported(root, err) != 0 ||
        read_sizes(root, &c, err) != 0 || read_rope(root, &c, err) != 0 ||
        get_float(root, "rms_norm_eps", 1e-6, &c.rms_norm_eps, err) != 0 ||
        get_bool(root, "tie_word_embeddings", false, &c.tied_embeddings, err) != 0 ||
        get_token(root, "bos_token_id", &c.bos_token, err) != 0 ||
        get_token(root, "eos_token_id", &c.eos_token, err) != 0)
        goto out;
    if (model_config_check(&c, err) != 0)
        goto out;
    *config = c;
    rc = 0;
out:
    json_decref(root);
    return rc;
}

static int check_range(const char *what, int64_t value, int64_t max, struct err *err)
{
    if (value >= 1 && value <= max)
        return 0;
    return err_set(err, ERR_INVALID, "%s is %lld; it must be from 1 to %lld", what,
                   (long long)value, (long long)max);
}

static int check_floats(const struct model_config *c, struct err *err)
{
    if (!(c->rms_norm_eps >= 0 && c->rms_norm_eps < 1))
        return err_set(err, ERR_INVALID, "the norm's epsilon must be from 0 to 1");
    if (!(c->rope_theta >= 1 && c->rope_theta <= 1e15f))
        return err_set(err, ERR_INVALID, "the rope's base must be from 1 to 1e15");
    if (c->rope_scaling == ROPE_SCALING_NONE)
        return 0;
    if (!(c->rope_factor >= 1 && c->rope_factor <= 1e6f))
        return err_set(err, ERR_INVALID, "the rope's scaling factor must be from 1 to 1e6");
    if (c->rope_scaling == ROPE_SCALING_LLAMA3 &&
        (!(c->rope_low_freq_factor > 0 && c->rope_low_freq_factor < c->rope_high_freq_factor &&
           c->rope_high_freq_factor <= 1e6f) ||
         check_range("the rope's original context", c->rope_original_context, MAX_CONTEXT, NULL) !=
             0))
        return err_set(err, ERR_INVALID,
                       "llama3 rope scaling needs 0 < low_freq_factor < high_freq_factor and an "
                       "original context");
    return 0;
}

int model_config_check(const struct model_config *c, struct err *err)
{
    int64_t q = (int64_t)c->heads * c->head_dim;

    if (strcmp(c->architecture, "llama") != 0)
        return err_set(err, ERR_INVALID,
                       "architecture \"%s\" is not supported yet; supported: llama",
                       c->architecture);
    if (check_range("the number of layers", c->layers, MAX_LAYERS, err) != 0 ||
        check_range("the hidden size", c->hidden, MAX_WIDTH, err) != 0 ||
        check_range("the intermediate size", c->intermediate, MAX_WIDTH, err) != 0 ||
        check_range("the number of heads", c->heads, MAX_HEADS, err) != 0 ||
        check_range("the number of key/value heads", c->kv_heads, c->heads, err) != 0 ||
        check_range("the head size", c->head_dim, MAX_HEAD_DIM, err) != 0 ||
        check_range("the width of all heads", q, MAX_WIDTH, err) != 0 ||
        check_range("the vocabulary", c->vocabulary, MAX_VOCABULARY, err) != 0 ||
        check_range("the context", c->context, MAX_CONTEXT, err) != 0)
        return -1;
    if (c->heads % c->kv_heads != 0)
        return err_set(err, ERR_INVALID, "%d heads can not share %d key/value heads evenly",
                       c->heads, c->kv_heads);
    if (c->head_dim % 2 != 0)
        return err_set(err, ERR_INVALID, "the head size %d is odd; rotary embeddings need pairs",
                       c->head_dim);
    if ((int64_t)c->vocabulary * c->hidden > INT32_MAX ||
        (int64_t)c->intermediate * c->hidden > INT32_MAX || q > INT32_MAX / c->hidden)
        return err_set(err, ERR_INVALID, "a matrix would have more than 2^31 elements");
    if (c->bos_token < -1 || c->bos_token >= c->vocabulary || c->eos_token < -1 ||
        c->eos_token >= c->vocabulary)
        return err_set(err, ERR_INVALID, "a begin or end token is outside of the vocabulary of %d",
                       c->vocabulary);
    return check_floats(c, err);
}

void model_config_to_json(const struct model_config *c, struct strbuf *out)
{
    strbuf_addf(out,
                "{\"model_type\":\"%s\",\"num_hidden_layers\":%d,\"hidden_size\":%d,"
                "\"intermediate_size\":%d,\"num_attention_heads\":%d,\"num_key_value_heads\":%d,",
                c->architecture, c->layers, c->hidden, c->intermediate, c->heads, c->kv_heads);
    strbuf_addf(out,
                "\"head_dim\":%d,\"vocab_size\":%d,\"max_position_embeddings\":%d,"
                "\"rms_norm_eps\":%.9g,\"tie_word_embeddings\":%s,",
                c->head_dim, c->vocabulary, c->context, (double)c->rms_norm_eps,
                c->tied_embeddings ? "true" : "false");
    if (c->bos_token >= 0)
        strbuf_addf(out, "\"bos_token_id\":%d,", c->bos_token);
    if (c->eos_token >= 0)
        strbuf_addf(out, "\"eos_token_id\":%d,", c->eos_token);
    strbuf_addf(out, "\"rope_parameters\":{\"rope_theta\":%.9g", (double)c->rope_theta);
    if (c->rope_scaling == ROPE_SCALING_LINEAR)
        strbuf_addf(out, ",\"rope_type\":\"linear\",\"factor\":%.9g", (double)c->rope_factor);
    if (c->rope_scaling == ROPE_SCALING_LLAMA3)
        strbuf_addf(out,
                    ",\"rope_type\":\"llama3\",\"factor\":%.9g,\"low_freq_factor\":%.9g,"
                    "\"high_freq_factor\":%.9g,\"original_max_position_embeddings\":%d",
                    (double)c->rope_factor, (double)c->rope_low_freq_factor,
                    (double)c->rope_high_freq_factor, c->rope_original_context);
    strbuf_addstr(out, "}}");
}
