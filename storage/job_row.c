#include "storage/job_row.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "storage/events.h"

/* ------------------------------------------------------------------ states */

static const struct {
    const char *text, *wire;
    bool terminal;
} states[] = {
#define JOB_STATE(name, text, wire, terminal) [JOB_STATE_##name] = {text, wire, terminal},
#include "storage/job_state.def"
#undef JOB_STATE
};

static const struct {
    enum job_state from, to;
} moves[] = {
#define JOB_MOVE(from, to) {JOB_STATE_##from, JOB_STATE_##to},
#include "storage/job_state.def"
#undef JOB_MOVE
};

const char *job_state_text(enum job_state state)
{
    return states[state].text;
}

const char *job_state_wire(enum job_state state)
{
    return states[state].wire;
}

bool job_state_terminal(enum job_state state)
{
    return states[state].terminal;
}

bool job_state_may_move(enum job_state from, enum job_state to)
{
    for (size_t i = 0; i < sizeof moves / sizeof *moves; i++)
        if (moves[i].from == from && moves[i].to == to)
            return true;
    return false;
}

static int parse_state(const char *text, enum job_state *out, struct err *err)
{
    for (int i = 0; i < JOB_STATE_COUNT; i++)
        if (strcmp(text, states[i].text) == 0) {
            *out = (enum job_state)i;
            return 0;
        }
    return err_set(err, ERR_INTERNAL, "the database has a job state \"%s\" that is not known here",
                   text);
}

/* ------------------------------------------------------------------ reading */

/* Reads column after column, so that the order of JOB_ROW_SELECT is the only thing to keep. */
struct cursor {
    const struct db_result *res;
    int row, column;
    bool out_of_memory;
};

static void next_into(struct cursor *c, char *out, size_t size)
{
    db_text_into(c->res, c->row, c->column++, out, size);
}

static char *next_copy(struct cursor *c)
{
    char *text = db_text_copy(c->res, c->row, c->column);

    if (text == NULL && !db_is_null(c->res, c->row, c->column))
        c->out_of_memory = true;
    c->column++;
    return text;
}

static int64_t next_int(struct cursor *c)
{
    return db_int(c->res, c->row, c->column++);
}

static double next_real(struct cursor *c)
{
    return db_real(c->res, c->row, c->column++);
}

static double next_real_or_zero(struct cursor *c)
{
    double d = next_real(c);

    return isnan(d) ? 0 : d;
}

static void read_what_it_is(struct cursor *c, struct job *j)
{
    j->model = next_copy(c);
    j->model_name = next_copy(c);
    j->suffix = next_copy(c);
    j->tuned_model = next_copy(c);
    next_into(c, j->tuned_sha256, sizeof j->tuned_sha256);
    j->training_file = next_copy(c);
    j->validation_file = next_copy(c);
    next_into(c, j->training_sha256, sizeof j->training_sha256);
    next_into(c, j->validation_sha256, sizeof j->validation_sha256);
    next_into(c, j->base_name, sizeof j->base_name);
    next_into(c, j->base_digest, sizeof j->base_digest);
    next_into(c, j->base_sha256, sizeof j->base_sha256);
    next_into(c, j->start_sha256, sizeof j->start_sha256);
    j->seed = next_int(c);
    j->method_type = next_copy(c);
    j->method = next_copy(c);
    j->metadata = next_copy(c);
    j->integrations = next_copy(c);
    j->extension = next_copy(c);
    j->train_embeddings = db_bool(c->res, c->row, c->column++);
    next_into(c, j->schedule, sizeof j->schedule);
    j->chosen.n_epochs = (int32_t)next_int(c);
    j->chosen.batch_size = (int32_t)next_int(c);
    j->chosen.learning_rate_multiplier = next_real_or_zero(c);
    next_into(c, j->compression.codec, sizeof j->compression.codec);
    j->compression.ratio = next_real_or_zero(c);
    j->compression.max_kl = next_real_or_zero(c);
    j->compression.distill_steps = (int32_t)next_int(c);
}

