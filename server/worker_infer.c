/* The infer worker: one thread that reads requests, advances every batch by a step, and sends what
 * came out. A base is loaded when it is asked for, a delta when its request can join the batch:
 * what waits keeps none in memory. Between two loads there is a step. A request at fault gets an
 * error of its own; a batch that failed ends its requests with an error and is opened anew. A lost
 * device ends the process, and with the line all requests. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "engine/base/log.h"
#include "server/capacity.h"
#include "server/devices.h"
#include "server/ipc.h"
#include "server/worker.h"
#include "server/worker_models.h"
#include "server/worker_watch.h"

#define OUT_MAX                                                                      \
    (64u << 20) /* bytes that the server has not read: far more than it lets pile up \
                 */

#define LONG_MESSAGE (64u << 10) /* bytes: to tokenize so much takes as long as a step may */

struct answer {
    struct answer *next;
    uint64_t id, session_id;
    struct worker_base *base;
    char *tenant, *delta_sha256, *delta_path; /* what to load; NULL: the base answers */
    struct worker_delta *delta;               /* NULL: not loaded yet */
};

struct infer {
    int fd;
    const char *device;
    int64_t memory_bytes, memory_free; /* of the device, when last asked; 0: never */
    bool hello;
    struct worker_models *models;
    struct answer *answers;
    struct strbuf in, out;
    size_t out_at;
    int64_t tokens, steps;
};

static struct answer *find(struct infer *w, uint64_t id)
{
    struct answer *a = w->answers;

    while (a != NULL && a->id != id)
        a = a->next;
    return a;
}

static void free_answer(struct answer *a)
{
    if (a == NULL)
        return;
    free(a->tenant);
    free(a->delta_sha256);
    free(a->delta_path);
    free(a);
}

static void finish(struct infer *w, struct answer *answer)
{
    struct answer **p = &w->answers;

    while (*p != answer)
        p = &(*p)->next;
    *p = answer->next;
    answer->base->active--;
    if (answer->delta != NULL)
        worker_models_unpin(answer->delta);
    free_answer(answer);
}

/* ------------------------------------------------------------------ requests */

static int keep_delta(struct answer *a, const struct ipc_submit *s, struct err *err)
{
    a->tenant = strdup(s->tenant);
    a->delta_sha256 = strdup(s->delta_sha256);
    a->delta_path = strdup(s->delta_path);
    if (a->tenant == NULL || a->delta_sha256 == NULL || a->delta_path == NULL)
        return err_set(err, ERR_NO_MEMORY, "request: out of memory");
    return 0;
}

static int start_answer(struct infer *w, const struct ipc_submit *s, struct answer *a,
                        struct err *err)
{
    const struct engine_request request = {.messages = s->messages,
                                           .message_count = s->message_count,
                                           .delta_later = s->delta_sha256[0] != '\0',
                                           .temperature = s->temperature,
                                           .top_p = s->top_p,
                                           .seed = s->seed,
                                           .max_tokens = s->max_tokens,
                                           .stop = s->stop,
                                           .stop_count = s->stop_count,
                                           .user = a};

    a->id = s->id;
    if (worker_models_base(w->models, s->base_sha256, s->base_path, &a->base, err) != 0)
        return -1;
    if (request.delta_later && keep_delta(a, s, err) != 0)
        return -1;
    return engine_session_submit(a->base->session, &request, &a->session_id, err);
}

static void refuse(struct infer *w, uint64_t id, const struct err *err)
{
    if (err->kind == ERR_DEVICE)
        worker_watch_lost(err);
    if (err->kind != ERR_INVALID)
        log_warn("request refused: %s", err->message);
    ipc_put_error(&w->out, id, err);
}

static void submit(struct infer *w, const struct ipc_submit *s)
{
    struct answer *a = calloc(1, sizeof *a);
    struct err err = {0};

    if (a == NULL)
        err_set(&err, ERR_NO_MEMORY, "request: out of memory");
    if (a == NULL || start_answer(w, s, a, &err) != 0) {
        refuse(w, s->id, &err);
        free_answer(a);
        return;
    }
    a->base->active++;
    a->next = w->answers;
    w->answers = a;
}

/* Of those that could join a batch if they had their delta the one that came first. */
static struct answer *first_that_wants(const struct infer *w)
{
    struct answer *first = NULL;
    void *user;

    for (struct worker_base *b = worker_models_first(w->models); b != NULL; b = b->next) {
        struct answer *a = engine_session_wants(b->session, &user) ? user : NULL;

        if (a != NULL && (first == NULL || a->id < first->id))
            first = a;
    }
    return first;
}

