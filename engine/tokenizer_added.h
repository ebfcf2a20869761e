/* tokenizer_added.h: added tokens: texts that are one token wherever they stand, before any
 * pre-tokenizer sees the text. Read-only after sort: any thread. */
#ifndef GRAFT_TOKENIZER_ADDED_H
#define GRAFT_TOKENIZER_ADDED_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/err.h"

struct tokenizer_added_token {
    char *content; /* malloc'ed by the owner of the list */
    size_t len;    /* at least 1 */
    int32_t id;
    bool special;
    bool lstrip, rstrip; /* takes white space beside it along */
};

struct tokenizer_added {
    struct tokenizer_added_token *items; /* sorted by content */
    size_t count, capacity;
    bool starts_with[256]; /* first bytes that occur */
};

int tokenizer_added_add(struct tokenizer_added *added, const struct tokenizer_added_token *token,
                        struct err *err);
/* Behind the last add. ERR_INVALID where two have the same content. */
int tokenizer_added_sort(struct tokenizer_added *added, struct err *err);
void tokenizer_added_release(struct tokenizer_added *added); /* contents too */
const struct tokenizer_added_token *tokenizer_added_find(const struct tokenizer_added *added,
                                                         const char *content, size_t len);

struct tokenizer_added_match {
    const struct tokenizer_added_token *token; /* NULL: none from here to the end */
    size_t start, end;                         /* with the white space it takes along */
    size_t resume;                             /* where the search for the next one goes on */
};

/* The first match at or behind `from` (the longest of those that start there), not reaching back
 * before `taken`. `skip_special`: special tokens are plain text; a longer special one still hides a
 * shorter one, as in the reference. */
struct tokenizer_added_match tokenizer_added_next(const struct tokenizer_added *added,
                                                  const char *text, size_t len, size_t from,
                                                  size_t taken, bool skip_special);

#endif
