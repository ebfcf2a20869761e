/* What libmicrohttpd calls: a request from its first line to its end. Event threads only. */
#include <openssl/crypto.h>
#include <openssl/rand.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/log.h"
#include "engine/base/sha256.h"
#include "server/http_connections.h"
#include "server/http_internal.h"

#define NO_BODY_MAX (1 << 20)                 /* of a body that nobody wants */
#define MULTIPART_OVERHEAD (INT64_C(2) << 20) /* around an uploaded file */

/* ------------------------------------------------------------------ birth and end */

static void set_request_id(struct http_exchange *exchange)
{
    unsigned char bytes[16];
    char *id = exchange->request.id;
    memcpy(id, "req_", 4);
    if (RAND_bytes(bytes, sizeof(bytes)) != 1)
        memset(bytes, 0, sizeof(bytes));
    hex_encode(bytes, sizeof(bytes), id + 4);
}

void *http_exchange_target(void *context, const char *target, struct MHD_Connection *mhd)
{
    struct http_server *server = context;
    const union MHD_ConnectionInfo *info =
        MHD_get_connection_info(mhd, MHD_CONNECTION_INFO_SOCKET_CONTEXT);
    struct http_connection *connection = info ? info->socket_context : NULL;
    if (!connection)
        return NULL;
    int64_t deadline = http_now_ms() + server->options.header_deadline_ms;
    if (deadline < atomic_load(&connection->deadline))
        atomic_store(&connection->deadline, deadline);
    /* MHD answers some malformed requests by itself; should a version of it not tell us of their
     * end, they end here or with the connection. */
    http_exchange_free(connection->orphan);
    connection->orphan = NULL;
    struct http_exchange *exchange = calloc(1, sizeof(*exchange));
    if (!exchange)
        return NULL;
    exchange->target = strdup(target);
    if (!exchange->target) {
        free(exchange);
        return NULL;
    }
    exchange->server = server;
    exchange->mhd = mhd;
    exchange->connection = connection;
    exchange->response.exchange = exchange;
    exchange->response.fd = -1;
    exchange->started = http_now_ms();
    set_request_id(exchange);
    connection->orphan = exchange;
    return exchange;
}

void http_exchange_free(struct http_exchange *exchange)
{
    if (!exchange)
        return;
    if (exchange->response.later)
        http_later_detach(exchange->response.later);
    http_response_clear(&exchange->response);
    http_upload_release(exchange);
    if (exchange->authorization)
        OPENSSL_cleanse(exchange->authorization, strlen(exchange->authorization));
    free(exchange->authorization);
    free(exchange->idempotency_key);
    free(exchange->content_type);
    free(exchange->target);
    http_path_release(&exchange->path);
    if (exchange->body.data)
        strbuf_release(&exchange->body);
    free(exchange);
}

void http_exchange_completed(void *context, struct MHD_Connection *mhd, void **slot,
                             enum MHD_RequestTerminationCode why)
{
    struct http_server *server = context;
    struct http_exchange *exchange = *slot;
    if (!exchange)
        return;
    *slot = NULL;
    struct http_connection *connection = exchange->connection;
    connection->orphan = NULL;
    atomic_store(&connection->between, true);
    atomic_store(&connection->reading, false);
    atomic_store(&connection->deadline, http_now_ms() + server->options.idle_ms);
    if (exchange->phase == HTTP_PHASE_ANSWER) {
        const struct http_route *route = exchange->request.route;
        int status = exchange->response.status;
        int64_t ms = http_now_ms() - exchange->started;
        atomic_fetch_add(&server->requests, 1);
        if (status >= 100 && status < 600)
            atomic_fetch_add(&server->by_class[status / 100], 1);
        if (server->options.on_answer)
            server->options.on_answer(route ? route->operation : NULL, status, (double)ms / 1000);
        if (!route || !route->on_event_thread)
            log_info("%s %s %d %lld ms %s%s %s%s", exchange->request.method,
                     route ? route->pattern : "-", status, (long long)ms, exchange->request.id,
                     why == MHD_REQUEST_TERMINATED_COMPLETED_OK ? "" : " cut",
                     exchange->known_tenant ? "by " : "",
                     exchange->known_tenant ? exchange->request.tenant.key_id : "");
    }
    if (exchange->counted)
        atomic_fetch_sub(&server->under_way, 1);
    http_exchange_free(exchange);
}

