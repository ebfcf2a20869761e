#include "server/worker_job.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/base/file_io.h"
#include "engine/base/log.h"
#include "engine/engine.h"
#include "server/capacity.h"
#include "server/clock.h"
#include "server/worker.h"
#include "server/worker_heartbeat.h"
#include "server/worker_metrics.h"
#include "storage/checkpoints.h"
#include "storage/jobs.h"

#define RETRY_SECONDS 0.5
#define PROGRESS_SECONDS 1.0
#define MEMORY_MARGIN (INT64_C(64) << 20) /* bytes left to the system */
#define DISK_MARGIN (INT64_C(64) << 20)

struct run {
    const struct worker_job_context *cx;
    struct lease lease;
    struct job job;
    struct worker_heartbeat *heartbeat;
    struct worker_metrics *metrics;
    char *staging; /* folder of this attempt */
    char *base_path, *training_path, *validation_path, *start_path;

    struct engine *engine;
    struct engine_dataset *training, *validation;
    struct engine_dataset_report report;
    struct engine_trainer *trainer;
    struct engine_train_plan plan;

    int32_t step, saved_step; /* made so far; in the newest recovery checkpoint */
    struct engine_step last;
    bool last_known; /* `last` was made by this attempt */
    double saved_at, progress_at;
    double step_seconds; /* smoothed */
    char recovery[96];   /* the newest recovery checkpoint's name; "" */

    char artifact_sha256[SHA256_HEX];
    struct engine_delta_report delta;
    struct job_recall recall;
};

/* ------------------------------------------------------------------ the database, patiently */

/* After a call failed: true to try again. A database that is away is waited for as long as the job
 * is ours. */
static bool again(struct run *r, struct err *err)
{
    struct err ours = {0};

    if (err->kind != ERR_UNAVAILABLE)
        return false;
    log_warn("%s waits for the database: %s", r->lease.job, err->message);
    if (worker_heartbeat_check(r->heartbeat, &ours) != 0) {
        *err = ours;
        return false;
    }
    if (worker_stopping())
        return false;
    worker_sleep(RETRY_SECONDS);
    err_clear(err);
    return true;
}

/* Calls that are fine to repeat: each is fenced and tells a second time what it told the first. */
#define PATIENTLY(rc, r, err, call) \
    do                              \
        (rc) = (call);              \
    while ((rc) != 0 && again((r), (err)))

static int mark_validated(struct run *r, struct err *err)
{
    const struct job_dataset dataset = {.examples = r->report.examples,
                                        .tokens = r->report.tokens,
                                        .trained_tokens = r->report.trained_tokens,
                                        .truncated_examples = r->report.truncated_examples,
                                        .untrained_examples = r->report.untrained_examples};
    int rc;

    PATIENTLY(rc, r, err, jobs_mark_validated(r->cx->db, &r->lease, &dataset, err));
    return rc;
}

static int mark_running(struct run *r, struct err *err)
{
    const struct job_plan plan = {
        .resolved = {.n_epochs = r->plan.n_epochs,
                     .batch_size = r->plan.batch_size,
                     .learning_rate_multiplier = r->plan.learning_rate_multiplier},
        .total_steps = r->plan.total_steps};
    int rc;

    PATIENTLY(rc, r, err, jobs_mark_running(r->cx->db, &r->lease, &plan, err));
    return rc;
}

static int flush_metrics(struct run *r, struct err *err)
{
    int rc;

    PATIENTLY(rc, r, err, worker_metrics_flush(r->metrics, err));
    return rc;
}

/* ------------------------------------------------------------------ opening */

static int find_blob(struct run *r, const char *owner, const char *sha256, const char *what,
                     char **path, struct err *err)
{
    if (sha256[0] == '\0')
        return 0;
    if (blob_path(r->cx->blobs, owner, sha256, path, err) != 0)
        return err_prefix(err, "%s", what);
    return 0;
}

static int find_files(struct run *r, struct err *err)
{
    const struct job *j = &r->job;

    if (find_blob(r, BLOB_OWNER_BASE, j->base_sha256, "base model", &r->base_path, err) != 0 ||
        find_blob(r, r->lease.project, j->training_sha256, "training file", &r->training_path,
                  err) != 0 ||
        find_blob(r, r->lease.project, j->validation_sha256, "validation file", &r->validation_path,
                  err) != 0 ||
        find_blob(r, r->lease.project, j->start_sha256, "fine-tuned model to continue from",
                  &r->start_path, err) != 0)
        return -1;
    return blob_staging_dir(r->cx->blobs, r->lease.job, r->lease.attempt, &r->staging, err);
}

