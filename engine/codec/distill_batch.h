/* distill_batch.h: the rows that a step of distillation is about, from examples.
 *
 * Examples in an order that is shuffled anew each time they are through, one behind the other until
 * the rows are full; of one that is longer its end, where the answer is. Every token is asked
 * about. Every other time an example comes it is thinned: some words of what is before an answer
 * are left out, drawn anew each time. The teacher says what it makes of what is left, so the
 * student learns to follow it on questions in other words than the examples' own. What the model's
 * format needs stays: special tokens, those close behind one, and answers. */
#ifndef GRAFT_CODEC_DISTILL_BATCH_H
#define GRAFT_CODEC_DISTILL_BATCH_H

#include "engine/model_pass.h"
#include "engine/tokenizer.h"
#include "engine/trainer.h"

#define DISTILL_ANSWERS 4   /* times as much as another token one of an answer counts */
#define DISTILL_THINNED 0.3 /* of the words that may be left out */
#define DISTILL_SPECIAL 2   /* tokens behind a special one that stay: a role and its line's end */

struct distill_batches {
    const struct trainer_source *examples;
    const struct tokenizer *tokenizer;
    int32_t max_rows;
    uint64_t seed;
    int64_t next;                        /* example, counted through all rounds */
    int32_t *order;                      /* [examples] */
    int32_t *token, *position, *example; /* [max_rows] */
    int32_t *ends;                       /* [max_rows + 1] */
    float *weight;                       /* [max_rows] */
};

/* One step's; valid until the next. What should follow a row is the teacher's to say. */
struct distill_batch {
    struct batch batch;
    const float *weight;    /* [rows], 1 in all: of what follows the row */
    const int32_t *example; /* [docs] which they are */
    bool thinned;           /* one of them is */
};

/* `examples`, at least one, and `tokenizer` must outlive it. */
int distill_batches_open(struct distill_batches *batches, const struct trainer_source *examples,
                         const struct tokenizer *tokenizer, int32_t max_rows, int64_t seed,
                         struct err *err);
void distill_batches_close(struct distill_batches *batches); /* a zeroed one is fine */
/* How many rows an example has when it is not thinned. */
int32_t distill_batches_rows(const struct distill_batches *batches, int64_t example);
void distill_batches_next(struct distill_batches *batches, struct distill_batch *out);

#endif
