#include "server/http_path.h"

#include <stdlib.h>
#include <string.h>

#include "engine/base/utf8.h"

static int hex_value(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    if (c >= 'a' && c <= 'f')
        return c - 'a' + 10;
    if (c >= 'A' && c <= 'F')
        return c - 'A' + 10;
    return -1;
}

/* Decodes [from, from + len) to `out` (at most len bytes and a NUL); `plus` turns '+' to a space.
 * Returns the decoded length, or -1 for a broken escape. */
static long decode(const char *from, size_t len, bool plus, char *out)
{
    size_t n = 0;
    for (size_t i = 0; i < len; i++) {
        if (from[i] != '%') {
            out[n++] = plus && from[i] == '+' ? ' ' : from[i];
            continue;
        }
        if (len - i < 3)
            return -1;
        int high = hex_value(from[i + 1]), low = hex_value(from[i + 2]);
        if (high < 0 || low < 0)
            return -1;
        out[n++] = (char)(high << 4 | low);
        i += 2;
    }
    out[n] = '\0';
    return (long)n;
}

/* "." and ".." between slashes, decoded ones too: such a name is never an id of ours. */
static bool has_dot_segment(const char *text)
{
    const char *p = text;
    for (;;) {
        size_t n = strcspn(p, "/");
        if ((n == 1 && p[0] == '.') || (n == 2 && p[0] == '.' && p[1] == '.'))
            return true;
        if (p[n] == '\0')
            return false;
        p += n + 1;
    }
}

static int add_segment(struct http_path *path, const char *from, size_t len, char **out,
                       struct err *err)
{
    if (path->segment_count == HTTP_SEGMENTS_MAX)
        return err_set(err, ERR_INVALID, "the path has more than %d segments", HTTP_SEGMENTS_MAX);
    char *text = *out;
    long n = decode(from, len, false, text);
    if (n < 0)
        return err_set(err, ERR_INVALID, "the path has a broken %%-escape");
    bool slash = false;
    for (long i = 0; i < n; i++) {
        unsigned char c = (unsigned char)text[i];
        if (c < 0x20 || c >= 0x7f || c == '\\')
            return err_set(err, ERR_INVALID, "the path has a byte 0x%02x, which no path here has",
                           c);
        slash |= c == '/';
    }
    if (has_dot_segment(text))
        return err_set(err, ERR_INVALID, "the path has a segment \".\" or \"..\"");
    path->segments[path->segment_count] = text;
    path->slash[path->segment_count++] = slash;
    *out = text + n + 1;
    return 0;
}

static int add_query_part(const char *from, size_t len, const char **part, char **out,
                          struct err *err)
{
    char *text = *out;
    long n = decode(from, len, true, text);
    if (n < 0)
        return err_set(err, ERR_INVALID, "the query string has a broken %%-escape");
    if (strlen(text) != (size_t)n || !utf8_valid(text, (size_t)n))
        return err_set(err, ERR_INVALID, "the query string is not UTF-8 text");
    *part = text;
    *out = text + n + 1;
    return 0;
}

static int parse_query(struct http_path *path, const char *query, char **out, struct err *err)
{
    while (*query) {
        size_t len = strcspn(query, "&");
        if (len > 0) {
            if (path->query_count == HTTP_QUERY_MAX)
                return err_set(err, ERR_INVALID, "the query string has more than %d parameters",
                               HTTP_QUERY_MAX);
            struct http_pair *pair = &path->query[path->query_count];
            const char *equals = memchr(query, '=', len);
            size_t name_len = equals ? (size_t)(equals - query) : len;
            if (add_query_part(query, name_len, &pair->name, out, err) < 0)
                return -1;
            const char *value = equals ? equals + 1 : query + len;
            if (add_query_part(value, (size_t)(query + len - value), &pair->value, out, err) < 0)
                return -1;
            path->query_count++;
        }
        query += len;
        if (*query == '&')
            query++;
    }
    return 0;
}

int http_path_parse(struct http_path *path, const char *target, struct err *err)
{
    memset(path, 0, sizeof(*path));
    size_t len = strlen(target);
    if (len > HTTP_URI_MAX)
        return err_set(err, ERR_TOO_LARGE, "the request target has %zu bytes, at most %d are read",
                       len, HTTP_URI_MAX);
    if (target[0] != '/')
        return err_set(err, ERR_INVALID, "the request target must start with \"/\"");
    for (size_t i = 0; i < len; i++) {
        unsigned char c = (unsigned char)target[i];
        if (c <= 0x20 || c >= 0x7f || c == '#')
            return err_set(err, ERR_INVALID, "the request target has a raw byte 0x%02x", c);
    }
    /* Each decoded part is no longer than its source and takes one NUL, for which there is a
     * separator in the source, but for "name" without '=': two NULs for one separator. */
    path->text = malloc(2 * len + 2);
    if (!path->text)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    char *out = path->text;
    const char *end = target + strcspn(target, "?");
    for (const char *p = target + 1;;) {
        const char *slash = memchr(p, '/', (size_t)(end - p));
        size_t n = slash ? (size_t)(slash - p) : (size_t)(end - p);
        if (add_segment(path, p, n, &out, err) < 0)
            return -1;
        if (!slash)
            break;
        p = slash + 1;
    }
    return *end ? parse_query(path, end + 1, &out, err) : 0;
}

void http_path_release(struct http_path *path)
{
    free(path->text);
    memset(path, 0, sizeof(*path));
}
