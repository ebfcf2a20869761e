#include "server/worker_job.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/clock.h"
#include "engine/base/file_io.h"
#include "engine/base/log.h"
#include "engine/base/progress.h"
#include "server/delta_report.h"
#include "server/devices.h"
#include "server/worker.h"
#include "server/worker_run.h"
#include "server/worker_watch.h"
#include "storage/checkpoints.h"

#define RETRY_SECONDS 0.5
#define PROGRESS_SECONDS 1.0

/* ------------------------------------------------------------------ the database, patiently */

static bool wait_for_database(struct worker_run *r, struct err *err)
{
    struct err ours = {0};

    log_warn("%s waits for the database: %s", r->lease.job, err->message);
    if (worker_run_still_ours(r, &ours) != 0) {
        *err = ours;
        return false;
    }
    worker_sleep(RETRY_SECONDS);
    err_clear(err);
    return true;
}

bool worker_run_away(struct worker_run *r, struct err *err)
{
    return err->kind == ERR_UNAVAILABLE && wait_for_database(r, err);
}

bool worker_run_again(struct worker_run *r, struct err *err)
{
    return (err->kind == ERR_UNAVAILABLE || err->kind == ERR_NO_SPACE) && wait_for_database(r, err);
}

int worker_run_still_ours(void *context, struct err *err)
{
    const struct worker_run *r = context;

    if (worker_stopping())
        return err_set(err, ERR_UNAVAILABLE, "the worker is stopping");
    return worker_heartbeat_check(r->heartbeat, err);
}

static int mark_validated(struct worker_run *r, struct err *err)
{
    const struct job_dataset dataset = {.examples = r->report.examples,
                                        .tokens = r->report.tokens,
                                        .trained_tokens = r->report.trained_tokens,
                                        .truncated_examples = r->report.truncated_examples,
                                        .untrained_examples = r->report.untrained_examples};
    int rc;

    WORKER_RUN_PATIENTLY(rc, r, err, jobs_mark_validated(r->cx->db, &r->lease, &dataset, err));
    return rc;
}

static int mark_running(struct worker_run *r, struct err *err)
{
    const struct job_plan plan = {
        .resolved = {.n_epochs = r->plan.n_epochs,
                     .batch_size = r->plan.batch_size,
                     .learning_rate_multiplier = r->plan.learning_rate_multiplier},
        .total_steps = r->plan.total_steps,
        .compression = r->tuned_path != NULL};
    int rc;

    WORKER_RUN_PATIENTLY(rc, r, err, jobs_mark_running(r->cx->db, &r->lease, &plan, err));
    return rc;
}

int worker_run_flush(struct worker_run *r, struct err *err)
{
    int rc;

    WORKER_RUN_PATIENTLY(rc, r, err, worker_metrics_flush(r->metrics, err));
    return rc;
}

/* ------------------------------------------------------------------ steps */

int worker_run_progress(struct worker_run *r, struct err *err)
{
    double left = r->step_seconds * (r->plan.total_steps - r->step);
    struct err progress = {0};

    if (worker_heartbeat_check(r->heartbeat, err) != 0)
        return -1;
    if (clock_now() < r->progress_at + PROGRESS_SECONDS)
        return 0;
    r->progress_at = clock_now();
    if (jobs_progress(r->cx->db, &r->lease, r->step, left, &progress) == 0)
        return 0;
    if (progress.kind == ERR_UNAVAILABLE || progress.kind == ERR_NO_SPACE)
        return 0; /* the work goes on; the heartbeat judges how long */
    *err = progress;
    return -1;
}

/* Between two calls of the device there may be minutes of work on the host: that is life, too. Each
 * time is one to stop at: whoever cancels a job does not want to wait for minutes either. */
bool worker_run_go_on(void *context, const char *stage, double share)
{
    struct worker_run *r = context;

    progress_tick();
    worker_presence_sample(r->cx->presence, r->engine);
    if (worker_stopping())
        err_set(&r->stopped, ERR_UNAVAILABLE, "the worker is stopping");
    progress_wait_begin(); /* for the database */
    (void)worker_run_progress(r, &r->stopped);
    progress_wait_end();
    return !err_is_set(&r->stopped);
}

void worker_run_explain_stop(const struct worker_run *r, struct err *err)
{
    if (err->kind == ERR_CANCELLED && err_is_set(&r->stopped))
        *err = r->stopped;
}

