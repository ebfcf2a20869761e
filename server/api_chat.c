#include "server/api_chat.h"

#include <openssl/rand.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "engine/base/strbuf.h"
#include "server/api_context.h"
#include "server/chat_request.h"
#include "server/infer_client.h"
#include "storage/blob_store.h"
#include "storage/ids.h"
#include "storage/models.h"

#define ANSWER_MAX (64u << 20) /* bytes of one answer: far above any context */

/* An answer under way. Two hold it: the handler until it returns, the HTTP layer until `release`.
 *
 * The inference client's thread and the HTTP layer's `gone` may come to the end at the same time:
 * whoever sets `ended` gives `later` back, and nobody touches it after. */
struct answer {
    atomic_int references;
    struct infer_client *infer;
    struct http_later *later;
    pthread_mutex_t lock; /* of the three below */
    uint64_t request;     /* at the inference client; 0: not submitted yet */
    bool ended, gone;

    char id[ID_SIZE];
    char fingerprint[16];
    char *model;
    int64_t created;
    bool stream, include_usage;
    bool begun; /* the stream's first event is out; the client's thread only */
    struct strbuf text;
};

static void unref(void *context)
{
    struct answer *a = context;

    if (atomic_fetch_sub(&a->references, 1) != 1)
        return;
    pthread_mutex_destroy(&a->lock);
    strbuf_release(&a->text);
    free(a->model);
    free(a);
}

/* True for the one caller that may end the answer. */
static bool take_end(struct answer *a)
{
    bool mine;

    pthread_mutex_lock(&a->lock);
    mine = !a->ended;
    a->ended = true;
    pthread_mutex_unlock(&a->lock);
    return mine;
}

/* ------------------------------------------------------------------ what it looks like */

static const char *finish_text(enum engine_finish finish)
{
    return finish == ENGINE_FINISH_LENGTH ? "length" : "stop";
}

static json_t *usage_json(const struct infer_event *e)
{
    return json_pack("{s:i, s:i, s:i, s:{s:i, s:i}, s:{s:i, s:i, s:i, s:i}}", "prompt_tokens",
                     (int)e->prompt_tokens, "completion_tokens", (int)e->completion_tokens,
                     "total_tokens", (int)(e->prompt_tokens + e->completion_tokens),
                     "prompt_tokens_details", "cached_tokens", 0, "audio_tokens", 0,
                     "completion_tokens_details", "reasoning_tokens", 0, "audio_tokens", 0,
                     "accepted_prediction_tokens", 0, "rejected_prediction_tokens", 0);
}

static json_t *completion_json(const struct answer *a, const struct infer_event *e)
{
    return json_pack("{s:s, s:s, s:I, s:s, s:[{s:i, s:{s:s, s:s%, s:n, s:[]}, s:n, s:s}], s:o, "
                     "s:s, s:s}",
                     "id", a->id, "object", "chat.completion", "created", (json_int_t)a->created,
                     "model", a->model, "choices", "index", 0, "message", "role", "assistant",
                     "content", a->text.data, a->text.len, "refusal", "annotations", "logprobs",
                     "finish_reason", finish_text(e->finish), "usage", usage_json(e),
                     "service_tier", "default", "system_fingerprint", a->fingerprint);
}

/* `choices` and `usage` are stolen; usage NULL: none in this stream. */
static json_t *chunk_json(const struct answer *a, json_t *choices, json_t *usage)
{
    json_t *chunk = json_pack("{s:s, s:s, s:I, s:s, s:s, s:s, s:o}", "id", a->id, "object",
                              "chat.completion.chunk", "created", (json_int_t)a->created, "model",
                              a->model, "service_tier", "default", "system_fingerprint",
                              a->fingerprint, "choices", choices);

    if (usage != NULL && (chunk == NULL || json_object_set_new(chunk, "usage", usage) != 0)) {
        json_decref(chunk);
        return NULL;
    }
    return chunk;
}

