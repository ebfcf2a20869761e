/* pretokenizer_unicode.h: where PCRE2 and the reference disagree about a character, a stand-in.
 *
 * The reference's regexes (Oniguruma) know Unicode 16 and its digits (Rust's char::is_numeric)
 * Unicode 17; PCRE2 10.42 knows Unicode 14, and takes U+180E for white space. In the text that is
 * given to the matcher, each character whose class differs is replaced by an old character of the
 * same general category and the same number of bytes, so that offsets stay. */
#ifndef GRAFT_PRETOKENIZER_UNICODE_H
#define GRAFT_PRETOKENIZER_UNICODE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/err.h"

enum pretokenizer_unicode {
    PRETOKENIZER_UNICODE_REGEX,  /* classes as the reference's regexes see them */
    PRETOKENIZER_UNICODE_DIGITS, /* as its Digits pre-tokenizer does */
};

/* *out: `text` with stand-ins, malloc'ed; NULL when there is nothing to replace. */
int pretokenizer_stand_ins(const char *text, size_t len, enum pretokenizer_unicode version,
                           char **out, struct err *err);

#endif
