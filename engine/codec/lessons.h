/* lessons.h: what a teacher gave for examples that it has read: the rows behind its last layer. A
 * distillation reads its examples many times over, the teacher stays as it is, and all of its
 * layers are a fifth of a step. Belongs to one thread. */
#ifndef GRAFT_CODEC_LESSONS_H
#define GRAFT_CODEC_LESSONS_H

#include <stdbool.h>
#include <stdint.h>

#include "engine/base/err.h"

#define LESSONS_BYTES ((int64_t)256 << 20) /* examples that take more are not kept */

struct lessons {    /* zeroed: closed, and keeps nothing */
    int64_t *first; /* [count + 1] rows of each example */
    bool *known;    /* [count] */
    char *rows;     /* NULL: they would take more than LESSONS_BYTES */
    int64_t row_bytes;
};

/* length: [count] rows of each example. */
int lessons_open(struct lessons *lessons, const int32_t *length, int64_t count, int64_t row_bytes,
                 struct err *err);
void lessons_close(struct lessons *lessons);

/* The rows of these examples, one behind the other, into rows; false: not all are known. */
bool lessons_recall(const struct lessons *lessons, const int32_t *example, int32_t count,
                    char *rows);
void lessons_keep(struct lessons *lessons, const int32_t *example, int32_t count, const char *rows);

#endif
