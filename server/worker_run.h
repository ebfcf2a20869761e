/* worker_run.h: one attempt at a job while it runs, as the files that make it share it:
 *
 *   worker_job.c      its course: steps, the end, how it went
 *   worker_prepare.c  what comes before the first step: files, plan, does it fit, resume
 *   worker_space.c    what is written on the way, and what a full disk means for it
 *
 * Nothing outside these and their test includes it. One thread, but for the heartbeat's. */
#ifndef GRAFT_WORKER_RUN_H
#define GRAFT_WORKER_RUN_H

#include "engine/engine.h"
#include "server/worker_heartbeat.h"
#include "server/worker_job.h"
#include "server/worker_metrics.h"
#include "storage/jobs.h"

#define WORKER_RUN_SHORTAGES_MAX 2 /* of a device's memory that a job is tried again after */

struct worker_run {
    const struct worker_job_context *cx;
    struct lease lease;
    struct job job;
    struct worker_heartbeat *heartbeat;
    struct worker_metrics *metrics;
    char *staging; /* folder of this attempt, once something is written there; NULL */
    char *base_path, *training_path, *validation_path, *start_path;
    char *tuned_path; /* NULL but for a job that compresses a model tuned elsewhere: no trainer then
                       */

    struct engine *engine;
    struct engine_dataset *training, *validation;
    struct engine_dataset_report report;
    struct engine_trainer *trainer;
    int shortages; /* of the device's memory that this attempt has had before */
    struct engine_train_plan plan;

    int32_t step, saved_step; /* made so far; in the newest recovery checkpoint */
    struct engine_step
        last; /* of an attempt that resumed: once it has made one, or behind the last */
    double saved_at, progress_at;
    double step_seconds; /* smoothed */
    char recovery[96];   /* the newest recovery checkpoint's name; "" */
    /* The client has been told that these can not be written at the moment. */
    bool recovery_missing, checkpoint_missing;

    struct err stopped; /* why the engine's call under way was told to stop */

    char artifact_sha256[SHA256_HEX];
    struct engine_delta_report delta;
    char *delta_report; /* `delta` as JSON text, once told; NULL */
    struct job_recall recall;
    char result_sha256[SHA256_HEX];
    int64_t result_bytes;
};

/* After a call failed: true to try again, some time later. A database that is away, or has no room,
 * is waited for as long as the job is ours; then err becomes what worker_run_still_ours says.
 * worker_run_away: away only. */
bool worker_run_again(struct worker_run *run, struct err *err);
bool worker_run_away(struct worker_run *run, struct err *err);

/* Calls that are fine to repeat: each is fenced and tells a second time what it told the first. */
#define WORKER_RUN_PATIENTLY(rc, run, err, call) \
    do                                           \
        (rc) = (call);                           \
    while ((rc) != 0 && worker_run_again((run), (err)))

int worker_run_flush(struct worker_run *run, struct err *err); /* all events are told */
/* ERR_UNAVAILABLE: the worker is stopping; else what worker_heartbeat_check says. context: the run.
 */
int worker_run_still_ours(void *context, struct err *err);
/* Between two steps of training or compression: tells how far it is, at most once a second, which
 * also finds out whether the job is still ours. ERR_FENCED, ERR_CANCELLED: it is not. */
int worker_run_progress(struct worker_run *run, struct err *err);
/* For the engine's long calls, as their `progress`; context: the run. false: why is in `stopped`.
 */
bool worker_run_go_on(void *context, const char *stage, double share);
/* Behind such a call that failed: where it was told to stop, err becomes why. */
void worker_run_explain_stop(const struct worker_run *run, struct err *err);

/* ------------------------------------------------------------------ worker_prepare.c */

int worker_prepare_files(struct worker_run *run, struct err *err);
/* Engine and those datasets that there are; `report` is filled. */
int worker_prepare_data(struct worker_run *run, struct err *err);
/* Plan, the checks of memory and disk, trainer. After two shortages, or where the plan says that it
 * will not fit otherwise, a step is computed in halves, and the client is told. ERR_NO_MEMORY,
 * ERR_NO_SPACE with words for the client where the job can not fit; the disk is not asked where
 * there is a recovery checkpoint. */
int worker_prepare_trainer(struct worker_run *run, struct err *err);
/* What a job takes at most, once there is a plan: what is trained stays in memory while it is
 * compressed. */
int64_t worker_prepare_bytes(const struct worker_run *run);
/* Instead, for a job that trains nothing: does it fit? */
int worker_prepare_compression(struct worker_run *run, struct err *err);
/* Goes on from the job's newest recovery checkpoint, where there is one: behind the last step with
 * what was told of it. One that can not be read costs time, not the job. */
int worker_prepare_resume(struct worker_run *run, struct err *err);

/* ------------------------------------------------------------------ worker_space.c */

/* A recovery checkpoint of the step just made. Where it can not be written, the one before stays
 * valid, the client is told (once, until one succeeds again), and 0 is returned: the next one is
 * due an interval later. */
int worker_space_recovery(struct worker_run *run, struct err *err);
void worker_space_remove_recovery(struct worker_run *run, const char *name); /* "": nothing */
/* The delta of the epoch just ended as a model the client may use. Skipped with a word where there
 * is no room. */
int worker_space_checkpoint(struct worker_run *run, struct err *err);
/* The final delta (artifact_sha256, delta) and its checkpoint's row; the result file. Without room
 * they wait for it, up to --disk-patience, and only then fail (insufficient_storage). */
int worker_space_artifact(struct worker_run *run, struct err *err);
int worker_space_result_file(struct worker_run *run, struct err *err);

#endif
