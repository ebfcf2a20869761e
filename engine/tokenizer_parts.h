/* tokenizer_parts.h: what a tokenizer is made of; for tokenizer.c and tokenizer_load.c alone. */
#ifndef GRAFT_TOKENIZER_PARTS_H
#define GRAFT_TOKENIZER_PARTS_H

#include "engine/pretokenizer.h"
#include "engine/tokenizer.h"
#include "engine/tokenizer_added.h"
#include "engine/tokenizer_bpe.h"

#define TOKENIZER_MAX_NAME 1024 /* bytes of a token's name, less 2 */

struct tokenizer_token {
    const char *name;  /* as the file spells it (byte-level letters), in `text`; NULL: no such id */
    const char *piece; /* the bytes it stands for, in `text` */
    uint32_t name_len, piece_len;
    bool special;
};

struct tokenizer {
    struct tokenizer_token *tokens;
    int32_t size;
    char *text;     /* names and pieces */
    int32_t *index; /* name → id by hash, -1: empty; a power of two of slots */
    size_t index_slots;
    int32_t byte_ids[256]; /* token of a single byte, -1: none */
    int32_t unknown;       /* stands for bytes that have no token; -1: they vanish */
    bool fuse_unknown;     /* one for a run of them */
    bool ignore_merges;    /* a piece that is a token is taken whole */
    struct tokenizer_merges merges;
    struct pretokenizer *pre;
    struct tokenizer_added added[2]; /* matched first; matched between those ("normalized") */
};

/* Fills *tokenizer (zeroed before) from a tokenizer.json. On failure the caller frees what is
 * there. */
int tokenizer_load(struct tokenizer *tokenizer, const char *json, size_t len, struct err *err);
/* Id of the token of this name, or -1. */
int32_t tokenizer_find(const struct tokenizer *tokenizer, const char *name, size_t len);
/* Byte-level spelling of a byte, as UTF-8: 1 or 2 bytes; returns how many. */
int tokenizer_byte_spelling(unsigned char byte, char out[2]);

#endif