static int step(struct worker_run *r, struct err *err)
{
    int rc;

    worker_watch_begin("step", r->step + 1);
    rc = engine_trainer_step(r->trainer, &r->last, err);
    worker_presence_sample(r->cx->presence, r->engine);
    worker_watch_end();
    if (rc != 0)
        return -1;
    r->step = r->last.step;
    r->step_seconds =
        r->step_seconds == 0 ? r->last.seconds : 0.9 * r->step_seconds + 0.1 * r->last.seconds;
    if (worker_metrics_step(r->metrics, &r->last, err) != 0 || worker_run_progress(r, err) != 0)
        return -1;
    if (r->last.finished)
        return 0; /* finish() makes the last checkpoint from the final artifact */
    /* Only the last three epochs' checkpoints are kept: the others need not be compressed. */
    if (r->last.epoch_end && r->last.epoch > r->plan.n_epochs - CHECKPOINTS_KEPT &&
        worker_space_checkpoint(r, err) != 0)
        return -1;
    if (worker_stopping() || clock_now() >= r->saved_at + r->cx->settings->recovery)
        return worker_space_recovery(r, err);
    return 0;
}

/* What comes behind training may take as long as training did, and is begun anew by the next
 * attempt: training is not, where there is more of it than is worth a checkpoint. */
static int save_trained(struct worker_run *r, struct err *err)
{
    bool due = clock_now() >= r->saved_at + r->cx->settings->recovery / 2;

    if (r->saved_step == r->step || (!due && !worker_stopping()))
        return 0;
    return worker_space_recovery(r, err);
}

/* ERR_CANCELLED without a cancelled job means that the worker stops: the caller tells them apart.
 */
static int train(struct worker_run *r, struct err *err)
{
    r->saved_at = clock_now();
    while (r->step < r->plan.total_steps) {
        if (worker_stopping())
            return err_set(err, ERR_UNAVAILABLE, "the worker is stopping");
        if (step(r, err) != 0)
            return -1;
    }
    return worker_run_flush(r, err) != 0 || save_trained(r, err) != 0 ? -1 : 0;
}

/* ------------------------------------------------------------------ the end */

static int ask(struct worker_run *r, struct engine_trainer *trainer,
               const struct engine_delta *delta, double *share, struct err *err)
{
    const struct engine_recall_options options = {
        .trainer = trainer, .delta = delta, .progress = worker_run_go_on, .context = r};
    struct engine_recall recall;
    int rc;

    if (worker_stopping())
        return err_set(err, ERR_UNAVAILABLE, "the worker is stopping");
    err_clear(&r->stopped);
    worker_watch_begin("recall", 0);
    rc = engine_recall(r->engine, r->training, &options, &recall, err);
    worker_watch_end();
    if (rc != 0) {
        err_prefix(err, "recall");
        worker_run_explain_stop(r, err);
        return -1;
    }
    *share = recall.exact;
    return worker_heartbeat_check(r->heartbeat, err);
}

static int open_delta(struct worker_run *r, struct engine_delta **out, const char *path,
                      struct err *err)
{
    int rc;

    worker_watch_begin("opening the delta", 0);
    rc = engine_delta_open(out, r->engine, path, err);
    worker_watch_end();
    return rc == 0 ? 0 : worker_hide_place("delta", r->artifact_sha256, err);
}

/* Does the model know its answers: as the base, as trained here, and as served? */
static int measure_recall(struct worker_run *r, struct err *err)
{
    struct engine_delta *delta = NULL;
    char *path = NULL;
    int rc = -1;

    if (!r->report.question_answer)
        return 0;
    if (blob_path(r->cx->blobs, r->lease.project, r->artifact_sha256, &path, err) != 0 ||
        open_delta(r, &delta, path, err) != 0)
        goto out;
    if (ask(r, NULL, NULL, &r->recall.base, err) != 0 ||
        (r->trainer != NULL && ask(r, r->trainer, NULL, &r->recall.tuned, err) != 0) ||
        ask(r, NULL, delta, &r->recall.served, err) != 0)
        goto out;
    rc = 0;
out:
    engine_delta_free(delta);
    free(path);
    return rc;
}

/* Where the device has no room for asking beside training, even the second time: the delta is
 * there, and the job does not fail for want of a figure. */
static int measure_recall_if_it_fits(struct worker_run *r, struct err *err)
{
    if (measure_recall(r, err) == 0)
        return 0;
    if (err->kind != ERR_NO_MEMORY || devices_is_cpu(r->cx->device) ||
        r->shortages < WORKER_RUN_SHORTAGES_MAX)
        return -1;
    log_warn("%s: %s", r->lease.job, err->message);
    err_clear(err);
    return worker_metrics_tell(r->metrics,
                               &(struct event_new){
                                   .level = "warn",
                                   .message =
                                       "The device has too little memory to ask the model its "
                                       "questions: recall was not measured.",
                                   .key = "recall-not-measured",
                               },
                               err);
}