/* One chunk with a choice. `delta` is stolen; finish NULL: not yet. */
static int write_choice(struct answer *a, json_t *delta, const char *finish)
{
    json_t *choices = json_pack("[{s:i, s:o, s:n, s:s?}]", "index", 0, "delta", delta, "logprobs",
                                "finish_reason", finish);
    json_t *chunk;

    if (choices == NULL)
        return -1;
    chunk = chunk_json(a, choices, a->include_usage ? json_null() : NULL);
    return chunk != NULL ? http_later_write_event(a->later, chunk) : -1;
}

/* Status and first event, when the model has begun: until then an error can still be a status. */
static int begin_stream(struct answer *a)
{
    if (a->begun)
        return 0;
    a->begun = true;
    http_later_stream(a->later, "text/event-stream");
    return write_choice(
        a, json_pack("{s:s, s:s, s:n}", "role", "assistant", "content", "", "refusal"), NULL);
}

static int write_end(struct answer *a, const struct infer_event *e)
{
    json_t *usage;

    if (begin_stream(a) != 0 || write_choice(a, json_object(), finish_text(e->finish)) != 0)
        return -1;
    if (a->include_usage) {
        usage = chunk_json(a, json_array(), usage_json(e));
        if (usage == NULL || http_later_write_event(a->later, usage) != 0)
            return -1;
    }
    return http_later_write(a->later, "data: [DONE]\n\n", 14);
}

/* ------------------------------------------------------------------ events of the model */

static int on_text(struct answer *a, const struct infer_event *e)
{
    json_t *delta;

    if (!a->stream) {
        strbuf_add(&a->text, e->text, e->text_len);
        return 0;
    }
    delta = json_pack("{s:s%}", "content", e->text, e->text_len);
    if (begin_stream(a) == 0 && write_choice(a, delta, NULL) == 0)
        return 0;
    /* The client reads too slowly for its ring: it is told by the stream's early end. */
    if (take_end(a))
        http_later_finish(a->later);
    return -1;
}

static void on_done(struct answer *a, const struct infer_event *e)
{
    struct err error = {0};
    json_t *body;

    if (a->stream) {
        write_end(a, e); /* without room the stream just ends, without [DONE] */
        http_later_finish(a->later);
        return;
    }
    body = strbuf_failed(&a->text) ? NULL : completion_json(a, e);
    if (body != NULL) {
        http_later_json(a->later, 200, body);
        return;
    }
    err_set(&error, ERR_NO_MEMORY, "answer: out of memory");
    http_later_error(a->later, &error);
}

static int on_event(void *context, const struct infer_event *event)
{
    struct answer *a = context;
    struct err stopped = {0};

    if (event->kind == INFER_TEXT)
        return on_text(a, event);
    if (!take_end(a))
        return 0;
    if (event->kind == INFER_ERROR) {
        http_later_error(a->later, event->err);
    } else if (event->finish == ENGINE_FINISH_CANCEL) { /* nobody here asked for it */
        err_set_code(&stopped, ERR_UNAVAILABLE, "worker_restarted", NULL,
                     "the model worker stopped; try again");
        http_later_error(a->later, &stopped);
    } else {
        on_done(a, event);
    }
    return 0;
}

/* ------------------------------------------------------------------ the client goes */

/* The request is withdrawn first: after that no event can come. */
static void abandon(struct answer *a, uint64_t request)
{
    struct err stopped = {0};

    infer_client_cancel(a->infer, request);
    if (!take_end(a))
        return;
    err_set_code(&stopped, ERR_UNAVAILABLE, "shutting_down", NULL,
                 "the server is stopping; try again");
    http_later_error(a->later, &stopped);
}

static void on_gone(void *context)
{
    struct answer *a = context;
    uint64_t request;

    pthread_mutex_lock(&a->lock);
    a->gone = true;
    request = a->request;
    pthread_mutex_unlock(&a->lock);
    if (request != 0) /* else the handler sees `gone` once it has submitted */
        abandon(a, request);
}

/* ------------------------------------------------------------------ the handler */

