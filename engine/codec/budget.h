/* budget.h: how small a file can be made, before any work is done for it. Pure: any thread. */
#ifndef GRAFT_CODEC_BUDGET_H
#define GRAFT_CODEC_BUDGET_H

#include "engine/codec/artifact.h"

struct budget {
    int64_t overhead; /* names, report, and what changed beside the matrices */
    int64_t least;    /* of the whole file, at the codec's smallest */
};

/* From names, shapes and what changed; of the content neither values nor parts are looked at. */
int budget_measure(const struct artifact_content *content, size_t report_len, struct budget *out,
                   struct err *err);
/* ERR_INVALID: a file can not be that small; the message says what is enough and what else helps.
 */
int budget_check(const struct artifact_content *content, size_t report_len, int64_t bytes,
                 struct err *err);

#endif
