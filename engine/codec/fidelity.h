/* fidelity.h: what a compressed model costs, measured as it is served: the base with the delta in
 * the decoder, beside the tuned weights, on the same rows. What is held to the tuned weights may
 * also be a second full model. */
#ifndef GRAFT_CODEC_FIDELITY_H
#define GRAFT_CODEC_FIDELITY_H

#include "engine/codec/stage.h"
#include "engine/engine.h"
#include "engine/model.h"
#include "engine/trainer.h"

#define FIDELITY_TOKENS 2048 /* what a compression measures on, about */

struct fidelity_args {
    struct engine *engine;
    const struct model_weights *tuned; /* NULL: none, only the loss of what is served */
    const struct model_weights *other; /* what is served: these, or NULL: the base with the delta */
    const struct engine_delta *delta;  /* NULL: none */
    const struct trainer_source *examples;
    int64_t max_tokens; /* about so many: examples evenly spread over all; 0: every example */
    struct stage_listener listener; /* of "measure" */
};

struct fidelity {            /* nats a token; NAN where there are no such tokens, or no tuned */
    double kl, answer_kl;    /* KL(tuned ‖ served) over all tokens; over those that answer */
    double loss, tuned_loss; /* of the tokens that answer */
    int64_t tokens, answer_tokens;
};

/* Weights are those of the engine's model or of a twin of it, on its backend. Engine's thread. */
int fidelity_measure(struct fidelity *out, const struct fidelity_args *args, struct err *err);

#endif
