/* Answers that come later. Locks: laters.lock, then a later's own lock, then MHD's. A callback of
 * the answerer is called with none of them. */
#include <stdlib.h>
#include <string.h>

#include "engine/base/log.h"
#include "server/http_connections.h"
#include "server/http_internal.h"

#define RING_DEFAULT (256u << 10)
#define WAKE_MS 50     /* a stream is resumed at most this often */
#define STALL_MS 60000 /* a client that takes nothing for so long is cut */
#define POLL_MS 250    /* between two looks for clients that have gone */

enum later_state { LATER_WAITING, LATER_ANSWERED, LATER_STREAMING, LATER_FINISHED };

struct http_later {
    struct http_later *prev, *next; /* in laters, while attached */
    pthread_mutex_t lock;
    int refs; /* the exchange's, the answerer's, and the clock's while it calls back */
    struct http_server *server;
    struct http_exchange *exchange; /* NULL: the exchange is over */
    struct http_later_options options;
    enum later_state state;
    bool handler_done, aborted;
    bool gone, gone_told;
    char id[HTTP_REQUEST_ID_SIZE]; /* of the request, for the log */
    int status;
    char *body;
    size_t body_len;
    char content_type[96];
    char *ring;
    size_t ring_size, head, used;
    bool suspended;       /* by the reader */
    int64_t woken, spoke; /* ms: last resume, last bytes given to MHD */
    int64_t polled;
};

static void later_unref(struct http_later *later)
{
    pthread_mutex_lock(&later->lock);
    int refs = --later->refs;
    pthread_mutex_unlock(&later->lock);
    if (refs > 0)
        return;
    if (later->options.release)
        later->options.release(later->options.context);
    pthread_mutex_destroy(&later->lock);
    free(later->body);
    free(later->ring);
    free(later);
}

struct http_later *http_response_later(struct http_response *response,
                                       const struct http_later_options *options, struct err *err)
{
    struct http_later *later = calloc(1, sizeof(*later));
    size_t ring_size = options->ring_bytes ? options->ring_bytes : RING_DEFAULT;
    char *ring = later ? malloc(ring_size) : NULL;
    if (!ring) {
        free(later);
        err_set(err, ERR_NO_MEMORY, "out of memory");
        if (options->release)
            options->release(options->context);
        return NULL;
    }
    pthread_mutex_init(&later->lock, NULL);
    later->refs = 2;
    later->server = response->exchange->server;
    later->exchange = response->exchange;
    later->options = *options;
    memcpy(later->id, response->exchange->request.id, sizeof(later->id));
    later->ring = ring;
    later->ring_size = ring_size;
    response->kind = HTTP_RESPONSE_LATER;
    response->later = later;
    struct http_laters *laters = &later->server->laters;
    pthread_mutex_lock(&laters->lock);
    later->next = laters->first;
    if (laters->first)
        laters->first->prev = later;
    laters->first = later;
    laters->count++;
    pthread_mutex_unlock(&laters->lock);
    return later;
}

/* With the lock held: the request's connection goes on once the handler has returned and there is
 * something to send. */
static void resume_request(struct http_later *later)
{
    if (later->handler_done && later->state != LATER_WAITING && later->exchange)
        MHD_resume_connection(later->exchange->mhd);
}

void http_later_handler_done(struct http_later *later)
{
    pthread_mutex_lock(&later->lock);
    later->handler_done = true;
    resume_request(later);
    pthread_mutex_unlock(&later->lock);
}

/* ------------------------------------------------------------------ one answer */

static void answer(struct http_later *later, int status, json_t *body)
{
    char *text = body ? json_dumps(body, JSON_COMPACT) : NULL;
    json_decref(body);
    pthread_mutex_lock(&later->lock);
    if (later->state == LATER_WAITING) {
        later->status = text ? status : 503;
        later->body = text;
        later->body_len = text ? strlen(text) : 0;
        memcpy(later->content_type, "application/json", sizeof("application/json"));
        later->state = LATER_ANSWERED;
        resume_request(later);
        text = NULL;
    }
    pthread_mutex_unlock(&later->lock);
    free(text);
}

void http_later_json(struct http_later *later, int status, json_t *body)
{
    answer(later, status, body);
    later_unref(later);
}

void http_later_error(struct http_later *later, const struct err *err)
{
    int status = http_error_status(err);
    if (status >= 500 && status != 503)
        log_error("request %s: %s", later->id, err->message);
    pthread_mutex_lock(&later->lock);
    bool streaming = later->state == LATER_STREAMING;
    pthread_mutex_unlock(&later->lock);
    if (streaming) {
        http_later_write_event(later, http_error_json(err));
        http_later_finish(later);
    } else {
        http_later_json(later, status, http_error_json(err));
    }
}