static int answer_new(struct answer **out, const struct http_request *request,
                      const struct chat_request *chat, const struct model *model, struct err *err)
{
    struct answer *a = calloc(1, sizeof *a);

    if (a == NULL)
        return err_set(err, ERR_NO_MEMORY, "answer: out of memory");
    atomic_init(&a->references, 2);
    pthread_mutex_init(&a->lock, NULL);
    strbuf_init(&a->text, ANSWER_MAX);
    a->infer = request->api->infer;
    a->created = (int64_t)time(NULL);
    a->stream = chat->stream;
    a->include_usage = chat->include_usage;
    a->model = strdup(chat->model);
    snprintf(a->fingerprint, sizeof a->fingerprint, "fp_%.10s", model->base_sha256);
    if (a->model == NULL || id_new("chatcmpl-", a->id, err) != 0) {
        err_set(err, ERR_NO_MEMORY, "answer: out of memory");
        atomic_store(&a->references, 1);
        unref(a);
        return -1;
    }
    *out = a;
    return 0;
}

/* The names are resolved in this request's own transaction: what runs is what the database says
 * now, whatever is still in some cache. */
static int resolve(struct http_request *request, const char *name, struct model *model,
                   char **base_path, char **delta_path, struct err *err)
{
    struct blob_store *blobs = request->api->blobs;

    if (models_resolve(request->db, request->tenant.project_id, name, model, err) != 0 ||
        blob_path(blobs, BLOB_OWNER_BASE, model->base_sha256, base_path, err) != 0)
        return -1;
    if (model->artifact_sha256[0] == '\0')
        return 0;
    return blob_path(blobs, request->tenant.project_id, model->artifact_sha256, delta_path, err);
}

/* From here on the answer is `later`'s, good or bad. */
static void submit(struct answer *a, const struct ipc_submit *submit_request)
{
    struct err err = {0};
    uint64_t id = 0;
    bool gone;

    if (infer_client_submit(a->infer, submit_request, on_event, a, &id, &err) != 0) {
        if (take_end(a))
            http_later_error(a->later, &err);
        return;
    }
    pthread_mutex_lock(&a->lock);
    a->request = id;
    gone = a->gone;
    pthread_mutex_unlock(&a->lock);
    if (gone)
        abandon(a, id);
}

static int choose_seed(struct chat_request *chat, struct err *err)
{
    if (!chat->has_seed && RAND_bytes((unsigned char *)&chat->seed, sizeof chat->seed) != 1)
        return err_set(err, ERR_INTERNAL, "no random numbers");
    return 0;
}

int api_chat_create(struct http_request *request, struct http_response *response, struct err *err)
{
    struct http_later_options later = {.gone = on_gone, .release = unref};
    char *base_path = NULL, *delta_path = NULL;
    struct chat_request chat;
    struct answer *a = NULL;
    struct model model;
    struct ipc_submit s;
    int rc = -1;

    if (chat_request_parse(&chat, request->json, err) != 0)
        return -1;
    if (resolve(request, chat.model, &model, &base_path, &delta_path, err) != 0 ||
        choose_seed(&chat, err) != 0 || answer_new(&a, request, &chat, &model, err) != 0)
        goto out;
    later.context = a;
    a->later = http_response_later(response, &later, err);
    if (a->later == NULL)
        goto out;
    s = (struct ipc_submit){.tenant = request->tenant.project_id,
                            .base_sha256 = model.base_sha256,
                            .base_path = base_path,
                            .delta_sha256 = model.artifact_sha256,
                            .delta_path = delta_path != NULL ? delta_path : "",
                            .messages = chat.messages,
                            .message_count = chat.message_count,
                            .temperature = chat.temperature,
                            .top_p = chat.top_p,
                            .seed = chat.seed,
                            .max_tokens = chat.max_tokens,
                            .stop = chat.stop,
                            .stop_count = chat.stop_count};
    submit(a, &s);
    rc = 0;
out:
    if (a != NULL)
        unref(a);
    free(base_path);
    free(delta_path);
    chat_request_release(&chat);
    return rc;
}
