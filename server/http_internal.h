/* http_internal.h: what the files of the HTTP layer share among themselves. Nothing outside
 * server/http_*.c includes it.
 *
 * Life of a request (struct http_exchange):
 *
 *   target callback   born, with the raw target                                  event thread
 *   head              filter, route, limits, key cache                           event thread
 *   body pieces       memory, or multipart into staging                          event thread
 *   complete          connection suspended, into the queue                       event thread
 *   handled           database, handler; then the connection is resumed          handler thread
 *   answer queued     libmicrohttpd writes it                                    event thread
 *   completed         freed                                                      event thread
 *
 * MHD takes an answer only before the body or after it. So what is wrong with a body is kept in
 * `refusal` and what still comes of the body is thrown away, 64 MiB at most, then the connection is
 * cut. A refusal by the head waits likewise for a body that is no longer and comes unasked, since
 * many clients read nothing before they have sent all; otherwise it is answered at once, and the
 * connection closes. A suspended connection can not vanish: while an exchange is queued, handled,
 * or waits for a later answer, its pointer is valid on every thread. */
#ifndef GRAFT_HTTP_INTERNAL_H
#define GRAFT_HTTP_INTERNAL_H

#include <microhttpd.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "engine/base/strbuf.h"
#include "server/http_auth.h"
#include "server/http_filter.h"
#include "server/http_path.h"
#include "server/http_request.h"
#include "server/http_response.h"
#include "server/http_route.h"
#include "server/http_server.h"
#include "server/multipart.h"

#define HTTP_NO_DEADLINE INT64_MAX
#define HTTP_DISCARD_MAX (INT64_C(64) << 20)
#define HTTP_RESPONSE_HEADERS_MAX 8

int64_t http_now_ms(void); /* CLOCK_MONOTONIC */

/* ------------------------------------------------------------------ connections */

/* One client connection; in the registry from accept to close. */
struct http_connection {
    struct http_connection *prev, *next;
    int fd;
    _Atomic int64_t deadline; /* http_now_ms at which the clock cuts it */
    atomic_bool between;      /* no request under way: the first to go when it gets crowded */
    atomic_bool reading;      /* a body is on its way */
    int64_t opened;
    char remote[48];
    struct http_exchange *orphan; /* born but not yet known to MHD as ours */
};

struct http_connections {
    pthread_mutex_t lock;
    struct http_connection *first;
    int64_t count, limit;
    _Atomic int64_t cut;
};

/* ------------------------------------------------------------------ responses */

enum http_response_kind {
    HTTP_RESPONSE_NONE,
    HTTP_RESPONSE_BYTES,
    HTTP_RESPONSE_FILE,
    HTTP_RESPONSE_LATER
};

struct http_response {
    struct http_exchange *exchange;
    enum http_response_kind kind;
    int status;
    char *data;
    size_t len;
    int fd; /* -1: none */
    int64_t file_bytes;
    char content_type[96];
    struct {
        char name[40], value[2200];
    } * headers;
    int header_count;
    struct http_later *later;
};

/* Drops what it holds, so that another answer can be set. */
void http_response_clear(struct http_response *response);
/* Makes `err` the answer; never fails (falls back to a fixed text). Logs internal errors. status 0:
 * by the error's kind. */
void http_response_error(struct http_response *response, int status, const struct err *err);
/* Hands the answer to MHD. On the event thread, in the access handler. `close`: the connection. */
enum MHD_Result http_response_send(struct http_response *response, bool close);

/* ------------------------------------------------------------------ exchanges */

enum http_phase {
    HTTP_PHASE_HEAD,    /* born */
    HTTP_PHASE_BODY,    /* reading the body */
    HTTP_PHASE_KEY,     /* suspended before an upload's body: the key is looked up */
    HTTP_PHASE_KEYED,   /* it has been: MHD calls once more before the body */
    HTTP_PHASE_HANDLER, /* suspended: queued, handled, or waiting for a later answer */
    HTTP_PHASE_ANSWER,  /* queued at MHD */
};

