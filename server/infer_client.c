#include "server/infer_client.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "engine/base/clock.h"
#include "engine/base/log.h"

#define WAITING_MAX ((size_t)256 << 20)
#define CANCEL_FRAME 13 /* bytes of a cancel's frame */
#define IN_MAX ((size_t)IPC_FRAME_MAX + 4)
#define STATS_EVERY_MS 5000

struct open_request {
    struct open_request *next;
    uint64_t id;
    infer_event_fn *fn;
    void *context;
};

struct infer_client {
    pthread_t thread;
    pthread_mutex_t lock; /* everything below, and held while an event is delivered */
    int wake;             /* eventfd: output, a new socket, or stop */
    int next_fd;          /* attached, not taken up yet; -1 */
    bool stop, started;
    atomic_bool ready;
    struct open_request *requests;
    int64_t open, max_requests;
    uint64_t last_id;
    struct strbuf out; /* frames; the last one is whole, always */
    size_t out_at;     /* sent already */
    size_t max_waiting;
    int64_t finished, tokens, connects;
    struct ipc_stats worker;

    int fd; /* the thread's own from here on */
    struct strbuf in;
    int32_t stats_every; /* ms */
    double stats_due;    /* clock_now() */
};

static void wake(struct infer_client *c)
{
    uint64_t one = 1;

    if (write(c->wake, &one, sizeof one) < 0)
        return; /* the counter is at its maximum: it is awake */
}

/* ------------------------------------------------------------------ requests (under the lock) */

static struct open_request *find(struct infer_client *c, uint64_t id)
{
    struct open_request *r = c->requests;

    while (r != NULL && r->id != id)
        r = r->next;
    return r;
}

static void forget(struct infer_client *c, struct open_request *request)
{
    struct open_request **p = &c->requests;

    while (*p != request)
        p = &(*p)->next;
    *p = request->next;
    c->open--;
    c->finished++;
    free(request);
}

static void deliver_error(struct infer_client *c, struct open_request *r, const struct err *error)
{
    struct infer_event event = {.kind = INFER_ERROR, .err = error};

    r->fn(r->context, &event);
    forget(c, r);
}

static void fail_all(struct infer_client *c, const char *why)
{
    struct err error = {0};

    err_set_code(&error, ERR_UNAVAILABLE, "worker_restarted", NULL, "%s", why);
    while (c->requests != NULL)
        deliver_error(c, c->requests, &error);
}

static void disconnect(struct infer_client *c, const char *why)
{
    pthread_mutex_lock(&c->lock);
    atomic_store(&c->ready, false);
    if (c->fd >= 0)
        close(c->fd);
    c->fd = -1;
    strbuf_reset(&c->out);
    c->out_at = 0;
    strbuf_reset(&c->in);
    memset(&c->worker, 0, sizeof c->worker);
    fail_all(c, why);
    pthread_mutex_unlock(&c->lock);
}

/* ------------------------------------------------------------------ what the worker says */

/* Requests stop at max_waiting, so there is room for a cancel of each. With no memory for one, its
 * answer is generated for nobody. */
static void put_cancel(struct infer_client *c, uint64_t id)
{
    size_t before = c->out.len;

    ipc_put_cancel(&c->out, id);
    if (strbuf_failed(&c->out)) {
        strbuf_truncate(&c->out, before);
        log_warn("a cancelled answer goes on: out of memory");
    }
}

static void on_text(struct infer_client *c, const struct ipc_message *m)
{
    struct open_request *r = find(c, m->id);
    struct infer_event event = {.kind = INFER_TEXT, .text = m->text.text, .text_len = m->text.len};

    if (r == NULL) /* cancelled while this was under way */
        return;
    if (r->fn(r->context, &event) != 0) {
        forget(c, r);
        put_cancel(c, m->id);
    }
}

static void on_done(struct infer_client *c, const struct ipc_message *m)
{
    struct open_request *r = find(c, m->id);
    struct infer_event event = {.kind = INFER_DONE,
                                .finish = m->done.finish,
                                .prompt_tokens = m->done.prompt_tokens,
                                .completion_tokens = m->done.completion_tokens};

    c->tokens += m->done.completion_tokens;
    if (r == NULL)
        return;
    r->fn(r->context, &event);
    forget(c, r);
}

