#include "engine/session.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/adapter.h"
#include "engine/chat_template.h"
#include "engine/engine_parts.h"
#include "engine/session_text.h"
#include "engine/tokenizer.h"

struct sequence {
    uint64_t id;
    void *user;
    const struct adapter *adapter;
    struct sample_row sampler; /* index: as many tokens as the answer has */
    struct session_text text;
    int32_t *prompt; /* [prompt_tokens] */
    int32_t prompt_tokens;
    int32_t past; /* tokens in the cache */
    int32_t last; /* the token to read next, when the prompt has been read */
    int32_t completion, max_completion;
    int32_t slot;
    bool cancelled, wants_delta;
    struct sequence *next; /* of those that wait */
};

struct engine_session {
    const struct engine *engine;
    const struct model_weights *weights;
    struct model_decoder *decoder;
    struct kv_cache cache;
    int32_t max_sequences, max_context, max_rows;
    size_t max_piece;
    uint64_t last_id;
    struct chat_tokens scratch_tokens;

    struct sequence **running; /* [max_sequences], in the order they came */
    int32_t running_count;
    struct sequence *waiting, **waiting_end;
    int32_t waiting_count;
    int32_t *free_slot; /* [free_slots]: a stack */
    int32_t free_slots;

    /* One step's batch. */
    struct sequence **planned; /* [max_sequences]: documents, in batch order */
    int32_t planned_count;
    int32_t *token, *position;    /* [max_rows] */
    int32_t *cu_seqlens;          /* [max_sequences + 1] */
    struct batch_slot *slot;      /* [max_sequences] */
    int32_t *segment_start;       /* [max_sequences + 1] */
    const struct adapter **owner; /* [max_sequences], by segment */
    int32_t *logit_row;           /* [max_sequences] */
    struct sequence **logit_of;   /* [max_sequences] */
    int32_t logit_count;
    struct sample_row *sample; /* [max_sequences] how its token is chosen */
    int32_t *chosen;           /* [max_sequences] */
};

/* ------------------------------------------------------------------ opening */

static void *array(size_t count, size_t size, bool *failed)
{
    void *memory = calloc(count, size);

    *failed |= memory == NULL;
    return memory;
}

static int take_memory(struct engine_session *s, struct err *err)
{
    size_t sequences = (size_t)s->max_sequences, rows = (size_t)s->max_rows;
    bool failed = false;

    s->running = array(sequences, sizeof(*s->running), &failed);
    s->free_slot = array(sequences, sizeof(*s->free_slot), &failed);
    s->planned = array(sequences, sizeof(*s->planned), &failed);
    s->token = array(rows, sizeof(*s->token), &failed);
    s->position = array(rows, sizeof(*s->position), &failed);
    s->cu_seqlens = array(sequences + 1, sizeof(*s->cu_seqlens), &failed);
    s->slot = array(sequences, sizeof(*s->slot), &failed);
    s->segment_start = array(sequences + 1, sizeof(*s->segment_start), &failed);
    s->owner = array(sequences, sizeof(*s->owner), &failed);
    s->logit_row = array(sequences, sizeof(*s->logit_row), &failed);
    s->logit_of = array(sequences, sizeof(*s->logit_of), &failed);
    s->sample = array(sequences, sizeof(*s->sample), &failed);
    s->chosen = array(sequences, sizeof(*s->chosen), &failed);
    if (failed)
        return err_set(err, ERR_NO_MEMORY, "out of memory for a session of %d sequences",
                       s->max_sequences);
    for (int32_t i = 0; i < s->max_sequences; i++)
        s->free_slot[i] = s->max_sequences - 1 - i;
    s->free_slots = s->max_sequences;
    return 0;
}

static size_t longest_piece(const struct tokenizer *tokenizer)
{
    size_t longest = 1, len;

    for (int32_t id = 0; id < tokenizer_size(tokenizer); id++) {
        if (tokenizer_piece(tokenizer, id, &len) != NULL && len > longest)
            longest = len;
    }
    return longest;
}

