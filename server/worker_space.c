/* What a run writes on its way, and what a full disk means for it: time, never the run.
 *
 * Three things want room, in rising order of worth. A recovery checkpoint: without a new one the
 * old one stays valid and a crash costs more. An epoch's checkpoint: one model less to choose from.
 * The result: it is waited for. To make room for the result the recovery checkpoint is given up,
 * but not before anything else has had its chance: until the result is committed, a crash would
 * then cost the whole run. */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/base/clock.h"
#include "engine/base/log.h"
#include "server/capacity.h"
#include "server/devices.h"
#include "server/worker.h"
#include "server/worker_run.h"
#include "server/worker_watch.h"
#include "storage/checkpoints.h"
#include "storage/collector.h"

#define GIVE_UP_SECONDS 10 /* of waiting, before the recovery checkpoint is given up */
#define PAUSE_SECONDS 1.0  /* between the first tries; each pause is longer, up to the next */
#define PAUSE_MAX_SECONDS 15.0

/* The disk's fault, not the job's or the machine's. */
static bool disk_failed(const struct err *err)
{
    return err->kind == ERR_NO_SPACE || err->kind == ERR_IO;
}

static int tell(struct worker_run *r, const char *level, struct err *err, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));
static int tell(struct worker_run *r, const char *level, struct err *err, const char *fmt, ...)
{
    char text[320];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    return worker_metrics_tell(r->metrics, &(struct event_new){.level = level, .message = text},
                               err);
}

/* ------------------------------------------------------------------ recovery checkpoints */

void worker_space_remove_recovery(struct worker_run *r, const char *name)
{
    char *path = NULL;

    if (name[0] == '\0' || blob_recovery_path(r->cx->blobs, name, &path, NULL) != 0)
        return;
    unlink(path); /* one that is left is the collector's */
    free(path);
}

/* Checkpoints may not take the database's last room: it may lie on the same disk. */
static int check_room(const struct worker_run *r, int64_t bytes, struct err *err)
{
    int64_t there;

    if (capacity_disk(blob_store_root(r->cx->blobs), &there, err) != 0)
        return -1;
    if (bytes <= there - CAPACITY_RESERVE)
        return 0;
    return err_set(err, ERR_NO_SPACE, "%lld MiB wanted, %lld MiB left", (long long)bytes >> 20,
                   (long long)there >> 20);
}

static int save(struct worker_run *r, const char *path, struct err *err)
{
    int rc;

    worker_watch_begin("saving a checkpoint", 0);
    rc = engine_trainer_save(r->trainer, path, err);
    worker_watch_end();
    return rc;
}

static int write_recovery(struct worker_run *r, struct err *err)
{
    struct job_recovery recovery = {.step = r->step, .bytes = r->plan.checkpoint_bytes};
    char old[96] = "";
    char *path = NULL;
    int rc = -1;

    /* What the checkpoint has behind it must be told, or a resumed attempt would leave a gap. */
    if (check_room(r, recovery.bytes, err) != 0 || worker_run_flush(r, err) != 0 ||
        blob_recovery_name(r->lease.job, r->lease.attempt, r->step, recovery.name,
                           sizeof recovery.name, err) != 0 ||
        blob_recovery_path(r->cx->blobs, recovery.name, &path, err) != 0)
        goto out;
    if (save(r, path, err) != 0 || worker_heartbeat_check(r->heartbeat, err) != 0) {
        unlink(path);
        goto out;
    }
    WORKER_RUN_PATIENTLY(rc, r, err, jobs_set_recovery(r->cx->db, &r->lease, &recovery, old, err));
    if (rc == 0) {
        if (strcmp(old, recovery.name) != 0)
            worker_space_remove_recovery(r, old);
        snprintf(r->recovery, sizeof r->recovery, "%s", recovery.name);
        r->saved_step = r->step;
    }
out:
    free(path);
    return rc;
}

int worker_space_recovery(struct worker_run *r, struct err *err)
{
    struct err why = {0};
    int rc = write_recovery(r, &why);

    r->saved_at = clock_now();
    if (rc == 0 && !r->recovery_missing)
        return 0;
    if (rc == 0) {
        r->recovery_missing = false;
        return tell(r, "info", err, "Recovery checkpoints are written again.");
    }
    if (!disk_failed(&why)) {
        *err = why;
        return -1;
    }
    log_warn("%s: no recovery checkpoint of step %d: %s", r->lease.job, (int)r->step, why.message);
    if (r->recovery_missing)
        return 0;
    r->recovery_missing = true;
    return tell(r, "warn", err,
                "The server could not write a recovery checkpoint (%s). Training goes on; until "
                "one is written again, a crash costs the work since step %d.",
                why.kind == ERR_NO_SPACE ? "its disk is full" : "its disk reports errors",
                r->recovery[0] != '\0' ? (int)r->saved_step : 0);
}

/* ------------------------------------------------------------------ deltas */

/* An epoch's delta is one of three and does not hold training up: it is neither distilled nor made
 * in many sizes. Which size keeps to a KL without distillation, and whether any does, is not known
 * then: where one is asked for it has the codec's own. */
