/* http_route.h: the route table: which handler answers which method and path, for whom, and how
 * much body it takes.
 *
 * api_routes.c holds ONE const array of these for the whole server; tests hold it equal to
 * api-spec/openapi.yaml. A pattern is literal segments and `{name}` segments ("/v1/files/{file_id}
 * /content"); the n-th `{name}` is request->path_params[n]. Literal segments win over `{name}`.
 * HEAD is answered by the GET route without a body; OPTIONS and 405 are made from the table. */
#ifndef GRAFT_HTTP_ROUTE_H
#define GRAFT_HTTP_ROUTE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/err.h"

struct http_request;
struct http_response;

enum http_auth {
    HTTP_AUTH_NONE, /* request->tenant is empty, request->db NULL until http_request_database() */
    HTTP_AUTH_KEY,  /* a live project key: request->tenant is set, request->db is open */
};

enum http_body {
    HTTP_BODY_NONE,   /* a body up to 1 MiB is read and ignored */
    HTTP_BODY_JSON,   /* one JSON object in request->json; no body at all is an error */
    HTTP_BODY_UPLOAD, /* multipart/form-data, its file in the blob store's staging */
};

#define HTTP_LIMIT_CONTROL (INT64_C(1) << 20)
#define HTTP_LIMIT_CHAT (INT64_C(8) << 20)
#define HTTP_LIMIT_FILE (INT64_C(512) << 20) /* of the file itself */

/* Runs on a handler thread, may block on the database, never on a model (see http_later in
 * http_response.h). 0: `response` holds the answer. -1: `err` becomes the answer. */
typedef int http_handler_fn(struct http_request *request, struct http_response *response,
                            struct err *err);

struct http_route {
    const char *method; /* "GET", "POST", "DELETE" */
    const char *pattern;
    http_handler_fn *handler;
    enum http_auth auth;
    enum http_body body;
    int64_t body_limit;    /* bytes; more is 413 before it is read */
    bool slash_in_param;   /* %2F is legal inside the parameter: model ids only */
    bool on_event_thread;  /* the handler never blocks and needs no database: it skips the queue */
    const char *operation; /* operationId in openapi.yaml; label in metrics */
};

/* Finds the route for a method ("HEAD" means "GET") and decoded path segments. NULL with *allow ""
 * when no route has the path; NULL with *allow = "GET, HEAD, POST, OPTIONS" when another method
 * has. params gets the values of `{name}` segments. A parameter with a slash matches only where
 * slash_in_param is set. */
struct http_path;
const struct http_route *http_route_find(const struct http_route *routes, size_t count,
                                         const char *method, const struct http_path *path,
                                         const char **params, char allow[64]);

#endif