/* ------------------------------------------------------------------ streams: the answerer */

void http_later_stream(struct http_later *later, const char *content_type)
{
    pthread_mutex_lock(&later->lock);
    if (later->state == LATER_WAITING) {
        later->state = LATER_STREAMING;
        later->status = 200;
        size_t n = strnlen(content_type, sizeof(later->content_type) - 1);
        memcpy(later->content_type, content_type, n);
        later->content_type[n] = '\0';
        later->spoke = http_now_ms();
        resume_request(later);
    }
    pthread_mutex_unlock(&later->lock);
}

/* With the lock held. */
static void wake(struct http_later *later, int64_t now)
{
    if (!later->suspended || !later->exchange)
        return;
    later->suspended = false;
    later->woken = now;
    MHD_resume_connection(later->exchange->mhd);
}

int http_later_write(struct http_later *later, const void *data, size_t len)
{
    int rc = 0;
    pthread_mutex_lock(&later->lock);
    if (later->gone || later->state != LATER_STREAMING) {
        /* dropped: nobody reads it */
    } else if (len > later->ring_size - later->used) {
        rc = -1;
    } else {
        size_t tail = (later->head + later->used) % later->ring_size;
        size_t first = later->ring_size - tail < len ? later->ring_size - tail : len;
        memcpy(later->ring + tail, data, first);
        memcpy(later->ring, (const char *)data + first, len - first);
        later->used += len;
        int64_t now = http_now_ms();
        if (now - later->woken >= WAKE_MS)
            wake(later, now);
    }
    pthread_mutex_unlock(&later->lock);
    return rc;
}

int http_later_write_event(struct http_later *later, json_t *event)
{
    char *text = event ? json_dumps(event, JSON_COMPACT) : NULL;
    json_decref(event);
    if (!text)
        return -1;
    struct strbuf sb;
    strbuf_init(&sb, later->ring_size);
    strbuf_addstr(&sb, "data: ");
    strbuf_addstr(&sb, text);
    strbuf_addstr(&sb, "\n\n");
    int rc = strbuf_failed(&sb) ? -1 : http_later_write(later, sb.data, sb.len);
    strbuf_release(&sb);
    free(text);
    return rc;
}

void http_later_finish(struct http_later *later)
{
    struct err none = {.kind = ERR_INTERNAL, .message = "finished without an answer"};
    answer(later, 500, http_error_json(&none)); /* does nothing where there was one */
    pthread_mutex_lock(&later->lock);
    if (later->state == LATER_STREAMING) {
        later->state = LATER_FINISHED;
        wake(later, http_now_ms());
    }
    pthread_mutex_unlock(&later->lock);
    later_unref(later);
}

bool http_later_gone(struct http_later *later)
{
    pthread_mutex_lock(&later->lock);
    bool gone = later->gone;
    pthread_mutex_unlock(&later->lock);
    return gone;
}

/* ------------------------------------------------------------------ streams: the event thread */

static ssize_t read_ring(void *context, uint64_t position, char *out, size_t max)
{
    static const char ping[] = ": ping\n\n";
    struct http_later *later = context;
    ssize_t n;
    pthread_mutex_lock(&later->lock);
    int64_t now = http_now_ms();
    if (!later->exchange) {
        n = MHD_CONTENT_READER_END_WITH_ERROR;
    } else if (later->used > 0) {
        size_t first = later->ring_size - later->head;
        size_t take = later->used < first ? later->used : first;
        take = take < max ? take : max;
        memcpy(out, later->ring + later->head, take);
        later->head = (later->head + take) % later->ring_size;
        later->used -= take;
        n = (ssize_t)take;
    } else if (later->aborted) {
        n = MHD_CONTENT_READER_END_WITH_ERROR;
    } else if (later->state == LATER_FINISHED) {
        n = MHD_CONTENT_READER_END_OF_STREAM;
    } else if (now - later->spoke >= later->server->options.ping_ms && max >= sizeof(ping) - 1) {
        memcpy(out, ping, sizeof(ping) - 1);
        n = sizeof(ping) - 1;
    } else {
        later->suspended = true;
        atomic_store(&later->exchange->connection->deadline, HTTP_NO_DEADLINE);
        MHD_suspend_connection(later->exchange->mhd);
        n = 0;
    }
    if (n > 0) {
        later->spoke = now;
        atomic_store(&later->exchange->connection->deadline, now + STALL_MS);
    }
    pthread_mutex_unlock(&later->lock);
    return n;
}

