/* http_response.h: what a handler answers: JSON, bytes, a file, an error, or an answer that comes
 * later, from another thread, whole or as a stream.
 *
 * Every answer gets x-request-id, openai-version, openai-processing-ms and, when the tenant is
 * known, openai-organization. Errors have OpenAI's body with all four keys; what a client may retry
 * is said by x-should-retry and Retry-After. Never 409: SDKs re-send those. */
#ifndef GRAFT_HTTP_RESPONSE_H
#define GRAFT_HTTP_RESPONSE_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/err.h"

struct http_response; /* one for each request, belongs to the server */

/* Status with a JSON body; steals the reference to `body`, also on failure. */
int http_response_json(struct http_response *response, int status, json_t *body, struct err *err);
/* Takes `data` (malloc'ed). */
int http_response_bytes(struct http_response *response, int status, const char *content_type,
                        char *data, size_t len, struct err *err);
/* Sends `bytes` bytes of `fd` from its start, and closes it, also on failure. file_name goes into
 * content-disposition, escaped. */
int http_response_file(struct http_response *response, int fd, int64_t bytes,
                       const char *content_type, const char *file_name, struct err *err);
/* At most 8; copied. CR and LF in the value are an error. */
int http_response_header(struct http_response *response, const char *name, const char *value,
                         struct err *err);

/* Status on the wire, and OpenAI's error type, for an error. */
int http_error_status(const struct err *err);
/* {"error":{message,type,param,code}}: for a stream's error event too. Those of 500 and
 * 503 without a code keep their text out of it (it is logged with the request id). NULL: out of
 * memory. */
json_t *http_error_json(const struct err *err);

/* ------------------------------------------------------------------ later
 *
 * A handler that waits for a model must not hold its thread: it turns the request into a
 * `struct http_later`, hands that to whoever will answer, and returns 0. Then any one thread at a
 * time calls either
 *     http_later_json or http_later_error                                       (one answer), or
 *     http_later_stream, http_later_write …, http_later_finish or _error        (a stream).
 * json, error and finish give the handle back: it must not be used after.
 *
 * A stream has a ring of `ring_bytes`; the event thread writes from it, woken at most every 50 ms;
 * after 15 s of silence it sends the comment ": ping". When the client has gone, `gone` is called
 * once, on a thread of the server that holds no lock; the answerer still has to finish (writes are
 * then dropped). `release` is called once, last of all, when nothing will use `context` any more:
 * free it there. Both may be NULL. At server stop, `gone` is called for those still open. */
struct http_later;

struct http_later_options {
    size_t ring_bytes; /* 0: 256 kB */
    void *context;
    void (*gone)(void *context);
    void (*release)(void *context);
};

/* NULL with err: `release` has been called. After success the handler returns 0. */
struct http_later *http_response_later(struct http_response *response,
                                       const struct http_later_options *options, struct err *err);

/* Steals `body`. */
void http_later_json(struct http_later *later, int status, json_t *body);
/* The answer, or the last event of a stream that has begun. Logs what is ours, with the request. */
void http_later_error(struct http_later *later, const struct err *err);

/* Sends status 200 and the headers now. */
void http_later_stream(struct http_later *later, const char *content_type);
/* All or nothing. -1: no room (the client reads too slowly: cancel the work and finish). Returns 0
 * when the client has gone. */
int http_later_write(struct http_later *later, const void *data, size_t len);
/* "data: " + compact JSON + "\n\n"; steals `event`. */
int http_later_write_event(struct http_later *later, json_t *event);
void http_later_finish(struct http_later *later);
bool http_later_gone(struct http_later *later);

#endif
