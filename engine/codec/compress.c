/* The compressions of engine.h: a tuned model's weights, from a trainer or a file, through
 * statistics, codec, distillation and measurement to an artifact with its report. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/clock.h"
#include "engine/codec/compress_run.h"
#include "engine/codec/distill.h"
#include "engine/codec/fidelity.h"
#include "engine/codec/lora.h"
#include "engine/codec/report.h"
#include "engine/codec/tuned.h"
#include "engine/engine_parts.h"
#include "engine/recall.h"

#define CALIBRATION_MARGIN 10 /* of the answers' margins beside the Fisher of all tokens */
#define PREDICT_LOWEST 4      /* ratio of the largest file predicted; of each next, twice that */
#define PREDICT_SIZES 8

static struct stage_listener listener_of(const struct compress_run *r)
{
    return (struct stage_listener){r->options->progress, r->options->context};
}

/* ------------------------------------------------------------------ options */

static int32_t steps_asked(const struct engine_compress_options *o, const struct codec *codec)
{
    return o->distill_steps >= 0 ? o->distill_steps : codec->distill_steps;
}

/* Parts before distillation are kept, and its steps. NULL: there will be some. */
static const char *nothing_kept(const struct engine_compress_options *o, const struct codec *codec)
{
    if (o->max_kl > 0)
        return "a search for max_kl starts over";
    if (!codec->scales)
        return "this codec is not distilled";
    if (!o->calibration)
        return "without calibration rows nothing is distilled";
    return steps_asked(o, codec) > 0 ? NULL : "no steps of distillation are asked for";
}

static int check_options(const struct engine_compress_options *o, const struct codec *codec,
                         struct err *err)
{
    int asked = (o->ratio != 0) + (o->bytes != 0) + (o->max_kl != 0);

    if (!codec)
        return err_set(err, ERR_INVALID, "there is no codec \"%.32s\": %s", o->codec,
                       codec_names());
    if (asked > 0 && codec->own_size)
        return err_set(err, ERR_INVALID,
                       "%s has the size that comes of what it keeps; leave out ratio, bytes and "
                       "max_kl, or choose another codec",
                       codec->name);
    if (asked > 1)
        return err_set(err, ERR_INVALID, "only one of ratio, bytes and max_kl can be asked for");
    if (o->ratio != 0 && !(o->ratio >= 1 && o->ratio <= 1024))
        return err_set(err, ERR_INVALID, "the ratio is %g: it must be between 1 and 1024",
                       o->ratio);
    if (o->bytes < 0)
        return err_set(err, ERR_INVALID, "a delta of %lld bytes can not be had",
                       (long long)o->bytes);
    if (o->max_kl != 0 && !(o->max_kl > 0 && isfinite(o->max_kl)))
        return err_set(err, ERR_INVALID, "max_kl is %g: it must be above 0", o->max_kl);
    if (o->max_kl > 0 && !o->calibration && !o->held_out)
        return err_set(err, ERR_INVALID,
                       "max_kl needs rows to measure on: calibration or held out");
    if (o->resume && nothing_kept(o, codec))
        return err_set(err, ERR_INVALID, "resume has nothing to go on from: %s",
                       nothing_kept(o, codec));
    return 0;
}

/* That part of the model; or of the matrices alone, where what changed beside them would take too
 * much of it: embeddings, or the names in a very small model. */
int64_t compress_run_bytes(const struct compress_run *r, double ratio)
{
    const struct engine_base_info *info = engine_info(r->engine);
    int64_t bytes = (int64_t)((double)info->bytes_16bit / ratio);
    int64_t matrices = (int64_t)(2 * (double)info->linear_parameters / ratio);

    if (bytes < r->budget.overhead + matrices)
        bytes = r->budget.overhead + matrices;
    return bytes > r->budget.least ? bytes : r->budget.least;
}

