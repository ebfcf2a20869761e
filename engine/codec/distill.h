/* distill.h: the scales of a compressed difference, trained against the tuned model.
 *
 * What is in the signs stays; the scales (codec.h: scales) follow the gradient of the KL from the
 * tuned model's predictions, on all tokens of the examples, whole and thinned (distill_batch.h),
 * in logarithms by Adam with a rate that falls in a line to zero, and is the less the closer the
 * difference was to begin with. Where a codec says so (common_rate) all scales of a matrix have a
 * factor in common as well, which may go far: the noise of single rows is not in it. Takes memory
 * for the matrices of the blocks and their gradients, in f32, one training pass, and what the
 * teacher gave (lessons.h). */
#ifndef GRAFT_CODEC_DISTILL_H
#define GRAFT_CODEC_DISTILL_H

#include "engine/codec/compression.h"
#include "engine/codec/resume.h"
#include "engine/trainer.h"

#define DISTILL_ROWS 512  /* tokens of a step */
#define DISTILL_RATE 1e-2 /* of the first step, where the KL is far */
#define DISTILL_FAR 0.04  /* nats a token; below it the rate goes by the KL's root */
#define DISTILL_SETTLE \
    60 /* steps that rows and columns need for the whole rate: in fewer, noise wins */
#define DISTILL_KEEP 10 /* steps from one that is kept to the next */

struct distill_options {
    int32_t steps;
    int64_t seed; /* order of the examples */
    struct thread_pool *pool;
    struct stage_listener listener; /* of "distill" */
    const struct resume *resume;    /* where steps are kept and gone on from; NULL: nowhere */
};

/* `tuned`: on the engine's backend. A codec without scales, or no examples: nothing is done.
 * ERR_CANCELLED: whoever listens had it stopped, within a step; the scales are of no use. */
int distill(struct compression *compression, const struct codec *codec, struct engine *engine,
            const struct model_weights *tuned, const struct trainer_source *examples,
            const struct distill_options *options, struct err *err);

#endif