/* An engine holds the base's weights in f32. */
static int check_memory(int64_t needed, const char *what, struct err *err)
{
    int64_t there = capacity_memory();

    if (needed <= there - MEMORY_MARGIN)
        return 0;
    return err_set_code(err, ERR_NO_MEMORY, "insufficient_memory", NULL,
                        "%s needs about %" PRId64 " MiB of memory and this machine has %" PRId64
                        " MiB: use a smaller model or batch, or a larger machine",
                        what, needed >> 20, there >> 20);
}

static int open_data(struct run *r, struct err *err)
{
    const struct engine_options engine = {.device = "cpu",
                                          .threads = (int32_t)r->cx->settings->threads};
    struct engine_dataset_options training = {.file_id = r->job.training_file};
    struct engine_dataset_options validation = {.file_id = r->job.validation_file,
                                                .validation = true};
    struct engine_dataset_report report;
    struct engine_base_info info;

    if (engine_base_read(r->base_path, &info, err) != 0 ||
        check_memory(2 * info.bytes_16bit, "the model", err) != 0 ||
        engine_open(&r->engine, r->base_path, &engine, err) != 0 ||
        engine_dataset_open(&r->training, r->engine, r->training_path, &training, &r->report,
                            err) != 0)
        return -1;
    if (r->validation_path == NULL)
        return 0;
    return engine_dataset_open(&r->validation, r->engine, r->validation_path, &validation, &report,
                               err);
}

static int open_trainer(struct run *r, struct err *err)
{
    const struct job *j = &r->job;
    const struct engine_train_options options = {
        .n_epochs = j->chosen.n_epochs,
        .batch_size = j->chosen.batch_size,
        .learning_rate_multiplier = j->chosen.learning_rate_multiplier,
        .seed = j->seed,
        .schedule =
            strcmp(j->schedule, "cosine") == 0 ? ENGINE_SCHEDULE_COSINE : ENGINE_SCHEDULE_LINEAR,
        .train_embeddings = j->train_embeddings,
        .start_delta = r->start_path};

    engine_trainer_free(r->trainer);
    r->trainer = NULL;
    return engine_trainer_open(&r->trainer, r->engine, r->training, r->validation, &options,
                               &r->plan, err);
}

/* Two recovery checkpoints lie side by side for a moment; artifacts are small beside them. */
static int check_capacity(struct run *r, struct err *err)
{
    int64_t needed, there;

    if (check_memory(r->plan.memory_bytes, "training", err) != 0)
        return -1;
    if (capacity_disk(blob_store_root(r->cx->blobs), &there, err) != 0)
        return -1;
    if (__builtin_mul_overflow(r->plan.checkpoint_bytes, 2, &needed) ||
        __builtin_add_overflow(needed, engine_info(r->engine)->bytes_16bit / 2, &needed))
        needed = INT64_MAX;
    if (needed <= there - DISK_MARGIN)
        return 0;
    return err_set_code(err, ERR_NO_SPACE, "insufficient_storage", NULL,
                        "training needs about %" PRId64 " MiB of disk for its checkpoints and "
                        "this machine has %" PRId64 " MiB left",
                        needed >> 20, there >> 20);
}

/* ------------------------------------------------------------------ recovery */

/* A checkpoint that can not be read costs time, not the job. */
static int resume(struct run *r, struct err *err)
{
    const struct job_recovery *from = &r->job.recovery;
    struct err why = {0};
    char *path = NULL;
    int rc = 0;

    if (from->name[0] == '\0')
        return 0;
    snprintf(r->recovery, sizeof r->recovery, "%s", from->name);
    if (blob_recovery_path(r->cx->blobs, from->name, &path, err) != 0)
        return -1;
    if (engine_trainer_load(r->trainer, path, &why) == 0) {
        r->step = (int32_t)from->step;
        log_info("%s goes on from step %d", r->lease.job, (int)r->step);
    } else {
        log_error("%s starts over: recovery checkpoint %s: %s", r->lease.job, from->name,
                  why.message);
        rc = open_trainer(r, err);
    }
    free(path);
    return rc;
}