double compress_run_highest(const struct compress_run *r)
{
    const struct engine_base_info *info = engine_info(r->engine);
    double model = (double)info->bytes_16bit / (double)r->budget.least;
    double scales = (double)(r->budget.least - r->budget.overhead);
    double matrices = 2 * (double)info->linear_parameters / fmax(scales, 1);

    return fmax(model, matrices);
}

static int bytes_asked(const struct compress_run *r, int64_t *bytes, struct err *err)
{
    const struct engine_compress_options *o = r->options;

    if (o->ratio == 0 && o->bytes == 0) {
        *bytes = r->codec->ratio > 0 ? compress_run_bytes(r, r->codec->ratio) : INT64_MAX;
        return 0;
    }
    *bytes = o->bytes;
    if (o->ratio != 0)
        *bytes = (int64_t)((double)engine_info(r->engine)->bytes_16bit / o->ratio);
    return compression_check(r->compression, *bytes, report_room(r->source.count), err);
}

bool compress_run_distills(const struct compress_run *r)
{
    return r->codec->scales && r->calibration.count > 0 && steps_asked(r->options, r->codec) > 0;
}

/* ------------------------------------------------------------------ file and report */

static int report_text(const struct compress_run *r, const struct engine_delta_report *report,
                       char **text, struct err *err)
{
    return report_json(text, report, r->options->held_out != NULL, r->source.count, r->bytes,
                       r->error, r->norm, err);
}

/* What was made, as a draft; in the report's place are blanks, until it is known. */
static int write_draft(struct compress_run *r, struct err *err)
{
    struct engine_delta_report *report = r->report;
    const struct engine_base_info *info = engine_info(r->engine);
    double error, norm;
    char *blanks;
    int rc;

    if (report_text(r, NULL, &blanks, err))
        return -1;
    rc = compression_write(r->compression, r->draft.path, blanks, &report->bytes, &error, &norm,
                           err);
    free(blanks);
    if (rc)
        return -1;
    report->ratio = (double)info->bytes_16bit / (double)report->bytes;
    report->linear_bytes = 0;
    for (int32_t i = 0; i < r->source.count; i++) {
        error += r->error[i];
        norm += r->norm[i];
        report->linear_bytes += r->bytes[i];
    }
    report->linear_ratio = report->linear_bytes
                               ? 2 * (double)info->linear_parameters / (double)report->linear_bytes
                               : NAN;
    report->relative_error = norm > 0 ? sqrt(error / norm) : 0;
    return 0;
}

int compress_run_keep(struct compress_run *r, struct err *err)
{
    char *text;
    int rc;

    if (report_text(r, r->report, &text, err))
        return -1;
    rc = draft_keep(&r->draft, text, err);
    free(text);
    return rc;
}

/* The adapter's own parts. */
static int import(struct compress_run *r, struct err *err)
{
    for (int32_t i = 0; i < r->source.count; i++)
        if (compression_changed(r->compression, i) &&
            compression_set_parts(r->compression, i, peft_parts(r->adapter, i), err))
            return -1;
    return 0;
}

int compress_run_make(struct compress_run *r, int64_t bytes, struct err *err)
{
    if (r->codec->imports) {
        if (import(r, err))
            return -1;
    } else if (compression_run(r->compression, bytes, report_room(r->source.count),
                               &r->report->predicted_kl, err)) {
        return -1;
    }
    if (r->report->calibration_tokens == 0)
        r->report->predicted_kl = NAN; /* in the plain metric it is no KL */
    for (int32_t i = 0; i < r->source.count; i++)
        r->bytes[i] = compression_part_bytes(r->compression, i);
    return 0;
}

/* Scales against the tuned model; nothing where that is not wanted. */
static int refine(struct compress_run *r, struct err *err)
{
    const struct engine_compress_options *o = r->options;
    const struct distill_options options = {.steps = steps_asked(r->options, r->codec),
                                            .seed = o->seed,
                                            .pool = r->pool,
                                            .listener = listener_of(r),
                                            .resume = r->resume.scales ? &r->resume : NULL};
    double from = clock_now();

    if (!compress_run_distills(r))
        return 0;
    if (distill(r->compression, r->codec, r->engine, r->tuned, &r->calibration, &options, err))
        return err_prefix(err, "distillation");
    r->report->distill_steps = options.steps;
    r->report->distill_seconds += clock_now() - from;
    return 0;
}

