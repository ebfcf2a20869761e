#include "server/http_response.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/base/log.h"
#include "server/http_internal.h"

int http_error_status(const struct err *err)
{
    switch (err->kind) {
    case ERR_INVALID:
        return 400;
    case ERR_AUTH:
        return 401;
    case ERR_FORBIDDEN:
        return 403;
    case ERR_NOT_FOUND:
        return 404;
    case ERR_TOO_LARGE:
        return 413;
    case ERR_RATE:
        return 429;
    case ERR_UNAVAILABLE:
    case ERR_NO_MEMORY:
        return 503;
    case ERR_NO_SPACE:
        return 507;
    default:
        return 500;
    }
}

static const char *error_type(const struct err *err)
{
    int status = http_error_status(err);
    if (status == 429)
        return "rate_limit_error";
    return status < 500 ? "invalid_request_error" : "server_error";
}

/* Our own failures are described in the log alone: their text may name paths, hosts or statements.
 * What has a code was written for the client. */
static const char *public_message(const struct err *err)
{
    switch (http_error_status(err)) {
    case 500:
        return err->code[0] ? err->message
                            : "The server had an error while processing your request. It is in "
                              "the server's log under this answer's x-request-id.";
    case 503:
        return err->code[0]
                   ? err->message
                   : "The server can not answer this at the moment. Try again in a second.";
    case 507:
        return "The server has no room left for this request. Free space or ask its operator.";
    default:
        return err->message;
    }
}

static json_t *text_or_null(const char *text)
{
    return text[0] ? json_string(text) : json_null();
}

json_t *http_error_json(const struct err *err)
{
    const char *message = public_message(err);
    json_t *text = json_string(message);
    if (!text) /* not UTF-8: never echo it */
        text = json_string("The request holds text that is not UTF-8.");
    return json_pack("{s:{s:o?, s:s, s:o?, s:o?}}", "error", "message", text, "type",
                     error_type(err), "param", text_or_null(err->param), "code",
                     text_or_null(err->code));
}

/* ------------------------------------------------------------------ setting an answer */

void http_response_clear(struct http_response *response)
{
    free(response->data);
    response->data = NULL;
    response->len = 0;
    if (response->fd >= 0)
        close(response->fd);
    response->fd = -1;
    response->kind = HTTP_RESPONSE_NONE;
    free(response->headers);
    response->headers = NULL;
    response->header_count = 0;
}

int http_response_bytes(struct http_response *response, int status, const char *content_type,
                        char *data, size_t len, struct err *err)
{
    free(response->data);
    response->kind = HTTP_RESPONSE_BYTES;
    response->status = status;
    response->data = data;
    response->len = len;
    snprintf(response->content_type, sizeof(response->content_type), "%s", content_type);
    return 0;
}

int http_response_json(struct http_response *response, int status, json_t *body, struct err *err)
{
    char *text = body ? json_dumps(body, JSON_COMPACT) : NULL;
    json_decref(body);
    if (!text)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    return http_response_bytes(response, status, "application/json", text, strlen(text), err);
}

int http_response_header(struct http_response *response, const char *name, const char *value,
                         struct err *err)
{
    if (strpbrk(value, "\r\n"))
        return err_set(err, ERR_INTERNAL, "header %s: a line end in its value", name);
    if (!response->headers) {
        response->headers = calloc(HTTP_RESPONSE_HEADERS_MAX, sizeof(*response->headers));
        if (!response->headers)
            return err_set(err, ERR_NO_MEMORY, "out of memory");
    }
    size_t i = (size_t)response->header_count;
    if (i == HTTP_RESPONSE_HEADERS_MAX || strlen(value) >= sizeof(response->headers[i].value))
        return err_set(err, ERR_INTERNAL, "header %s: too many, or too long", name);
    snprintf(response->headers[i].name, sizeof(response->headers[i].name), "%s", name);
    snprintf(response->headers[i].value, sizeof(response->headers[i].value), "%s", value);
    response->header_count++;
    return 0;
}

/* attachment; filename="…" with everything but plain characters replaced, and the exact name in the
 * extended form (RFC 6266). */