static int64_t loads_begun(const struct infer *w)
{
    struct worker_models_stats m;

    worker_models_stats(w->models, &m);
    return m.loads;
}

/* Deltas to those whose turn it is, up to the first that had to be loaded. */
static void give_deltas(struct infer *w)
{
    int64_t loads = loads_begun(w);
    struct answer *a;

    while (loads_begun(w) == loads && (a = first_that_wants(w)) != NULL) {
        struct err err = {0};

        if (worker_models_pin(w->models, a->base, a->tenant, a->delta_sha256, a->delta_path,
                              &a->delta, &err) == 0) {
            engine_session_give(a->base->session, a->session_id, worker_delta_engine(a->delta));
            continue;
        }
        refuse(w, a->id, &err);
        engine_session_withdraw(a->base->session, a->session_id);
        finish(w, a);
    }
}

/* All engines are on the same device; the last figure stays where none is open. */
static void ask_memory(struct infer *w)
{
    const struct worker_base *b = worker_models_first(w->models);

    if (devices_is_cpu(w->device))
        capacity_machine(&w->memory_bytes, &w->memory_free);
    else if (b != NULL)
        engine_memory(b->engine, &w->memory_bytes, &w->memory_free);
}

static void put_stats(struct infer *w)
{
    struct worker_models_stats m;
    struct ipc_stats s = {
        .tokens = w->tokens, .steps = w->steps, .utilization = worker_watch_utilization()};

    ask_memory(w);
    s.memory_bytes = w->memory_bytes;
    s.memory_free = w->memory_free;
    worker_models_stats(w->models, &m);
    s.bases = m.bases;
    s.deltas = m.deltas;
    s.base_bytes = m.base_bytes;
    s.delta_bytes = m.delta_bytes;
    for (const struct answer *a = w->answers; a != NULL; a = a->next)
        s.active++;
    ipc_put_stats(&w->out, &s);
}

static int on_message(struct infer *w, const struct ipc_message *m, struct err *err)
{
    const struct answer *a;

    if (!w->hello && m->type != IPC_HELLO)
        return err_set(err, ERR_INTERNAL, "the server did not say hello");
    switch (m->type) {
    case IPC_HELLO:
        if (m->version != IPC_VERSION)
            return err_set(err, ERR_INTERNAL, "the server speaks protocol %u, not %d", m->version,
                           IPC_VERSION);
        w->hello = true;
        ipc_put_hello(&w->out);
        return 0;
    case IPC_SUBMIT:
        submit(w, &m->submit);
        return 0;
    case IPC_CANCEL:
        a = find(w, m->id);
        if (a != NULL)
            engine_session_cancel(a->base->session, a->session_id);
        return 0;
    case IPC_STATS_REQUEST:
        put_stats(w);
        return 0;
    default:
        return err_set(err, ERR_INTERNAL, "the server sent a message of type %d", (int)m->type);
    }
}

/* ------------------------------------------------------------------ steps */

static void on_event(void *context, const struct engine_event *event)
{
    struct infer *w = context;
    struct answer *a = event->user;
    struct ipc_done done = {.finish = event->finish,
                            .prompt_tokens = event->prompt_tokens,
                            .completion_tokens = event->completion_tokens};

    if (event->text_len > 0)
        ipc_put_text(&w->out, a->id, event->text, event->text_len);
    if (event->finish == ENGINE_FINISH_NONE)
        return;
    done.id = a->id;
    if (event->finish == ENGINE_FINISH_ERROR) {
        struct err broken = {0};

        err_set(&broken, ERR_INTERNAL,
                "the model's output is not a number: the fine-tune is broken");
        ipc_put_error(&w->out, a->id, &broken);
    } else {
        ipc_put_done(&w->out, &done);
    }
    w->tokens += event->completion_tokens;
    finish(w, a);
}

/* The batch can not go on: its requests end, and it is loaded again by the next one. */
static void drop_batch(struct infer *w, struct worker_base *base, const struct err *why)
{
    log_error("batch of base %.12s failed: %s", base->sha256, why->message);
    for (struct answer *a = w->answers, *next; a != NULL; a = next) {
        next = a->next;
        if (a->base != base)
            continue;
        ipc_put_error(&w->out, a->id, why);
        finish(w, a);
    }
    worker_models_drop(w->models, base);
}

