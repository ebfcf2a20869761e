/* recall.h: does the model know the answers that it was taught?
 *
 * The questions are those of dataset_question(): the tokens before an example's last trained answer
 * are the prompt, the answer is generated greedily, a little longer than the expected one. Equal
 * means: after cutting outer blanks and one final dot, and without regard to the case of ASCII
 * letters. */
#ifndef GRAFT_RECALL_H
#define GRAFT_RECALL_H

#include <stdbool.h>
#include <stddef.h>

#include "engine/codec/stage.h"
#include "engine/engine.h"
#include "engine/model.h"

#define RECALL_MAX_QUESTIONS 512 /* of a larger dataset so many are asked, evenly spread */
#define RECALL_MORE_TOKENS 8     /* than the expected answer has: room to contain it */

struct recall_match {
    bool exact, contained;
};

struct recall_match recall_compare(const char *answer, size_t answer_len, const char *expected,
                                   size_t expected_len);

struct recall_args {
    /* On the engine's backend; NULL: the base's. With the delta (NULL: none) on top. */
    const struct model_weights *weights;
    const struct engine_delta *delta;
    const struct engine_dataset *dataset;
    int64_t questions;              /* at most */
    struct stage_listener listener; /* of "recall", after each step of the answers */
    int32_t round, rounds;          /* this is one of so many whose shares it tells; rounds 0: 1 */
};

/* ERR_CANCELLED: the listener said stop. */
int recall_measure(struct engine *engine, const struct recall_args *args, struct engine_recall *out,
                   struct err *err);

#endif
