#include "server/worker_metrics.h"

#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/clock.h"
#include "engine/base/json_text.h"
#include "engine/base/log.h"
#include "engine/base/strbuf.h"
#include "storage/events.h"

#define GATHER_SECONDS 0.25
#define GATHER_MAX 64        /* events in one transaction */
#define WAITING_MAX 100000   /* events kept while the database is away; with more, a step fails */
#define RESULT_MAX (1 << 30) /* bytes of a result file */
#define RECENT 20            /* events read at once, from the newest back */
#define PAGE 500

struct waiting {
    const char *level, *type; /* as in event_new */
    char *message, *data;     /* data NULL: none */
    char key[32];             /* "": none */
};

struct worker_metrics {
    struct db *db;
    struct lease lease;
    struct waiting *items;
    int count, capacity;
    double written; /* clock_now() of the last try */
};

/* ------------------------------------------------------------------ wording */

/* Nothing where it was not measured. Eight digits are more than f32 sums are good for. */
static int set_number(json_t *object, const char *key, double v)
{
    if (!isfinite(v))
        return 0;
    return json_object_set_new(object, key, json_real(v));
}

/* The contract's numbers, and below them what it does not have. */
static char *data_text(const struct engine_step *s)
{
    json_t *data = json_object();
    double rate = s->seconds > 0 ? (double)s->tokens / s->seconds : NAN;
    char *text = NULL;

    if (json_object_set_new(data, "step", json_integer(s->step)) == 0 &&
        set_number(data, "train_loss", s->train_loss) == 0 &&
        json_object_set_new(data, "total_steps", json_integer(s->total_steps)) == 0 &&
        set_number(data, "train_mean_token_accuracy", s->train_mean_token_accuracy) == 0 &&
        set_number(data, "valid_loss", s->valid_loss) == 0 &&
        set_number(data, "valid_mean_token_accuracy", s->valid_mean_token_accuracy) == 0 &&
        set_number(data, "full_valid_loss", s->full_valid_loss) == 0 &&
        set_number(data, "full_valid_mean_token_accuracy", s->full_valid_mean_token_accuracy) ==
            0 &&
        json_object_set_new(data, "epoch", json_integer(s->epoch)) == 0 &&
        set_number(data, "learning_rate", s->learning_rate) == 0 &&
        set_number(data, "gradient_norm", s->gradient_norm) == 0 &&
        set_number(data, "tokens_per_second", rate) == 0)
        text = json_dumps(data, JSON_COMPACT | JSON_REAL_PRECISION(8));
    json_decref(data);
    return text;
}

int worker_metrics_format(const struct engine_step *step, char **message, char **data,
                          struct err *err)
{
    struct strbuf sb;

    strbuf_init(&sb, 512);
    strbuf_addf(&sb, "Step %d/%d: training loss=%.2f", (int)step->step, (int)step->total_steps,
                step->train_loss);
    if (isfinite(step->valid_loss))
        strbuf_addf(&sb, ", validation loss=%.2f", step->valid_loss);
    if (isfinite(step->full_valid_loss))
        strbuf_addf(&sb, ", full validation loss=%.2f", step->full_valid_loss);
    *message = strbuf_detach(&sb, NULL);
    *data = data_text(step);
    if (*message != NULL && *data != NULL)
        return 0;
    free(*message);
    free(*data);
    return err_set(err, ERR_NO_MEMORY, "metrics: out of memory");
}

void worker_metrics_of_step(const struct engine_step *step, struct checkpoint_metrics *out)
{
    *out = (struct checkpoint_metrics){.train_loss = step->train_loss,
                                       .train_mean_token_accuracy = step->train_mean_token_accuracy,
                                       .valid_loss = step->valid_loss,
                                       .valid_mean_token_accuracy = step->valid_mean_token_accuracy,
                                       .full_valid_loss = step->full_valid_loss,
                                       .full_valid_mean_token_accuracy =
                                           step->full_valid_mean_token_accuracy};
}

/* ------------------------------------------------------------------ writing */

int worker_metrics_open(struct worker_metrics **out, struct db *db, const struct lease *lease,
                        struct err *err)
{
    struct worker_metrics *m = calloc(1, sizeof *m);

    if (m == NULL)
        return err_set(err, ERR_NO_MEMORY, "metrics: out of memory");
    m->db = db;
    m->lease = *lease;
    *out = m;
    return 0;
}

