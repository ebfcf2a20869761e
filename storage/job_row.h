/* job_row.h: what the files about jobs share: a row read into its struct, what is said of a job
 * that is not there, and the one function that moves a job from state to state. */
#ifndef GRAFT_STORAGE_JOB_ROW_H
#define GRAFT_STORAGE_JOB_ROW_H

#include "storage/jobs.h"

/* Columns, in the order of job_row_read(), and tables of a job; a WHERE clause follows, with
 * aliases j (job), l (job_lease) and p (project). */
#define JOB_ROW_SELECT                                                                   \
    "SELECT j.id, j.tenant, p.organization, j.state, "                                   \
    "floor(extract(epoch FROM j.created_at))::bigint, "                                  \
    "floor(extract(epoch FROM j.started_at))::bigint, "                                  \
    "floor(extract(epoch FROM j.finished_at))::bigint, "                                 \
    "floor(extract(epoch FROM l.estimated_finish))::bigint, j.model, j.model_name, "     \
    "j.suffix, j.tuned_model, j.tuned_sha256, j.training_file, j.validation_file, "      \
    "j.training_sha256, j.validation_sha256, "                                           \
    "j.base_name, j.base_digest, j.base_sha256, j.start_sha256, j.seed, j.method_type, " \
    "j.method::text, j.metadata::text, j.integrations::text, j.extension::text, "        \
    "j.train_embeddings, j.schedule, j.chosen_n_epochs, j.chosen_batch_size, "           \
    "j.chosen_learning_rate_multiplier, j.compression_codec, j.compression_ratio, "      \
    "j.compression_max_kl, coalesce(j.compression_distill_steps, -1), "                  \
    "j.resolved_n_epochs, j.resolved_batch_size, "                                       \
    "j.resolved_learning_rate_multiplier, l.step, j.total_steps, j.trained_tokens, "     \
    "j.result_file, j.error_code, j.error_message, j.error_param, j.dataset_examples, "  \
    "j.dataset_tokens, j.dataset_trained, j.dataset_truncated, j.dataset_untrained, "    \
    "j.recall_base, j.recall_tuned, j.recall_served, j.delta_codec, j.delta_bytes, "     \
    "j.delta_ratio, j.delta_relative_error, j.delta_report::text, l.recovery_name, "     \
    "l.recovery_step, "                                                                  \
    "l.recovery_bytes, l.attempt, l.crashes"                                             \
    " FROM job j"                                                                        \
    " JOIN project p ON p.tenant = j.tenant"                                             \
    " JOIN job_lease l ON l.tenant = j.tenant AND l.job = j.id "
int job_row_read(const struct db_result *res, int row, struct job *out, struct err *err);

/* ERR_NOT_FOUND, code fine_tune_not_found, param fine_tune_id: what every function says of a job
 * that is not there, or is another project's. */
int job_row_missing(const char *id, struct err *err);
/* 0 where the job is there; inside a transaction of the project. */
int job_row_exists(struct db *db, const char *project, const char *id, struct err *err);

/* The job's present state, with its lease row locked to the end of the transaction. ERR_NOT_FOUND
 * as jobs_get says it. */
int job_row_lock(struct db *db, const char *project, const char *id, enum job_state *state,
                 struct err *err);

/* THE transition: from `from` to `to`, with started_at and finished_at, and at a terminal state the
 * lease's end and the outbox row. The lease row is locked by the caller. ERR_FENCED where the job
 * is not in `from` (somebody moved it), ERR_INTERNAL where job_state.def has no such move. For
 * FAILED the job's error is `why`. */
struct job_error {
    const char *code, *message, *param; /* param "": null */
};
int job_row_move(struct db *db, const char *project, const char *id, enum job_state from,
                 enum job_state to, const struct job_error *why, struct err *err);

/* A webhook's row in the caller's transaction; once for each type and job. */
int job_row_outbox(struct db *db, const char *project, const char *id, const char *type,
                   struct err *err);

/* Failure with its event: for a worker's error and for a poisoned job. */
int job_row_fail(struct db *db, const char *project, const char *id, const struct job_error *why,
                 struct err *err);

#endif
