#include "server/http_filter.h"

#include <string.h>
#include <strings.h>

static bool is_token(const char *s, size_t len)
{
    if (len == 0)
        return false;
    for (size_t i = 0; i < len; i++) {
        unsigned char c = (unsigned char)s[i];
        if (c <= 0x20 || c >= 0x7f || strchr("\"(),/:;<=>?@[\\]{}", c))
            return false;
    }
    return true;
}

static bool is_field_value(const char *s, size_t len)
{
    for (size_t i = 0; i < len; i++) {
        unsigned char c = (unsigned char)s[i];
        if ((c < 0x20 && c != '\t') || c == 0x7f)
            return false;
    }
    return true;
}

/* Fields that may appear once; a second one, equal or not, is refused. */
enum { ONCE_LENGTH, ONCE_ENCODING, ONCE_HOST, ONCE_AUTH, ONCE_TYPE, ONCE_KEY, ONCE_EXPECT, ONCE_N };
static const char *const once_names[ONCE_N] = {
    [ONCE_LENGTH] = "Content-Length",
    [ONCE_ENCODING] = "Transfer-Encoding",
    [ONCE_HOST] = "Host",
    [ONCE_AUTH] = "Authorization",
    [ONCE_TYPE] = "Content-Type",
    [ONCE_KEY] = "Idempotency-Key",
    [ONCE_EXPECT] = "Expect",
};

static bool is_name(const struct http_header *header, const char *name)
{
    return header->name_len == strlen(name) &&
           strncasecmp(header->name, name, header->name_len) == 0;
}

static int parse_length(const char *text, int64_t *length, struct err *err)
{
    int64_t n = 0;
    for (const char *p = text; *p; p++) {
        if (*p < '0' || *p > '9' || __builtin_mul_overflow(n, INT64_C(10), &n) ||
            __builtin_add_overflow(n, (int64_t)(*p - '0'), &n))
            return err_set(err, ERR_INVALID, "Content-Length is not a number");
    }
    if (*text == '\0')
        return err_set(err, ERR_INVALID, "Content-Length is empty");
    *length = n;
    return 0;
}

static bool is_host(const char *text)
{
    if (*text == '\0')
        return false;
    for (const char *p = text; *p; p++) {
        unsigned char c = (unsigned char)*p;
        if (c <= 0x20 || c >= 0x7f || strchr("\"#,/<>?@\\^`{|}", c))
            return false;
    }
    return true;
}

static int collect(const struct http_header *headers, int count, const char *once[ONCE_N],
                   int *status, struct err *err)
{
    for (int i = 0; i < count; i++) {
        const struct http_header *header = &headers[i];
        if (!is_token(header->name, header->name_len))
            return err_set(err, ERR_INVALID, "header field %d has a malformed name", i + 1);
        if (!is_field_value(header->value, header->value_len))
            return err_set(err, ERR_INVALID, "header field %d has control bytes in its value",
                           i + 1);
        if (is_name(header, "Content-Encoding")) {
            *status = 415;
            return err_set(err, ERR_INVALID,
                           "Content-Encoding is not supported: send the body as it is");
        }
        for (int j = 0; j < ONCE_N; j++) {
            if (!is_name(header, once_names[j]))
                continue;
            if (once[j])
                return err_set(err, ERR_INVALID, "%s is given twice", once_names[j]);
            once[j] = header->value;
        }
    }
    return 0;
}

int http_filter_headers(const struct http_header *headers, int count, int minor,
                        struct http_head *head, int *status, struct err *err)
{
    const char *once[ONCE_N] = {NULL};
    *head = (struct http_head){.content_length = -1};
    *status = 400;
    if (count > HTTP_HEADERS_MAX)
        return err_set(err, ERR_INVALID, "the request has more than %d header fields",
                       HTTP_HEADERS_MAX);
    if (collect(headers, count, once, status, err) < 0)
        return -1;
    if (once[ONCE_LENGTH] && once[ONCE_ENCODING])
        return err_set(err, ERR_INVALID, "Content-Length and Transfer-Encoding exclude each other");
    if (once[ONCE_LENGTH] && parse_length(once[ONCE_LENGTH], &head->content_length, err) < 0)
        return -1;
    if (once[ONCE_ENCODING]) {
        if (minor < 1 || strcasecmp(once[ONCE_ENCODING], "chunked") != 0)
            return err_set(err, ERR_INVALID, "the only Transfer-Encoding is \"chunked\"");
        head->chunked = true;
    }
    if (minor >= 1 && !once[ONCE_HOST])
        return err_set(err, ERR_INVALID, "Host is missing");
    if (once[ONCE_HOST] && !is_host(once[ONCE_HOST]))
        return err_set(err, ERR_INVALID, "Host is malformed");
    if (once[ONCE_EXPECT]) {
        if (strcasecmp(once[ONCE_EXPECT], "100-continue") != 0) {
            *status = 417;
            return err_set(err, ERR_INVALID, "the only expectation met is 100-continue");
        }
        head->expects_continue = true;
    }
    head->host = once[ONCE_HOST];
    head->authorization = once[ONCE_AUTH];
    head->content_type = once[ONCE_TYPE];
    head->idempotency_key = once[ONCE_KEY];
    return 0;
}

int http_filter_layout(const struct http_header *headers, int count, const char *end,
                       struct err *err)
{
    for (int i = 0; i < count; i++) {
        const struct http_header *header = &headers[i];
        uintptr_t name = (uintptr_t)header->name;
        if (name - (uintptr_t)end == 1)
            return err_set(err, ERR_INVALID, "a header line ends with LF instead of CRLF");
        if (name - (uintptr_t)end != 2 || (uintptr_t)header->value <= name)
            return err_set(err, ERR_INVALID, "header field %d is folded or holds a NUL", i + 1);
        end = header->value + header->value_len;
    }
    /* CRLF CRLF, each byte made NUL. A line that starts with ':' looks like an empty one to MHD,
     * and what follows like a second request: here it shows as NUL NUL NUL and its second byte. */
    if (memcmp(end, "\0\0\0", 4) != 0)
        return err_set(err, ERR_INVALID, "the header does not end with an empty line");
    return 0;
}
