/* tiny_model.h: writes small random Llama models as Hugging Face directories, for tests.
 *
 * Weights are a function of name, index and seed, so that any language can make them again
 * (tests/api/make_tiny_model.py does). All arithmetic on 64-bit unsigned integers wraps:
 *
 *   h = FNV-1a-64 of the tensor's canonical name (engine/base_file.h)
 *   z = splitmix64's output function of h ^ seed·0xD1342543DE82EF95, advanced index + 1 steps:
 *       z = (h ^ seed·0xD1342543DE82EF95) + (index + 1)·0x9E3779B97F4A7C15
 *       z = (z ^ z>>30)·0xBF58476D1CE4E5B9;  z = (z ^ z>>27)·0x94D049BB133111EB;  z = z ^ z>>31
 *   u = (z >> 40)·2^-23 − 1                  in [-1, 1), exact
 *   value = f32(u·s), s = 2/sqrt(columns) for matrices, 1 for the embedding; norms: f32(1 + u/10)
 *
 * computed in double; `index` is row-major. F16 and BF16 are rounded from that f32 to nearest even.
 * The tokenizer is tests/golden/tiny_tokenizer.json (512 tokens), the chat template
 * tests/golden/tiny_template.jinja; tests run in the root of the tree. */
#ifndef GRAFT_TESTS_TINY_MODEL_H
#define GRAFT_TESTS_TINY_MODEL_H

#include <stdbool.h>
#include <stdint.h>

#include "engine/base/err.h"
#include "engine/tensor.h"

struct tiny_model {
    /* 0: the value behind it */
    int32_t layers;       /* 2 */
    int32_t hidden;       /* 64 */
    int32_t intermediate; /* 128 */
    int32_t heads;        /* 4 */
    int32_t kv_heads;     /* 2 */
    int32_t head_dim;     /* hidden / heads */
    int32_t vocabulary;   /* 512; at least as much */
    int32_t context;      /* 256 */
    double rope_theta;    /* 10000 */
    bool untied;          /* an lm_head.weight of its own */
    enum dtype dtype;     /* F32 (0), BF16 or F16 */
    uint64_t seed;
};

/* Makes the folder if it is missing; config.json, model.safetensors, tokenizer.json,
 * tokenizer_config.json, chat_template.jinja in it. */
int tiny_model_write(const char *dir, const struct tiny_model *model, struct err *err);

/* Another chat template for the model in the folder, without a system prompt: imported it is
 * another base of the same values. */
int tiny_model_brief_template(const char *dir, struct err *err);

/* Element `index` of the tensor `name`, before it is rounded to the model's dtype. */
float tiny_model_value(const char *name, int64_t index, int64_t columns, uint64_t seed);

#endif
