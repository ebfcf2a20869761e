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

#include "engine/engine.h"
#include "engine/model.h"

#define RECALL_MAX_QUESTIONS 512 /* of a larger dataset so many are asked, evenly spread */
#define RECALL_MORE_TOKENS 8     /* than the expected answer has: room to contain it */

struct recall_match {
    bool exact, contained;
};

struct recall_match recall_compare(const char *answer, size_t answer_len, const char *expected,
                                   size_t expected_len);

/* engine_recall with at most `questions` of them, by other weights on the engine's backend than the
 * base's (NULL: these) with the delta (NULL: none) on top. */
int recall_measure(struct engine *engine, const struct model_weights *weights,
                   const struct engine_delta *delta, const struct engine_dataset *dataset,
                   int64_t questions, struct engine_recall *out, struct err *err);

#endif