void http_exchange_connection(void *context, struct MHD_Connection *mhd, void **slot,
                              enum MHD_ConnectionNotificationCode what)
{
    struct http_server *server = context;
    if (what == MHD_CONNECTION_NOTIFY_STARTED) {
        const union MHD_ConnectionInfo *info =
            MHD_get_connection_info(mhd, MHD_CONNECTION_INFO_CONNECTION_FD);
        *slot = info ? http_connections_add(&server->connections, (int)info->connect_fd,
                                            http_now_ms() + server->options.header_deadline_ms)
                     : NULL;
        return;
    }
    struct http_connection *connection = *slot;
    *slot = NULL;
    if (!connection)
        return;
    http_exchange_free(connection->orphan);
    http_connections_remove(&server->connections, connection);
}

/* ------------------------------------------------------------------ the head */

struct header_list {
    struct http_header items[HTTP_HEADERS_MAX + 1];
    int count;
};

static enum MHD_Result add_header(void *context, enum MHD_ValueKind kind, const char *name,
                                  size_t name_len, const char *value, size_t value_len)
{
    struct header_list *list = context;
    if (list->count <= HTTP_HEADERS_MAX)
        list->items[list->count++] = (struct http_header){.name = name,
                                                          .name_len = name_len,
                                                          .value = value ? value : "",
                                                          .value_len = value_len};
    return MHD_YES;
}

static int read_headers(struct http_exchange *exchange, const char *version, struct http_head *head,
                        int *status, struct err *err)
{
    struct header_list list;
    list.count = 0;
    if (strncmp(version, "HTTP/1.", 7) != 0) {
        *status = 505;
        return err_set(err, ERR_INVALID, "Only HTTP/1.0 and HTTP/1.1 are spoken here.");
    }
    MHD_get_connection_values_n(exchange->mhd, MHD_HEADER_KIND, add_header, &list);
    if (http_filter_headers(list.items, list.count, version[7] - '0', head, status, err) < 0)
        return -1;
    if (exchange->server->in_place_parser &&
        http_filter_layout(list.items, list.count, version + strlen(version), err) < 0)
        return -1;
    return 0;
}

/* Blanks behind a value are not a part of it (RFC 9110, 5.5); MHD leaves them there. */
static int copy_header(char **out, const char *value, struct err *err)
{
    size_t len = value ? strlen(value) : 0;
    while (len > 0 && (value[len - 1] == ' ' || value[len - 1] == '\t'))
        len--;
    *out = value ? strndup(value, len) : NULL;
    return value && !*out ? err_set(err, ERR_NO_MEMORY, "out of memory") : 0;
}

/* The last mistake of a malformed request is what its method and path say; up to here nothing of
 * it is trusted. */
static int filter(struct http_exchange *exchange, const char *version, struct http_head *head,
                  int *status, struct err *err)
{
    if (read_headers(exchange, version, head, status, err) < 0)
        return -1;
    exchange->has_body = head->chunked || head->content_length > 0;
    *status = 0;
    if (http_path_parse(&exchange->path, exchange->target, err) < 0) {
        *status = err->kind == ERR_TOO_LARGE ? 414 : 0;
        return -1;
    }
    struct http_request *request = &exchange->request;
    request->query_count = exchange->path.query_count;
    memcpy(request->query, exchange->path.query, sizeof(request->query));
    if (copy_header(&exchange->authorization, head->authorization, err) < 0 ||
        copy_header(&exchange->idempotency_key, head->idempotency_key, err) < 0 ||
        copy_header(&exchange->content_type, head->content_type, err) < 0)
        return -1;
    request->idempotency_key = exchange->idempotency_key;
    request->body = "";
    request->api = exchange->server->options.api;
    memcpy(request->remote, exchange->connection->remote, sizeof(request->remote));
    return 0;
}

