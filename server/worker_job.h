/* worker_job.h: one attempt at one job, from its claim to its end or its hand-over.
 *
 *   validate the files → plan → (resume) → steps, with metrics, user checkpoints at the last three
 *   epochs' ends and recovery checkpoints in between → compress → ask the questions back → result
 *   file → one fenced transaction
 *
 * A job that compresses a model tuned elsewhere goes the same way, without what has to do with
 * steps.
 *
 * Every attempt goes the same way; what an earlier one has told or stored already is not told
 * again. Between two attempts nothing is shared but the database and the newest recovery
 * checkpoint, so the final delta is bitwise that of an uninterrupted run. */
#ifndef GRAFT_WORKER_JOB_H
#define GRAFT_WORKER_JOB_H

#include "server/settings.h"
#include "server/worker_presence.h"
#include "storage/blob_store.h"
#include "storage/db.h"
#include "storage/leases.h"

struct worker_job_context {
    const struct settings *settings;
    const char *device;
    struct worker_presence *presence;
    struct db *db;   /* DB_ROLE_WORKER */
    const char *url; /* for the heartbeat's own connection */
    struct blob_store *blobs;
};

/* Returns when the job has ended, is not ours any more, or was handed back because the worker
 * stops. Whatever happened is in the database and the log. Does not return where the device is
 * lost: the job is let go and the process ends. */
void worker_job_run(const struct worker_job_context *context, const struct lease *lease);

#endif