static void add_point(struct engine_delta_curve *c, int64_t bytes, double kl)
{
    if (c->count == ENGINE_DELTA_POINTS || !isfinite(kl))
        return;
    c->bytes[c->count] = bytes;
    c->kl[c->count++] = kl;
}

/* As it will be served: the draft is opened like any other file. */
static int measure_draft(struct compress_run *r, struct err *err)
{
    struct engine_delta_report *report = r->report;
    struct engine_delta *delta = NULL;
    struct fidelity found;
    double from = clock_now();
    int rc = -1;

    if (r->measured.count == 0)
        return 0;
    if (engine_delta_open(&delta, r->engine, r->draft.path, err) ||
        fidelity_measure(&found,
                         &(struct fidelity_args){.engine = r->engine,
                                                 .tuned = r->tuned,
                                                 .delta = delta,
                                                 .examples = &r->measured,
                                                 .max_tokens = FIDELITY_TOKENS,
                                                 .listener = listener_of(r)},
                         err))
        goto out;
    report->measured_kl = found.kl;
    report->answer_kl = found.answer_kl;
    report->held_out_loss = found.loss;
    report->tuned_loss = found.tuned_loss;
    report->measured_tokens = found.tokens;
    report->measure_seconds += clock_now() - from;
    add_point(&report->tried, report->bytes, found.kl);
    rc = 0;
out:
    engine_delta_free(delta);
    return rc;
}

int compress_run_measure(struct compress_run *r, struct err *err)
{
    return write_draft(r, err) || measure_draft(r, err) ? -1 : 0;
}

int compress_run_finish(struct compress_run *r, bool distilled, struct err *err)
{
    r->report->distill_steps = 0;
    if (distilled && refine(r, err))
        return -1;
    return compression_measure(r->compression, r->error, r->norm, err) ||
                   compress_run_measure(r, err)
               ? -1
               : 0;
}

/* ------------------------------------------------------------------ the whole of it */

static int take_statistics(struct compress_run *r, struct err *err)
{
    const struct calibration_options options = {.seed = r->options->seed,
                                                .margin = CALIBRATION_MARGIN,
                                                .inputs_only = !r->codec->gradients,
                                                .listener = listener_of(r)};
    double from = clock_now();

    if (!r->codec->inputs || r->calibration.count == 0)
        return 0;
    if (calibration_measure(&r->statistics, r->engine->model, r->tuned, &r->calibration, &options,
                            err))
        return err_prefix(err, "statistics");
    r->report->calibration_tokens = r->statistics.tokens;
    r->report->statistics_seconds = clock_now() - from;
    return 0;
}

/* *bytes: of the file; 0: yet to be searched for. */
static int open_run(struct compress_run *r, int64_t *bytes, struct err *err)
{
    const struct engine_compress_options *o = r->options;
    size_t count;
    struct compression_options options = {.codec = r->codec, .listener = listener_of(r)};

    r->calibration = trainer_source_of(o->calibration);
    r->measured = trainer_source_of(o->held_out ? o->held_out : o->calibration);
    if (artifact_tensors_of_model(r->engine->model, &r->tensor, &r->source.count, err) ||
        thread_pool_open(&r->pool, r->engine->threads, err))
        return -1;
    r->source.tensor = r->tensor;
    r->source.base_digest = engine_info(r->engine)->digest;
    count = (size_t)r->source.count;
    r->error = calloc(count + 1, sizeof *r->error);
    r->norm = calloc(count + 1, sizeof *r->norm);
    r->bytes = calloc(count + 1, sizeof *r->bytes);
    if (!r->error || !r->norm || !r->bytes)
        return err_set(err, ERR_NO_MEMORY, "no memory for a report");
    options.pool = r->pool;
    /* What can not be had is refused before anything that takes its time. */
    if (compression_open(&r->compression, &r->source, &options, err) ||
        compression_budget(r->compression, report_room(r->source.count), &r->budget, err) ||
        (o->max_kl == 0 && bytes_asked(r, bytes, err)))
        return -1;
    return 0;
}