static void read_what_became(struct cursor *c, struct job *j)
{
    j->resolved.n_epochs = (int32_t)next_int(c);
    j->resolved.batch_size = (int32_t)next_int(c);
    j->resolved.learning_rate_multiplier = next_real_or_zero(c);
    j->step = (int32_t)next_int(c);
    j->total_steps = (int32_t)next_int(c);
    j->trained_tokens = next_int(c);
    next_into(c, j->result_file, sizeof j->result_file);
    next_into(c, j->error_code, sizeof j->error_code);
    j->error_message = next_copy(c);
    next_into(c, j->error_param, sizeof j->error_param);
    j->dataset.examples = next_int(c);
    j->dataset.tokens = next_int(c);
    j->dataset.trained_tokens = next_int(c);
    j->dataset.truncated_examples = next_int(c);
    j->dataset.untrained_examples = next_int(c);
    j->recall.base = next_real(c);
    j->recall.tuned = next_real(c);
    j->recall.served = next_real(c);
    next_into(c, j->delta.codec, sizeof j->delta.codec);
    j->delta.bytes = next_int(c);
    j->delta.ratio = next_real_or_zero(c);
    j->delta.relative_error = next_real(c);
    j->delta_report = next_copy(c);
    next_into(c, j->recovery.name, sizeof j->recovery.name);
    j->recovery.step = next_int(c);
    j->recovery.bytes = next_int(c);
    j->attempt = next_int(c);
    j->crashes = (int32_t)next_int(c);
}

int job_row_read(const struct db_result *res, int row, struct job *out, struct err *err)
{
    struct cursor c = {.res = res, .row = row};

    *out = (struct job){0};
    next_into(&c, out->id, sizeof out->id);
    next_into(&c, out->project, sizeof out->project);
    next_into(&c, out->organization_id, sizeof out->organization_id);
    if (parse_state(db_text(res, row, c.column++), &out->state, err) != 0)
        return -1;
    out->has_model = out->state == JOB_STATE_SUCCEEDED;
    out->created_at = next_int(&c);
    out->started_at = next_int(&c);
    out->finished_at = next_int(&c);
    out->estimated_finish = next_int(&c);
    read_what_it_is(&c, out);
    read_what_became(&c, out);
    if (c.out_of_memory) {
        job_release(out);
        return err_set(err, ERR_NO_MEMORY, "read a job's row: out of memory");
    }
    return 0;
}

void job_release(struct job *job)
{
    free(job->model);
    free(job->model_name);
    free(job->suffix);
    free(job->tuned_model);
    free(job->training_file);
    free(job->validation_file);
    free(job->method_type);
    free(job->method);
    free(job->metadata);
    free(job->integrations);
    free(job->extension);
    free(job->delta_report);
    free(job->error_message);
    *job = (struct job){0};
}

/* ------------------------------------------------------------------ moving */

int job_row_missing(const char *id, struct err *err)
{
    return err_set_code(err, ERR_NOT_FOUND, "fine_tune_not_found", "fine_tune_id",
                        "Could not find fine tune: %.100s", id);
}

int job_row_exists(struct db *db, const char *project, const char *id, struct err *err)
{
    struct db_result *res = NULL;
    bool found;

    assert(db_in_transaction(db));
    if (db_exec(db, "SELECT 1 FROM job WHERE tenant = $1::uuid AND id = $2",
                DB_ARGS(DB_TEXT(project), DB_TEXT(id)), &res, err) != 0)
        return -1;
    found = db_rows(res) == 1;
    db_result_free(res);
    return found ? 0 : job_row_missing(id, err);
}

int job_row_lock(struct db *db, const char *project, const char *id, enum job_state *state,
                 struct err *err)
{
    struct db_result *res = NULL;
    int rc;

    assert(db_in_transaction(db));
    /* Two statements: the second one's snapshot begins after the lock is held. */
    if (db_exec(db, "SELECT 1 FROM job_lease WHERE tenant = $1::uuid AND job = $2 FOR UPDATE",
                DB_ARGS(DB_TEXT(project), DB_TEXT(id)), NULL, err) != 0 ||
        db_exec(db, "SELECT state FROM job WHERE tenant = $1::uuid AND id = $2",
                DB_ARGS(DB_TEXT(project), DB_TEXT(id)), &res, err) != 0)
        return -1;
    if (db_rows(res) == 1)
        rc = parse_state(db_text(res, 0, 0), state, err);
    else
        rc = job_row_missing(id, err);
    db_result_free(res);
    return rc;
}

