/* compression.h: the difference of one model to its base on its way through a codec: which tensors
 * changed, what each matrix is worth, plans for a number of bytes, parts, and the file.
 *
 *   compression_open -> compression_decompose -> compression_run (for each size that is tried)
 *                    -> compression_parts (distillation changes their scales) -> _measure, _write
 *
 * Matrices are compressed by a pool, as many at once as fit COMPRESSION_MEMORY (one always does);
 * the pool reads them as well where the source lets it. Beside that it takes memory for the parts.
 * The result does not depend on the pool's threads. Whoever listens may stop it between two of them
 * (ERR_CANCELLED); it can only be freed then. */
#ifndef GRAFT_CODEC_COMPRESSION_H
#define GRAFT_CODEC_COMPRESSION_H

#include "engine/base/thread_pool.h"
#include "engine/codec/artifact.h"
#include "engine/codec/budget.h"
#include "engine/codec/stage.h"

#define COMPRESSION_MEMORY ((int64_t)1 << 29)

/* What the work on one matrix takes at most. */
int64_t compression_work_bytes(int64_t rows, int64_t cols);

struct compression;

struct compression_options {
    const struct codec *codec;
    struct thread_pool *pool;
    struct stage_listener listener; /* of "read", "decompose", "compress", "compare" */
};

/* `source` and what the options point to must outlive it. */
int compression_open(struct compression **out, const struct artifact_source *source,
                     const struct compression_options *options, struct err *err);
void compression_free(struct compression *compression);

/* What each matrix is worth. h, g: [count] second moments by tensor (codec.h), which must outlive
 * the last compression_run; NULL: none. Needed before compression_run and compression_predict,
 * which plan by it, and nothing else: parts that were made before are set, measured and written
 * without. */
int compression_decompose(struct compression *compression, float *const *h, float *const *g,
                          struct err *err);
/* Of a file with a report of report_len. */
int compression_budget(const struct compression *compression, size_t report_len, struct budget *out,
                       struct err *err);
/* ERR_INVALID: so few bytes cannot be had; the message says how many are enough. */
int compression_check(const struct compression *compression, int64_t bytes, size_t report_len,
                      struct err *err);

/* Parts for a file of at most `bytes` with a report of report_len; what was made before is
 * replaced. *cost: as codec.allot. ERR_INVALID: as compression_check. */
int compression_run(struct compression *compression, int64_t bytes, size_t report_len, double *cost,
                    struct err *err);

/* What parts for a file of that size are expected to lose, without making them; plans only. */
int compression_predict(struct compression *compression, int64_t bytes, size_t report_len,
                        double *cost, struct err *err);

bool compression_changed(const struct compression *compression, int32_t index);
/* The parts of a matrix that changed; else NULL. */
struct tensor *compression_parts(const struct compression *compression, int32_t index);
/* Copies parts that were made before; ERR_INVALID: not of a matrix that changed. */
int compression_set_parts(struct compression *compression, int32_t index,
                          const struct tensor part[], struct err *err);
int64_t compression_part_bytes(const struct compression *compression, int32_t index); /* 0: none */
/* error[i], norm[i] (count): Σ (expanded - difference)² and Σ difference² of matrix i, else 0. */
int compression_measure(struct compression *compression, double *error, double *norm,
                        struct err *err);
int compression_write(const struct compression *compression, const char *path, const char *report,
                      int64_t *bytes, double *error, double *norm, struct err *err);

#endif