/* Once: a resumed attempt compresses again, to the same bytes. */
static int tell_report(struct worker_run *r, struct err *err)
{
    char *message = NULL;
    int rc;

    if (delta_report_format(&r->delta, &message, &r->delta_report, err) != 0)
        return -1;
    rc = worker_metrics_tell(
        r->metrics,
        &(struct event_new){.message = message, .data = r->delta_report, .key = "compressed"}, err);
    free(message);
    return rc;
}

static int commit(struct worker_run *r, struct err *err)
{
    struct job_success success = {.artifact_sha256 = r->artifact_sha256,
                                  .delta_report = r->delta_report,
                                  .recall = r->recall,
                                  .trained_tokens = r->plan.trained_tokens};
    int rc;

    if (r->trainer != NULL)
        success.result_file = (struct file_new){
            .filename = "step_metrics.csv", .sha256 = r->result_sha256, .bytes = r->result_bytes};
    success.delta.bytes = r->delta.bytes;
    success.delta.ratio = r->delta.ratio;
    success.delta.relative_error = r->delta.relative_error;
    snprintf(success.delta.codec, sizeof success.delta.codec, "%s", r->delta.codec);
    if (worker_heartbeat_check(r->heartbeat, err) != 0)
        return -1;
    WORKER_RUN_PATIENTLY(rc, r, err, jobs_commit_success(r->cx->db, &r->lease, &success, err));
    return rc;
}

static int finish(struct worker_run *r, struct err *err)
{
    int rc;

    WORKER_RUN_PATIENTLY(rc, r, err, jobs_progress(r->cx->db, &r->lease, r->step, 0, err));
    if (rc == 0)
        WORKER_RUN_PATIENTLY(rc, r, err, jobs_mark_compressing(r->cx->db, &r->lease, err));
    if (rc != 0 || worker_space_artifact(r, err) != 0 || tell_report(r, err) != 0 ||
        save_trained(r, err) != 0 || measure_recall_if_it_fits(r, err) != 0 ||
        (r->trainer != NULL && worker_space_result_file(r, err) != 0) ||
        worker_run_flush(r, err) != 0)
        return -1;
    return commit(r, err);
}

static int go(struct worker_run *r, struct err *err)
{
    const struct worker_heartbeat_options heartbeat = {.url = r->cx->url,
                                                       .interval = r->cx->settings->heartbeat,
                                                       .fence = r->cx->settings->fence,
                                                       .presence = r->cx->presence};

    if (worker_heartbeat_start(&r->heartbeat, &r->lease, &heartbeat, err) != 0)
        return -1;
    if (jobs_get(r->cx->db, r->lease.project, r->lease.job, &r->job, err) != 0 ||
        worker_metrics_open(&r->metrics, r->cx->db, &r->lease, err) != 0 ||
        worker_prepare_files(r, err) != 0 || worker_prepare_data(r, err) != 0 ||
        mark_validated(r, err) != 0)
        return -1;
    if (r->tuned_path != NULL) { /* compressed, not trained */
        if (worker_prepare_compression(r, err) != 0 || mark_running(r, err) != 0)
            return -1;
        return finish(r, err);
    }
    if (worker_prepare_trainer(r, err) != 0 || worker_prepare_resume(r, err) != 0 ||
        mark_running(r, err) != 0 || train(r, err) != 0)
        return -1;
    return finish(r, err);
}

/* ------------------------------------------------------------------ how it went */

static void remove_recovery(struct worker_run *r)
{
    worker_space_remove_recovery(r, r->recovery[0] != '\0' ? r->recovery : r->job.recovery.name);
}

static void fail(struct worker_run *r, const struct err *why)
{
    struct err err = {0};
    int rc = 0;

    if (r->metrics != NULL && worker_run_flush(r, &err) != 0) /* what led to it is told first */
        log_warn("%s: %s", r->lease.job, err.message);
    err_clear(&err);
    WORKER_RUN_PATIENTLY(rc, r, &err, jobs_commit_failure(r->cx->db, &r->lease, why, &err));
    if (rc != 0)
        log_error("%s: its failure could not be stored: %s", r->lease.job, err.message);
    else
        remove_recovery(r);
}

/* Handed back: the next worker goes on from the checkpoint. A database that is away is waited for,
 * or the lease would run out and count as a crash that was none. Where the job is another's by
 * then, nothing happens. */