static void reader_done(void *context)
{
    later_unref(context);
}

struct MHD_Response *http_later_response(struct http_later *later, int *status,
                                         const char **content_type)
{
    struct MHD_Response *mhd;
    pthread_mutex_lock(&later->lock);
    *status = later->status;
    *content_type = later->content_type;
    if (later->state == LATER_ANSWERED) {
        mhd = MHD_create_response_from_buffer(later->body_len, later->body ? later->body : "",
                                              later->body ? MHD_RESPMEM_MUST_FREE
                                                          : MHD_RESPMEM_PERSISTENT);
        if (mhd)
            later->body = NULL;
    } else {
        later->refs++;
        mhd = MHD_create_response_from_callback(MHD_SIZE_UNKNOWN, 16 << 10, read_ring, later,
                                                reader_done);
        if (!mhd)
            later->refs--;
        else
            MHD_add_response_header(mhd, "cache-control", "no-cache");
    }
    pthread_mutex_unlock(&later->lock);
    return mhd;
}

void http_later_detach(struct http_later *later)
{
    struct http_laters *laters = &later->server->laters;
    pthread_mutex_lock(&laters->lock);
    if (later->prev)
        later->prev->next = later->next;
    else
        laters->first = later->next;
    if (later->next)
        later->next->prev = later->prev;
    laters->count--;
    pthread_mutex_lock(&later->lock);
    later->exchange = NULL;
    bool tell =
        later->state < LATER_FINISHED && later->state != LATER_ANSWERED && !later->gone_told;
    later->gone = true;
    later->gone_told |= tell;
    pthread_mutex_unlock(&later->lock);
    pthread_mutex_unlock(&laters->lock);
    if (tell && later->options.gone)
        later->options.gone(later->options.context);
    later_unref(later);
}

/* ------------------------------------------------------------------ the clock */

/* With both locks held. True: `gone` is to be called; a reference is taken for that. */
static bool tick(struct http_later *later, int64_t now, bool abort_all)
{
    if (!later->exchange)
        return false;
    bool open = later->state == LATER_WAITING || later->state == LATER_STREAMING;
    if (later->suspended && now - later->woken >= WAKE_MS &&
        (later->used > 0 || now - later->spoke >= later->server->options.ping_ms))
        wake(later, now);
    if (!open || later->gone_told)
        return false;
    if (!abort_all) {
        if (now - later->polled < POLL_MS)
            return false;
        later->polled = now;
        /* A suspended connection does not notice by itself. Its descriptor is open as long as the
         * exchange is attached. */
        if (!http_connection_gone(later->exchange->connection))
            return false;
        later->gone = true;
    }
    later->gone_told = true;
    later->refs++;
    return true;
}

/* Calls `gone` where it is due, a few at a time, outside the locks. */
static void tell_gone(struct http_server *server, bool abort_all)
{
    struct http_later *due[64];
    int count;
    do {
        count = 0;
        int64_t now = http_now_ms();
        pthread_mutex_lock(&server->laters.lock);
        for (struct http_later *l = server->laters.first; l && count < 64; l = l->next) {
            pthread_mutex_lock(&l->lock);
            if (tick(l, now, abort_all))
                due[count++] = l;
            pthread_mutex_unlock(&l->lock);
        }
        pthread_mutex_unlock(&server->laters.lock);
        for (int i = 0; i < count; i++) {
            if (due[i]->options.gone)
                due[i]->options.gone(due[i]->options.context);
            later_unref(due[i]);
        }
    } while (count == 64);
}

void http_laters_tick(struct http_server *server)
{
    tell_gone(server, false);
}

void http_laters_abort(struct http_server *server, bool answer_them)
{
    tell_gone(server, true);
    if (!answer_them)
        return;
    pthread_mutex_lock(&server->laters.lock);
    for (struct http_later *l = server->laters.first; l; l = l->next) {
        pthread_mutex_lock(&l->lock);
        l->aborted = true;
        if (l->state == LATER_WAITING) {
            static const char body[] =
                "{\"error\":{\"message\":\"The server is shutting down. Try again.\",\"type\":"
                "\"server_error\",\"param\":null,\"code\":\"shutting_down\"}}";
            l->status = 503;
            l->body = strdup(body);
            l->body_len = l->body ? sizeof(body) - 1 : 0;
            memcpy(l->content_type, "application/json", sizeof("application/json"));
            l->state = LATER_ANSWERED;
            resume_request(l);
        }
        wake(l, http_now_ms());
        pthread_mutex_unlock(&l->lock);
    }
    pthread_mutex_unlock(&server->laters.lock);
}