static void remove_recovery(struct run *r, const char *name)
{
    char *path = NULL;

    if (name[0] == '\0' || blob_recovery_path(r->cx->blobs, name, &path, NULL) != 0)
        return;
    unlink(path); /* one that is left is the collector's */
    free(path);
}

static int save_recovery(struct run *r, struct err *err)
{
    struct job_recovery recovery = {.step = r->step, .bytes = r->plan.checkpoint_bytes};
    char old[96] = "";
    char *path = NULL;
    int rc = -1;

    /* What the checkpoint has behind it must be told, or a resumed attempt would leave a gap. */
    if (flush_metrics(r, err) != 0 ||
        blob_recovery_name(r->lease.job, r->lease.attempt, r->step, recovery.name,
                           sizeof recovery.name, err) != 0 ||
        blob_recovery_path(r->cx->blobs, recovery.name, &path, err) != 0)
        goto out;
    if (engine_trainer_save(r->trainer, path, err) != 0 ||
        worker_heartbeat_check(r->heartbeat, err) != 0) {
        unlink(path);
        goto out;
    }
    PATIENTLY(rc, r, err, jobs_set_recovery(r->cx->db, &r->lease, &recovery, old, err));
    if (rc == 0) {
        if (strcmp(old, recovery.name) != 0)
            remove_recovery(r, old);
        snprintf(r->recovery, sizeof r->recovery, "%s", recovery.name);
        r->saved_at = clock_now();
        r->saved_step = r->step;
    }
out:
    free(path);
    return rc;
}

/* ------------------------------------------------------------------ artifacts */

/* The delta as it is now, as a durable blob of the project. */
static int compress(struct run *r, struct err *err)
{
    char *path = NULL;
    int64_t bytes;
    int rc = -1;

    if (asprintf(&path, "%s/delta.safetensors", r->staging) < 0)
        return err_set(err, ERR_NO_MEMORY, "compress: out of memory");
    if (engine_trainer_compress(r->trainer, path, &r->delta, err) == 0 &&
        worker_heartbeat_check(r->heartbeat, err) == 0)
        rc = blob_adopt(r->cx->blobs, r->lease.project, path, r->artifact_sha256, &bytes, err);
    if (rc == 0)
        r->delta.bytes = bytes;
    free(path);
    return rc;
}

static int add_checkpoint(struct run *r, struct err *err)
{
    struct checkpoint_new checkpoint = {
        .step = r->step, .artifact_sha256 = r->artifact_sha256, .artifact_bytes = r->delta.bytes};
    int rc;

    worker_metrics_of_step(&r->last, &checkpoint.metrics);
    if (flush_metrics(r, err) != 0)
        return -1;
    PATIENTLY(rc, r, err, checkpoints_add(r->cx->db, &r->lease, &checkpoint, err));
    return rc;
}

/* ------------------------------------------------------------------ steps */

static int tell_progress(struct run *r, struct err *err)
{
    double left = r->step_seconds * (r->plan.total_steps - r->step);
    struct err progress = {0};

    if (clock_now() < r->progress_at + PROGRESS_SECONDS)
        return 0;
    r->progress_at = clock_now();
    if (jobs_progress(r->cx->db, &r->lease, r->step, left, &progress) == 0)
        return 0;
    if (progress.kind == ERR_UNAVAILABLE)
        return 0; /* training goes on; the heartbeat judges how long */
    *err = progress;
    return -1;
}

static int step(struct run *r, struct err *err)
{
    if (engine_trainer_step(r->trainer, &r->last, err) != 0)
        return -1;
    r->last_known = true;
    r->step = r->last.step;
    r->step_seconds =
        r->step_seconds == 0 ? r->last.seconds : 0.9 * r->step_seconds + 0.1 * r->last.seconds;
    if (worker_metrics_step(r->metrics, &r->last, err) != 0 || tell_progress(r, err) != 0 ||
        worker_heartbeat_check(r->heartbeat, err) != 0)
        return -1;
    if (r->last.finished)
        return 0; /* finish() makes the last checkpoint from the final artifact */
    /* Only the last three epochs' checkpoints are kept: the others need not be compressed. */
    if (r->last.epoch_end && r->last.epoch > r->plan.n_epochs - CHECKPOINTS_KEPT &&
        (compress(r, err) != 0 || add_checkpoint(r, err) != 0))
        return -1;
    if (worker_stopping() || clock_now() >= r->saved_at + r->cx->settings->recovery)
        return save_recovery(r, err);
    return 0;
}

