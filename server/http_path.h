/* http_path.h: the raw request target, taken apart once and safely.
 *
 * libmicrohttpd decodes the path before handlers see it ("/a%00b" arrives as "/a", "..%2f" as
 * "../"), so the server reads the raw target and splits at '/' first, then decodes each segment
 * once. Refused with ERR_INVALID: a target that does not start with '/', %00, %5c and '\', control
 * bytes and bytes from 0x80 in the path, segments "." and "..", broken escapes, '#', more than 4
 * kB. A decoded '/' (%2F) is kept and marked; the router allows it in model ids only. */
#ifndef GRAFT_HTTP_PATH_H
#define GRAFT_HTTP_PATH_H

#include <stdbool.h>
#include <stddef.h>

#include "engine/base/err.h"
#include "server/http_request.h"

#define HTTP_URI_MAX 4096

struct http_path {
    char *text; /* decoded parts; segments and query point into it */
    int segment_count;
    const char *segments[HTTP_SEGMENTS_MAX];
    bool slash[HTTP_SEGMENTS_MAX]; /* the segment holds a decoded '/' */
    int query_count;
    struct http_pair query[HTTP_QUERY_MAX];
};

/* `path` is valid for http_path_release after success and failure. "/v1/files" has two segments;
 * empty segments ("//", a trailing '/') are kept, and match no route. */
int http_path_parse(struct http_path *path, const char *target, struct err *err);
void http_path_release(struct http_path *path);

#endif
