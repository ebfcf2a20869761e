#include "engine/base/strbuf.h"

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static char empty[1]; /* what data points to before the first append; never written */

void strbuf_init(struct strbuf *sb, size_t max)
{
    /* No more than an object can have, so that sizes below never wrap. */
    *sb = (struct strbuf){.data = empty, .max = max < PTRDIFF_MAX ? max : PTRDIFF_MAX - 1};
}

void strbuf_release(struct strbuf *sb)
{
    if (sb->data != empty)
        free(sb->data);
    sb->data = empty;
    sb->len = sb->capacity = 0;
    sb->failed = false;
}

void strbuf_reset(struct strbuf *sb)
{
    sb->len = 0;
    sb->failed = false;
    if (sb->data != empty)
        sb->data[0] = '\0';
}

void strbuf_truncate(struct strbuf *sb, size_t len)
{
    sb->failed = false;
    if (len < sb->len) {
        sb->len = len;
        sb->data[len] = '\0';
    }
}

static bool reserve(struct strbuf *sb, size_t extra)
{
    size_t want, capacity;
    char *grown;

    if (sb->failed)
        return false;
    if (extra > sb->max - sb->len) {
        sb->failed = true;
        return false;
    }
    want = sb->len + extra + 1;
    if (want <= sb->capacity)
        return true;
    capacity = sb->capacity ? sb->capacity : 64;
    while (capacity < want)
        capacity = capacity > (size_t)-1 / 2 ? want : capacity * 2;
    grown = realloc(sb->data == empty ? NULL : sb->data, capacity);
    if (grown == NULL) {
        sb->failed = true;
        return false;
    }
    sb->data = grown;
    sb->capacity = capacity;
    return true;
}

void strbuf_add(struct strbuf *sb, const void *data, size_t len)
{
    if (len == 0 || !reserve(sb, len))
        return;
    memcpy(sb->data + sb->len, data, len);
    sb->len += len;
    sb->data[sb->len] = '\0';
}

void strbuf_addstr(struct strbuf *sb, const char *s)
{
    strbuf_add(sb, s, strlen(s));
}

void strbuf_addch(struct strbuf *sb, char c)
{
    strbuf_add(sb, &c, 1);
}

void strbuf_addf(struct strbuf *sb, const char *fmt, ...)
{
    va_list ap;
    int n;

    va_start(ap, fmt);
    n = vsnprintf(NULL, 0, fmt, ap);
    va_end(ap);
    if (n < 0) {
        sb->failed = true;
        return;
    }
    if (n == 0 || !reserve(sb, (size_t)n))
        return;
    va_start(ap, fmt);
    vsnprintf(sb->data + sb->len, (size_t)n + 1, fmt, ap);
    va_end(ap);
    sb->len += (size_t)n;
}

bool strbuf_failed(const struct strbuf *sb)
{
    return sb->failed;
}

char *strbuf_detach(struct strbuf *sb, size_t *len)
{
    char *out = NULL;

    if (!sb->failed && reserve(sb, 0)) {
        out = sb->data;
        out[sb->len] = '\0';
        if (len != NULL)
            *len = sb->len;
        sb->data = empty;
    }
    strbuf_release(sb);
    return out;
}