/* What other sizes would cost, for who draws the report: plans alone are made for it. */
static int predict(struct compress_run *r, struct err *err)
{
    double ratio = PREDICT_LOWEST, highest = compress_run_highest(r);

    for (int i = 0; i < PREDICT_SIZES && ratio <= highest; i++, ratio *= 2) {
        int64_t bytes = compress_run_bytes(r, ratio);
        double kl;

        if (r->report->calibration_tokens == 0)
            break;
        if (compression_predict(r->compression, bytes, report_room(r->source.count), &kl, err))
            return -1;
        add_point(&r->report->predicted, bytes, kl);
    }
    return 0;
}

static int prepare(struct compress_run *r, struct err *err)
{
    if (take_statistics(r, err) ||
        compression_decompose(r->compression, r->statistics.h, r->statistics.g, err))
        return -1;
    return predict(r, err);
}

/* Parts from an interrupted run, or new ones, which are kept for the next. */
static int make_or_resume(struct compress_run *r, int64_t bytes, struct err *err)
{
    const struct resume_key key = {.source = &r->source,
                                   .codec = r->codec,
                                   .backend = r->engine->backend,
                                   .bytes = bytes,
                                   .seed = r->options->seed,
                                   .steps = steps_asked(r->options, r->codec),
                                   .calibration = &r->calibration};
    struct engine_delta_report *report = r->report;
    struct resume_facts facts;
    bool found = false;

    if (!r->options->resume || !compress_run_distills(r))
        return prepare(r, err) || compress_run_make(r, bytes, err) ? -1 : 0;
    if (resume_open(&r->resume, r->draft.place, &key, err) ||
        resume_load_parts(&r->resume, &r->source, r->compression, &facts, &found, err))
        return -1;
    if (!found) {
        if (prepare(r, err) || compress_run_make(r, bytes, err))
            return -1;
        facts = (struct resume_facts){report->predicted_kl, report->calibration_tokens,
                                      report->predicted};
        return resume_save_parts(&r->resume, r->compression, &facts, err);
    }
    report->predicted_kl = facts.predicted_kl;
    report->calibration_tokens = facts.calibration_tokens;
    report->predicted = facts.predicted;
    for (int32_t i = 0; i < r->source.count; i++)
        r->bytes[i] = compression_part_bytes(r->compression, i);
    return 0;
}

static void close_run(struct compress_run *r)
{
    compression_free(r->compression);
    calibration_free(&r->statistics);
    thread_pool_free(r->pool);
    free(r->tensor);
    free(r->error);
    free(r->norm);
    free(r->bytes);
}

/* To a draft that is kept. */
static int run(struct compress_run *r, struct err *err)
{
    int64_t bytes = 0;

    if (open_run(r, &bytes, err))
        return -1;
    if (r->options->max_kl > 0)
        return prepare(r, err) || compress_search(r, err) ? -1 : 0;
    if (make_or_resume(r, bytes, err))
        return -1;
    calibration_free(&r->statistics); /* no more parts will be made: room for the distillation */
    return compress_run_finish(r, true, err) || compress_run_keep(r, err) ? -1 : 0;
}

