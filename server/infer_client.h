/* infer_client.h: the server's end of the line to the infer worker.
 *
 * One connection, one thread of its own, any number of requests on it. The supervisor attaches a
 * fresh socket whenever it has started a worker; when a worker dies, every open request gets an
 * error event at once (ERR_UNAVAILABLE) and new ones are refused until the next worker has said
 * hello.
 *
 * Events come on the client's thread, in order, and must not block. After INFER_DONE or
 * INFER_ERROR, and after infer_client_cancel has returned, `fn` is never called again for that
 * request. `fn` must not call into the client, and a caller of infer_client_cancel must not hold a
 * lock that `fn` takes. */
#ifndef GRAFT_INFER_CLIENT_H
#define GRAFT_INFER_CLIENT_H

#include <stdbool.h>
#include <stdint.h>

#include "engine/base/err.h"
#include "server/ipc.h"

struct infer_client;

struct infer_client_options {
    int64_t max_requests; /* open at once; more get ERR_RATE */
    size_t max_waiting;   /* bytes of requests not sent to the worker yet; more get ERR_RATE.
                             0: 256 MiB */
    int32_t stats_every;  /* ms between two questions for the worker's figures; 0: 5000 */
};

enum infer_event_kind { INFER_TEXT, INFER_DONE, INFER_ERROR };

struct infer_event {
    enum infer_event_kind kind;
    const char *text; /* INFER_TEXT: whole UTF-8 characters, valid during the call */
    size_t text_len;
    enum engine_finish finish; /* INFER_DONE */
    int32_t prompt_tokens, completion_tokens;
    const struct err *err; /* INFER_ERROR */
};
/* Returns 0, or -1 after INFER_TEXT to give the request up, as infer_client_cancel does. */
typedef int infer_event_fn(void *context, const struct infer_event *event);

int infer_client_open(struct infer_client **out, const struct infer_client_options *options,
                      struct err *err);
/* Open requests get an error event first. */
void infer_client_free(struct infer_client *client);

/* Takes over `fd`, a connected stream socket to a new worker; one that was attached is dropped. */
void infer_client_attach(struct infer_client *client, int fd);

/* A worker is connected and speaks our version. */
bool infer_client_ready(const struct infer_client *client);

/* Hands the request to the worker; does not wait for it. ERR_RATE: the queue is full.
 * ERR_UNAVAILABLE: no worker right now. Strings are copied. */
int infer_client_submit(struct infer_client *client, const struct ipc_submit *request,
                        infer_event_fn *fn, void *context, uint64_t *id, struct err *err);
/* Unknown or finished ids are ignored. */
void infer_client_cancel(struct infer_client *client, uint64_t id);

struct infer_client_stats {
    bool ready;
    int64_t open;             /* requests without an end yet */
    int64_t requests, tokens; /* since the server started: finished requests, generated tokens */
    int64_t connects;         /* workers attached so far */
    struct ipc_stats worker;  /* as the worker last said */
};
void infer_client_stats(struct infer_client *client, struct infer_client_stats *out);

#endif
