/* compress_run.h: one compression while it runs, as the files that make it share it:
 *
 *   compress.c         its course: options, statistics, parts, distillation, file, measurement
 *   compress_search.c  the smallest file that keeps to a KL
 *
 * Nothing outside these includes it. */
#ifndef GRAFT_CODEC_COMPRESS_RUN_H
#define GRAFT_CODEC_COMPRESS_RUN_H

#include "engine/codec/calibration.h"
#include "engine/codec/compression.h"
#include "engine/codec/draft.h"
#include "engine/codec/kl_curve.h"
#include "engine/codec/peft.h"
#include "engine/codec/resume.h"
#include "engine/engine.h"
#include "engine/trainer.h"

struct compress_run {
    struct engine *engine;
    const struct model_weights *tuned; /* on the engine's backend; NULL: nothing is run */
    const struct peft *adapter;        /* that the tuned model is; or NULL */
    const struct engine_compress_options *options;
    const struct codec *codec;
    struct artifact_source source;
    struct artifact_tensor *tensor; /* source.tensor, owned */
    struct thread_pool *pool;
    struct trainer_source calibration, measured;
    struct calibration statistics; /* empty: none */
    struct compression *compression;
    struct budget budget; /* of its file */
    double *error, *norm; /* [count] */
    int64_t *bytes;       /* [count] */
    struct engine_delta_report *report;
    struct resume resume;  /* zeroed: nothing is kept */
    struct kl_curve plain; /* of what was tried without distillation */
    struct draft draft;
    int64_t questions; /* that are asked in the end; 0: none */
};

/* Bytes of a file of that ratio to the 16-bit base. Where what changed beside the matrices is more
 * than its share, that and the matrices in this ratio to theirs; never fewer than can be had. */
int64_t compress_run_bytes(const struct compress_run *run, double ratio);
/* The ratio from which on these are the fewest that can be had. */
double compress_run_highest(const struct compress_run *run);
bool compress_run_distills(const struct compress_run *run); /* it may */

/* Parts for a file of so many bytes. */
int compress_run_make(struct compress_run *run, int64_t bytes, struct err *err);
/* What was made, as a draft, and what that costs, as it will be served: to the report. */
int compress_run_measure(struct compress_run *run, struct err *err);
/* The same to its end: first distilled, if that is wanted, and held to the difference. */
int compress_run_finish(struct compress_run *run, bool distilled, struct err *err);
/* The draft, with its report: it is the best of what was tried. */
int compress_run_keep(struct compress_run *run, struct err *err);

/* ------------------------------------------------------------------ compress_search.c */

/* Behind statistics and decomposition: keeps the smallest file found whose measured KL is not above
 * options->max_kl; the report is of that one. ERR_INVALID: not even the largest that is tried keeps
 * to it. */
int compress_search(struct compress_run *run, struct err *err);

#endif