static int on_message(struct infer_client *c, const struct ipc_message *m, struct err *err)
{
    struct open_request *r;

    switch (m->type) {
    case IPC_HELLO:
        if (m->version != IPC_VERSION)
            return err_set(err, ERR_INTERNAL, "the infer worker speaks protocol %u, not %d",
                           m->version, IPC_VERSION);
        atomic_store(&c->ready, true);
        return 0;
    case IPC_TEXT:
        on_text(c, m);
        return 0;
    case IPC_DONE:
        on_done(c, m);
        return 0;
    case IPC_ERROR:
        r = find(c, m->id);
        if (r != NULL)
            deliver_error(c, r, &m->error);
        return 0;
    case IPC_STATS:
        c->worker = m->stats;
        return 0;
    default:
        return err_set(err, ERR_INTERNAL, "the infer worker sent a message of type %d",
                       (int)m->type);
    }
}

static int take_messages(struct infer_client *c, struct err *err)
{
    size_t at = 0, used;
    struct ipc_message m;
    int rc;

    pthread_mutex_lock(&c->lock);
    while ((rc = ipc_take(c->in.data + at, c->in.len - at, &used, &m, err)) == 1) {
        rc = on_message(c, &m, err);
        ipc_message_release(&m);
        if (rc != 0)
            break;
        at += used;
    }
    pthread_mutex_unlock(&c->lock);
    memmove(c->in.data, c->in.data + at, c->in.len - at + 1);
    c->in.len -= at;
    return rc;
}

/* ------------------------------------------------------------------ the socket */

static int receive(struct infer_client *c, struct err *err)
{
    char buf[65536];

    for (;;) {
        ssize_t n = recv(c->fd, buf, sizeof buf, MSG_DONTWAIT);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            return 0;
        if (n < 0)
            return err_set_errno(err, errno, "read from the infer worker");
        if (n == 0)
            return err_set(err, ERR_UNAVAILABLE, "the infer worker has gone");
        strbuf_add(&c->in, buf, (size_t)n);
        if (strbuf_failed(&c->in))
            return err_set(err, ERR_NO_MEMORY, "messages of the infer worker: out of memory");
        if (take_messages(c, err) != 0)
            return -1;
    }
}

static int transmit(struct infer_client *c, struct err *err)
{
    int rc = 0;

    pthread_mutex_lock(&c->lock);
    while (c->out_at < c->out.len) {
        ssize_t n = send(c->fd, c->out.data + c->out_at, c->out.len - c->out_at,
                         MSG_DONTWAIT | MSG_NOSIGNAL);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK)
            rc = err_set_errno(err, errno, "write to the infer worker");
        if (n < 0)
            break;
        c->out_at += (size_t)n;
    }
    if (c->out_at == c->out.len) {
        strbuf_reset(&c->out);
        c->out_at = 0;
    }
    pthread_mutex_unlock(&c->lock);
    return rc;
}

/* Takes up what the others have left for the thread. false: stop. */
static bool look_around(struct infer_client *c, bool *output)
{
    bool stop;
    int fd;

    pthread_mutex_lock(&c->lock);
    stop = c->stop;
    fd = c->next_fd;
    c->next_fd = -1;
    pthread_mutex_unlock(&c->lock);
    if (fd >= 0) {
        disconnect(c, "the model worker was replaced; try again");
        pthread_mutex_lock(&c->lock);
        c->fd = fd;
        c->connects++;
        ipc_put_hello(&c->out);
        pthread_mutex_unlock(&c->lock);
        c->stats_due = clock_now() + c->stats_every / 1e3;
    }
    pthread_mutex_lock(&c->lock);
    *output = c->fd >= 0 && c->out_at < c->out.len;
    pthread_mutex_unlock(&c->lock);
    return !stop;
}

/* When it is time, however busy the line is: a worker's figures matter most then. */
static void ask_for_stats(struct infer_client *c)
{
    double now = clock_now();

    if (now < c->stats_due || !atomic_load(&c->ready))
        return;
    pthread_mutex_lock(&c->lock);
    if (c->out.len == 0) { /* else it has not taken what it was sent: the next time */
        ipc_put_stats_request(&c->out);
        c->stats_due = now + c->stats_every / 1e3;
    }
    pthread_mutex_unlock(&c->lock);
}

static void *client_thread(void *context)
{
    struct infer_client *c = context;
    bool output;

    while (look_around(c, &output)) {
        struct pollfd fds[2] = {{.fd = c->wake, .events = POLLIN}, {.fd = c->fd, .events = POLLIN}};
        struct err err = {0};
        uint64_t count;
        int n;

        if (output)
            fds[1].events |= POLLOUT;
        n = poll(fds, c->fd >= 0 ? 2 : 1, c->stats_every);
        ask_for_stats(c);
        if (n > 0 && fds[0].revents != 0 && read(c->wake, &count, sizeof count) < 0)
            continue;
        if (c->fd < 0)
            continue;
        if (transmit(c, &err) != 0 || receive(c, &err) != 0) {
            log_warn("%s", err.message);
            disconnect(c, "the model worker died; it is being restarted, try again");
        }
    }
    disconnect(c, "the server is stopping");
    return NULL;
}