static struct engine_compress_options compress_options(struct worker_run *r, bool final)
{
    const struct job_compression *c = &r->job.compression;

    return (struct engine_compress_options){.codec = c->codec[0] != '\0' ? c->codec : NULL,
                                            .ratio = c->ratio,
                                            .max_kl = final ? c->max_kl : 0,
                                            .distill_steps = final ? c->distill_steps : 0,
                                            .seed = r->job.seed,
                                            .calibration = r->training,
                                            .held_out = r->validation,
                                            .progress = worker_run_go_on,
                                            .context = r};
}

/* What can not be had is told in the engine's words, and is not the training file's fault; nor is
 * it the client's where they are about a file of the store. */
static int compression_failed(const struct worker_run *r, struct err *err)
{
    struct err why = *err;

    if (why.kind != ERR_INVALID || why.code[0] != '\0')
        return -1;
    if (strstr(why.message, blob_store_root(r->cx->blobs)) != NULL)
        return worker_hide_place("tuned model", r->job.tuned_sha256, err);
    err_clear(err);
    return err_set_code(err, ERR_INVALID, "compression_failed", NULL,
                        "The fine-tuned model could not be compressed: %s.", why.message);
}

static int run_codec(struct worker_run *r, const struct engine_compress_options *options,
                     const char *path, struct err *err)
{
    int rc;

    err_clear(&r->stopped);
    worker_watch_begin("compressing", 0);
    rc = r->trainer != NULL
             ? engine_trainer_compress(r->trainer, options, path, &r->delta, err)
             : engine_model_compress(r->engine, r->tuned_path, options, path, &r->delta, err);
    worker_watch_end();
    if (rc != 0)
        worker_run_explain_stop(r, err);
    return rc;
}

/* Where the device has no room for the model's passes beside training, even the second time: a
 * difference that is compressed by its own values alone is better than none. A KL can not be kept
 * to without measuring it. */
static int compress_if_it_fits(struct worker_run *r, const struct engine_compress_options *options,
                               const char *path, struct err *err)
{
    struct engine_compress_options without = *options;

    if (run_codec(r, options, path, err) == 0)
        return 0;
    if (err->kind != ERR_NO_MEMORY || devices_is_cpu(r->cx->device) ||
        r->shortages < WORKER_RUN_SHORTAGES_MAX || options->calibration == NULL ||
        options->max_kl > 0)
        return -1;
    log_warn("%s: %s", r->lease.job, err->message);
    err_clear(err);
    without.calibration = without.held_out = NULL;
    without.distill_steps = 0;
    if (worker_metrics_tell(r->metrics,
                            &(struct event_new){
                                .level = "warn",
                                .message =
                                    "The device has too little memory to run the model while "
                                    "it is compressed: what is lost was neither weighed by "
                                    "the training file's rows nor measured.",
                                .key = "compressed-without-rows",
                            },
                            err) != 0)
        return -1;
    return run_codec(r, &without, path, err);
}

/* The delta as it is now, as a durable blob of the project. */
static int compress(struct worker_run *r, bool final, struct err *err)
{
    const struct engine_compress_options options = compress_options(r, final);
    char *path = NULL;
    int64_t bytes;
    int rc;

    if (r->staging == NULL && /* a folder takes room as well */
        blob_staging_dir(r->cx->blobs, r->lease.job, r->lease.attempt, &r->staging, err) != 0)
        return -1;
    if (asprintf(&path, "%s/delta.safetensors", r->staging) < 0)
        return err_set(err, ERR_NO_MEMORY, "compress: out of memory");
    rc = compress_if_it_fits(r, &options, path, err);
    if (rc != 0)
        compression_failed(r, err);
    if (rc == 0)
        rc = worker_heartbeat_check(r->heartbeat, err);
    if (rc == 0)
        rc = blob_adopt(r->cx->blobs, r->lease.project, path, r->artifact_sha256, &bytes, err);
    if (rc == 0)
        r->delta.bytes = bytes;
    else
        unlink(path);
    free(path);
    return rc;
}

static int add_checkpoint(struct worker_run *r, struct err *err)
{
    struct checkpoint_new checkpoint = {
        .step = r->step, .artifact_sha256 = r->artifact_sha256, .artifact_bytes = r->delta.bytes};
    int rc;

    worker_metrics_of_step(&r->last, &checkpoint.metrics);
    if (worker_run_flush(r, err) != 0)
        return -1;
    WORKER_RUN_PATIENTLY(rc, r, err, checkpoints_add(r->cx->db, &r->lease, &checkpoint, err));
    return rc;
}

int worker_space_checkpoint(struct worker_run *r, struct err *err)
{
    struct err why = {0};

    if (compress(r, false, &why) == 0) {
        r->checkpoint_missing = false;
        return add_checkpoint(r, err);
    }
    if (!disk_failed(&why)) {
        *err = why;
        return -1;
    }
    log_warn("%s: no checkpoint of step %d: %s", r->lease.job, (int)r->step, why.message);
    if (r->checkpoint_missing)
        return 0;
    r->checkpoint_missing = true;
    return tell(r, "warn", err,
                "The checkpoint of step %d could not be stored (the server's disk %s) and is left "
                "out. Training goes on.",
                (int)r->step, why.kind == ERR_NO_SPACE ? "is full" : "reports errors");
}