int job_row_outbox(struct db *db, const char *project, const char *id, const char *type,
                   struct err *err)
{
    char event[ID_SIZE];

    if (id_new(ID_WEBHOOK_EVENT, event, err) != 0)
        return -1;
    return db_exec(
        db, "INSERT INTO outbox (tenant, id, type, object_id) VALUES ($1::uuid, $2, $3, $4)",
        DB_ARGS(DB_TEXT(project), DB_TEXT(event), DB_TEXT(type), DB_TEXT(id)), NULL, err);
}

/* Nobody works on it any more, nobody will, and its recovery checkpoint is the collector's. */
static int end_lease(struct db *db, const char *project, const char *id, struct err *err)
{
    return db_exec(db,
                   "UPDATE job_lease SET worker = NULL, lease_until = NULL, run_after = 'infinity',"
                   "       estimated_finish = NULL, recovery_name = NULL"
                   " WHERE tenant = $1::uuid AND job = $2",
                   DB_ARGS(DB_TEXT(project), DB_TEXT(id)), NULL, err);
}

/* Column by column, since the API's role may write fewer of them than a worker's. */
static int update_state(struct db *db, const char *project, const char *id, enum job_state from,
                        enum job_state to, const struct job_error *why, struct db_result **res,
                        struct err *err)
{
    if (to == JOB_STATE_FAILED)
        return db_exec(db,
                       "UPDATE job SET state = $4, finished_at = now(), error_code = $5,"
                       "       error_message = $6, error_param = nullif($7, '')"
                       " WHERE tenant = $1::uuid AND id = $2 AND state = $3",
                       DB_ARGS(DB_TEXT(project), DB_TEXT(id), DB_TEXT(states[from].text),
                               DB_TEXT(states[to].text), DB_TEXT(why->code), DB_TEXT(why->message),
                               DB_TEXT(why->param)),
                       res, err);
    return db_exec(db,
                   states[to].terminal ? "UPDATE job SET state = $4, finished_at = now()"
                                         " WHERE tenant = $1::uuid AND id = $2 AND state = $3"
                   : to == JOB_STATE_RUNNING
                       ? "UPDATE job SET state = $4,"
                         "       started_at = coalesce(started_at, now())"
                         " WHERE tenant = $1::uuid AND id = $2 AND state = $3"
                       : "UPDATE job SET state = $4"
                         " WHERE tenant = $1::uuid AND id = $2 AND state = $3",
                   DB_ARGS(DB_TEXT(project), DB_TEXT(id), DB_TEXT(states[from].text),
                           DB_TEXT(states[to].text)),
                   res, err);
}

int job_row_move(struct db *db, const char *project, const char *id, enum job_state from,
                 enum job_state to, const struct job_error *why, struct err *err)
{
    struct db_result *res = NULL;
    char type[64];
    int64_t moved;

    assert((to == JOB_STATE_FAILED) == (why != NULL));
    if (!job_state_may_move(from, to))
        return err_set(err, ERR_INTERNAL, "job %s: no move from %s to %s", id, states[from].text,
                       states[to].text);
    if (update_state(db, project, id, from, to, why, &res, err) != 0)
        return -1;
    moved = db_affected(res);
    db_result_free(res);
    if (moved != 1)
        return err_set(err, ERR_FENCED, "job %s is not %s any more", id, states[from].text);
    if (!states[to].terminal)
        return 0;
    snprintf(type, sizeof type, "fine_tuning.job.%s", states[to].text);
    if (end_lease(db, project, id, err) != 0)
        return -1;
    return job_row_outbox(db, project, id, type, err);
}

int job_row_fail(struct db *db, const char *project, const char *id, const struct job_error *why,
                 struct err *err)
{
    enum job_state state;

    if (job_row_lock(db, project, id, &state, err) != 0)
        return -1;
    if (job_state_terminal(state))
        return err_set(err, ERR_FENCED, "job %s has ended already (%s)", id, states[state].text);
    if (events_write(db, project, id,
                     &(struct event_new){.level = "error", .message = why->message}, err) != 0)
        return -1;
    return job_row_move(db, project, id, state, JOB_STATE_FAILED, why, err);
}
