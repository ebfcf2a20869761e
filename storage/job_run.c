/* The worker's side of jobs.h. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "engine/base/log.h"
#include "storage/events.h"
#include "storage/job_row.h"

/* Transaction, fence, and the state the job is in. */
static int begin_fenced(struct db *db, const struct lease *lease, enum job_state *state,
                        struct err *err)
{
    if (db_begin(db, lease->project, err) != 0)
        return -1;
    if (leases_lock(db, lease, err) != 0 ||
        job_row_lock(db, lease->project, lease->job, state, err) != 0) {
        db_rollback(db);
        return -1;
    }
    return 0;
}

static int end_fenced(struct db *db, int rc, struct err *err)
{
    if (rc == 0)
        return db_commit(db, err);
    db_rollback(db);
    return -1;
}

static int move_and_tell(struct db *db, const struct lease *lease, enum job_state from,
                         enum job_state to, const char *message, struct err *err)
{
    if (job_row_move(db, lease->project, lease->job, from, to, NULL, err) != 0)
        return -1;
    return message == NULL ? 0
                           : events_write(db, lease->project, lease->job,
                                          &(struct event_new){.message = message}, err);
}

/* ------------------------------------------------------------------ on the way */

int jobs_mark_validated(struct db *db, const struct lease *lease, const struct job_dataset *d,
                        struct err *err)
{
    enum job_state state;
    int rc;

    if (begin_fenced(db, lease, &state, err) != 0)
        return -1;
    rc = db_exec(db,
                 "UPDATE job SET dataset_examples = $3, dataset_tokens = $4, dataset_trained = $5,"
                 "       dataset_truncated = $6, dataset_untrained = $7"
                 " WHERE tenant = $1::uuid AND id = $2",
                 DB_ARGS(DB_TEXT(lease->project), DB_TEXT(lease->job), DB_INT(d->examples),
                         DB_INT(d->tokens), DB_INT(d->trained_tokens),
                         DB_INT(d->truncated_examples), DB_INT(d->untrained_examples)),
                 NULL, err);
    if (rc == 0 && state == JOB_STATE_VALIDATING)
        rc = move_and_tell(db, lease, state, JOB_STATE_QUEUED,
                           "Files validated, moving job to queued state", err);
    return end_fenced(db, rc, err);
}

static int set_estimate(struct db *db, const struct lease *lease, int32_t step, double seconds,
                        struct err *err)
{
    return db_exec(db,
                   "UPDATE job_lease SET step = $3::integer, estimated_finish = now()"
                   "       + interval '1 second' * $4::double precision"
                   " WHERE tenant = $1::uuid AND job = $2",
                   DB_ARGS(DB_TEXT(lease->project), DB_TEXT(lease->job), DB_INT(step),
                           seconds > 0 ? DB_REAL(seconds) : DB_NULL),
                   NULL, err);
}

int jobs_mark_running(struct db *db, const struct lease *lease, const struct job_plan *plan,
                      struct err *err)
{
    enum job_state state;
    int rc;

    if (begin_fenced(db, lease, &state, err) != 0)
        return -1;
    rc = db_exec(db,
                 "UPDATE job SET resolved_n_epochs = $3::integer,"
                 "       resolved_batch_size = $4::integer,"
                 "       resolved_learning_rate_multiplier = $5::double precision,"
                 "       total_steps = $6::integer WHERE tenant = $1::uuid AND id = $2",
                 DB_ARGS(DB_TEXT(lease->project), DB_TEXT(lease->job),
                         DB_INT(plan->resolved.n_epochs), DB_INT(plan->resolved.batch_size),
                         DB_REAL(plan->resolved.learning_rate_multiplier),
                         DB_INT(plan->total_steps)),
                 NULL, err);
    if (rc == 0 && state == JOB_STATE_QUEUED)
        rc = move_and_tell(
            db, lease, state, JOB_STATE_RUNNING,
            plan->compression ? "Compression job started" : "Fine-tuning job started", err);
    else if (rc == 0 && state == JOB_STATE_COMPRESSING)
        rc = move_and_tell(db, lease, state, JOB_STATE_RUNNING, NULL, err);
    else if (rc == 0 && state != JOB_STATE_RUNNING)
        rc = err_set(err, ERR_INTERNAL, "job %s is %s: mark it validated first", lease->job,
                     job_state_text(state));
    return end_fenced(db, rc, err);
}