/* ------------------------------------------------------------------ the result */

struct wait {
    const char *what; /* for the client */
    double began, pause;
    bool given_up; /* the recovery checkpoint */
};

/* What nobody owns goes first: it costs nothing. */
static void collect(struct worker_run *r)
{
    const struct settings *s = r->cx->settings;
    struct collector_options options = {.grace = (int64_t)s->grace,
                                        .staging_grace = COLLECTOR_STAGING_GRACE_SECONDS};
    struct collector_report report;
    struct err err = {0};

    if (options.staging_grace > options.grace)
        options.staging_grace = options.grace;
    if (collector_run(r->cx->db, r->cx->blobs, &options, &report, &err) != 0)
        log_warn("%s: could not collect what nobody owns: %s", r->lease.job, err.message);
}

/* The row first, so that it names nothing that is gone; but a database that waits for the same room
 * may not keep the room from it, and whoever resumes copes with a file that is absent. */
static int give_up_recovery(struct worker_run *r, struct wait *wait, struct err *err)
{
    const struct job_recovery none = {.name = ""};
    struct err why = {0};
    char old[96];

    wait->given_up = true;
    if (r->recovery[0] == '\0')
        return 0;
    if (jobs_set_recovery(r->cx->db, &r->lease, &none, old, &why) != 0 &&
        why.kind != ERR_UNAVAILABLE && why.kind != ERR_NO_SPACE) {
        *err = why;
        return -1;
    }
    worker_space_remove_recovery(r, r->recovery);
    r->recovery[0] = '\0';
    r->saved_step = 0;
    wait->pause = 0;
    return tell(r, "warn", err,
                "The recovery checkpoint was removed to make room for %s: a crash would now cost "
                "the whole run.",
                wait->what);
}

static int begin_wait(struct worker_run *r, struct wait *wait, struct err *err)
{
    wait->began = clock_now();
    wait->pause = PAUSE_SECONDS;
    collect(r);
    return tell(r, "warn", err, "The server's disk is full: %s waits for room, for %.0f s at most.",
                wait->what, r->cx->settings->disk_patience);
}

/* One pause of the wait; -1 when it is over. */
static int wait_on(struct worker_run *r, struct wait *wait, struct err *err)
{
    double patience = r->cx->settings->disk_patience;
    double half = patience / 2, waited;

    if (wait->began == 0) {
        if (begin_wait(r, wait, err) != 0)
            return -1;
    }
    waited = clock_now() - wait->began;
    if (!wait->given_up && waited >= (half < GIVE_UP_SECONDS ? half : GIVE_UP_SECONDS)) {
        if (give_up_recovery(r, wait, err) != 0)
            return -1;
    } else if (waited >= patience) {
        return err_set_code(err, ERR_NO_SPACE, "insufficient_storage", NULL,
                            "The server's disk was full for %.0f s: %s could not be stored.",
                            waited, wait->what);
    }
    if (wait->pause > patience - waited)
        wait->pause = patience > waited ? patience - waited : 0;
    worker_sleep(wait->pause);
    wait->pause = wait->pause == 0                      ? PAUSE_SECONDS
                  : wait->pause < PAUSE_MAX_SECONDS / 2 ? 2 * wait->pause
                                                        : PAUSE_MAX_SECONDS;
    return worker_run_still_ours(r, err);
}

typedef int work_fn(struct worker_run *run, struct err *err);

/* `work` until it succeeds, fails for another reason than room, or patience is at its end. */
static int with_patience(struct worker_run *r, const char *what, work_fn *work, struct err *err)
{
    struct wait wait = {.what = what};
    struct err why = {0};

    while (work(r, &why) != 0) {
        if (why.kind == ERR_NO_SPACE) {
            log_warn("%s: %s: %s", r->lease.job, what, why.message);
            if (wait_on(r, &wait, err) != 0)
                return -1;
        } else if (!worker_run_away(r, &why)) {
            *err = why;
            return -1;
        }
        err_clear(&why);
    }
    return wait.began == 0 ? 0 : tell(r, "info", err, "There was room for %s.", what);
}

static int compress_result(struct worker_run *r, struct err *err)
{
    return compress(r, true, err);
}

int worker_space_artifact(struct worker_run *r, struct err *err)
{
    if (with_patience(r, "the fine-tuned model", compress_result, err) != 0)
        return -1;
    return r->trainer != NULL ? add_checkpoint(r, err) : 0;
}

static int write_result_file(struct worker_run *r, struct err *err)
{
    return worker_metrics_result_file(r->cx->db, r->cx->blobs, &r->lease, r->result_sha256,
                                      &r->result_bytes, err);
}

int worker_space_result_file(struct worker_run *r, struct err *err)
{
    return with_patience(r, "the result file", write_result_file, err);
}