static void drop_first(struct worker_metrics *m, int count)
{
    if (count == 0)
        return; /* items may be NULL */
    for (int i = 0; i < count; i++) {
        free(m->items[i].message);
        free(m->items[i].data);
    }
    memmove(m->items, m->items + count, (size_t)(m->count - count) * sizeof *m->items);
    m->count -= count;
}

void worker_metrics_free(struct worker_metrics *metrics)
{
    if (metrics == NULL)
        return;
    drop_first(metrics, metrics->count);
    free(metrics->items);
    free(metrics);
}

int worker_metrics_flush(struct worker_metrics *m, struct err *err)
{
    m->written = clock_now();
    while (m->count > 0) {
        struct event_new events[GATHER_MAX];
        int n = m->count < GATHER_MAX ? m->count : GATHER_MAX;

        for (int i = 0; i < n; i++)
            events[i] =
                (struct event_new){.level = m->items[i].level,
                                   .type = m->items[i].type,
                                   .message = m->items[i].message,
                                   .data = m->items[i].data,
                                   .key = m->items[i].key[0] != '\0' ? m->items[i].key : NULL};
        if (events_append(m->db, &m->lease, events, n, err) != 0)
            return -1;
        drop_first(m, n);
    }
    return 0;
}

/* A place at the end; it counts once m->count does. */
static struct waiting *new_place(struct worker_metrics *m, struct err *err)
{
    if (m->count == m->capacity) {
        int capacity = m->capacity == 0 ? GATHER_MAX : 2 * m->capacity;

        struct waiting *items = realloc(m->items, (size_t)capacity * sizeof *items);

        if (items == NULL) {
            err_set(err, ERR_NO_MEMORY, "metrics: out of memory");
            return NULL;
        }
        m->items = items;
        m->capacity = capacity;
    }
    m->items[m->count] = (struct waiting){0};
    return &m->items[m->count];
}

/* Writes what there is. A database that is away or full costs nothing yet. */
static int try_flush(struct worker_metrics *m, struct err *err)
{
    struct err flush = {0};

    if (worker_metrics_flush(m, &flush) == 0)
        return 0;
    if ((flush.kind == ERR_UNAVAILABLE || flush.kind == ERR_NO_SPACE) && m->count < WAITING_MAX) {
        log_warn("events of %s wait for the database: %s", m->lease.job, flush.message);
        return 0;
    }
    *err = flush;
    return -1;
}

int worker_metrics_tell(struct worker_metrics *m, const struct event_new *event, struct err *err)
{
    struct waiting *w = new_place(m, err);

    if (w == NULL)
        return -1;
    w->level = event->level;
    w->type = event->type;
    w->message = strdup(event->message);
    w->data = event->data != NULL ? strdup(event->data) : NULL;
    if (w->message == NULL || (event->data != NULL && w->data == NULL)) {
        free(w->message);
        return err_set(err, ERR_NO_MEMORY, "metrics: out of memory");
    }
    snprintf(w->key, sizeof w->key, "%s", event->key != NULL ? event->key : "");
    m->count++;
    return try_flush(m, err);
}

static int keep(struct worker_metrics *m, const struct engine_step *step, struct err *err)
{
    struct waiting *w = new_place(m, err);

    if (w == NULL || worker_metrics_format(step, &w->message, &w->data, err) != 0)
        return -1;
    w->type = "metrics";
    snprintf(w->key, sizeof w->key, "step:%d", (int)step->step);
    m->count++;
    return 0;
}

int worker_metrics_step(struct worker_metrics *m, const struct engine_step *step, struct err *err)
{
    if (keep(m, step, err) != 0)
        return -1;
    if (clock_now() < m->written + GATHER_SECONDS &&
        (m->count < GATHER_MAX || m->count % GATHER_MAX != 0))
        return 0;
    return try_flush(m, err);
}

/* ------------------------------------------------------------------ reading */

/* *data: what a step's event says, a new reference; NULL: it is another kind of event. */
static int load_step(const struct event *event, json_t **data, struct err *err)
{
    *data = NULL;
    if (strcmp(event->type, "metrics") != 0)
        return 0;
    *data = json_text_load(event->data, strlen(event->data), 0, err);
    return *data != NULL ? 0 : err_prefix(err, "event %s", event->id);
}

