/* pretokenizer_pattern.h: is this regex one that PCRE2 and Oniguruma (Ruby syntax), which the
 * reference uses, understand the same way? */
#ifndef GRAFT_PRETOKENIZER_PATTERN_H
#define GRAFT_PRETOKENIZER_PATTERN_H

#include "engine/base/err.h"

/* Allowed: literals, escapes of punctuation, \r \n \t \f, \s \S \d \D, \p{..} and \P{..} of
 * general categories, classes without nesting or intersection, groups, look-around, quantifiers,
 * ".". ERR_INVALID names the first construct that is outside of that. */
int pretokenizer_pattern_check(const char *pattern, struct err *err);

#endif
