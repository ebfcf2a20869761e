/* Before the first step. */
#include <inttypes.h>
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

#define HEAL_SECONDS 1
#define MEMORY_MARGIN (INT64_C(64) << 20) /* bytes left to the system */
/* Another process may have had the memory for a moment: the first time the same is tried again, and
 * gives the same bits. */
#define SHORTAGES_BEFORE_HALVES 2

/* ------------------------------------------------------------------ files */

static int warn(struct worker_run *r, const char *key, const char *text, struct err *err)
{
    return worker_metrics_tell(
        r->metrics, &(struct event_new){.level = "warn", .message = text, .key = key}, err);
}

static int find_blob(struct worker_run *r, const struct blob_wanted *want, char **path,
                     struct err *err)
{
    int fd;

    free(*path); /* of the time before */
    if (blob_path(r->cx->blobs, want->owner, want->sha256, path, err) != 0 ||
        blob_open_sound(r->cx->blobs, want, &fd, err) != 0)
        return -1;
    close(fd);
    return 0;
}

/* Until what lies at `path` is another file than it was; false: patience is at its end. */
static bool wait_for_change(struct worker_run *r, const char *path, double until, struct err *err)
{
    struct file_identity was = {0}, is = {0};

    (void)file_identify(path, &was);
    while (clock_now() < until) {
        worker_sleep(HEAL_SECONDS);
        if (worker_run_still_ours(r, err) != 0)
            return false;
        if (file_identify(path, &is) && !file_identity_equal(&was, &is))
            return true;
    }
    return false;
}

/* A damaged base fails every job of every client, and one that has come far loses what it has:
 * an operator may heal it meanwhile, by importing the same again. */
static int find_patiently(struct worker_run *r, const struct blob_wanted *want, char **path,
                          struct err *err)
{
    double until = clock_now() + r->cx->settings->disk_patience;
    bool wait = strcmp(want->owner, BLOB_OWNER_BASE) == 0 || r->job.recovery.name[0] != '\0';
    struct err stopped = {0};
    char text[256];

    while (find_blob(r, want, path, err) != 0) {
        if (!wait || strcmp(err->code, "damaged_file") != 0)
            return -1;
        snprintf(text, sizeof text,
                 "The bytes of `%.80s` on the server's disk are damaged: the job waits for them to "
                 "be stored again, for %.0f s at most.",
                 want->name, r->cx->settings->disk_patience);
        if (warn(r, "damaged-file", text, &stopped) != 0 ||
            !wait_for_change(r, *path, until, &stopped)) {
            if (err_is_set(&stopped))
                *err = stopped;
            return -1;
        }
        err_clear(err);
    }
    return 0;
}

/* What a job reads is what was stored, or it fails before hours have gone into it. The bases last:
 * they may be large. */
int worker_prepare_files(struct worker_run *r, struct err *err)
{
    const struct job *j = &r->job;
    const char *project = r->lease.project;
    struct {
        struct blob_wanted want;
        char **path;
    } file[] = {
        {{project, j->training_sha256, j->training_file, "training_file", worker_run_still_ours, r},
         &r->training_path},
        {{project, j->validation_sha256, j->validation_file, "validation_file",
          worker_run_still_ours, r},
         &r->validation_path},
        {{project, j->start_sha256, j->model, "model", worker_run_still_ours, r}, &r->start_path},
        {{BLOB_OWNER_BASE, j->base_sha256, j->base_name, "model", worker_run_still_ours, r},
         &r->base_path},
        {{BLOB_OWNER_BASE, j->tuned_sha256, j->tuned_model, "tuned", worker_run_still_ours, r},
         &r->tuned_path},
    };

    for (size_t i = 0; i < sizeof file / sizeof file[0]; i++)
        if (file[i].want.sha256[0] != '\0' &&
            find_patiently(r, &file[i].want, file[i].path, err) != 0)
            return -1;
    return 0;
}

static struct engine_options engine_options(const struct worker_run *r)
{
    return (struct engine_options){.device = r->cx->device,
                                   .threads = (int32_t)r->cx->settings->threads,
                                   .precision = settings_precision(r->cx->settings)};
}