static int choose_sizes(struct engine_session *s, const struct engine_session_options *options,
                        struct err *err)
{
    const struct model_config *config = model_get_config(s->engine->model);

    s->max_sequences =
        options->max_sequences == 0 ? SESSION_DEFAULT_SEQUENCES : options->max_sequences;
    if (s->max_sequences < 1 || s->max_sequences > SESSION_MAX_SEQUENCES)
        return err_set(err, ERR_INVALID, "a session holds 1 to %d sequences, not %d",
                       SESSION_MAX_SEQUENCES, options->max_sequences);
    s->max_context = options->max_context == 0 ? SESSION_DEFAULT_CONTEXT : options->max_context;
    if (s->max_context > config->context) /* one limit is meant for models of many lengths */
        s->max_context = config->context;
    if (s->max_context < 2)
        return err_set(err, ERR_INVALID, "a context has 2 tokens at least, not %d",
                       options->max_context);
    s->max_rows = s->max_sequences + SESSION_PREFILL_ROWS;
    return 0;
}

int session_open(struct engine_session **out, struct engine *engine,
                 const struct engine_session_options *options, const struct model_weights *weights,
                 struct err *err)
{
    struct engine_session *s = calloc(1, sizeof(*s));

    if (s == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory for a session");
    s->engine = engine;
    s->weights = weights;
    s->waiting_end = &s->waiting;
    chat_tokens_init(&s->scratch_tokens);
    s->max_piece = longest_piece(engine->tokenizer);
    if (choose_sizes(s, options, err) != 0 || take_memory(s, err) != 0 ||
        model_kv_cache_open(&s->cache, engine->model, s->max_sequences, s->max_context, err) != 0 ||
        model_decoder_open(&s->decoder, engine->model, s->max_rows, s->max_sequences, err) != 0) {
        engine_session_free(s);
        return -1;
    }
    *out = s;
    return 0;
}

int engine_session_open(struct engine_session **out, struct engine *engine,
                        const struct engine_session_options *options, struct err *err)
{
    return session_open(out, engine, options, NULL, err);
}

static void sequence_free(struct sequence *q)
{
    if (q == NULL)
        return;
    session_text_release(&q->text);
    free(q->prompt);
    free(q);
}

void engine_session_free(struct engine_session *s)
{
    struct sequence *next;

    if (s == NULL)
        return;
    for (int32_t i = 0; i < s->running_count; i++)
        sequence_free(s->running[i]);
    for (struct sequence *q = s->waiting; q != NULL; q = next) {
        next = q->next;
        sequence_free(q);
    }
    model_decoder_free(s->decoder);
    if (s->cache.k.data != NULL)
        model_kv_cache_close(&s->cache, s->engine->model);
    chat_tokens_release(&s->scratch_tokens);
    free(s->running);
    free(s->free_slot);
    free(s->planned);
    free(s->token);
    free(s->position);
    free(s->cu_seqlens);
    free(s->slot);
    free(s->segment_start);
    free(s->owner);
    free(s->logit_row);
    free(s->logit_of);
    free(s->sample);
    free(s->chosen);
    free(s);
}

/* ------------------------------------------------------------------ requests */

/* how: "" or "at least ". */
static int too_long(const struct engine_session *s, const char *how, size_t count, struct err *err)
{
    return err_set_code(err, ERR_INVALID, "context_length_exceeded", "messages",
                        "This model's maximum context length is %d tokens. However, your messages "
                        "resulted in %s%zu tokens. Please reduce the length of the messages.",
                        s->max_context, how, count);
}

static int check_request(const struct engine_session *s, const struct engine_request *request,
                         size_t count, struct err *err)
{
    if (!(request->temperature >= 0) || !isfinite(request->temperature))
        return err_set_code(err, ERR_INVALID, "invalid_value", "temperature",
                            "temperature must be a number of at least 0");
    if (!(request->top_p >= 0 && request->top_p <= 1))
        return err_set_code(err, ERR_INVALID, "invalid_value", "top_p",
                            "top_p must be a number between 0 and 1");
    if (request->max_tokens < 0)
        return err_set_code(err, ERR_INVALID, "invalid_value", "max_completion_tokens",
                            "max_completion_tokens must be at least 1");
    if (count == 0)
        return err_set_code(err, ERR_INVALID, "invalid_value", "messages",
                            "the messages hold no tokens");
    return count < (size_t)s->max_context ? 0 : too_long(s, "", count, err);
}

int session_submit_tokens(struct engine_session *s, const int32_t *token, size_t count,
                          const struct engine_request *request, uint64_t *id, struct err *err)
{
    struct sequence *q;

    if (check_request(s, request, count, err) != 0)
        return -1;
    q = calloc(1, sizeof(*q));
    if (q == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory for a request");
    q->prompt = malloc(count * sizeof(*q->prompt));
    if (q->prompt == NULL) {
        err_set(err, ERR_NO_MEMORY, "out of memory for a request");
        goto fail;
    }
    if (session_text_init(&q->text, s->max_piece, request->stop, request->stop_count, err) != 0)
        goto fail;
    memcpy(q->prompt, token, count * sizeof(*q->prompt));
    q->prompt_tokens = (int32_t)count;
    q->max_completion = s->max_context - q->prompt_tokens;
    if (request->max_tokens > 0 && request->max_tokens < q->max_completion)
        q->max_completion = request->max_tokens;
    q->id = ++s->last_id;
    q->user = request->user;
    q->adapter = engine_delta_adapter(request->delta);
    q->wants_delta = request->delta_later;
    q->sampler = (struct sample_row){request->temperature, request->top_p, request->seed, 0};
    *s->waiting_end = q;
    s->waiting_end = &q->next;
    s->waiting_count++;
    *id = q->id;
    return 0;
fail:
    sequence_free(q);
    return -1;
}

/* What no tokens of this vocabulary could bring into the context is not tokenized: all who are
 * being answered would wait for megabytes of it. */
static int check_bytes(const struct engine_session *s, const struct engine_request *request,
                       struct err *err)
{
    size_t bytes = 0;

    for (int32_t i = 0; i < request->message_count; i++)
        bytes += strlen(request->messages[i].content);
    if (bytes <= (size_t)s->max_context * s->max_piece)
        return 0;
    return too_long(s, "at least ", (bytes + s->max_piece - 1) / s->max_piece, err);
}

int engine_session_submit(struct engine_session *s, const struct engine_request *request,
                          uint64_t *id, struct err *err)
{
    if (check_bytes(s, request, err) != 0)
        return -1;
    chat_tokens_reset(&s->scratch_tokens);
    if (chat_template_encode(s->engine->chat_template, request->messages, request->message_count,
                             true, &s->scratch_tokens, err) != 0)
        return -1;
    return session_submit_tokens(s, s->scratch_tokens.ids, s->scratch_tokens.count, request, id,
                                 err);
}

void engine_session_cancel(struct engine_session *s, uint64_t id)
{
    for (int32_t i = 0; i < s->running_count; i++)
        s->running[i]->cancelled |= s->running[i]->id == id;
    for (struct sequence *q = s->waiting; q != NULL; q = q->next)
        q->cancelled |= q->id == id;
}

/* ------------------------------------------------------------------ the queue */

static struct sequence *take_waiting(struct engine_session *s, struct sequence **at)
{
    struct sequence *q = *at;

    *at = q->next;
    if (s->waiting_end == &q->next)
        s->waiting_end = at;
    s->waiting_count--;
    q->next = NULL;
    return q;
}

bool engine_session_wants(const struct engine_session *s, void **user)
{
    int32_t slots = s->free_slots;

    for (const struct sequence *q = s->waiting; q != NULL && slots > 0; q = q->next) {
        if (q->cancelled)
            continue; /* it ends before it takes one */
        if (q->wants_delta) {
            *user = q->user;
            return true;
        }
        slots--;
    }
    return false;
}

void engine_session_give(struct engine_session *s, uint64_t id, const struct engine_delta *delta)
{
    struct sequence *q = s->waiting;

    while (q->id != id)
        q = q->next;
    q->adapter = engine_delta_adapter(delta);
    q->wants_delta = false;
}

void engine_session_withdraw(struct engine_session *s, uint64_t id)
{
    struct sequence **at = &s->waiting;

    while ((*at)->id != id)
        at = &(*at)->next;
    sequence_free(take_waiting(s, at));
}

static void admit(struct engine_session *s)
{
    while (s->waiting != NULL && s->free_slots > 0 && !s->waiting->wants_delta) {
        struct sequence *q = take_waiting(s, &s->waiting);

        q->slot = s->free_slot[--s->free_slots];
        s->running[s->running_count++] = q;
    }
}

/* ------------------------------------------------------------------ ends */

struct listener {
    engine_event_fn *on_event;
    void *context;
};

static void tell(const struct listener *to, const struct sequence *q, const char *text, size_t len,
                 enum engine_finish finish)
{
    struct engine_event event = {.id = q->id,
                                 .user = q->user,
                                 .text = text,
                                 .text_len = len,
                                 .finish = finish,
                                 .prompt_tokens = q->prompt_tokens,
                                 .completion_tokens = q->completion};

    if (len > 0 || finish != ENGINE_FINISH_NONE)
        to->on_event(to->context, &event);
}

/* Takes the running sequence out of the session. */
static void retire(struct engine_session *s, struct sequence *q)
{
    int32_t at = 0;

    while (s->running[at] != q)
        at++;
    s->running_count--;
    memmove(&s->running[at], &s->running[at + 1],
            (size_t)(s->running_count - at) * sizeof(*s->running));
    s->free_slot[s->free_slots++] = q->slot;
    sequence_free(q);
}

static void finish(struct engine_session *s, const struct listener *to, struct sequence *q,
                   enum engine_finish how)
{
    const char *text;
    size_t len;

    session_text_finish(&q->text, &text, &len);
    tell(to, q, text, len, how);
    retire(s, q);
}

static void end_cancelled(struct engine_session *s, const struct listener *to)
{
    struct sequence **at = &s->waiting;

    for (int32_t i = s->running_count; i-- > 0;) {
        if (s->running[i]->cancelled)
            finish(s, to, s->running[i], ENGINE_FINISH_CANCEL);
    }
    while (*at != NULL) {
        struct sequence *q = *at;

        if (!q->cancelled) {
            at = &q->next;
            continue;
        }
        take_waiting(s, at); /* before the event: it may submit */
        tell(to, q, "", 0, ENGINE_FINISH_CANCEL);
        sequence_free(q);
    }
}

/* ------------------------------------------------------------------ a step */

/* Rows of this sequence in this step: its chunk, or one token. */
static int32_t rows_of(const struct sequence *q)
{
    int32_t to_grid = SESSION_CHUNK - q->past % SESSION_CHUNK;
    int32_t left = q->prompt_tokens - q->past;

    if (left <= 0)
        return 1;
    return left < to_grid ? left : to_grid;
}

/* Chooses who takes part, the rows of one adapter side by side, adapters in order of arrival. */
static void plan(struct engine_session *s)
{
    int32_t budget = SESSION_PREFILL_ROWS;

    s->planned_count = 0;
    for (int32_t i = 0; i < s->running_count; i++) {
        struct sequence *q = s->running[i];
        int32_t at;

        if (q->past < q->prompt_tokens) {
            if (rows_of(q) > budget)
                continue;
            budget -= rows_of(q);
        }
        for (at = s->planned_count; at > 0 && s->planned[at - 1]->adapter != q->adapter; at--)
            ;
        if (at == 0)
            at = s->planned_count; /* the first of its adapter */
        memmove(&s->planned[at + 1], &s->planned[at],
                (size_t)(s->planned_count - at) * sizeof(*s->planned));
        s->planned[at] = q;
        s->planned_count++;
    }
}

static void add_document(struct engine_session *s, int32_t doc, struct row_segments *segments)
{
    struct sequence *q = s->planned[doc];
    int32_t from = s->cu_seqlens[doc], rows = rows_of(q);

    for (int32_t r = 0; r < rows; r++) {
        s->token[from + r] = q->past < q->prompt_tokens ? q->prompt[q->past + r] : q->last;
        s->position[from + r] = q->past + r;
    }
    s->slot[doc] = (struct batch_slot){.slot = q->slot, .past = q->past};
    if (doc == 0 || s->planned[doc - 1]->adapter != q->adapter) {
        s->owner[segments->count] = q->adapter;
        s->segment_start[segments->count++] = from;
    }
    s->cu_seqlens[doc + 1] = from + rows;
    if (q->past + rows >= q->prompt_tokens) {
        s->logit_row[s->logit_count] = from + rows - 1;
        s->sample[s->logit_count] = q->sampler;
        s->sample[s->logit_count].index = (uint64_t)q->completion;
        s->logit_of[s->logit_count++] = q;
    }
}

static int decode(struct engine_session *s, struct err *err)
{
    struct row_segments segments = {.start = s->segment_start, .adapter = s->owner};
    struct batch batch;

    s->logit_count = 0;
    s->cu_seqlens[0] = 0;
    for (int32_t doc = 0; doc < s->planned_count; doc++)
        add_document(s, doc, &segments);
    batch = (struct batch){
        .rows = s->cu_seqlens[s->planned_count],
        .token = s->token,
        .position = s->position,
        .docs = s->planned_count,
        .cu_seqlens = s->cu_seqlens,
        .slot = s->slot,
    };
    assert(batch.rows <= s->max_rows);
    s->segment_start[segments.count] = batch.rows;
    batch.segments = segments;
    if (model_decode(s->decoder,
                     &(struct model_decode_args){
                         .weights = s->weights,
                         .batch = &batch,
                         .cache = &s->cache,
                         .logit_row = s->logit_row,
                         .logit_count = s->logit_count,
                         .sample = s->sample,
                         .chosen = s->chosen,
                     },
                     err) != 0)
        return -1;
    for (int32_t doc = 0; doc < s->planned_count; doc++)
        s->planned[doc]->past += s->cu_seqlens[doc + 1] - s->cu_seqlens[doc];
    return 0;
}

static bool is_end(const struct engine_session *s, int32_t token)
{
    return token == model_get_config(s->engine->model)->eos_token ||
           chat_template_is_end(s->engine->chat_template, token);
}

/* The next token of one sequence. */
static void advance(struct engine_session *s, const struct listener *to, struct sequence *q,
                    int32_t token)
{
    const char *piece, *text;
    size_t len = 0;
    bool stopped;

    if (token < 0) {
        finish(s, to, q, ENGINE_FINISH_ERROR);
        return;
    }
    if (is_end(s, token)) {
        finish(s, to, q, ENGINE_FINISH_STOP);
        return;
    }
    q->completion++;
    q->last = token;
    /* Special tokens and ids that only pad the vocabulary have no text. */
    piece = tokenizer_is_special(s->engine->tokenizer, token)
                ? NULL
                : tokenizer_piece(s->engine->tokenizer, token, &len);
    stopped = session_text_add(&q->text, piece != NULL ? piece : "", piece != NULL ? len : 0, &text,
                               &len);
    if (stopped) {
        tell(to, q, text, len, ENGINE_FINISH_STOP);
        retire(s, q);
        return;
    }
    tell(to, q, text, len, ENGINE_FINISH_NONE);
    if (q->completion >= q->max_completion)
        finish(s, to, q, ENGINE_FINISH_LENGTH);
}

int engine_session_step(struct engine_session *s, engine_event_fn *on_event, void *context,
                        int32_t *active, struct err *err)
{
    struct listener to = {on_event, context};

    end_cancelled(s, &to);
    admit(s);
    plan(s);
    if (s->planned_count > 0) {
        if (decode(s, err) != 0)
            return -1;
        for (int32_t i = 0; i < s->logit_count; i++)
            advance(s, &to, s->logit_of[i], s->chosen[i]);
    }
    *active = s->running_count + s->waiting_count;
    return 0;
}
