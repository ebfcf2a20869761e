/* http_server.h: HTTP/1.1 with libmicrohttpd in front of a pool of handler threads.
 *
 * Threads. `event_threads` run MHD's epoll loops and never wait: they parse, filter, spool bodies
 * (JSON to memory; files by write(2) into the page cache of the blob store's staging, hashing as
 * they go: never fsync, never the database) and write answers. A complete request is put into a
 * bounded queue while its connection is suspended; `handler_threads` take it from there, each with
 * its own database connection, opened when first needed and again after a failure. A full queue is
 * 503 with Retry-After. One more thread keeps the clock: deadlines of slow clients, pings, the
 * wake-ups of streams.
 *
 * In front of everything is the filter (http_filter.h). Beyond loopback without a certificate the
 * server starts only with `insecure`. */
#ifndef GRAFT_HTTP_SERVER_H
#define GRAFT_HTTP_SERVER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/err.h"
#include "server/http_route.h"

struct api_context;
struct http_server;

/* 0 and NULL mean the default in brackets. Strings must live until http_server_start returns. */
struct http_server_options {
    const char *listen;             /* HOST:PORT or [V6]:PORT; port 0 picks a free one */
    const char *tls_cert, *tls_key; /* PEM files, both or none; TLS 1.2 and 1.3 */
    bool insecure;                  /* plain HTTP beyond loopback, knowingly */
    const struct http_route *routes;
    size_t route_count;
    const char *database_url; /* NULL: every route with HTTP_AUTH_KEY answers 503 */
    const char *data_dir;     /* of the blob store */
    struct api_context *api;  /* handed to handlers; must outlive the server */
    /* Called for each answered request, on event threads: operation (NULL: no route), status, and
     * seconds from the headers to the answer's end. [nobody] */
    void (*on_answer)(const char *operation, int status, double seconds);
    int event_threads;               /* [2] */
    int handler_threads;             /* [8] */
    int queue_length;                /* complete requests that wait for a handler [256] */
    int max_connections;             /* [4096, or what the file limit allows] */
    int64_t max_json_body;           /* lowers the routes' limits [no] */
    int64_t max_file_bytes;          /* [HTTP_LIMIT_FILE] */
    int header_deadline_ms;          /* connect (or request line) to complete headers [10000] */
    int idle_ms;                     /* a kept connection without a request [75000] */
    int body_deadline_ms;            /* a JSON body, whole; and an upload's grace [60000] */
    int ping_ms;                     /* a stream's silence before a comment is sent [15000] */
    int64_t upload_bytes_per_second; /* after the grace an upload slower than this is cut [8192] */
};

/* Could it start? Looks at address, certificate and key, and keeps nothing: for what would take
 * long before http_server_start. */
int http_server_check(const struct http_server_options *options, struct err *err);
/* Returns when the socket listens. */
int http_server_start(struct http_server **out, const struct http_server_options *options,
                      struct err *err);
/* "http://127.0.0.1:8080": what was really bound. */
const char *http_server_url(const struct http_server *server);
/* From now on new requests get 503 and `Connection: close`, and no connection is accepted. */
void http_server_quiesce(struct http_server *server);
/* Quiesce, wait up to drain_ms for what is under way, then cut the rest, stop and free. NULL is
 * fine. */
void http_server_stop(struct http_server *server, int drain_ms);

struct http_server_stats {
    int64_t connections;      /* open now */
    int64_t queued, handling; /* now */
    int64_t streams;          /* http_later not finished, now */
    int64_t requests;         /* answered since the start, and of those by status class: */
    int64_t by_class[6];      /* [2] is 2xx, … */
    int64_t refused_filter;   /* malformed */
    int64_t refused_busy;     /* queue full */
    int64_t cut_slow;         /* connections cut at a deadline */
    int64_t auth_failures;
    double handler_seconds; /* sum of handling times, from headers to answer */
};
void http_server_stats(struct http_server *server, struct http_server_stats *out);

#endif
