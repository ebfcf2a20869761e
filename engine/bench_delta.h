/* bench_delta.h: a random difference that went through a codec: what benches serve instead of a
 * fine-tune's. Its values are Gaussian and small, so that no model breaks of them; a random matrix
 * has no structure to find, but what a codec stores, and what applying that costs, depends on
 * shapes and bytes alone. */
#ifndef GRAFT_BENCH_DELTA_H
#define GRAFT_BENCH_DELTA_H

#include "engine/backend.h"
#include "engine/codec/codec.h"

struct bench_delta {
    const struct codec *codec;
    int32_t rows, cols;
    struct tensor part[CODEC_MAX_PARTS];
    void *memory;
    struct delta_tensor tensor; /* for ops->delta_pack */
    int64_t bytes;              /* of the parts, as a file has them */
};

/* Compressed to 2 · rows · cols / ratio bytes; ratio 0: what the codec takes by itself.
 * Deterministic. The caller frees *out after -1 too. ERR_INVALID: the codec can not be so small. */
int bench_delta_make(struct bench_delta *out, const struct codec *codec, int32_t rows, int32_t cols,
                     double ratio, struct err *err);
void bench_delta_free(struct bench_delta *delta); /* a zeroed struct is fine */

#endif
