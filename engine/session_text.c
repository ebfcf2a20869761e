#include "engine/session_text.h"

#include <assert.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/utf8.h"

static const char replacement[] = "\xef\xbf\xbd"; /* U+FFFD */

static int add_stop(struct session_text *text, const char *stop, struct err *err)
{
    size_t len = strlen(stop);

    if (len == 0 || len > SESSION_TEXT_MAX_STOP || !utf8_valid(stop, len))
        return err_set_code(err, ERR_INVALID, "invalid_value", "stop",
                            "a stop string must be UTF-8 text of 1 to %d bytes",
                            SESSION_TEXT_MAX_STOP);
    text->stop[text->stop_count] = strdup(stop);
    if (text->stop[text->stop_count] == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory for a stop string");
    text->stop_len[text->stop_count++] = len;
    return 0;
}

int session_text_init(struct session_text *text, size_t max_piece, const char *const *stop,
                      int stop_count, struct err *err)
{
    size_t longest = 0;

    memset(text, 0, sizeof(*text));
    if (stop_count < 0 || stop_count > SESSION_TEXT_MAX_STOPS)
        return err_set_code(err, ERR_INVALID, "invalid_value", "stop",
                            "at most %d stop strings are allowed", SESSION_TEXT_MAX_STOPS);
    for (int i = 0; i < stop_count; i++) {
        if (add_stop(text, stop[i], err) != 0)
            goto fail;
        if (text->stop_len[i] > longest)
            longest = text->stop_len[i];
    }
    /* Held back is less than a stop string; a byte becomes at most one U+FFFD of three. */
    text->capacity = longest + 3 * (max_piece + 2);
    text->held = malloc(text->capacity);
    if (text->held == NULL) {
        err_set(err, ERR_NO_MEMORY, "out of memory for an answer's text");
        goto fail;
    }
    return 0;
fail:
    session_text_release(text);
    return -1;
}

void session_text_release(struct session_text *text)
{
    for (int i = 0; i < text->stop_count; i++)
        free(text->stop[i]);
    free(text->held);
    memset(text, 0, sizeof(*text));
}

/* Adds one whole character; true when a stop string ends with it (the longest is cut off). */
static bool push(struct session_text *text, const char *bytes, size_t len)
{
    size_t cut = 0;

    assert(text->held_len + len <= text->capacity);
    memcpy(text->held + text->held_len, bytes, len);
    text->held_len += len;
    for (int i = 0; i < text->stop_count; i++) {
        size_t n = text->stop_len[i];

        if (n <= text->held_len && n > cut &&
            memcmp(text->held + text->held_len - n, text->stop[i], n) == 0)
            cut = n;
    }
    text->held_len -= cut;
    return cut > 0;
}

/* Takes one byte; true when a stop string ended. */
static bool take(struct session_text *text, unsigned char c)
{
    if (text->broken_len > 0) {
        if (utf8_may_follow(text->broken[0], text->broken_len, c)) {
            text->broken[text->broken_len++] = c;
            if (text->broken_len < utf8_length(text->broken[0]))
                return false;
            text->broken_len = 0;
            return push(text, (const char *)text->broken, utf8_length(text->broken[0]));
        }
        text->broken_len = 0;
        if (push(text, replacement, 3))
            return true;
    }
    if (utf8_length(c) == 1)
        return push(text, (const char *)&c, 1);
    if (utf8_length(c) == 0)
        return push(text, replacement, 3);
    text->broken[0] = c;
    text->broken_len = 1;
    return false;
}

/* Bytes at the end of what is held that may be the begin of a stop string. */
static size_t undecided(const struct session_text *text)
{
    size_t most = 0;

    for (int i = 0; i < text->stop_count; i++) {
        size_t n = text->stop_len[i] - 1;

        if (n > text->held_len)
            n = text->held_len;
        while (n > most && memcmp(text->held + text->held_len - n, text->stop[i], n) != 0)
            n--;
        if (n > most)
            most = n;
    }
    return most;
}

static void drop_given(struct session_text *text)
{
    memmove(text->held, text->held + text->given, text->held_len - text->given);
    text->held_len -= text->given;
    text->given = 0;
}

bool session_text_add(struct session_text *text, const char *piece, size_t len, const char **out,
                      size_t *out_len)
{
    assert(!text->stopped);
    drop_given(text);
    for (size_t i = 0; i < len && !text->stopped; i++)
        text->stopped = take(text, (unsigned char)piece[i]);
    text->given = text->stopped ? text->held_len : text->held_len - undecided(text);
    *out = text->held;
    *out_len = text->given;
    return text->stopped;
}

void session_text_finish(struct session_text *text, const char **out, size_t *out_len)
{
    drop_given(text);
    if (text->broken_len > 0 && !text->stopped) {
        text->broken_len = 0;
        text->stopped = push(text, replacement, 3);
    }
    text->given = text->held_len;
    *out = text->held;
    *out_len = text->given;
}
