/* dataset.h: a training or validation file, validated and turned into tokens with loss weights.
 *
 * The file is JSONL: line N is example N (an empty line is allowed at the end only, so the two
 * numbers never part). A line is at most DATASET_MAX_LINE bytes and is read through one buffer of
 * that size: a line of a gigabyte is refused without being held. An example is
 *   {"messages": [{"role", "content", "weight"?}, ...]}   chat
 *   {"prompt": "...", "completion": "..."}                legacy: one user, one assistant
 * and nothing else: a key that would have no effect on training is refused by name, because a
 * client who wrote it believes that it has one (null and empty values are let through).
 *
 * weight[i] is the loss weight of predicting token[i] from the tokens before it; 0 is masked.
 * Weighted are the answers as chat_template.h defines them, end of turn included, times the
 * message's `weight` (0 or 1).
 *
 * Messages carry the codes and the wording of OpenAI's service (contract, "Validation failures");
 * err.param is "training_file" or "validation_file". Read-only once open: any thread. */
#ifndef GRAFT_DATASET_H
#define GRAFT_DATASET_H

#include <stdint.h>

#include "engine/engine.h"

#define DATASET_MAX_LINE (1 << 20)  /* bytes */
#define DATASET_MAX_TOKENS 50000000 /* of a file, before cutting: 8 bytes each in memory */
#define DATASET_MIN_EXAMPLES 10     /* of a training file */
#define DATASET_MAX_MESSAGES 2048   /* of an example */
#define DATASET_SHORT_QUESTION 128  /* tokens of a prompt, for `question_answer` */
#define DATASET_SHORT_ANSWER 48     /* tokens of an answer */

struct tokenizer;
struct chat_template;

struct dataset_example {
    const int32_t *token; /* [length] */
    const float *weight;  /* [length]; weight[0] is always 0 */
    int32_t length;       /* at least 1, at most max_sequence */
};

/* The last trained answer of an example: token[0, begin) asks, token[begin, end) answers, without
 * the end of turn. */
struct dataset_question {
    int32_t begin, end;
};

/* engine_dataset_open without an engine; options->max_sequence must be positive. */
int dataset_open(struct engine_dataset **out, const struct tokenizer *tokenizer,
                 const struct chat_template *chat_template, const char *path,
                 const struct engine_dataset_options *options, struct engine_dataset_report *report,
                 struct err *err);

int64_t dataset_count(const struct engine_dataset *dataset);
/* i in [0, count). Pointers live as long as the dataset. */
struct dataset_example dataset_example(const struct engine_dataset *dataset, int64_t i);
/* false: the example has no trained answer that is whole. */
bool dataset_question(const struct engine_dataset *dataset, int64_t i,
                      struct dataset_question *out);
const struct engine_dataset_report *dataset_report(const struct engine_dataset *dataset);

#endif
