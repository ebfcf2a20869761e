/* trainer.h: an open training job, as the engine's own modules see it beside engine.h: recall asks
 * its weights, the codecs read them.
 *
 * A trainer has its own F32 copy of everything it trains, and in precision BF16 beside it a BF16
 * copy of the matrices, which is what stages read; what is frozen (embeddings, unless asked for)
 * stays the base's memory. One step takes batch_size examples in the seeded order of the
 * epoch, packs them back to back, and cuts them into micro-batches of at most TRAINER_ROWS tokens
 * (or one longer example): a fixed cut, so that the result depends neither on the machine's memory
 * nor on its threads. Only where that was too much for a device (options.halved) is it half as
 * many, and then sums are rounded otherwise.
 *
 * AdamW with β 0.9 and 0.99 (not 0.999: a job has tens to hundreds of steps, and the second moment
 * must follow within them), ε 1e-8, no weight decay, gradients clipped to a norm of 1; the rate
 * rises over the first tenth of the steps (at most TRAINER_WARM_UP) and then falls to zero, in a
 * line or a cosine. */
#ifndef GRAFT_TRAINER_H
#define GRAFT_TRAINER_H

#include "engine/dataset.h"
#include "engine/engine.h"
#include "engine/model.h"

#define TRAINER_ROWS 1024      /* tokens of a micro-batch */
#define TRAINER_WARM_UP 50     /* steps */
#define TRAINER_BASE_RATE 1e-4 /* what a learning_rate_multiplier of 1 means */

/* Examples from anywhere: a dataset, or a bench's random tokens. They must outlive the trainer. */
struct trainer_source {
    const void *context;
    int64_t count; /* 0: none */
    struct dataset_example (*example)(const void *context, int64_t i);
};

/* Those of a dataset; NULL: none. */
struct trainer_source trainer_source_of(const struct engine_dataset *dataset);

/* engine_trainer_open on such examples; `validation` may be NULL. */
int trainer_open(struct engine_trainer **out, struct engine *engine,
                 const struct trainer_source *train, const struct trainer_source *validation,
                 const struct engine_train_options *options, struct engine_train_plan *plan,
                 struct err *err);

/* The weights as they are now: valid until the next step or load, gone with the trainer. */
const struct model_weights *trainer_weights(const struct engine_trainer *trainer);
struct engine *trainer_engine(const struct engine_trainer *trainer);
/* Does this tensor (index as in model_tensor) have a copy of its own? If not, tuned is base. */
bool trainer_trains(const struct engine_trainer *trainer, int32_t index);
/* Elements [from, from + count) of tensor `index`, of the base and as they are now, to host memory.
 * `trainer` is a struct engine_trainer *: the signature is that of artifact_source.read. */
int trainer_read(void *trainer, int32_t index, int64_t from, int64_t count, float *base,
                 float *tuned, struct err *err);

#endif
