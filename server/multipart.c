#include "server/multipart.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>

enum {
    STATE_PREAMBLE,   /* before the first delimiter; its CRLF is taken as seen at the start */
    STATE_AFTER,      /* a delimiter was seen: "--", blanks or CRLF must follow */
    STATE_AFTER_DASH, /* "-" */
    STATE_AFTER_CR,   /* CR, LF must follow */
    STATE_HEADER,     /* a part's header block, up to an empty line */
    STATE_DATA,       /* a part's body */
    STATE_EPILOGUE,   /* after the closing delimiter: ignored */
    STATE_FAILED,
};

static bool is_boundary_char(char c)
{
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
           (c != '\0' && strchr("'()+_,-./:=? ", c));
}

/* ------------------------------------------------------------------ parameters
 *
 * `; name=value` lists of Content-Type and Content-Disposition: token or quoted string, in which a
 * backslash escapes '"' and '\' (browsers escape '"' as %22 instead, which is left as it is). */

static const char *skip_blanks(const char *p)
{
    while (*p == ' ' || *p == '\t')
        p++;
    return p;
}

/* Reads one parameter at *text (behind its ';'). 1: one was read; 0: the end; -1: malformed. */
static int next_parameter(const char **text, char *name, size_t name_size, char *value,
                          size_t value_size)
{
    const char *p = skip_blanks(*text);
    if (*p == '\0')
        return 0;
    if (*p != ';')
        return -1;
    p = skip_blanks(p + 1);
    if (*p == '\0') { /* a trailing ';' is common and harmless */
        *text = p;
        return 0;
    }
    size_t n = strcspn(p, "=; \t\"");
    if (n == 0 || n >= name_size)
        return -1;
    memcpy(name, p, n);
    name[n] = '\0';
    p = skip_blanks(p + n);
    if (*p != '=')
        return -1;
    p = skip_blanks(p + 1);
    size_t len = 0;
    if (*p == '"') {
        for (p++; *p != '"'; p++) {
            if (*p == '\\' && (p[1] == '"' || p[1] == '\\'))
                p++;
            if (*p == '\0' || len + 1 >= value_size)
                return -1;
            value[len++] = *p;
        }
        p++;
    } else {
        len = strcspn(p, "; \t");
        if (len + 1 > value_size)
            return -1;
        memcpy(value, p, len);
        p += len;
    }
    value[len] = '\0';
    *text = p;
    return 1;
}

int multipart_init(struct multipart *mp, const char *content_type,
                   const struct multipart_events *events, struct err *err)
{
    memset(mp, 0, sizeof(*mp));
    mp->state = STATE_FAILED;
    mp->events = *events;
    static const char type[] = "multipart/form-data";
    if (!content_type || strncasecmp(content_type, type, sizeof(type) - 1) != 0)
        return err_set(err, ERR_INVALID,
                       "the body must be multipart/form-data, with Content-Type saying so");
    char name[64], value[256];
    char boundary[MULTIPART_BOUNDARY_MAX + 1] = "";
    const char *p = content_type + sizeof(type) - 1;
    int got;
    while ((got = next_parameter(&p, name, sizeof(name), value, sizeof(value))) == 1) {
        if (strcasecmp(name, "boundary") != 0)
            continue;
        size_t n = strlen(value);
        if (boundary[0] || n == 0 || n > MULTIPART_BOUNDARY_MAX || value[n - 1] == ' ')
            return err_set(err, ERR_INVALID,
                           "Content-Type: the boundary must have 1 to %d characters",
                           MULTIPART_BOUNDARY_MAX);
        for (size_t i = 0; i < n; i++)
            if (!is_boundary_char(value[i]))
                return err_set(err, ERR_INVALID, "Content-Type: illegal character in the boundary");
        memcpy(boundary, value, n + 1);
    }
    if (got < 0 || !boundary[0])
        return err_set(err, ERR_INVALID, "Content-Type: the boundary is missing or malformed");
    mp->header = malloc(MULTIPART_HEADER_MAX + 1);
    if (!mp->header)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    memcpy(mp->delimiter, "\r\n--", 4);
    size_t boundary_len = strlen(boundary);
    memcpy(mp->delimiter + 4, boundary, boundary_len + 1);
    mp->delimiter_len = 4 + boundary_len;
    mp->state = STATE_PREAMBLE;
    mp->matched = 2;
    return 0;
}

void multipart_release(struct multipart *mp)
{
    free(mp->header);
    mp->header = NULL;
}

/* ------------------------------------------------------------------ a part's header */