static int find_route(struct http_exchange *exchange, const char *method, int *status,
                      struct err *err)
{
    struct http_server *server = exchange->server;
    struct http_request *request = &exchange->request;
    char allow[64];
    request->route = http_route_find(server->options.routes, server->options.route_count, method,
                                     &exchange->path, request->path_params, allow);
    if (request->route) {
        request->method = request->route->method;
        return 0;
    }
    request->method = "-";
    if (!allow[0])
        return err_set_code(err, ERR_NOT_FOUND, "unknown_url", "",
                            "Unknown request URL. Please check the URL for typos, or see "
                            "api-spec/openapi.yaml.");
    *status = strcmp(method, "OPTIONS") == 0 ? 204 : 405;
    snprintf(exchange->allow, sizeof(exchange->allow), "%s", allow);
    return err_set_code(err, ERR_INVALID, "method_not_allowed", "",
                        "Not allowed to send this method to this URL; it takes %s.", allow);
}

static int check_key(struct http_exchange *exchange, struct err *err)
{
    struct http_server *server = exchange->server;
    struct key_identity identity;
    if (exchange->request.route->auth == HTTP_AUTH_NONE)
        return 0;
    switch (http_auth_check(server->auth, exchange->authorization, exchange->connection->remote,
                            http_now_ms(), &identity, err)) {
    case HTTP_AUTH_GOOD:
        http_exchange_identify(exchange, &identity);
        return 0;
    case HTTP_AUTH_REFUSED:
        atomic_fetch_add(&server->auth_failures, 1);
        return -1;
    default:
        return 0; /* a handler thread looks it up */
    }
}

static int64_t body_limit(const struct http_exchange *exchange)
{
    const struct http_server_options *options = &exchange->server->options;
    const struct http_route *route = exchange->request.route;
    if (route->body == HTTP_BODY_NONE)
        return NO_BODY_MAX;
    if (route->body == HTTP_BODY_UPLOAD)
        return options->max_file_bytes + MULTIPART_OVERHEAD;
    if (options->max_json_body > 0 && options->max_json_body < route->body_limit)
        return options->max_json_body;
    return route->body_limit;
}

static int too_large(struct http_exchange *exchange, struct err *err)
{
    return err_set_code(err, ERR_TOO_LARGE, "request_too_large", "",
                        "The body of this request may have %lld bytes at most.",
                        (long long)body_limit(exchange));
}

static int prepare_body(struct http_exchange *exchange, const struct http_head *head, int *status,
                        struct err *err)
{
    enum http_body kind = exchange->request.route->body;
    if (head->content_length > body_limit(exchange))
        return too_large(exchange, err);
    if (kind == HTTP_BODY_UPLOAD)
        return http_upload_begin(exchange, exchange->content_type, err);
    if (kind == HTTP_BODY_JSON && exchange->has_body && exchange->content_type &&
        strncasecmp(exchange->content_type, "application/json", 16) != 0) {
        *status = 415;
        return err_set_code(err, ERR_INVALID, "unsupported_content_type", "",
                            "The body of this request must be application/json, and Content-Type "
                            "must say so (with curl: -H 'Content-Type: application/json').");
    }
    if (kind == HTTP_BODY_JSON)
        strbuf_init(&exchange->body, (size_t)body_limit(exchange));
    return 0;
}

/* Answers with a refusal now. What may still come is not read, so the connection closes where there
 * is a body, or where the request was malformed. */
