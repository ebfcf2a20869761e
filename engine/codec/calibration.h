/* calibration.h: what errors in a fine-tune's matrices cost, measured: the second moments of each
 * matrix's inputs and of the gradients at its outputs (engine/model_moments.h), over examples that
 * look like what the model will be asked.
 *
 * The gradients are those of the true Fisher information: at every row, of prompt and answer alike,
 * of -log p(y) with y drawn from the tuned model itself. With a margin those of the answers'
 * margins are added, with random signs, so that in the mean their moments are; the Fisher
 * information of a model that is sure of its answers is blind to them. For a codec that has no use
 * for gradients (delta-come) the inputs alone will do, in forward passes without a loss; bitdelta
 * and lossless weigh nothing. Examples are taken in a random order until there are so many tokens
 * as below, the last one cut to what is left.
 *
 * One thread, that of the model's backend. Deterministic: a function of the weights, the examples
 * and the options; how sums are rounded depends on the device and its memory, not on what of that
 * is free. */
#ifndef GRAFT_CODEC_CALIBRATION_H
#define GRAFT_CODEC_CALIBRATION_H

#include "engine/codec/stage.h"
#include "engine/model.h"
#include "engine/trainer.h"

#define CALIBRATION_TOKENS 16384
/* Of inputs alone: so many, or two for each input of the widest matrix, up to those above; GPTQ's
 * rounding learns nothing from more. */
#define CALIBRATION_TOKENS_INPUTS 4096
#define CALIBRATION_ROWS 512 /* tokens of a micro-batch, or one longer example */
#define CALIBRATION_ROWS_DEVICE                                      \
    2048 /* a device of its own memory takes each sum there and back \
          */

/* By index of a tensor (model_tensor); NULL where that is not a matrix of a block. Symmetric. */
struct calibration {
    int32_t count;
    /* [cols, cols] Σ u·x·xᵀ / Σ u, u = ‖g‖²; 0 where no row has a gradient. Of inputs alone u = 1,
     * and matrices that read the same (q, k and v; gate and up) point to the same sums. */
    float **h;
    float **g;      /* [rows, rows] Σ g·gᵀ / tokens; each NULL of inputs alone */
    int64_t tokens; /* that were looked at */
};

struct calibration_options {
    int64_t seed;
    /* How much the answers' margins count: factor on their gradients (model_moments_args). Answers
     * are the rows whose next token has a weight in the examples. 0: not at all. */
    double margin;
    bool inputs_only;               /* no gradients: the margin is not looked at */
    struct stage_listener listener; /* of "statistics", after each layer */
};

/* `tuned` are weights of `model` in the memory of its backend. Takes on the host 4 bytes times the
 * squares of all matrices' sides, on the backend what model_moments_open takes. ERR_INVALID: no
 * tokens; what the model gives is not finite. ERR_NO_MEMORY. ERR_CANCELLED: the listener had it
 * stopped. *out is empty on failure. */
int calibration_measure(struct calibration *out, struct model *model,
                        const struct model_weights *tuned, const struct trainer_source *examples,
                        const struct calibration_options *options, struct err *err);
void calibration_free(struct calibration *c); /* a zeroed struct is fine */

#endif
