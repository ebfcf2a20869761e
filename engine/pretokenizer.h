/* pretokenizer.h: cuts text into the pieces that BPE merges within: the `pre_tokenizer` part of a
 * tokenizer.json. ByteLevel, Digits, Split (string or regular expression) and Sequence of these;
 * others are refused by name.
 *
 * Regular expressions run on PCRE2 (UTF, Unicode properties, JIT where the machine has it). The
 * reference runs them on Oniguruma with its own Unicode version; where the two disagree about a
 * character's class, the matcher sees a stand-in of the reference's class (pretokenizer.c has the
 * table), so the pieces are the reference's.
 *
 * Read-only after open: any number of threads. */
#ifndef GRAFT_PRETOKENIZER_H
#define GRAFT_PRETOKENIZER_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/err.h"

struct pretokenizer;

struct pretokenizer_piece {
    uint32_t start, len; /* bytes of the text */
};

struct pretokenizer_pieces {
    struct pretokenizer_piece *items;
    size_t count, capacity;
};

/* `spec`: the value of "pre_tokenizer" (an object). */
int pretokenizer_open(struct pretokenizer **out, const json_t *spec, struct err *err);
void pretokenizer_free(struct pretokenizer *pre);

/* Text that goes in front of every text that does not begin with a space? (add_prefix_space) */
bool pretokenizer_adds_space(const struct pretokenizer *pre);

/* `text`: valid UTF-8, below 4 GiB. Sets *pieces (initialise with {0}, release when done; its
 * memory is kept between calls). ERR_INVALID when a pattern needs too many steps on this text. */
int pretokenizer_split(const struct pretokenizer *pre, const char *text, size_t len,
                       struct pretokenizer_pieces *pieces, struct err *err);
void pretokenizer_pieces_release(struct pretokenizer_pieces *pieces);

#endif