/* ERR_CANCELLED without a cancelled job means that the worker stops: the caller tells them apart.
 */
static int train(struct run *r, struct err *err)
{
    r->saved_at = clock_now();
    while (r->step < r->plan.total_steps) {
        if (worker_stopping())
            return err_set(err, ERR_UNAVAILABLE, "the worker is stopping");
        if (step(r, err) != 0)
            return -1;
    }
    return flush_metrics(r, err);
}

/* ------------------------------------------------------------------ the end */

static int ask(struct run *r, struct engine_trainer *trainer, const struct engine_delta *delta,
               double *share, struct err *err)
{
    struct engine_recall recall;

    if (worker_stopping())
        return err_set(err, ERR_UNAVAILABLE, "the worker is stopping");
    if (engine_recall(r->engine, trainer, delta, r->training, &recall, err) != 0)
        return err_prefix(err, "recall");
    *share = recall.exact;
    return worker_heartbeat_check(r->heartbeat, err);
}

/* Does the model know its answers: as the base, as trained, and as served? */
static int measure_recall(struct run *r, struct err *err)
{
    struct engine_delta *delta = NULL;
    char *path = NULL;
    int rc = -1;

    if (!r->report.question_answer)
        return 0;
    if (blob_path(r->cx->blobs, r->lease.project, r->artifact_sha256, &path, err) != 0 ||
        engine_delta_open(&delta, r->engine, path, err) != 0)
        goto out;
    if (ask(r, NULL, NULL, &r->recall.base, err) != 0 ||
        ask(r, r->trainer, NULL, &r->recall.tuned, err) != 0 ||
        ask(r, NULL, delta, &r->recall.served, err) != 0)
        goto out;
    rc = 0;
out:
    engine_delta_free(delta);
    free(path);
    return rc;
}

static int commit(struct run *r, struct err *err)
{
    char result_sha256[SHA256_HEX];
    struct job_success success = {.artifact_sha256 = r->artifact_sha256,
                                  .recall = r->recall,
                                  .trained_tokens = r->plan.trained_tokens};
    int rc;

    PATIENTLY(rc, r, err,
              worker_metrics_result_file(r->cx->db, r->cx->blobs, &r->lease, result_sha256,
                                         &success.result_file.bytes, err));
    if (rc != 0)
        return -1;
    success.result_file.filename = "step_metrics.csv";
    success.result_file.sha256 = result_sha256;
    success.delta.bytes = r->delta.bytes;
    success.delta.ratio = r->delta.ratio;
    success.delta.relative_error = r->delta.relative_error;
    snprintf(success.delta.codec, sizeof success.delta.codec, "%s", r->delta.codec);
    if (worker_heartbeat_check(r->heartbeat, err) != 0)
        return -1;
    PATIENTLY(rc, r, err, jobs_commit_success(r->cx->db, &r->lease, &success, err));
    return rc;
}

static int finish(struct run *r, struct err *err)
{
    int rc;

    PATIENTLY(rc, r, err, jobs_progress(r->cx->db, &r->lease, r->step, 0, err));
    if (rc == 0)
        PATIENTLY(rc, r, err, jobs_mark_compressing(r->cx->db, &r->lease, err));
    if (rc != 0 || compress(r, err) != 0)
        return -1;
    /* An attempt that resumed behind the last step has its predecessor's row already. */
    if (r->last_known && add_checkpoint(r, err) != 0)
        return -1;
    /* Asking may take as long as training did: what is behind us must not be lost to it. */
    if (r->last_known && clock_now() >= r->saved_at + r->cx->settings->recovery / 2 &&
        save_recovery(r, err) != 0)
        return -1;
    return measure_recall(r, err) != 0 || commit(r, err) != 0 ? -1 : 0;
}