/* Does each of the three know the answers: the base, the tuned model, and what is to be served? */
static int ask_all(const struct compress_run *r, struct err *err)
{
    struct engine_delta_report *report = r->report;
    double *share[] = {&report->base_recall, &report->tuned_recall, &report->served_recall};
    struct engine_delta *delta = NULL;
    int rc = engine_delta_open(&delta, r->engine, r->draft.kept, err);

    for (int i = 0; i < 3 && !rc; i++) {
        const struct recall_args args = {.weights = i == 1 ? r->tuned : NULL,
                                         .delta = i == 2 ? delta : NULL,
                                         .dataset = r->options->calibration,
                                         .questions = r->questions,
                                         .listener = listener_of(r),
                                         .round = i,
                                         .rounds = 3};
        struct engine_recall found;

        rc = recall_measure(r->engine, &args, &found, err);
        if (!rc) {
            *share[i] = found.exact;
            report->recall_asked = found.asked;
        }
    }
    engine_delta_free(delta);
    return rc;
}

/* adapter: what is to be compressed is one. */
static int choose(struct compress_run *r, const struct engine_compress_options *options,
                  bool adapter, struct err *err)
{
    r->options = options;
    r->codec = codec_find(options->codec ? options->codec : codec_default());
    if (check_options(options, r->codec, err))
        return -1;
    return r->codec->imports && !adapter ? lora_refuse(err) : 0;
}

/* Of what was chosen. */
static int compress(struct compress_run *r, const char *path, struct engine_delta_report *report,
                    struct err *err)
{
    double from = clock_now();
    int rc;

    *report = (struct engine_delta_report){.predicted_kl = NAN,
                                           .measured_kl = NAN,
                                           .answer_kl = NAN,
                                           .held_out_loss = NAN,
                                           .tuned_loss = NAN};
    snprintf(report->codec, sizeof report->codec, "%s", r->codec->name);
    r->report = report;
    rc = draft_open(&r->draft, path, err) || run(r, err) ? -1 : 0;
    close_run(r);
    report->seconds = clock_now() - from;
    /* Asked before it is at its place: who stops that keeps the file that was there before. */
    if (!rc && ((r->questions > 0 && ask_all(r, err)) || draft_place(&r->draft, err)))
        rc = -1;
    if (!rc && r->resume.scales)
        resume_remove(&r->resume);
    resume_close(&r->resume);
    draft_close(&r->draft);
    return rc;
}

int engine_trainer_compress(struct engine_trainer *trainer,
                            const struct engine_compress_options *options, const char *out_path,
                            struct engine_delta_report *report, struct err *err)
{
    struct compress_run r = {.engine = trainer_engine(trainer),
                             .tuned = trainer_weights(trainer),
                             .source = {.read = trainer_read, .context = trainer}};

    return choose(&r, options, false, err) ? -1 : compress(&r, out_path, report, err);
}

bool engine_codec_known(const char *name)
{
    return codec_find(name) != NULL;
}

const char *engine_codec_names(void)
{
    return codec_names();
}

bool engine_codec_sized(const char *name)
{
    const struct codec *codec = codec_find(name);

    return codec && !codec->own_size;
}

bool engine_codec_makes(const char *name)
{
    const struct codec *codec = codec_find(name);

    return codec && !codec->imports;
}

const char *engine_codec_makers(void)
{
    return codec_makers();
}

/* ------------------------------------------------------------------ a model tuned elsewhere */

int engine_model_compress(struct engine *engine, const char *tuned_path,
                          const struct engine_compress_options *options, const char *out_path,
                          struct engine_delta_report *report, struct err *err)
{
    bool runs = options->calibration || options->held_out;
    struct compress_run r = {.engine = engine, .source = {.read = tuned_read, .any_thread = true}};
    struct tuned *tuned;
    int rc;

    if (choose(&r, options, peft_is_adapter(tuned_path), err) ||
        tuned_open(&tuned, engine, tuned_path, runs, err))
        return -1;
    r.source.context = tuned;
    r.tuned = tuned_weights(tuned);
    r.adapter = tuned_adapter(tuned);
    r.questions = options->calibration ? options->recall_questions : 0;
    rc = compress(&r, out_path, report, err);
    tuned_free(tuned);
    return rc;
}
