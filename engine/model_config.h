/* model_config.h: what a Llama-family model is, as numbers and flags. Read from a Hugging Face
 * config.json or from GGUF metadata (model_config.c), checked once: behind that, every size is
 * positive, products of two fit in 31 bits, and heads divide as they must. */
#ifndef GRAFT_MODEL_CONFIG_H
#define GRAFT_MODEL_CONFIG_H

#include <stdbool.h>
#include <stdint.h>

#include "engine/base/err.h"
#include "engine/base/strbuf.h"

enum rope_scaling {
    ROPE_SCALING_NONE,
    ROPE_SCALING_LINEAR,
    ROPE_SCALING_LLAMA3,
    ROPE_SCALING_YARN
};

struct model_config {
    char architecture[32]; /* "llama"; others are refused by name until they are tested */
    int32_t layers;
    int32_t hidden;       /* d */
    int32_t intermediate; /* width of the MLP */
    int32_t heads, kv_heads, head_dim;
    int32_t vocabulary;
    int32_t context; /* max_position_embeddings */
    float rms_norm_eps;
    float rope_theta;
    enum rope_scaling rope_scaling;
    float rope_factor, rope_low_freq_factor, rope_high_freq_factor; /* by kind of scaling */
    int32_t rope_original_context;
    bool tied_embeddings;
    bool attention_bias;          /* q, k, v have biases (Qwen2) */
    bool qk_norm;                 /* RMSNorm on each head of q and k (Qwen3) */
    int32_t bos_token, eos_token; /* -1: none */
};

/* The lengths that shapes are made of: D, H·E, G·E, F, E, V (backend.h). NONE is 0. */
enum model_width { WIDTH_D, WIDTH_QUERY, WIDTH_KEY, WIDTH_F, WIDTH_E, WIDTH_V, WIDTH_NONE };
int64_t model_config_width(const struct model_config *config, enum model_width width);

#define MODEL_CONFIG_MAX_JSON (1u << 20)

/* From the text of a config.json. ERR_INVALID names the key. */
int model_config_from_json(struct model_config *config, const char *text, unsigned long len,
                           struct err *err);
/* The same checks for a configuration that came from elsewhere (GGUF metadata). */
int model_config_check(const struct model_config *config, struct err *err);
/* A config.json that model_config_from_json reads back to the same values, bit for bit. */
void model_config_to_json(const struct model_config *config, struct strbuf *out);

#endif