static int go(struct run *r, struct err *err)
{
    const struct worker_heartbeat_options heartbeat = {
        .url = r->cx->url, .interval = r->cx->settings->heartbeat, .fence = r->cx->settings->fence};

    if (worker_heartbeat_start(&r->heartbeat, &r->lease, &heartbeat, err) != 0)
        return -1;
    if (jobs_get(r->cx->db, r->lease.project, r->lease.job, &r->job, err) != 0 ||
        worker_metrics_open(&r->metrics, r->cx->db, &r->lease, err) != 0 ||
        find_files(r, err) != 0 || open_data(r, err) != 0 || mark_validated(r, err) != 0 ||
        open_trainer(r, err) != 0 || check_capacity(r, err) != 0 || resume(r, err) != 0 ||
        mark_running(r, err) != 0 || train(r, err) != 0)
        return -1;
    return finish(r, err);
}

/* ------------------------------------------------------------------ how it went */

/* What the client reads: its own faults in full, ours without paths and descriptors. */
static void client_words(const struct run *r, const struct err *why, struct err *out)
{
    *out = *why;
    switch (why->kind) {
    case ERR_NO_SPACE:
        if (out->code[0] == '\0')
            snprintf(out->code, sizeof out->code, "insufficient_storage");
        if (why->code[0] == '\0')
            snprintf(out->message, sizeof out->message,
                     "The server ran out of disk space while it worked on this job.");
        return;
    case ERR_NO_MEMORY:
        if (out->code[0] == '\0')
            snprintf(out->code, sizeof out->code, "insufficient_memory");
        return;
    case ERR_INVALID:
        return;
    default:
        snprintf(out->code, sizeof out->code, "internal_error");
        snprintf(out->message, sizeof out->message,
                 "The job failed for an internal reason; the server's log names %s.", r->lease.job);
    }
}

static void fail(struct run *r, const struct err *why)
{
    struct err told = {0}, err = {0};
    int rc;

    client_words(r, why, &told);
    PATIENTLY(rc, r, &err, jobs_commit_failure(r->cx->db, &r->lease, &told, &err));
    if (rc != 0)
        log_error("%s: its failure could not be stored: %s", r->lease.job, err.message);
    else
        remove_recovery(r, r->recovery[0] != '\0' ? r->recovery : r->job.recovery.name);
}

/* Handed back: the next worker goes on from the checkpoint. Where that can not be told, the lease
 * runs out by itself. */
static void hand_back(struct run *r)
{
    struct err err = {0};

    if (leases_release(r->cx->db, &r->lease, &err) != 0)
        log_warn("%s: the lease could not be handed back: %s", r->lease.job, err.message);
}

static void conclude(struct run *r, int rc, const struct err *err)
{
    if (rc == 0) {
        log_info("%s succeeded", r->lease.job);
        remove_recovery(r, r->recovery);
        return;
    }
    switch (err->kind) {
    case ERR_CANCELLED:
        log_info("%s was cancelled", r->lease.job);
        remove_recovery(r, r->recovery[0] != '\0' ? r->recovery : r->job.recovery.name);
        return;
    case ERR_FENCED:
        log_warn("%s: %s", r->lease.job, err->message);
        return;
    case ERR_UNAVAILABLE:
        log_info("%s is handed back: %s", r->lease.job, err->message);
        hand_back(r);
        return;
    default:
        log_error("%s failed: %s", r->lease.job, err->message);
        fail(r, err);
    }
}

void worker_job_run(const struct worker_job_context *context, const struct lease *lease)
{
    struct run r = {
        .cx = context, .lease = *lease, .recall = {.base = NAN, .tuned = NAN, .served = NAN}};
    struct err err = {0};
    int rc;

    log_info("%s, attempt %" PRId64, lease->job, lease->attempt);
    rc = go(&r, &err);
    /* A write that found the lease gone does not know why; the heartbeat asks. */
    if (rc != 0 && err.kind == ERR_FENCED && r.heartbeat != NULL)
        worker_heartbeat_explain(r.heartbeat, &err);
    conclude(&r, rc, &err);
    engine_trainer_free(r.trainer);
    engine_dataset_free(r.validation);
    engine_dataset_free(r.training);
    engine_free(r.engine);
    worker_metrics_free(r.metrics);
    worker_heartbeat_stop(r.heartbeat);
    if (r.staging != NULL)
        file_remove_tree(r.staging, NULL);
    free(r.staging);
    free(r.base_path);
    free(r.training_path);
    free(r.validation_path);
    free(r.start_path);
    job_release(&r.job);
}
