/* http_filter.h: the strict reading of a request's header fields, in front of everything.
 *
 * libmicrohttpd 0.9.75 (Debian 12) lets request-smuggling shapes through; what differs between
 * this server and a proxy in front of it is refused here, before a body byte is read:
 *   duplicate Content-Length, Host, Transfer-Encoding (and other fields that may appear once);
 *   Content-Length with Transfer-Encoding; any Transfer-Encoding but "chunked";
 *   names that are no tokens ("Transfer-Encoding :"); control bytes in values; obs-fold;
 *   line ends that are not CRLF; Content-Encoding (415); an expectation but 100-continue;
 *   more than 100 fields.
 * Pure functions over name/value lists, so that they can be tested and fuzzed alone. */
#ifndef GRAFT_HTTP_FILTER_H
#define GRAFT_HTTP_FILTER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/err.h"

#define HTTP_HEADERS_MAX 100

struct http_header {
    const char *name, *value;
    size_t name_len, value_len;
};

/* What the server needs of the fields; pointers into the list given, NULL when absent. */
struct http_head {
    int64_t content_length; /* -1: absent */
    bool chunked;
    bool expects_continue;
    const char *host, *authorization, *content_type, *idempotency_key;
};

/* On failure *status is 400, 415 or 417, and err says what was wrong. `minor`: of HTTP/1.x. */
int http_filter_headers(const struct http_header *headers, int count, int minor,
                        struct http_head *head, int *status, struct err *err);

/* What the field list can not show but its place in memory can: MHD before 1.0 parses in place, so
 * the distance from the end of one line to the start of the next is 2 for CRLF, 1 for a bare LF,
 * and anything else where a folded line was glued together or a NUL cut a value short. `end` is the
 * end of the request line ("HTTP/1.1"). Four bytes behind the last value are read, which are the
 * CRLF CRLF that ended the header. Only meaningful for that MHD: 1.0 refuses these itself. */
int http_filter_layout(const struct http_header *headers, int count, const char *end,
                       struct err *err);

#endif
