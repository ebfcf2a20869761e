/* base_file.h: an imported base model: one safetensors file, opened and mapped read-only.
 *
 * Canonical tensor names are those of Hugging Face's Llama:
 *   model.embed_tokens.weight                          [vocabulary, hidden]
 *   model.layers.N.input_layernorm.weight              [hidden]
 *   model.layers.N.self_attn.{q,k,v,o}_proj.weight     [out, in], bias [out] where the model has it
 *   model.layers.N.self_attn.{q,k}_norm.weight         [head_dim] where the model has it
 *   model.layers.N.post_attention_layernorm.weight     [hidden]
 *   model.layers.N.mlp.{gate,up,down}_proj.weight      [out, in]
 *   model.norm.weight                                  [hidden]
 *   lm_head.weight                                     [vocabulary, hidden], absent when tied
 * q and k rows are in Hugging Face's order (halves rotate against each other), also from GGUF.
 * Beside them, U8 tensors `graft.tokenizer` (a tokenizer.json) and `graft.chat_template` (Jinja
 * text, absent when the model has none). __metadata__ has `graft.base_version`, `graft.config` (a
 * config.json, see model_config.h) and `graft.digest` (how it is made: base_layout.h).
 * F32 tensors lie first, then the 16-bit ones, each in canonical order, then the texts.
 *
 * Every tensor that the configuration calls for is there with the right shape, and no other:
 * checked at open. Dtypes are F32, F16 or BF16, as imported. Read-only after open: any thread. */
#ifndef GRAFT_BASE_FILE_H
#define GRAFT_BASE_FILE_H

#include <stddef.h>

#include "engine/engine.h"
#include "engine/model_config.h"
#include "engine/tensor.h"

#define BASE_FILE_VERSION "1"
#define BASE_FILE_VERSION_KEY "graft.base_version"
#define BASE_FILE_CONFIG_KEY "graft.config"
#define BASE_FILE_DIGEST_KEY "graft.digest"
#define BASE_FILE_TOKENIZER "graft.tokenizer"
#define BASE_FILE_CHAT_TEMPLATE "graft.chat_template"

struct base_file;

int base_file_open(struct base_file **out, const char *path, struct err *err);
void base_file_free(struct base_file *base);
/* Do the values have the digest that the header declares? Reads and hashes all of them;
 * ERR_INVALID: no. Open does not: whoever keeps base files among blobs has hashed them already. */
int base_file_verify(const struct base_file *base, struct err *err);
const struct model_config *base_file_config(const struct base_file *base);
const struct engine_base_info *base_file_info(const struct base_file *base);
/* View into the mapping; false when the base has no such tensor. */
bool base_file_tensor(const struct base_file *base, const char *name, struct tensor *out);
/* The tensor's values will not be needed soon: the kernel may drop their pages (they come back when
 * they are read), so that a pass over a base larger than memory does not fill it. */
void base_file_done_with(const struct base_file *base, const char *name);
/* Text of tokenizer.json; of the chat template (NULL when it has none). Not NUL-terminated. */
const char *base_file_tokenizer_json(const struct base_file *base, size_t *len);
const char *base_file_chat_template(const struct base_file *base, size_t *len);

#endif