static void step_all(struct infer *w)
{
    struct worker_base *damaged;
    struct err why = {0};

    while ((damaged = worker_models_damaged(w->models, &why)) != NULL)
        drop_batch(w, damaged, &why);
    for (struct worker_base *b = worker_models_first(w->models), *next; b != NULL; b = next) {
        struct err err = {0};
        int32_t active;
        int rc;

        next = b->next;
        if (b->active == 0)
            continue;
        worker_watch_begin("step", ++w->steps);
        rc = engine_session_step(b->session, on_event, w, &active, &err);
        worker_watch_end();
        if (rc != 0 && err.kind == ERR_DEVICE)
            worker_watch_lost(&err);
        if (rc != 0)
            drop_batch(w, b, &err);
    }
}

/* ------------------------------------------------------------------ the socket */

static int transmit(struct infer *w, struct err *err)
{
    if (strbuf_failed(&w->out))
        return err_set(err, ERR_NO_MEMORY, "answers to the server: out of memory");
    while (w->out_at < w->out.len) {
        ssize_t n = send(w->fd, w->out.data + w->out_at, w->out.len - w->out_at,
                         MSG_DONTWAIT | MSG_NOSIGNAL);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            return 0;
        if (n < 0)
            return err_set_errno(err, errno, "write to the server");
        w->out_at += (size_t)n;
    }
    strbuf_reset(&w->out);
    w->out_at = 0;
    return 0;
}

static int advance(struct infer *w, struct err *err)
{
    step_all(w);
    return transmit(w, err);
}

/* A load takes as long as many steps, and a long text as one: those who are being answered get one
 * after each. */
static int take_messages(struct infer *w, struct err *err)
{
    size_t at = 0, used;
    struct ipc_message m;
    int64_t loads;
    int rc;

    while ((rc = ipc_take(w->in.data + at, w->in.len - at, &used, &m, err)) == 1) {
        loads = loads_begun(w);
        rc = on_message(w, &m, err);
        ipc_message_release(&m);
        if (rc != 0)
            return -1;
        at += used;
        if ((loads_begun(w) > loads || used > LONG_MESSAGE) && advance(w, err) != 0)
            return -1;
    }
    memmove(w->in.data, w->in.data + at, w->in.len - at + 1);
    w->in.len -= at;
    return rc;
}

/* *open = false: the server has closed the line. */
static int receive(struct infer *w, bool *open, struct err *err)
{
    char buf[65536];

    for (;;) {
        ssize_t n = recv(w->fd, buf, sizeof buf, MSG_DONTWAIT);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            return 0;
        if (n == 0 || (n < 0 && errno == ECONNRESET)) {
            *open = false;
            return 0;
        }
        if (n < 0)
            return err_set_errno(err, errno, "read from the server");
        strbuf_add(&w->in, buf, (size_t)n);
        if (strbuf_failed(&w->in))
            return err_set(err, ERR_NO_MEMORY, "messages of the server: out of memory");
        if (take_messages(w, err) != 0)
            return -1;
    }
}

static int loop(struct infer *w, struct err *err)
{
    bool open = true;

    while (open && !worker_stopping()) {
        bool busy = w->answers != NULL;
        struct pollfd fd = {.fd = w->fd, .events = POLLIN};

        if (w->out_at < w->out.len)
            fd.events |= POLLOUT;
        /* SIGTERM comes when the streams have ended; a second is soon enough to see it. */
        poll(&fd, 1, busy ? 0 : 1000);
        if (receive(w, &open, err) != 0)
            return -1;
        give_deltas(w);
        step_all(w);
        if (open && transmit(w, err) != 0)
            return -1;
    }
    return 0;
}

int worker_infer_run(const struct settings *settings, const char *device, int socket_fd,
                     struct err *err)
{
    const struct worker_models_options options = {
        .engine = {.device = device,
                   .threads = (int32_t)settings->threads,
                   .precision = settings_precision(settings)},
        .base_bytes = settings->base_memory,
        .delta_bytes = settings->delta_memory,
        .max_sequences = (int32_t)settings->infer_sequences,
        .max_context = (int32_t)settings->infer_context,
    };
    struct infer w = {.fd = socket_fd, .device = device};
    int rc = -1;

    fcntl(socket_fd, F_SETFD, FD_CLOEXEC);
    strbuf_init(&w.in, (size_t)IPC_FRAME_MAX + 4 + 65536);
    strbuf_init(&w.out, OUT_MAX);
    if (worker_models_open(&w.models, &options, err) != 0)
        goto out;
    rc = loop(&w, err);
out:
    worker_models_free(w.models);
    while (w.answers != NULL) {
        struct answer *next = w.answers->next;

        free_answer(w.answers);
        w.answers = next;
    }
    strbuf_release(&w.in);
    strbuf_release(&w.out);
    return rc;
}
