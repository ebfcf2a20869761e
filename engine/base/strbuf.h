/* strbuf.h: a growing byte string with a maximum. Always NUL-terminated behind its length, so that
 * `data` is a C string when the content has no NUL.
 *
 * The first failure (out of memory, or over the maximum) sticks: later appends do nothing, and
 * strbuf_failed() tells. Callers append freely and check once. */
#ifndef GRAFT_BASE_STRBUF_H
#define GRAFT_BASE_STRBUF_H

#include <stdbool.h>
#include <stddef.h>

struct strbuf {
    char *data; /* never NULL after strbuf_init */
    size_t len;
    size_t capacity;
    size_t max; /* bytes, without the NUL */
    bool failed;
};

void strbuf_init(struct strbuf *sb, size_t max);
void strbuf_release(struct strbuf *sb); /* frees; the struct may be initialised again */
void strbuf_reset(struct strbuf *sb);   /* len = 0, failed = false; keeps the memory */
/* Back to its first `len` bytes, of those it has; failed = false. */
void strbuf_truncate(struct strbuf *sb, size_t len);
void strbuf_add(struct strbuf *sb, const void *data, size_t len);
void strbuf_addstr(struct strbuf *sb, const char *s);
void strbuf_addch(struct strbuf *sb, char c);
void strbuf_addf(struct strbuf *sb, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
bool strbuf_failed(const struct strbuf *sb);
/* Hands the malloc'ed string to the caller (free()) and leaves sb as after strbuf_release. NULL if
 * the buffer has failed. */
char *strbuf_detach(struct strbuf *sb, size_t *len);

#endif
