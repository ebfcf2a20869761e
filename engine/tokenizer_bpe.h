/* tokenizer_bpe.h: byte-pair merges of one piece of text. Read-only after open: any thread. */
#ifndef GRAFT_TOKENIZER_BPE_H
#define GRAFT_TOKENIZER_BPE_H

#include <stddef.h>
#include <stdint.h>

#include "engine/base/err.h"
#include "engine/tokenizer.h"

struct tokenizer_merge {
    int32_t left, right; /* left < 0: an empty slot */
    uint32_t rank;       /* lower merges first */
    int32_t result;
};

/* Pair → merge, open addressing; `slots` is a power of two. */
struct tokenizer_merges {
    struct tokenizer_merge *items;
    size_t slots;
};

int tokenizer_merges_init(struct tokenizer_merges *merges, size_t count, struct err *err);
void tokenizer_merges_release(struct tokenizer_merges *merges);
/* A pair that is there already gets the new rank and result. At most `count` different pairs. */
void tokenizer_merges_set(struct tokenizer_merges *merges, struct tokenizer_merge merge);
const struct tokenizer_merge *tokenizer_merges_get(const struct tokenizer_merges *merges,
                                                   int32_t left, int32_t right);

struct tokenizer_symbol {
    int32_t id;
    uint32_t start;         /* first byte in the text */
    int32_t previous, next; /* -1: none; id -1: merged into its left neighbour */
};

/* Working memory, kept between pieces. */
struct tokenizer_bpe {
    struct tokenizer_symbol *symbols;
    size_t count, capacity;
    struct tokenizer_queued {
        uint32_t rank, position;
        int32_t result;
    } * queue;
    size_t queued, queue_capacity;
};

void tokenizer_bpe_release(struct tokenizer_bpe *bpe);
int tokenizer_bpe_add_symbol(struct tokenizer_bpe *bpe, int32_t id, uint32_t start,
                             struct err *err);
/* Merges the symbols and appends what is left to `out`; then there are no symbols again.
 * The pair of lowest rank first, of equal rank the leftmost: O(n log n). */
int tokenizer_bpe_run(struct tokenizer_bpe *bpe, const struct tokenizer_merges *merges,
                      struct token_list *out, struct err *err);

#endif