/* ------------------------------------------------------------------ public */

int infer_client_open(struct infer_client **out, const struct infer_client_options *options,
                      struct err *err)
{
    struct infer_client *c = calloc(1, sizeof *c);

    if (c == NULL)
        return err_set(err, ERR_NO_MEMORY, "inference client: out of memory");
    c->fd = c->next_fd = -1;
    c->max_requests = options->max_requests;
    c->max_waiting = options->max_waiting > 0 ? options->max_waiting : WAITING_MAX;
    c->stats_every = options->stats_every > 0 ? options->stats_every : STATS_EVERY_MS;
    strbuf_init(&c->out, c->max_waiting + CANCEL_FRAME * (size_t)c->max_requests);
    strbuf_init(&c->in, IN_MAX + 65536);
    pthread_mutex_init(&c->lock, NULL);
    c->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (c->wake < 0) {
        err_set_errno(err, errno, "inference client: eventfd");
        goto fail;
    }
    if (pthread_create(&c->thread, NULL, client_thread, c) != 0) {
        err_set(err, ERR_NO_MEMORY, "inference client: no thread");
        goto fail;
    }
    c->started = true;
    *out = c;
    return 0;
fail:
    infer_client_free(c);
    return -1;
}

void infer_client_free(struct infer_client *client)
{
    if (client == NULL)
        return;
    if (client->started) {
        pthread_mutex_lock(&client->lock);
        client->stop = true;
        pthread_mutex_unlock(&client->lock);
        wake(client);
        pthread_join(client->thread, NULL);
    }
    if (client->next_fd >= 0)
        close(client->next_fd);
    if (client->wake >= 0)
        close(client->wake);
    strbuf_release(&client->out);
    strbuf_release(&client->in);
    pthread_mutex_destroy(&client->lock);
    free(client);
}

void infer_client_attach(struct infer_client *client, int fd)
{
    pthread_mutex_lock(&client->lock);
    if (client->next_fd >= 0)
        close(client->next_fd);
    client->next_fd = fd;
    pthread_mutex_unlock(&client->lock);
    wake(client);
}

bool infer_client_ready(const struct infer_client *client)
{
    return atomic_load(&client->ready);
}

int infer_client_submit(struct infer_client *client, const struct ipc_submit *request,
                        infer_event_fn *fn, void *context, uint64_t *id, struct err *err)
{
    struct open_request *r = calloc(1, sizeof *r);
    struct ipc_submit submit = *request;
    size_t before;
    int rc = -1;

    if (r == NULL)
        return err_set(err, ERR_NO_MEMORY, "inference request: out of memory");
    pthread_mutex_lock(&client->lock);
    if (!atomic_load(&client->ready)) {
        err_set_code(err, ERR_UNAVAILABLE, "worker_unavailable", NULL,
                     "the model worker is starting; try again in a moment");
        goto out;
    }
    if (client->open >= client->max_requests) {
        err_set_code(err, ERR_RATE, "queue_full", NULL,
                     "%lld requests are being answered already; try again later",
                     (long long)client->open);
        goto out;
    }
    submit.id = r->id = ++client->last_id;
    before = client->out.len;
    ipc_put_submit(&client->out, &submit);
    if (strbuf_failed(&client->out) || client->out.len > client->max_waiting) {
        strbuf_truncate(&client->out, before);
        err_set_code(err, ERR_RATE, "queue_full", NULL,
                     "too much is waiting for the model; try again later");
        goto out;
    }
    r->fn = fn;
    r->context = context;
    r->next = client->requests;
    client->requests = r;
    client->open++;
    *id = r->id;
    r = NULL;
    rc = 0;
out:
    pthread_mutex_unlock(&client->lock);
    free(r);
    if (rc == 0)
        wake(client);
    return rc;
}

void infer_client_cancel(struct infer_client *client, uint64_t id)
{
    struct open_request *r;

    pthread_mutex_lock(&client->lock);
    r = find(client, id);
    if (r != NULL) {
        forget(client, r);
        put_cancel(client, id);
    }
    pthread_mutex_unlock(&client->lock);
    wake(client);
}

void infer_client_stats(struct infer_client *client, struct infer_client_stats *out)
{
    pthread_mutex_lock(&client->lock);
    *out = (struct infer_client_stats){.ready = atomic_load(&client->ready),
                                       .open = client->open,
                                       .requests = client->finished,
                                       .tokens = client->tokens,
                                       .connects = client->connects,
                                       .worker = client->worker};
    pthread_mutex_unlock(&client->lock);
}