int jobs_mark_compressing(struct db *db, const struct lease *lease, struct err *err)
{
    enum job_state state;
    int rc = 0;

    if (begin_fenced(db, lease, &state, err) != 0)
        return -1;
    if (state != JOB_STATE_COMPRESSING)
        rc = move_and_tell(db, lease, state, JOB_STATE_COMPRESSING, NULL, err);
    return end_fenced(db, rc, err);
}

int jobs_progress(struct db *db, const struct lease *lease, int32_t step, double seconds_left,
                  struct err *err)
{
    if (db_begin(db, lease->project, err) != 0)
        return -1;
    if (leases_lock(db, lease, err) != 0 || set_estimate(db, lease, step, seconds_left, err) != 0) {
        db_rollback(db);
        return -1;
    }
    return db_commit(db, err);
}

int jobs_set_recovery(struct db *db, const struct lease *lease, const struct job_recovery *recovery,
                      char old[96], struct err *err)
{
    struct db_result *res = NULL;

    old[0] = '\0';
    if (db_begin(db, lease->project, err) != 0)
        return -1;
    if (leases_lock(db, lease, err) != 0 ||
        db_exec(db, "SELECT recovery_name FROM job_lease WHERE tenant = $1::uuid AND job = $2",
                DB_ARGS(DB_TEXT(lease->project), DB_TEXT(lease->job)), &res, err) != 0 ||
        db_exec(db,
                "UPDATE job_lease SET recovery_name = $3, recovery_step = $4,"
                "       recovery_bytes = $5 WHERE tenant = $1::uuid AND job = $2",
                DB_ARGS(DB_TEXT(lease->project), DB_TEXT(lease->job), DB_TEXT(recovery->name),
                        DB_INT(recovery->step), DB_INT(recovery->bytes)),
                NULL, err) != 0) {
        db_result_free(res);
        db_rollback(db);
        return -1;
    }
    if (strcmp(recovery->name, db_is_null(res, 0, 0) ? "" : db_text(res, 0, 0)) != 0)
        db_text_into(res, 0, 0, old, 96);
    db_result_free(res);
    if (db_commit(db, err) != 0) {
        old[0] = '\0'; /* not known which is the newest: the collector will tell */
        return -1;
    }
    return 0;
}

/* ------------------------------------------------------------------ the end */

static int insert_model(struct db *db, const struct lease *lease, const struct job_success *s,
                        char *name, size_t name_size, struct err *err)
{
    struct db_result *res = NULL;
    int rc = 0;

    if (db_exec(db,
                "INSERT INTO model (tenant, name, job, base_name, base_digest, artifact_sha256,"
                "                   artifact_bytes)"
                " SELECT tenant, model_name, id, base_name, base_digest, $3, $4 FROM job"
                "  WHERE tenant = $1::uuid AND id = $2 RETURNING name",
                DB_ARGS(DB_TEXT(lease->project), DB_TEXT(lease->job), DB_TEXT(s->artifact_sha256),
                        DB_INT(s->delta.bytes)),
                &res, err) != 0)
        return -1;
    if (db_rows(res) == 1)
        db_text_into(res, 0, 0, name, name_size);
    else
        rc = err_set(err, ERR_INTERNAL, "job %s is not there", lease->job);
    db_result_free(res);
    return rc;
}

static int set_outcome(struct db *db, const struct lease *lease, const struct job_success *s,
                       const char *result_file, struct err *err)
{
    return db_exec(db,
                   "UPDATE job SET trained_tokens = $3, result_file = nullif($4, ''),"
                   "       recall_base = $5::double precision, recall_tuned = $6::double precision,"
                   "       recall_served = $7::double precision, delta_codec = $8,"
                   "       delta_bytes = $9, delta_ratio = $10::double precision,"
                   "       delta_relative_error = $11::double precision,"
                   "       delta_report = $12::json"
                   " WHERE tenant = $1::uuid AND id = $2",
                   DB_ARGS(DB_TEXT(lease->project), DB_TEXT(lease->job), DB_INT(s->trained_tokens),
                           DB_TEXT(result_file), DB_REAL(s->recall.base), DB_REAL(s->recall.tuned),
                           DB_REAL(s->recall.served), DB_TEXT(s->delta.codec),
                           DB_INT(s->delta.bytes), DB_REAL(s->delta.ratio),
                           DB_REAL(s->delta.relative_error), DB_TEXT(s->delta_report)),
                   NULL, err);
}

