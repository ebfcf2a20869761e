/* codec.h: how the difference of one matrix (tuned - base) becomes fewer bytes, and back.
 *
 * A codec stores a matrix as a fixed number of parts; each part is one tensor of the artifact,
 * named <matrix>.<suffix> (api-spec/delta-format.md). The parts' shapes follow from the matrix's
 * shape alone, so a writer knows the whole file's layout before it has compressed anything, and
 * matrices stream through one by one: a model larger than memory can be compressed.
 *
 *   layout()    shape of a part                        compress()  fills the parts
 *   accept()    the same for a reader: shape and values of parts that came from outside
 *   expand()    parts -> f32 difference                view()      parts -> what a backend packs
 *
 * compress() is deterministic. All functions are pure: any thread. */
#ifndef GRAFT_CODEC_H
#define GRAFT_CODEC_H

#include <stddef.h>
#include <stdint.h>

#include "engine/backend.h"
#include "engine/base/err.h"
#include "engine/tensor.h"

#define CODEC_MAX_PARTS 4

struct codec {
    const char *name; /* as metadata spell it */
    int part_count;
    const char *suffix[CODEC_MAX_PARTS];
    /* A view without data: dtype, rank and shape of part `part` of a [rows, cols] matrix. */
    struct tensor (*layout)(int part, int32_t rows, int32_t cols);
    /* delta: [rows, cols]; part[]: memory as layout says. -1: the difference is not finite, or too
     * large for the format. */
    int (*compress)(const float *delta, int32_t rows, int32_t cols, void *const part[],
                    struct err *err);
    /* Parts from a file: ERR_INVALID unless every other function may use them. */
    int (*accept)(const struct tensor part[], int32_t rows, int32_t cols, struct err *err);
    void (*expand)(const struct tensor part[], int32_t rows, int32_t cols, float *delta);
    /* `scale`: memory of `rows` floats that the view points to. */
    void (*view)(const struct tensor part[], int32_t rows, int32_t cols, float *scale,
                 struct delta_tensor *out);
};

/* NULL: unknown. */
const struct codec *codec_find(const char *name);
/* The names of all codecs, for messages: "bitdelta". */
const char *codec_names(void);

#endif
