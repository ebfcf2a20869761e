/* session_text.h: from the bytes of generated tokens to text that may be shown.
 *
 * Tokens end anywhere: inside of a character, inside of a stop string. Bytes wait here until they
 * are whole characters (bytes that are no UTF-8 become U+FFFD, one for each maximal broken part, as
 * the Unicode standard recommends), and characters wait until no stop string can begin with them.
 * What comes out does not depend on where the tokens' borders lay: the stop string that ends first
 * ends the text, the longest one if several end together.
 *
 * All memory is taken by session_text_init. One thread at a time. */
#ifndef GRAFT_SESSION_TEXT_H
#define GRAFT_SESSION_TEXT_H

#include <stdbool.h>
#include <stddef.h>

#include "engine/base/err.h"

#define SESSION_TEXT_MAX_STOPS 16
#define SESSION_TEXT_MAX_STOP 1024 /* bytes of one stop string */

struct session_text {
    unsigned char broken[4]; /* the begin of a character */
    size_t broken_len;
    char *held; /* whole characters; the first `given` bytes are handed out */
    size_t held_len, given, capacity;
    char *stop[SESSION_TEXT_MAX_STOPS]; /* owned */
    size_t stop_len[SESSION_TEXT_MAX_STOPS];
    int stop_count;
    bool stopped;
};

/* `max_piece`: bytes of the longest token. Stop strings are copied; an empty one, one that is no
 * UTF-8, too long or too many are ERR_INVALID with param "stop". */
int session_text_init(struct session_text *text, size_t max_piece, const char *const *stop,
                      int stop_count, struct err *err);
void session_text_release(struct session_text *text);

/* Adds the bytes of one token (at most max_piece) and sets `out`, valid until the next call, to
 * what may be shown now. Returns true when a stop string is complete: `out` is then the rest before
 * it, and nothing may be added after. */
bool session_text_add(struct session_text *text, const char *piece, size_t len, const char **out,
                      size_t *out_len);
/* The end without a stop string: what was held back, a broken character included. */
void session_text_finish(struct session_text *text, const char **out, size_t *out_len);

#endif
