/* json_text.h: JSON text from outside, read strictly: valid UTF-8, no duplicate keys, nothing
 * behind the value, a depth limit that is checked before the recursive parser sees the text, no
 * NUL.
 *
 * Call json_text_setup() once before threads start (it seeds jansson's hash). */
#ifndef GRAFT_BASE_JSON_TEXT_H
#define GRAFT_BASE_JSON_TEXT_H

#include <jansson.h>
#include <stddef.h>

#include "engine/base/err.h"

#define JSON_TEXT_DEPTH 32 /* arrays and objects inside one another */

void json_text_setup(void);
/* Returns a new reference or NULL with an ERR_INVALID that says where. `flags`: 0 or
 * JSON_DECODE_ANY. An UTF-8 byte order mark in front is refused by name. */
json_t *json_text_load(const char *text, size_t len, size_t flags, struct err *err);

#endif
