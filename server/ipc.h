/* ipc.h: the messages between `graft serve` and its infer worker, over a stream socket.
 *
 * A frame is a 32-bit length (little-endian, of what follows), one byte of type, and the type's
 * fields (server/ipc_wire.h). Both ends first send IPC_HELLO with the protocol's version; another
 * version ends the connection. A malformed frame ends the connection: the peer is our own binary,
 * so it is a bug, never a reason to guess.
 *
 *   server -> worker: hello, submit, cancel, stats request
 *   worker -> server: hello, text, done, error, stats */
#ifndef GRAFT_IPC_H
#define GRAFT_IPC_H

#include <stddef.h>
#include <stdint.h>

#include "engine/base/err.h"
#include "engine/base/strbuf.h"
#include "engine/engine.h"

#define IPC_VERSION 3
#define IPC_FRAME_MAX (16u << 20) /* bytes: the largest JSON body, with room */
#define IPC_MESSAGES_MAX 4096
#define IPC_STOP_MAX 4

enum ipc_type {
    IPC_HELLO = 1,
    IPC_SUBMIT,
    IPC_CANCEL,
    IPC_STATS_REQUEST,
    IPC_TEXT,
    IPC_DONE,
    IPC_ERROR,
    IPC_STATS,
};

struct ipc_submit {
    uint64_t id; /* chosen by the server, unique on this connection */
    const char *tenant;
    const char *base_sha256; /* of the base's file: its name in caches */
    const char *base_path;
    const char *delta_sha256; /* of the artifact, as the server resolved it for this request; "" for
                                 the base */
    const char *delta_path;
    const struct engine_message *messages;
    int32_t message_count;
    double temperature, top_p;
    uint64_t seed;
    int32_t max_tokens; /* 0: up to the context */
    const char *const *stop;
    int32_t stop_count;
};

struct ipc_stats {
    int32_t active, bases, deltas; /* sequences in the batches; models and deltas loaded */
    int64_t base_bytes, delta_bytes;
    int64_t tokens, steps;             /* since the worker started */
    double utilization;                /* share of the last minute in which it computed */
    int64_t memory_bytes, memory_free; /* of its device; 0: not known yet */
};

struct ipc_done {
    uint64_t id;
    enum engine_finish finish;
    int32_t prompt_tokens, completion_tokens;
};

struct ipc_message {
    enum ipc_type type;
    uint64_t id; /* of submit, cancel, text, done, error */
    union {
        uint32_t version; /* hello */
        struct ipc_submit submit;
        struct {
            const char *text;
            size_t len;
        } text;
        struct ipc_done done;
        struct err error;
        struct ipc_stats stats;
    };
    /* Owned by the message: what submit's arrays point to. */
    struct engine_message *messages;
    const char *stop[IPC_STOP_MAX];
};

/* Each appends one frame to `out`, or nothing where it fails (check strbuf_failed once). */
void ipc_put_hello(struct strbuf *out);
void ipc_put_submit(struct strbuf *out, const struct ipc_submit *submit);
void ipc_put_cancel(struct strbuf *out, uint64_t id);
void ipc_put_stats_request(struct strbuf *out);
void ipc_put_text(struct strbuf *out, uint64_t id, const char *text, size_t len);
void ipc_put_done(struct strbuf *out, const struct ipc_done *done);
void ipc_put_error(struct strbuf *out, uint64_t id, const struct err *error);
void ipc_put_stats(struct strbuf *out, const struct ipc_stats *stats);

/* Takes one frame off the front of data[0..len): 1 and *used bytes eaten, 0 when it is not complete
 * yet, -1 when it is malformed. Strings in `message` point into data; release it before data moves.
 */
int ipc_take(const char *data, size_t len, size_t *used, struct ipc_message *message,
             struct err *err);
void ipc_message_release(struct ipc_message *message);

#endif