static enum MHD_Result refuse(struct http_exchange *exchange, int status, bool malformed,
                              const struct err *err)
{
    struct http_response *response = &exchange->response;
    bool close_connection = malformed || exchange->has_body;
    if (status == 204)
        http_response_bytes(response, 204, "", NULL, 0, NULL);
    else
        http_response_error(response, status, err);
    if (exchange->allow[0])
        http_response_header(response, "allow", exchange->allow, NULL);
    return http_response_send(response, close_connection);
}

static enum MHD_Result busy(struct http_exchange *exchange)
{
    struct err err = {0};
    atomic_fetch_add(&exchange->server->refused_busy, 1);
    err_set_code(&err, ERR_UNAVAILABLE, "server_busy", "",
                 "The server has too many requests at the moment. Try again in a second.");
    return refuse(exchange, 0, false, &err);
}

/* Suspends and queues. */
static bool dispatch(struct http_exchange *exchange, enum http_phase phase)
{
    enum http_phase before = exchange->phase;
    exchange->phase = phase;
    atomic_store(&exchange->connection->deadline, HTTP_NO_DEADLINE);
    if (http_handlers_submit(exchange))
        return true;
    exchange->phase = before;
    return false;
}

static void set_body_deadline(struct http_exchange *exchange)
{
    const struct http_server_options *options = &exchange->server->options;
    int64_t deadline = exchange->started + options->body_deadline_ms;
    if (exchange->uploading || exchange->refused)
        deadline += exchange->body_bytes * 1000 / options->upload_bytes_per_second;
    atomic_store(&exchange->connection->deadline, deadline);
    atomic_store(&exchange->connection->reading, true);
}

static void await_body(struct http_exchange *exchange)
{
    exchange->phase = HTTP_PHASE_BODY;
    set_body_deadline(exchange);
}

/* A refusal before the body. A client that sends on without asking may look for an answer only
 * after its last byte, and would find the connection closed: it gets its answer then, and what it
 * sends is thrown away. */
static enum MHD_Result refuse_head(struct http_exchange *exchange, int status,
                                   const struct err *err)
{
    if (!exchange->reads_on)
        return refuse(exchange, status, false, err);
    exchange->refused = true;
    exchange->refusal = *err;
    exchange->refusal_status = status;
    await_body(exchange);
    return MHD_YES;
}

static enum MHD_Result access_head(struct http_exchange *exchange, const char *method,
                                   const char *version)
{
    struct http_server *server = exchange->server;
    struct http_head head;
    struct err err = {0};
    int status = 0;
    exchange->connection->orphan = NULL; /* from here on MHD tells us of its end */
    atomic_store(&exchange->connection->between, false);
    exchange->started = http_now_ms();
    exchange->request.method = "-";
    exchange->has_body = true; /* until the head says otherwise */
    if (filter(exchange, version, &head, &status, &err) < 0) {
        atomic_fetch_add(&server->refused_filter, 1);
        return refuse(exchange, status, true, &err);
    }
    exchange->reads_on =
        !head.chunked && !head.expects_continue && head.content_length <= HTTP_DISCARD_MAX;
    if (find_route(exchange, method, &status, &err) < 0)
        return refuse_head(exchange, status, &err);
    if (atomic_load(&server->quiet) && !exchange->request.route->on_event_thread) {
        err_set_code(&err, ERR_UNAVAILABLE, "shutting_down", "",
                     "The server is shutting down. Try again.");
        return refuse(exchange, 0, false, &err);
    }
    if (check_key(exchange, &err) < 0 || prepare_body(exchange, &head, &status, &err) < 0)
        return refuse_head(exchange, status, &err);
    exchange->phase = HTTP_PHASE_BODY;
    exchange->counted = true;
    atomic_fetch_add(&server->under_way, 1);
    bool unknown_key = exchange->request.route->auth == HTTP_AUTH_KEY && !exchange->known_tenant;
    if (exchange->uploading && unknown_key && exchange->has_body)
        return dispatch(exchange, HTTP_PHASE_KEY) ? MHD_YES : busy(exchange);
    set_body_deadline(exchange);
    return MHD_YES;
}

