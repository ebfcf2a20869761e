/* tokenizer.h: text to token ids and back, as Hugging Face's `tokenizers` does it: byte-level BPE
 * read from a tokenizer.json.
 *
 * The text is cut at added tokens (longest match first), the rest by the pre-tokenizer
 * (pretokenizer.h), and each piece is merged by rank: O(n log n) in the length of the piece.
 * Ids are those of the reference for every valid UTF-8 text. What the reference would do and this
 * does not (normalizers, other models, byte fallback, …) is refused by name at open.
 * A post-processor is not applied: no token is added to a text; a chat template says what a
 * conversation starts with.
 *
 * Read-only after open: any number of threads. */
#ifndef GRAFT_TOKENIZER_H
#define GRAFT_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/err.h"

#define TOKENIZER_MAX_JSON (64u << 20)
#define TOKENIZER_MAX_TOKENS (1 << 21)

struct tokenizer;

/* A growing list of tokens; encode appends to it. */
struct token_list {
    int32_t *ids;
    uint32_t *starts; /* offset of the token's first byte in the text it was made from */
    size_t count, capacity;
};

void token_list_init(struct token_list *list);
void token_list_release(struct token_list *list); /* frees; may be initialised again */
/* -1 with ERR_NO_MEMORY */
int token_list_add(struct token_list *list, int32_t id, uint32_t start, struct err *err);

/* From the text of a tokenizer.json. */
int tokenizer_open(struct tokenizer **out, const char *json, size_t len, struct err *err);
void tokenizer_free(struct tokenizer *tokenizer);

/* Appends the tokens of `text` (valid UTF-8 without limit below 4 GiB, else ERR_INVALID).
 * allow_special: names of special tokens in the text become those tokens, as in the reference's
 * default. false is for text from users: they stay plain text (the reference's
 * encode_special_tokens = true). Added tokens that are not special are always matched. */
int tokenizer_encode(const struct tokenizer *tokenizer, const char *text, size_t len,
                     bool allow_special, struct token_list *out, struct err *err);

/* Bytes that a token stands for (one token may hold part of a character); for added tokens their
 * text. NULL for an id that is none. Not NUL-terminated. */
const char *tokenizer_piece(const struct tokenizer *tokenizer, int32_t id, size_t *len);
bool tokenizer_is_special(const struct tokenizer *tokenizer, int32_t id);
/* Id of the added token with exactly this text, or -1. */
int32_t tokenizer_added_token(const struct tokenizer *tokenizer, const char *content);
/* Highest id + 1. May be smaller than the model's vocabulary (padding), never larger. */
int32_t tokenizer_size(const struct tokenizer *tokenizer);

#endif