static int write_success(struct db *db, const struct lease *lease, enum job_state state,
                         const struct job_success *s, struct err *err)
{
    struct file_new result = s->result_file;
    struct file file = {0};
    char name[320], message[400];

    if (insert_model(db, lease, s, name, sizeof name, err) != 0)
        return -1;
    result.purpose = "fine-tune-results";
    if (result.filename != NULL && files_create(db, lease->project, &result, &file, err) != 0)
        return -1;
    if (set_outcome(db, lease, s, file.id, err) != 0) {
        file_release(&file);
        return -1;
    }
    file_release(&file);
    snprintf(message, sizeof message, "New fine-tuned model created: %s", name);
    if (events_write(db, lease->project, lease->job, &(struct event_new){.message = message},
                     err) != 0)
        return -1;
    return move_and_tell(db, lease, state, JOB_STATE_SUCCEEDED,
                         "The job has successfully completed", err);
}

/* Did an earlier call of this attempt commit, and only its answer got lost? */
static bool committed_before(struct db *db, const struct lease *lease, const char *artifact)
{
    struct db_result *res = NULL;
    bool yes = false;

    if (db_begin(db, lease->project, NULL) != 0)
        return false;
    if (db_exec(db,
                "SELECT 1 FROM job_lease l JOIN job j ON j.tenant = l.tenant AND j.id = l.job"
                "  JOIN model m ON m.tenant = j.tenant AND m.job = j.id"
                " WHERE l.tenant = $1::uuid AND l.job = $2 AND l.attempt = $3"
                "   AND j.state = 'succeeded' AND m.artifact_sha256 = $4",
                DB_ARGS(DB_TEXT(lease->project), DB_TEXT(lease->job), DB_INT(lease->attempt),
                        DB_TEXT(artifact)),
                &res, NULL) == 0)
        yes = db_rows(res) == 1;
    db_result_free(res);
    db_rollback(db);
    return yes;
}

int jobs_commit_success(struct db *db, const struct lease *lease, const struct job_success *success,
                        struct err *err)
{
    struct err why = {0};
    enum job_state state;

    if (begin_fenced(db, lease, &state, &why) != 0) {
        if (why.kind == ERR_FENCED && committed_before(db, lease, success->artifact_sha256))
            return 0;
        return err_set_code(err, why.kind, why.code, why.param, "%s", why.message);
    }
    return end_fenced(db, write_success(db, lease, state, success, err), err);
}

/* What of an error is the client's business. */
static struct job_error job_error_of(const struct err *why)
{
    switch (why->kind) {
    case ERR_INVALID:
    case ERR_NOT_FOUND:
    case ERR_TOO_LARGE:
    case ERR_FORBIDDEN:
        return (struct job_error){why->code[0] != '\0' ? why->code : "invalid_training_file",
                                  why->message, why->param};
    /* With a code they are worded for the client; else they may name paths. */
    case ERR_NO_SPACE:
        return (struct job_error){"insufficient_storage",
                                  why->code[0] != '\0'
                                      ? why->message
                                      : "The job failed because the server has no disk space left.",
                                  ""};
    case ERR_NO_MEMORY:
        return (struct job_error){
            "insufficient_memory",
            why->code[0] != '\0' ? why->message
                                 : "The job failed because the server has not enough memory for "
                                   "it.",
            ""};
    default:
        if (why->kind == ERR_IO && why->code[0] != '\0')
            return (struct job_error){why->code, why->message, why->param};
        return (struct job_error){"server_error",
                                  "The job failed due to an internal error of the server.", ""};
    }
}

int jobs_commit_failure(struct db *db, const struct lease *lease, const struct err *why,
                        struct err *err)
{
    struct job_error error = job_error_of(why);
    enum job_state state;

    log_warn("job %s failed: %s", lease->job, why->message);
    if (begin_fenced(db, lease, &state, err) != 0)
        return -1;
    return end_fenced(db, job_row_fail(db, lease->project, lease->job, &error, err), err);
}

int jobs_end_poisoned(struct db *db, const char *project, const char *id, int crashes,
                      struct err *err)
{
    char message[160];

    snprintf(message, sizeof message,
             "The job failed because its worker process crashed %d times without progress.",
             crashes);
    return job_row_fail(db, project, id, &(struct job_error){"worker_crashed", message, ""}, err);
}
