/* import_gguf_tokenizer.h: the tokenizer in GGUF metadata as the text of a tokenizer.json, so that
 * there is one path for tokenizers. */
#ifndef GRAFT_IMPORT_GGUF_TOKENIZER_H
#define GRAFT_IMPORT_GGUF_TOKENIZER_H

#include <stddef.h>

#include "engine/base/err.h"
#include "engine/gguf.h"

/* *text: malloc'ed, free() it. Pre-tokenizers (tokenizer.ggml.pre) that are known: smollm,
 * llama-bpe, gpt-2; others, and files that name none, are refused by name, since their ids would be
 * a guess. (qwen2 is one of those: it needs text in normal form C, which nothing here makes yet.)
 */
int import_gguf_tokenizer(const struct gguf *file, char **text, size_t *len, struct err *err);

#endif