/* What a job may take, where it computes; the base's own weights, if they are there already, are
 * given back to the sum: a plan counts them. */
static int64_t memory_there(struct worker_run *r)
{
    const struct engine_options options = engine_options(r);
    int64_t bytes, bytes_free = r->cx->presence->device.memory_free;

    if (devices_is_cpu(r->cx->device))
        return capacity_memory() - MEMORY_MARGIN;
    if (r->engine != NULL && engine_memory(r->engine, &bytes, &bytes_free))
        bytes_free += engine_weight_bytes(engine_info(r->engine), &options);
    return bytes_free;
}

static int check_memory(struct worker_run *r, int64_t needed, const char *what, struct err *err)
{
    int64_t there = memory_there(r);
    bool cpu = devices_is_cpu(r->cx->device);

    if (needed <= there)
        return 0;
    return err_set_code(err, ERR_NO_MEMORY, "insufficient_memory", NULL,
                        "%s needs about %" PRId64 " MiB of memory and %s%s has %" PRId64
                        " MiB: use a smaller model or batch, or a larger machine",
                        what, needed >> 20, cpu ? "this machine" : "device ",
                        cpu ? "" : r->cx->device, there >> 20);
}

/* A device that can not be opened at all is lost to this worker: the next process may have it, or
 * another device's worker the job. */
static int open_engine(struct worker_run *r, struct err *err)
{
    const struct engine_options options = engine_options(r);
    int rc;

    worker_watch_begin("opening the model", 0);
    rc = engine_open(&r->engine, r->base_path, &options, err);
    if (rc == 0)
        worker_presence_sample(r->cx->presence, r->engine);
    worker_watch_end();
    if (rc != 0 && err->kind == ERR_UNAVAILABLE && !devices_is_cpu(r->cx->device))
        err->kind = ERR_DEVICE;
    return rc == 0 ? 0 : worker_hide_place("base", r->job.base_sha256, err);
}

/* What compressing takes, the base included, with so many tokens of calibration rows. */
static int64_t compression_bytes(const struct worker_run *r, const struct engine_base_info *info,
                                 int64_t tokens)
{
    const struct job_compression *c = &r->job.compression;
    const struct engine_compress_options compression = {.codec =
                                                            c->codec[0] != '\0' ? c->codec : NULL,
                                                        .max_kl = c->max_kl,
                                                        .distill_steps = c->distill_steps};
    const struct engine_options options = engine_options(r);

    return engine_compress_bytes(info, &options, &compression, tokens);
}

/* What a compression of two models needs, and for a delta of so many bytes. */
static int check_compression(struct worker_run *r, const struct engine_base_info *info,
                             int64_t tokens, int64_t delta, struct err *err)
{
    return check_memory(r, compression_bytes(r, info, tokens) + delta,
                        "compressing one model's difference to another", err);
}

/* Before it is opened. */
static int check_model(struct worker_run *r, struct err *err)
{
    const struct engine_options options = engine_options(r);
    struct engine_base_info info, tuned;

    if (engine_base_read(r->base_path, &info, err) != 0)
        return worker_hide_place("base", r->job.base_sha256, err);
    if (r->tuned_path != NULL && engine_base_read(r->tuned_path, &tuned, err) != 0)
        return worker_hide_place("tuned model", r->job.tuned_sha256, err);
    return r->tuned_path != NULL
               ? check_compression(r, &info, 0, 0, err)
               : check_memory(r, engine_weight_bytes(&info, &options), "the model", err);
}

int worker_prepare_data(struct worker_run *r, struct err *err)
{
    struct engine_dataset_options training = {.file_id = r->job.training_file};
    struct engine_dataset_options validation = {.file_id = r->job.validation_file,
                                                .validation = true};
    struct engine_dataset_report report;

    if (check_model(r, err) != 0 || open_engine(r, err) != 0)
        return -1;
    if (r->training_path != NULL && engine_dataset_open(&r->training, r->engine, r->training_path,
                                                        &training, &r->report, err) != 0)
        return -1;
    if (r->validation_path == NULL)
        return 0;
    return engine_dataset_open(&r->validation, r->engine, r->validation_path, &validation, &report,
                               err);
}