static double number_in(const json_t *data, const char *key)
{
    const json_t *v = json_object_get(data, key);

    return json_is_number(v) ? json_number_value(v) : NAN;
}

/* *step: it was told of that one; 0: of none. */
static int read_event(const struct event *event, struct engine_step *out, int32_t *step,
                      struct err *err)
{
    json_t *data;

    *step = 0;
    if (load_step(event, &data, err) != 0)
        return -1;
    if (data == NULL)
        return 0;
    *step = (int32_t)json_integer_value(json_object_get(data, "step"));
    *out = (struct engine_step){
        .step = *step,
        .train_loss = number_in(data, "train_loss"),
        .train_mean_token_accuracy = number_in(data, "train_mean_token_accuracy"),
        .valid_loss = number_in(data, "valid_loss"),
        .valid_mean_token_accuracy = number_in(data, "valid_mean_token_accuracy"),
        .full_valid_loss = number_in(data, "full_valid_loss"),
        .full_valid_mean_token_accuracy = number_in(data, "full_valid_mean_token_accuracy")};
    json_decref(data);
    return 0;
}

/* From the newest back: it is asked for the last there is. */
int worker_metrics_read_step(struct db *db, const struct lease *lease, int32_t step,
                             struct engine_step *out, struct err *err)
{
    char after[ID_SIZE] = "";
    int32_t found = 0;
    bool more = true;

    while (more) {
        struct event_list page = {0};
        int rc = events_list(db, lease->project, lease->job, after[0] != '\0' ? after : NULL,
                             RECENT, &page, err);

        for (int i = 0; rc == 0 && i < page.count && found != step; i++) {
            snprintf(after, sizeof after, "%s", page.items[i].id);
            rc = read_event(&page.items[i], out, &found, err);
        }
        more = page.has_more && found != step;
        event_list_release(&page);
        if (rc != 0)
            return -1;
    }
    return found == step ? 0
                         : err_set(err, ERR_NOT_FOUND, "nothing was told of step %d", (int)step);
}

/* ------------------------------------------------------------------ the result file */

static void put_cell(struct strbuf *csv, const json_t *data, const char *key)
{
    const json_t *v = json_object_get(data, key);

    strbuf_addch(csv, ',');
    if (json_is_number(v))
        strbuf_addf(csv, "%.5f", json_number_value(v));
}

static int put_line(struct strbuf *csv, const struct event *event, struct err *err)
{
    json_t *data;

    if (load_step(event, &data, err) != 0)
        return -1;
    if (data == NULL)
        return 0;
    strbuf_addf(csv, "%" JSON_INTEGER_FORMAT, json_integer_value(json_object_get(data, "step")));
    put_cell(csv, data, "train_loss");
    put_cell(csv, data, "train_mean_token_accuracy");
    put_cell(csv, data, "valid_loss");
    put_cell(csv, data, "valid_mean_token_accuracy");
    strbuf_addch(csv, '\n');
    json_decref(data);
    return 0;
}

static int gather(struct strbuf *csv, struct db *db, const struct lease *lease, struct err *err)
{
    int64_t since = 0;
    bool more = true;

    strbuf_addstr(csv, "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n");
    while (more) {
        struct event_list page = {0};
        int rc = events_since(db, lease->project, lease->job, since, PAGE, &page, err);

        for (int i = 0; rc == 0 && i < page.count; i++) {
            since = page.items[i].sequence;
            rc = put_line(csv, &page.items[i], err);
        }
        more = page.has_more && page.count > 0;
        event_list_release(&page);
        if (rc != 0)
            return -1;
    }
    if (strbuf_failed(csv))
        return err_set(err, ERR_NO_MEMORY, "result file: out of memory");
    return 0;
}

int worker_metrics_result_file(struct db *db, struct blob_store *blobs, const struct lease *lease,
                               char sha256[SHA256_HEX], int64_t *bytes, struct err *err)
{
    struct blob_writer *writer = NULL;
    struct strbuf csv;
    int rc = -1;

    strbuf_init(&csv, RESULT_MAX);
    if (gather(&csv, db, lease, err) != 0 ||
        blob_begin(blobs, lease->project, "result", &writer, err) != 0)
        goto out;
    if (blob_write(writer, csv.data, csv.len, err) != 0) {
        blob_abort(writer);
        goto out;
    }
    rc = blob_commit(writer, sha256, bytes, err);
out:
    strbuf_release(&csv);
    return rc;
}