static void content_disposition(const char *file_name, char *out, size_t size)
{
    static const char plain[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-";
    struct strbuf sb;
    strbuf_init(&sb, size - 1);
    strbuf_addstr(&sb, "attachment; filename=\"");
    for (const char *p = file_name; *p; p++)
        strbuf_addch(&sb, strchr(plain, *p) || *p == ' ' ? *p : '_');
    strbuf_addch(&sb, '"');
    if (file_name[strspn(file_name, plain)]) {
        strbuf_addstr(&sb, "; filename*=UTF-8''");
        for (const char *p = file_name; *p; p++)
            if (strchr(plain, *p))
                strbuf_addch(&sb, *p);
            else
                strbuf_addf(&sb, "%%%02X", (unsigned char)*p);
    }
    snprintf(out, size, "%s", strbuf_failed(&sb) ? "attachment" : sb.data);
    strbuf_release(&sb);
}

int http_response_file(struct http_response *response, int fd, int64_t bytes,
                       const char *content_type, const char *file_name, struct err *err)
{
    char disposition[2200];
    content_disposition(file_name, disposition, sizeof(disposition));
    if (http_response_header(response, "content-disposition", disposition, err) < 0) {
        close(fd);
        return -1;
    }
    response->kind = HTTP_RESPONSE_FILE;
    response->status = 200;
    response->fd = fd;
    response->file_bytes = bytes;
    snprintf(response->content_type, sizeof(response->content_type), "%s", content_type);
    return 0;
}

void http_response_error(struct http_response *response, int status, const struct err *err)
{
    if (status == 0)
        status = http_error_status(err);
    http_response_clear(response);
    if (status >= 500)
        log_error("request %s: %s", response->exchange->request.id, err->message);
    if (http_response_json(response, status, http_error_json(err), NULL) < 0) {
        static const char fallback[] =
            "{\"error\":{\"message\":\"Out of memory.\",\"type\":\"server_error\","
            "\"param\":null,\"code\":null}}";
        http_response_bytes(response, 503, "application/json", strdup(fallback),
                            sizeof(fallback) - 1, NULL);
        if (!response->data)
            response->len = 0;
    }
}

/* ------------------------------------------------------------------ to MHD */

static struct MHD_Response *make_response(struct http_response *response, int *status,
                                          const char **content_type)
{
    *status = response->status;
    *content_type = response->content_type;
    struct MHD_Response *mhd = NULL;
    switch (response->kind) {
    case HTTP_RESPONSE_LATER:
        return http_later_response(response->later, status, content_type);
    case HTTP_RESPONSE_FILE:
        mhd = MHD_create_response_from_fd64((uint64_t)response->file_bytes, response->fd);
        if (mhd)
            response->fd = -1;
        return mhd;
    default:
        mhd = MHD_create_response_from_buffer(response->len, response->data ? response->data : "",
                                              response->data ? MHD_RESPMEM_MUST_FREE
                                                             : MHD_RESPMEM_PERSISTENT);
        if (mhd)
            response->data = NULL;
        return mhd;
    }
}

static void add_headers(struct http_response *response, struct MHD_Response *mhd, int status,
                        const char *content_type)
{
    struct http_exchange *exchange = response->exchange;
    char text[32];
    if (content_type[0])
        MHD_add_response_header(mhd, "content-type", content_type);
    MHD_add_response_header(mhd, "x-request-id", exchange->request.id);
    MHD_add_response_header(mhd, "openai-version", "2020-10-01");
    snprintf(text, sizeof(text), "%lld", (long long)(http_now_ms() - exchange->started));
    MHD_add_response_header(mhd, "openai-processing-ms", text);
    if (exchange->known_tenant)
        MHD_add_response_header(mhd, "openai-organization", exchange->request.tenant.organization);
    if (status == 429 || status == 503)
        MHD_add_response_header(mhd, "retry-after", "1");
    if (status >= 500 && status != 503)
        MHD_add_response_header(mhd, "x-should-retry", "false");
    for (int i = 0; i < response->header_count; i++)
        MHD_add_response_header(mhd, response->headers[i].name, response->headers[i].value);
}

/* A minute, and for what is large the slowest rate that an upload may have. */
static int64_t answer_deadline(const struct http_server *server, int64_t bytes)
{
    return http_now_ms() + 60000 + bytes * 1000 / server->options.upload_bytes_per_second;
}

enum MHD_Result http_response_send(struct http_response *response, bool close_connection)
{
    struct http_exchange *exchange = response->exchange;
    struct http_server *server = exchange->server;
    int status;
    const char *content_type;
    int64_t bytes =
        response->kind == HTTP_RESPONSE_FILE ? response->file_bytes : (int64_t)response->len;
    struct MHD_Response *mhd = make_response(response, &status, &content_type);
    if (!mhd)
        return MHD_NO;
    add_headers(response, mhd, status, content_type);
    if (close_connection || atomic_load(&server->quiet))
        MHD_add_response_header(mhd, "connection", "close");
    exchange->phase = HTTP_PHASE_ANSWER;
    response->status = status;
    atomic_store(&exchange->connection->deadline, answer_deadline(server, bytes));
    enum MHD_Result rc = MHD_queue_response(exchange->mhd, (unsigned)status, mhd);
    MHD_destroy_response(mhd);
    return rc;
}
