/* job_row.h: what jobs.c and job_run.c share: a job's row read into its struct, and the one
 * function that moves a job from state to state. */
#ifndef GRAFT_STORAGE_JOB_ROW_H
#define GRAFT_STORAGE_JOB_ROW_H

#include "storage/jobs.h"

/* Columns and tables of a job for job_row_read(); a WHERE clause follows, with aliases j (job), l
 * (job_lease) and p (project). */
extern const char job_row_select[];
int job_row_read(const struct db_result *res, int row, struct job *out, struct err *err);

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