/* ------------------------------------------------------------------ the body */

static void take_body(struct http_exchange *exchange, const char *data, size_t len)
{
    exchange->body_bytes += (int64_t)len;
    if (exchange->refused) {
        exchange->discarded += (int64_t)len;
        return;
    }
    enum http_body kind = exchange->request.route->body;
    int rc = 0;
    if (exchange->body_bytes > body_limit(exchange)) {
        rc = too_large(exchange, &exchange->refusal);
    } else if (kind == HTTP_BODY_UPLOAD) {
        rc = http_upload_feed(exchange, data, len, &exchange->refusal);
    } else if (kind == HTTP_BODY_JSON) {
        strbuf_add(&exchange->body, data, len);
        if (strbuf_failed(&exchange->body))
            rc = err_set(&exchange->refusal, ERR_NO_MEMORY, "out of memory");
    }
    if (rc < 0) {
        exchange->refused = true;
        http_upload_release(exchange); /* its staging file goes now, not when the rest has come */
    }
}

/* A connection that was suspended before its body is asked once more before the body is read. */
static enum MHD_Result access_keyed(struct http_exchange *exchange)
{
    if (exchange->refused && !exchange->reads_on)
        return refuse(exchange, 0, false, &exchange->refusal);
    exchange->started = http_now_ms();
    await_body(exchange);
    return MHD_YES;
}

static enum MHD_Result access_body(struct http_exchange *exchange, const char *data, size_t *size)
{
    if (exchange->phase == HTTP_PHASE_KEYED)
        exchange->phase = HTTP_PHASE_BODY;
    if (exchange->phase != HTTP_PHASE_BODY)
        return MHD_YES; /* suspended in this very round: it stays in MHD's buffer */
    take_body(exchange, data, *size);
    *size = 0;
    if (exchange->discarded > HTTP_DISCARD_MAX)
        return MHD_NO;
    set_body_deadline(exchange);
    return MHD_YES;
}

static enum MHD_Result access_complete(struct http_exchange *exchange)
{
    struct http_request *request = &exchange->request;
    atomic_store(&exchange->connection->reading, false);
    if (!exchange->refused && exchange->uploading &&
        http_upload_end(exchange, &exchange->refusal) < 0)
        exchange->refused = true;
    if (exchange->refused)
        return refuse(exchange, exchange->refusal_status, false, &exchange->refusal);
    if (request->route->body == HTTP_BODY_JSON) {
        request->body = exchange->body.data;
        request->body_len = exchange->body.len;
    }
    if (exchange->uploading)
        request->upload = &exchange->upload;
    if (request->route->on_event_thread) {
        http_exchange_run(exchange, NULL);
        return http_response_send(&exchange->response, false);
    }
    return dispatch(exchange, HTTP_PHASE_HANDLER) ? MHD_YES : busy(exchange);
}

enum MHD_Result http_exchange_access(void *server, struct MHD_Connection *mhd, const char *url,
                                     const char *method, const char *version, const char *data,
                                     size_t *size, void **slot)
{
    struct http_exchange *exchange = *slot;
    if (!exchange)
        return MHD_NO;
    if (exchange->phase == HTTP_PHASE_HEAD)
        return access_head(exchange, method, version);
    if (*size > 0)
        return access_body(exchange, data, size);
    if (exchange->phase == HTTP_PHASE_KEYED)
        return access_keyed(exchange);
    if (exchange->phase == HTTP_PHASE_BODY)
        return access_complete(exchange);
    if (exchange->phase == HTTP_PHASE_HANDLER)
        return http_response_send(&exchange->response, false);
    return MHD_YES;
}
