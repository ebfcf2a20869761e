#include "engine/base/json_text.h"

#include <stdbool.h>
#include <string.h>

void json_text_setup(void)
{
    json_object_seed(0);
}

/* Depth of brackets outside of strings; needs no valid JSON. */
static bool too_deep(const char *text, size_t len)
{
    bool in_string = false;
    int depth = 0;

    for (size_t i = 0; i < len; i++) {
        char c = text[i];

        if (in_string) {
            if (c == '\\')
                i++;
            else if (c == '"')
                in_string = false;
        } else if (c == '"') {
            in_string = true;
        } else if (c == '{' || c == '[') {
            if (++depth > JSON_TEXT_DEPTH)
                return true;
        } else if ((c == '}' || c == ']') && depth > 0) {
            depth--;
        }
    }
    return false;
}

json_t *json_text_load(const char *text, size_t len, size_t flags, struct err *err)
{
    json_error_t at;
    json_t *value;

    if (len >= 3 && memcmp(text, "\xef\xbb\xbf", 3) == 0) {
        err_set(err, ERR_INVALID, "starts with a byte order mark; save it as UTF-8 without one");
        return NULL;
    }
    if (too_deep(text, len)) {
        err_set(err, ERR_INVALID, "is nested deeper than %d levels", JSON_TEXT_DEPTH);
        return NULL;
    }
    value = json_loadb(text, len, flags | JSON_REJECT_DUPLICATES, &at);
    if (value == NULL)
        err_set(err, ERR_INVALID, "is not valid JSON: %s (line %d, column %d)", at.text, at.line,
                at.column);
    return value;
}