struct http_exchange {
    struct http_server *server;
    struct MHD_Connection *mhd;
    struct http_connection *connection;
    struct http_exchange *next; /* in the queue */
    /* The event thread's, but for KEY → KEYED, by which a handler thread hands over what it found:
     * MHD may look between that and the connection's resumption. */
    _Atomic enum http_phase phase;
    bool counted;    /* in server->under_way */
    int64_t started; /* http_now_ms at the end of the headers */
    char *target;    /* raw, until the head is read */
    struct http_path path;
    bool has_body;
    bool reads_on;       /* a refusal by the head waits for the end of the body */
    char *authorization; /* copy; overwritten when freed */
    char *idempotency_key, *content_type;
    char allow[64];    /* of a 405 or OPTIONS */
    bool known_tenant; /* the key is good */
    struct http_request request;
    struct http_response response;
    struct strbuf body;
    struct multipart multipart;
    struct http_upload upload;
    char *upload_text[2 * HTTP_UPLOAD_FIELDS_MAX + 2]; /* owned strings of `upload` */
    int upload_text_count;
    struct strbuf upload_value; /* the field being read */
    bool uploading, upload_in_file;
    bool refused; /* `refusal` is the answer once the body is through */
    struct err refusal;
    int refusal_status; /* 0: by the error's kind */
    int64_t body_bytes, discarded;
};

/* http_exchange.c: the callbacks that MHD gets. */
void *http_exchange_target(void *server, const char *target, struct MHD_Connection *mhd);
enum MHD_Result http_exchange_access(void *server, struct MHD_Connection *mhd, const char *url,
                                     const char *method, const char *version, const char *data,
                                     size_t *size, void **exchange);
void http_exchange_completed(void *server, struct MHD_Connection *mhd, void **exchange,
                             enum MHD_RequestTerminationCode why);
void http_exchange_connection(void *server, struct MHD_Connection *mhd, void **context,
                              enum MHD_ConnectionNotificationCode what);
void http_exchange_free(struct http_exchange *exchange);
struct key_identity;
void http_exchange_identify(struct http_exchange *exchange, const struct key_identity *identity);
/* Runs the handler; afterwards `response` is set, or will be later. `db`: the thread's slot for its
 * connection, NULL on event threads. */
void http_exchange_run(struct http_exchange *exchange, struct db **db);

/* http_upload.c: the multipart body of an exchange. */
int http_upload_begin(struct http_exchange *exchange, const char *content_type, struct err *err);
int http_upload_feed(struct http_exchange *exchange, const char *data, size_t len, struct err *err);
int http_upload_end(struct http_exchange *exchange, struct err *err);
void http_upload_release(struct http_exchange *exchange);

/* ------------------------------------------------------------------ handler threads */

struct http_handlers {
    pthread_mutex_t lock;
    pthread_cond_t wake;
    struct http_exchange *first, *last;
    int queued, limit, handling;
    bool stopping; /* takes nothing more */
    pthread_t *threads;
    int thread_count;
    double seconds; /* sum of handling times */
};

int http_handlers_start(struct http_server *server, int threads, int limit, struct err *err);
/* Suspends the connection and queues the exchange. False: full or stopping, nothing was done. */
bool http_handlers_submit(struct http_exchange *exchange);
/* Answers what is queued with 503, waits for what is being handled, ends the threads. */
void http_handlers_stop(struct http_server *server);

/* ------------------------------------------------------------------ later answers */

struct http_laters {
    pthread_mutex_t lock; /* before any later's own lock */
    struct http_later *first;
    int64_t count;
};

/* The handler has returned: from now on an answer resumes the connection. */
void http_later_handler_done(struct http_later *later);
/* What to send: the whole answer, or a callback that reads the ring. Event thread. */
struct MHD_Response *http_later_response(struct http_later *later, int *status,
                                         const char **content_type);
/* The exchange is over: the client got all, or has gone. */
void http_later_detach(struct http_later *later);
/* One tick of the clock: wakes streams, sends pings, finds clients that have gone. */
void http_laters_tick(struct http_server *server);
/* Calls `gone` for all; then those not answered get 503, those streaming end. */
void http_laters_abort(struct http_server *server, bool answer);

/* ------------------------------------------------------------------ the server */

struct http_server {
    struct http_server_options options; /* numbers with defaults filled in; strings owned */
    struct MHD_Daemon *daemon;
    int listen_fd;
    char url[80];
    bool in_place_parser; /* MHD before 1.0: http_filter_layout applies */
    struct http_connections connections;
    struct http_handlers handlers;
    struct http_laters laters;
    struct http_auth_cache *auth;
    pthread_t clock;
    bool clock_runs;
    atomic_bool quiet, stop_clock;
    _Atomic int64_t under_way; /* exchanges from a good head to their end: a stop waits for them */
    _Atomic int64_t requests, by_class[6], refused_filter, refused_busy, auth_failures;
};

#endif
