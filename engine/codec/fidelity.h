/* fidelity.h: what a compressed model costs, measured as it is served: the base with the delta in
 * the decoder, beside the tuned weights, on the same rows. */
#ifndef GRAFT_CODEC_FIDELITY_H
#define GRAFT_CODEC_FIDELITY_H

#include "engine/engine.h"
#include "engine/model.h"
#include "engine/trainer.h"

#define FIDELITY_TOKENS 2048 /* measured at most: examples evenly spread over all */
#define FIDELITY_ROWS 256    /* of an example: longer ones are cut */

struct fidelity {            /* nats a token; NAN where there are no such tokens */
    double kl, answer_kl;    /* KL(tuned ‖ served) over all tokens; over those that answer */
    double loss, tuned_loss; /* of the tokens that answer */
    int64_t tokens, answer_tokens;
};

int fidelity_measure(struct fidelity *out, struct engine *engine, const struct model_weights *tuned,
                     const struct engine_delta *delta, const struct trainer_source *examples,
                     struct err *err);

#endif
