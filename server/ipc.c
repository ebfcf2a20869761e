#include "server/ipc.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "server/ipc_wire.h"

/* ------------------------------------------------------------------ writing */

/* A frame's length is known at its end: begin leaves room, end fills it in. */
static size_t begin(struct strbuf *out, enum ipc_type type)
{
    size_t at = out->len;

    ipc_wire_put_u32(out, 0);
    ipc_wire_put_u8(out, (uint8_t)type);
    return at;
}

static void end(struct strbuf *out, size_t at)
{
    size_t len = out->len - at - 4;

    if (strbuf_failed(out) || len > IPC_FRAME_MAX) { /* no half of a frame */
        strbuf_truncate(out, at);
        out->failed = true;
        return;
    }
    for (int i = 0; i < 4; i++)
        out->data[at + (size_t)i] = (char)(len >> (8 * i));
}

void ipc_put_hello(struct strbuf *out)
{
    size_t at = begin(out, IPC_HELLO);

    ipc_wire_put_u32(out, IPC_VERSION);
    end(out, at);
}

void ipc_put_submit(struct strbuf *out, const struct ipc_submit *s)
{
    size_t at = begin(out, IPC_SUBMIT);

    ipc_wire_put_u64(out, s->id);
    ipc_wire_put_string(out, s->tenant);
    ipc_wire_put_string(out, s->base_sha256);
    ipc_wire_put_string(out, s->base_path);
    ipc_wire_put_string(out, s->delta_sha256);
    ipc_wire_put_string(out, s->delta_path);
    ipc_wire_put_u32(out, (uint32_t)s->message_count);
    for (int32_t i = 0; i < s->message_count; i++) {
        ipc_wire_put_string(out, s->messages[i].role);
        ipc_wire_put_string(out, s->messages[i].content);
    }
    ipc_wire_put_f64(out, s->temperature);
    ipc_wire_put_f64(out, s->top_p);
    ipc_wire_put_u64(out, s->seed);
    ipc_wire_put_u32(out, (uint32_t)s->max_tokens);
    ipc_wire_put_u32(out, (uint32_t)s->stop_count);
    for (int32_t i = 0; i < s->stop_count; i++)
        ipc_wire_put_string(out, s->stop[i]);
    end(out, at);
}

void ipc_put_cancel(struct strbuf *out, uint64_t id)
{
    size_t at = begin(out, IPC_CANCEL);

    ipc_wire_put_u64(out, id);
    end(out, at);
}

void ipc_put_stats_request(struct strbuf *out)
{
    end(out, begin(out, IPC_STATS_REQUEST));
}

void ipc_put_text(struct strbuf *out, uint64_t id, const char *text, size_t len)
{
    size_t at = begin(out, IPC_TEXT);

    ipc_wire_put_u64(out, id);
    ipc_wire_put_bytes(out, text, len);
    end(out, at);
}

void ipc_put_done(struct strbuf *out, const struct ipc_done *done)
{
    size_t at = begin(out, IPC_DONE);

    ipc_wire_put_u64(out, done->id);
    ipc_wire_put_u8(out, (uint8_t)done->finish);
    ipc_wire_put_u32(out, (uint32_t)done->prompt_tokens);
    ipc_wire_put_u32(out, (uint32_t)done->completion_tokens);
    end(out, at);
}

void ipc_put_error(struct strbuf *out, uint64_t id, const struct err *error)
{
    size_t at = begin(out, IPC_ERROR);

    ipc_wire_put_u64(out, id);
    ipc_wire_put_u8(out, (uint8_t)error->kind);
    ipc_wire_put_string(out, error->code);
    ipc_wire_put_string(out, error->param);
    ipc_wire_put_string(out, error->message);
    end(out, at);
}

void ipc_put_stats(struct strbuf *out, const struct ipc_stats *s)
{
    size_t at = begin(out, IPC_STATS);

    ipc_wire_put_u32(out, (uint32_t)s->active);
    ipc_wire_put_u32(out, (uint32_t)s->bases);
    ipc_wire_put_u32(out, (uint32_t)s->deltas);
    ipc_wire_put_u64(out, (uint64_t)s->base_bytes);
    ipc_wire_put_u64(out, (uint64_t)s->delta_bytes);
    ipc_wire_put_u64(out, (uint64_t)s->tokens);
    ipc_wire_put_u64(out, (uint64_t)s->steps);
    ipc_wire_put_f64(out, s->utilization);
    ipc_wire_put_u64(out, (uint64_t)s->memory_bytes);
    ipc_wire_put_u64(out, (uint64_t)s->memory_free);
    end(out, at);
}

/* ------------------------------------------------------------------ reading */

/* A 32-bit field that is a count of something: never negative. */
static int32_t count31(struct ipc_wire_reader *r)
{
    uint32_t v = ipc_wire_u32(r);

    if (v > INT32_MAX)
        r->failed = true;
    return r->failed ? 0 : (int32_t)v;
}