static int hex_value(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    c = (char)(c | 0x20);
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* filename*=UTF-8''na%20me (RFC 8187). Other character sets are refused. */
static int decode_extended(const char *value, char *out, size_t size)
{
    if (strncasecmp(value, "utf-8'", 6) != 0)
        return -1;
    const char *p = strchr(value + 6, '\'');
    if (!p)
        return -1;
    size_t n = 0;
    for (p++; *p; p++) {
        int byte = (unsigned char)*p;
        if (*p == '%') {
            int high = hex_value(p[1]), low = high < 0 ? -1 : hex_value(p[2]);
            if (low < 0)
                return -1;
            byte = high << 4 | low;
            p += 2;
        }
        if (byte == 0 || n + 1 >= size)
            return -1;
        out[n++] = (char)byte;
    }
    out[n] = '\0';
    return 0;
}

static int parse_disposition(struct multipart_part *part, const char *value, struct err *err)
{
    static const char type[] = "form-data";
    if (strncasecmp(value, type, sizeof(type) - 1) != 0)
        return err_set(err, ERR_INVALID, "Content-Disposition must be form-data");
    const char *p = value + sizeof(type) - 1;
    char name[64], text[MULTIPART_FILE_NAME_MAX + 1];
    bool has_name = false, extended = false;
    int got;
    while ((got = next_parameter(&p, name, sizeof(name), text, sizeof(text))) == 1) {
        if (strcasecmp(name, "name") == 0) {
            size_t n = strlen(text);
            if (has_name || n == 0 || n > MULTIPART_NAME_MAX)
                return err_set(err, ERR_INVALID, "the field's name must have 1 to %d bytes, once",
                               MULTIPART_NAME_MAX);
            memcpy(part->name, text, n + 1);
            has_name = true;
        } else if (strcasecmp(name, "filename") == 0) {
            part->has_file_name = true;
            if (!extended) /* the extended form wins wherever it stands */
                memcpy(part->file_name, text, strlen(text) + 1);
        } else if (strcasecmp(name, "filename*") == 0) {
            part->has_file_name = extended = true;
            if (decode_extended(text, part->file_name, sizeof(part->file_name)) < 0)
                return err_set(err, ERR_INVALID, "filename* is not UTF-8''… text");
        }
    }
    if (got < 0)
        return err_set(err, ERR_INVALID, "Content-Disposition is malformed or too long");
    if (!has_name)
        return err_set(err, ERR_INVALID, "Content-Disposition has no name");
    return 0;
}

/* One header line, without its CRLF, NUL-terminated. */
static int parse_header_line(struct multipart_part *part, char *line, size_t len,
                             bool *has_disposition, struct err *err)
{
    for (size_t i = 0; i < len; i++)
        if ((unsigned char)line[i] < 0x20 && line[i] != '\t')
            return err_set(err, ERR_INVALID, "a header line holds a control byte");
    char *colon = strchr(line, ':');
    if (!colon || colon == line || line[0] == ' ' || line[0] == '\t')
        return err_set(err, ERR_INVALID, "a header line is malformed");
    *colon = '\0';
    const char *value = skip_blanks(colon + 1);
    if (strcasecmp(line, "Content-Disposition") == 0) {
        if (*has_disposition)
            return err_set(err, ERR_INVALID, "Content-Disposition is given twice");
        *has_disposition = true;
        return parse_disposition(part, value, err);
    }
    if (strcasecmp(line, "Content-Transfer-Encoding") == 0 && strcasecmp(value, "binary") != 0 &&
        strcasecmp(value, "8bit") != 0 && strcasecmp(value, "7bit") != 0)
        return err_set(err, ERR_INVALID, "Content-Transfer-Encoding is not supported");
    if (strcasecmp(line, "Content-Type") == 0) {
        size_t n = strnlen(value, sizeof(part->content_type) - 1);
        memcpy(part->content_type, value, n);
        part->content_type[n] = '\0';
    }
    return 0;
}

static int finish_header(struct multipart *mp, struct err *err)
{
    bool has_disposition = false;
    memset(&mp->part, 0, sizeof(mp->part));
    char *end = mp->header + mp->header_len;
    for (char *line = mp->header; line < end;) {
        char *cr = line;
        while (cr[0] != '\r' || cr[1] != '\n')
            cr++;
        if (cr == line)
            break;
        *cr = '\0';
        if (parse_header_line(&mp->part, line, (size_t)(cr - line), &has_disposition, err) < 0)
            return -1;
        line = cr + 2;
    }
    if (!has_disposition)
        return err_set(err, ERR_INVALID, "Content-Disposition is missing");
    mp->state = STATE_DATA;
    mp->matched = 0;
    return mp->events.on_part(mp->events.context, &mp->part, err);
}

static int begin_header(struct multipart *mp, struct err *err)
{
    if (mp->parts == MULTIPART_PARTS_MAX)
        return err_set(err, ERR_INVALID, "more than %d parts", MULTIPART_PARTS_MAX);
    mp->parts++;
    mp->header_len = 0;
    mp->state = STATE_HEADER;
    return 0;
}

static int feed_header(struct multipart *mp, char c, struct err *err)
{
    if (mp->header_len == MULTIPART_HEADER_MAX)
        return err_set(err, ERR_INVALID, "a part's header has more than %d bytes",
                       MULTIPART_HEADER_MAX);
    mp->header[mp->header_len++] = c;
    mp->header[mp->header_len] = '\0';
    size_t n = mp->header_len;
    const char *h = mp->header;
    bool empty = n == 2 && memcmp(h, "\r\n", 2) == 0;
    if (c == '\n' && (empty || (n >= 4 && memcmp(h + n - 4, "\r\n\r\n", 4) == 0)))
        return finish_header(mp, err);
    return 0;
}

/* ------------------------------------------------------------------ bodies */

static int emit(struct multipart *mp, const char *data, size_t len, struct err *err)
{
    if (len == 0 || mp->state == STATE_PREAMBLE)
        return 0;
    return mp->events.on_data(mp->events.context, data, len, err);
}

/* Consumes what it can of a body (or the preamble): up to and including a delimiter. CR occurs in
 * the delimiter at its start alone, so that after a mismatch only the current byte can start a new
 * one: no table is needed. */
static int feed_body(struct multipart *mp, const char *data, size_t len, size_t *used,
                     struct err *err)
{
    size_t i = 0;
    while (i < len) {
        if (mp->matched == 0) {
            const char *cr = memchr(data + i, '\r', len - i);
            size_t n = cr ? (size_t)(cr - (data + i)) : len - i;
            if (emit(mp, data + i, n, err) < 0)
                return -1;
            i += n;
            if (!cr)
                break;
            mp->matched = 1;
            i++;
            continue;
        }
        if (data[i] == mp->delimiter[mp->matched]) {
            i++;
            if (++mp->matched < mp->delimiter_len)
                continue;
            bool was_data = mp->state == STATE_DATA;
            mp->state = STATE_AFTER;
            *used = i;
            return was_data ? mp->events.on_part_end(mp->events.context, err) : 0;
        }
        /* What looked like a delimiter was data. (In the preamble emit drops it.) */
        size_t seen = mp->matched;
        mp->matched = 0;
        if (emit(mp, mp->delimiter, seen, err) < 0)
            return -1;
    }
    *used = len;
    return 0;
}

static int feed_after(struct multipart *mp, char c, struct err *err)
{
    switch (mp->state) {
    case STATE_AFTER:
        if (c == '-')
            mp->state = STATE_AFTER_DASH;
        else if (c == '\r')
            mp->state = STATE_AFTER_CR;
        else if (c != ' ' && c != '\t') /* transport padding, RFC 2046 */
            return err_set(err, ERR_INVALID, "a boundary is followed by neither CRLF nor \"--\"");
        return 0;
    case STATE_AFTER_DASH:
        if (c != '-')
            return err_set(err, ERR_INVALID, "a boundary is followed by a single \"-\"");
        mp->state = STATE_EPILOGUE;
        return 0;
    default:
        if (c != '\n')
            return err_set(err, ERR_INVALID, "a boundary is followed by CR without LF");
        return begin_header(mp, err);
    }
}

static int feed(struct multipart *mp, const char *data, size_t len, struct err *err)
{
    for (size_t i = 0; i < len;) {
        size_t used = 1;
        int rc = 0;
        switch (mp->state) {
        case STATE_PREAMBLE:
        case STATE_DATA:
            rc = feed_body(mp, data + i, len - i, &used, err);
            break;
        case STATE_HEADER:
            rc = feed_header(mp, data[i], err);
            break;
        case STATE_EPILOGUE:
            return 0;
        default:
            rc = feed_after(mp, data[i], err);
            break;
        }
        if (rc < 0)
            return -1;
        i += used;
    }
    return 0;
}

int multipart_feed(struct multipart *mp, const char *data, size_t len, struct err *err)
{
    if (mp->state != STATE_FAILED && feed(mp, data, len, &mp->err) < 0) {
        err_prefix(&mp->err, "multipart body, part %d", mp->parts);
        mp->state = STATE_FAILED;
    }
    if (mp->state != STATE_FAILED)
        return 0;
    if (err && !err_is_set(err))
        *err = mp->err;
    return -1;
}

int multipart_end(struct multipart *mp, struct err *err)
{
    if (mp->state == STATE_EPILOGUE)
        return 0;
    if (mp->state == STATE_FAILED) {
        if (err && !err_is_set(err))
            *err = mp->err;
        return -1;
    }
    return err_set(err, ERR_INVALID, "the multipart body ends in part %d, before its last boundary",
                   mp->parts);
}
