/* utf8.h: is this UTF-8? By Unicode's table 3-7: no overlong forms, no surrogates, nothing above
 * U+10FFFF. */
#ifndef GRAFT_BASE_UTF8_H
#define GRAFT_BASE_UTF8_H

#include <stdbool.h>
#include <stddef.h>

/* Bytes of the character that begins with `lead`; 0 where none begins so. */
size_t utf8_length(unsigned char lead);
/* May c be byte number `at` (1, 2, 3) of the character that begins with `lead`? */
bool utf8_may_follow(unsigned char lead, size_t at, unsigned char c);
bool utf8_valid(const char *s, size_t len);
/* Replaces each byte that belongs to no character by '?': for a text that was cut or formatted from
 * outside bytes and must go to a database or into JSON. */
void utf8_scrub(char *s);

#endif
