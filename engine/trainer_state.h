/* trainer_state.h: what trainer.c, trainer_plan.c, trainer_weights.c and trainer_checkpoint.c share
 * of one trainer. */
#ifndef GRAFT_TRAINER_STATE_H
#define GRAFT_TRAINER_STATE_H

#include "engine/base/sha256.h"
#include "engine/engine_parts.h"
#include "engine/trainer.h"

/* The examples of a dataset that train something, and of each how many rows need computing: those
 * before its last trained token (later ones change nothing). */
struct trainer_examples {
    struct trainer_source source;
    int32_t *index;          /* [count] in the source */
    int32_t *rows;           /* [count] */
    int32_t count, longest;  /* longest: most rows of one */
    int64_t tokens, trained; /* of all of them */
};

/* One micro-batch being filled. */
struct trainer_micro {
    struct batch batch;
    int32_t *token, *position, *target, *cu_seqlens;
    float *weight;
};

struct engine_trainer {
    struct engine *engine;
    struct engine_train_options options;
    struct engine_train_plan plan;
    struct trainer_examples train, valid;
    char identity[SHA256_HEX]; /* digest of everything that the result depends on */

    struct model_weights weights, grads;
    float *frozen;                /* own values of embeddings that a start delta changed, or NULL */
    float *w, *g, *m, *v;         /* [parameters]: the trained tensors, one behind the other */
    uint16_t *copy, *frozen_copy; /* BF16 only: w and frozen once more, as stages read matrices */
    int64_t parameters;
    struct parameter *parameter; /* views of those, one for each tensor */
    int32_t parameter_count;
    struct tensor norm; /* [1] */

    struct model_training *pass;
    struct trainer_micro micro;
    int32_t max_rows;

    int32_t step;        /* made so far */
    int32_t order_epoch; /* the epoch that `order` is for, 0-based; -1: none yet */
    int32_t *order;      /* [train.count] */
};

/* ------------------------------------------------------------------ trainer_plan.c */

/* Turns auto into numbers: epochs, batch, rate and steps. ERR_INVALID: too many steps to count. */
int trainer_plan(struct engine_trainer *trainer, struct err *err);
/* The rate of 1-based step `step`. */
double trainer_rate(const struct engine_trainer *trainer, int32_t step);
/* Most rows of a micro-batch of such a job, at most `limit` where no example is longer. */
int32_t trainer_micro_rows(const struct trainer_examples *train,
                           const struct trainer_examples *valid, int32_t batch_size, int32_t limit);

/* ------------------------------------------------------------------ trainer_weights.c */

/* Elements of everything that is trained, as `w` holds them. Needs the views of `weights`. */
int64_t trainer_weights_count(const struct engine_trainer *trainer);
/* Copies of what is trained, from the base and the start delta; gradients and moments zero. */
int trainer_weights_open(struct engine_trainer *trainer, struct err *err);
void trainer_weights_close(struct engine_trainer *trainer); /* also what was opened in part */
/* After w was written from outside: the copies. */
int trainer_weights_refresh(struct engine_trainer *trainer, struct err *err);

/* ------------------------------------------------------------------ trainer_checkpoint.c */

/* Size of the recovery checkpoint of so many trained weights. */
int64_t trainer_checkpoint_bytes(int64_t parameters);

#endif