static int64_t count63(struct ipc_wire_reader *r)
{
    uint64_t v = ipc_wire_u64(r);

    if (v > INT64_MAX)
        r->failed = true;
    return r->failed ? 0 : (int64_t)v;
}

static void read_submit(struct ipc_wire_reader *r, struct ipc_message *m)
{
    struct ipc_submit *s = &m->submit;

    s->id = m->id = ipc_wire_u64(r);
    s->tenant = ipc_wire_string(r);
    s->base_sha256 = ipc_wire_string(r);
    s->base_path = ipc_wire_string(r);
    s->delta_sha256 = ipc_wire_string(r);
    s->delta_path = ipc_wire_string(r);
    s->message_count = (int32_t)ipc_wire_count(r, IPC_MESSAGES_MAX, 10); /* two empty strings */
    if (s->message_count > 0) {
        m->messages = calloc((size_t)s->message_count, sizeof *m->messages);
        if (m->messages == NULL) {
            r->failed = true;
            return;
        }
    }
    for (int32_t i = 0; i < s->message_count; i++) {
        m->messages[i].role = ipc_wire_string(r);
        m->messages[i].content = ipc_wire_string(r);
    }
    s->messages = m->messages;
    s->temperature = ipc_wire_f64(r);
    s->top_p = ipc_wire_f64(r);
    s->seed = ipc_wire_u64(r);
    s->max_tokens = count31(r);
    s->stop_count = (int32_t)ipc_wire_count(r, IPC_STOP_MAX, 5);
    for (int32_t i = 0; i < s->stop_count; i++)
        m->stop[i] = ipc_wire_string(r);
    s->stop = m->stop;
}

static void read_done(struct ipc_wire_reader *r, struct ipc_message *m)
{
    uint8_t finish;

    m->done.id = m->id = ipc_wire_u64(r);
    finish = ipc_wire_u8(r);
    if (finish < ENGINE_FINISH_STOP || finish > ENGINE_FINISH_CANCEL)
        r->failed = true;
    m->done.finish = (enum engine_finish)finish;
    m->done.prompt_tokens = count31(r);
    m->done.completion_tokens = count31(r);
}

static void read_error(struct ipc_wire_reader *r, struct ipc_message *m)
{
    uint8_t kind;

    m->id = ipc_wire_u64(r);
    kind = ipc_wire_u8(r);
    if (kind == ERR_NONE || kind > ERR_DEVICE)
        r->failed = true;
    m->error.kind = (enum err_kind)kind;
    snprintf(m->error.code, sizeof m->error.code, "%s", ipc_wire_string(r));
    snprintf(m->error.param, sizeof m->error.param, "%s", ipc_wire_string(r));
    snprintf(m->error.message, sizeof m->error.message, "%s", ipc_wire_string(r));
}

static void read_stats(struct ipc_wire_reader *r, struct ipc_message *m)
{
    m->stats.active = count31(r);
    m->stats.bases = count31(r);
    m->stats.deltas = count31(r);
    m->stats.base_bytes = count63(r);
    m->stats.delta_bytes = count63(r);
    m->stats.tokens = count63(r);
    m->stats.steps = count63(r);
    m->stats.utilization = ipc_wire_f64(r);
    m->stats.memory_bytes = count63(r);
    m->stats.memory_free = count63(r);
}

static void read_fields(struct ipc_wire_reader *r, struct ipc_message *m)
{
    switch (m->type) {
    case IPC_HELLO:
        m->version = ipc_wire_u32(r);
        return;
    case IPC_SUBMIT:
        read_submit(r, m);
        return;
    case IPC_CANCEL:
        m->id = ipc_wire_u64(r);
        return;
    case IPC_STATS_REQUEST:
        return;
    case IPC_TEXT:
        m->id = ipc_wire_u64(r);
        m->text.text = ipc_wire_bytes(r, &m->text.len);
        return;
    case IPC_DONE:
        read_done(r, m);
        return;
    case IPC_ERROR:
        read_error(r, m);
        return;
    case IPC_STATS:
        read_stats(r, m);
        return;
    }
    r->failed = true;
}

int ipc_take(const char *data, size_t len, size_t *used, struct ipc_message *message,
             struct err *err)
{
    struct ipc_wire_reader r = {.data = data, .len = len};
    size_t frame;

    memset(message, 0, sizeof *message);
    if (len < 4)
        return 0;
    frame = ipc_wire_u32(&r);
    if (frame == 0 || frame > IPC_FRAME_MAX)
        return err_set(err, ERR_INTERNAL, "worker socket: a frame of %zu bytes", frame);
    if (len - 4 < frame)
        return 0;
    r.len = 4 + frame;
    message->type = (enum ipc_type)ipc_wire_u8(&r);
    read_fields(&r, message);
    if (!ipc_wire_ended(&r)) {
        ipc_message_release(message);
        return err_set(err, ERR_INTERNAL, "worker socket: a malformed frame of type %d",
                       (int)message->type);
    }
    *used = r.len;
    return 1;
}

void ipc_message_release(struct ipc_message *message)
{
    free(message->messages);
    message->messages = NULL;
}