/* ------------------------------------------------------------------ plan */

/* What was asked for, or what the most any codec takes of its own accord: a sixteenth of
 * the model, or a bit for each weight of a matrix and its scales; two bytes for each other
 * difference. */
static int64_t artifact_bytes(const struct worker_run *r)
{
    const struct engine_base_info *info = engine_info(r->engine);
    double ratio = r->job.compression.ratio;
    int64_t others = info->parameters - info->linear_parameters, matrices;
    /* What was tuned elsewhere has everything trained. */
    bool embeddings = r->job.train_embeddings || r->start_path != NULL || r->tuned_path != NULL;

    if (ratio > 0)
        return (int64_t)((double)info->bytes_16bit / ratio) + (INT64_C(1) << 20);
    matrices = info->linear_parameters / 7;
    if (matrices < info->bytes_16bit / 16)
        matrices = info->bytes_16bit / 16;
    return matrices + (embeddings ? 2 * others : 0) + (INT64_C(1) << 20);
}

/* The result must fit, or training would be for nothing. Two recovery checkpoints lie side by side
 * for a moment; without room for them there is only a risk, of which the client is told. A job that
 * has one goes on: the disk may be full of just that, its end waits for room and can give it up. */
static int check_disk(struct worker_run *r, struct err *err)
{
    int64_t artifact = artifact_bytes(r), both, there;
    char text[256];

    if (r->job.recovery.name[0] != '\0')
        return 0;
    if (capacity_disk(blob_store_root(r->cx->blobs), &there, err) != 0)
        return -1;
    if (artifact > there - CAPACITY_RESERVE)
        return err_set_code(err, ERR_NO_SPACE, "insufficient_storage", NULL,
                            "The fine-tuned model needs about %" PRId64 " MiB of disk and the "
                            "server has %" PRId64 " MiB left, of which it keeps %" PRId64
                            " for its database.",
                            (artifact >> 20) + 1, there >> 20, CAPACITY_RESERVE >> 20);
    if (__builtin_mul_overflow(r->plan.checkpoint_bytes, 2, &both) ||
        __builtin_add_overflow(both, artifact, &both))
        both = INT64_MAX;
    if (both <= there - CAPACITY_RESERVE)
        return 0;
    snprintf(text, sizeof text,
             "The server's disk has no room for recovery checkpoints (%" PRId64
             " MiB needed, %" PRId64 " MiB left): a crash would cost the whole run.",
             both >> 20, (there - CAPACITY_RESERVE) >> 20);
    return warn(r, "no-room-for-recovery", text, err);
}

/* Rows that count for less than the client thinks are said aloud, not only counted. */
static int tell_losses(struct worker_run *r, struct err *err)
{
    const struct engine_dataset_report *d = &r->report;
    char text[256];

    if (d->truncated_examples > 0) {
        snprintf(text, sizeof text,
                 "%" PRId64 " of %" PRId64 " examples are longer than the model's context and were "
                 "cut at the end (the longest has %d tokens): split them.",
                 d->truncated_examples, d->examples, (int)d->longest);
        if (warn(r, "examples-cut", text, err) != 0)
            return -1;
    }
    if (d->untrained_examples == 0)
        return 0;
    snprintf(text, sizeof text,
             "%" PRId64 " of %" PRId64 " examples train nothing: they have no assistant message of "
             "weight 1, or it was cut away.",
             d->untrained_examples, d->examples);
    return warn(r, "examples-untrained", text, err);
}

static struct engine_train_options train_options(const struct worker_run *r)
{
    const struct job *j = &r->job;

    return (struct engine_train_options){
        .n_epochs = j->chosen.n_epochs,
        .batch_size = j->chosen.batch_size,
        .learning_rate_multiplier = j->chosen.learning_rate_multiplier,
        .seed = j->seed,
        .schedule =
            strcmp(j->schedule, "cosine") == 0 ? ENGINE_SCHEDULE_COSINE : ENGINE_SCHEDULE_LINEAR,
        .train_embeddings = j->train_embeddings,
        .start_delta = r->start_path,
        .start_sha256 = j->start_sha256,
        .halved = r->shortages >= SHORTAGES_BEFORE_HALVES};
}