static void hand_back(struct worker_run *r)
{
    struct err err = {0};

    while (leases_release(r->cx->db, &r->lease, &err) != 0) {
        if ((err.kind != ERR_UNAVAILABLE && err.kind != ERR_NO_SPACE) || worker_stopping()) {
            log_info("%s is not handed back: %s", r->lease.job, err.message);
            return;
        }
        worker_sleep(RETRY_SECONDS);
        err_clear(&err);
    }
}

/* A device that has too little memory says how much was wanted and how much there was, and names
 * nothing but itself: the client may know. */
static void tell_shortage(const struct worker_run *r, struct err *err)
{
    struct err why = *err;

    if (err->kind != ERR_NO_MEMORY || err->code[0] != '\0' || devices_is_cpu(r->cx->device) ||
        strstr(err->message, r->cx->device) == NULL || strchr(err->message, '/') != NULL)
        return;
    err_clear(err);
    err_set_code(
        err, ERR_NO_MEMORY, "insufficient_memory", NULL,
        "The job needs more memory than its device has (%s): use a smaller model or batch, "
        "or a larger device.",
        why.message);
}

/* Another device may have the job at once. Nothing is freed: what that asks of the driver may hang.
 */
static _Noreturn void leave_device(struct worker_run *r, const struct err *why)
{
    int poison = (int)r->cx->settings->max_attempts;
    struct err err = {0};

    log_error("%s, attempt %" PRId64 ": %s", r->lease.job, r->lease.attempt, why->message);
    if (workers_device_lost(r->cx->db, r->lease.worker, poison, &err) != 0)
        log_warn("%s: the lease could not be let go: %s", r->lease.job, err.message);
    if (r->staging != NULL)
        file_remove_tree(r->staging, NULL);
    worker_watch_lost(why);
}

static void conclude(struct worker_run *r, int rc, const struct err *err)
{
    if (rc == 0) {
        log_info("%s succeeded", r->lease.job);
        worker_space_remove_recovery(r, r->recovery);
        return;
    }
    switch (err->kind) {
    case ERR_CANCELLED:
        log_info("%s was cancelled", r->lease.job);
        remove_recovery(r);
        return;
    case ERR_FENCED:
        log_warn("%s: %s", r->lease.job, err->message);
        hand_back(r);
        return;
    case ERR_DEVICE:
        leave_device(r, err);
    case ERR_UNAVAILABLE:
        log_info("%s is handed back: %s", r->lease.job, err->message);
        hand_back(r);
        worker_sleep(r->cx->settings->poll); /* it would be claimed, and meet the same, at once */
        return;
    default:
        log_error("%s failed: %s", r->lease.job, err->message);
        fail(r, err);
    }
}

static void release(struct worker_run *r)
{
    engine_trainer_free(r->trainer);
    engine_dataset_free(r->validation);
    engine_dataset_free(r->training);
    engine_free(r->engine);
    worker_metrics_free(r->metrics);
    worker_heartbeat_stop(r->heartbeat);
    if (r->staging != NULL)
        file_remove_tree(r->staging, NULL);
    free(r->staging);
    free(r->delta_report);
    free(r->base_path);
    free(r->tuned_path);
    free(r->training_path);
    free(r->validation_path);
    free(r->start_path);
    job_release(&r->job);
}

/* One way through the job. true: the device had too little memory, and what it gave back or half as
 * many tokens at once may do; the lease is still ours. */
static bool run_once(const struct worker_job_context *context, const struct lease *lease,
                     int *shortages)
{
    struct worker_run r = {.cx = context,
                           .lease = *lease,
                           .shortages = *shortages,
                           .recall = {.base = NAN, .tuned = NAN, .served = NAN}};
    struct err err = {0};
    bool again;
    int rc;

    rc = go(&r, &err);
    *shortages = r.shortages + 1;
    /* A write that found the lease gone does not know why; the heartbeat asks. */
    if (rc != 0 && err.kind == ERR_FENCED && r.heartbeat != NULL)
        worker_heartbeat_explain(r.heartbeat, &err);
    again = rc != 0 && err.kind == ERR_NO_MEMORY && !devices_is_cpu(context->device) &&
            *shortages <= WORKER_RUN_SHORTAGES_MAX && !worker_stopping();
    if (again) {
        log_warn("%s: %s: it is tried again", lease->job, err.message);
    } else {
        if (rc != 0)
            tell_shortage(&r, &err);
        conclude(&r, rc, &err);
    }
    worker_watch_job(again ? lease->job : "");
    release(&r);
    return again;
}

void worker_job_run(const struct worker_job_context *context, const struct lease *lease)
{
    int shortages = 0;

    log_info("%s, attempt %" PRId64, lease->job, lease->attempt);
    worker_watch_job(lease->job);
    while (run_once(context, lease, &shortages))
        ;
}