/* What is wrong with the files or the options, the plan has found: here it is the delta. */
static int open_trainer(struct worker_run *r, struct err *err)
{
    const struct engine_train_options options = train_options(r);
    int rc;

    worker_watch_begin("opening the trainer", 0);
    engine_trainer_free(r->trainer);
    r->trainer = NULL;
    rc = engine_trainer_open(&r->trainer, r->engine, r->training, r->validation, &options, &r->plan,
                             err);
    worker_watch_end();
    return rc == 0 ? 0 : worker_hide_place("delta", r->job.start_sha256, err);
}

static int make_plan(struct worker_run *r, struct err *err)
{
    const struct engine_train_options options = train_options(r);

    return engine_trainer_plan(r->engine, r->training, r->validation, &options, &r->plan, err);
}

static int halve(struct worker_run *r, struct err *err)
{
    r->shortages = SHORTAGES_BEFORE_HALVES;
    log_warn("%s is computed in halves: %s has too little memory", r->lease.job, r->cx->device);
    if (make_plan(r, err) != 0)
        return -1;
    return warn(
        r, "computed-in-halves",
        "The device has too little memory for the usual amount of tokens at once: steps are "
        "computed in halves, which takes longer and changes the result by rounding only.",
        err);
}

int64_t worker_prepare_bytes(const struct worker_run *r)
{
    const struct engine_options options = engine_options(r);
    const struct engine_base_info *info = engine_info(r->engine);
    int64_t more;

    if (!devices_is_cpu(r->cx->device)) /* there it is the host's, but for the weights */
        return r->plan.memory_bytes;
    more = compression_bytes(r, info, r->report.tokens) - engine_weight_bytes(info, &options);
    return r->plan.memory_bytes + (more > 0 ? more : 0);
}

int worker_prepare_trainer(struct worker_run *r, struct err *err)
{
    bool device = !devices_is_cpu(r->cx->device);

    if (tell_losses(r, err) != 0 || make_plan(r, err) != 0)
        return -1;
    if (device &&
        (r->shortages >= SHORTAGES_BEFORE_HALVES || r->plan.memory_bytes > memory_there(r)) &&
        halve(r, err) != 0)
        return -1;
    if (check_memory(r, worker_prepare_bytes(r),
                     device ? "training" : "training, and compressing what was trained,",
                     err) != 0 ||
        check_disk(r, err) != 0)
        return -1;
    return open_trainer(r, err);
}

int worker_prepare_compression(struct worker_run *r, struct err *err)
{
    int64_t delta = devices_is_cpu(r->cx->device) ? artifact_bytes(r) : 0;

    if (check_compression(r, engine_info(r->engine), r->report.tokens, delta, err) != 0)
        return -1;
    return check_disk(r, err); /* without checkpoints: only the result counts */
}

/* ------------------------------------------------------------------ resume */

static int load(struct worker_run *r, const char *path, struct err *err)
{
    int rc;

    worker_watch_begin("loading a checkpoint", 0);
    rc = engine_trainer_load(r->trainer, path, err);
    worker_watch_end();
    return rc;
}

/* No step will be made of which the last checkpoint could tell. */
static int read_last(struct worker_run *r, struct err *err)
{
    int rc;

    WORKER_RUN_PATIENTLY(rc, r, err,
                         worker_metrics_read_step(r->cx->db, &r->lease, r->step, &r->last, err));
    return rc;
}

int worker_prepare_resume(struct worker_run *r, struct err *err)
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
    if (load(r, path, &why) == 0) {
        r->step = r->saved_step = (int32_t)from->step;
        log_info("%s goes on from step %d", r->lease.job, (int)r->step);
        if (r->step == r->plan.total_steps)
            rc = read_last(r, err);
    } else if (why.kind == ERR_DEVICE) {
        *err = why;
        rc = -1;
    } else {
        log_error("%s starts over: recovery checkpoint %s: %s", r->lease.job, from->name,
                  why.message);
        rc = open_trainer(r, err);
    }
    free(path);
    return rc;
}
