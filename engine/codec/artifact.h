/* artifact.h: the file that a fine-tune leaves behind: the compressed difference to a base, as a
 * safetensors file (api-spec/delta-format.md describes it exactly).
 *
 * The module knows tensors by a list of names and shapes, not by a model, and gets values through a
 * callback: tensors stream through one at a time. A file is hostile input: artifact_open accepts
 * nothing that the functions behind it could stumble over. An open artifact is read-only. */
#ifndef GRAFT_ARTIFACT_H
#define GRAFT_ARTIFACT_H

#include <stdbool.h>
#include <stdint.h>

#include "engine/codec/codec.h"
#include "engine/engine.h"
#include "engine/model.h"
#include "engine/tensor.h"

#define ARTIFACT_VERSION "1"

enum artifact_kind {
    ARTIFACT_MATRIX,    /* of a block: goes through the codec */
    ARTIFACT_EMBEDDING, /* embed_tokens, lm_head: 16-bit difference, when trained at all */
    ARTIFACT_VECTOR,    /* norms, biases: 16-bit difference */
};

struct artifact_tensor { /* a tensor of the base */
    char name[MODEL_NAME_MAX];
    enum artifact_kind kind;
    int32_t rows, cols; /* vectors: 1, length */
};

/* The tensors of a model, in its order; *out is malloc'ed. */
int artifact_tensors_of_model(const struct model *model, struct artifact_tensor **out,
                              int32_t *count, struct err *err);

/* ------------------------------------------------------------------ writing */

struct artifact_source {
    const struct artifact_tensor *tensor; /* [count] */
    int32_t count;
    const char *base_digest;
    const struct codec *codec;
    /* Elements [from, from + count) of tensor `index`, row-major, of the base and tuned. */
    int (*read)(void *context, int32_t index, int64_t from, int64_t count, float *base,
                float *tuned, struct err *err);
    void *context;
};

/* Writes durably; tensors that did not change are left out. Takes memory for the largest matrix,
 * four times in f32. Fills all of `report` but `ratio`. */
int artifact_write(const struct artifact_source *source, const char *path,
                   struct engine_delta_report *report, struct err *err);

/* ------------------------------------------------------------------ reading */

struct artifact;

struct artifact_expectation {
    const struct artifact_tensor *tensor; /* [count]; must outlive the artifact */
    int32_t count;
    const char *base_digest;
};

int artifact_open(struct artifact **out, const char *path, const struct artifact_expectation *want,
                  struct err *err);
/* The same on bytes that outlive it; `name` is for messages. */
int artifact_open_memory(struct artifact **out, const void *data, size_t len, const char *name,
                         const struct artifact_expectation *want, struct err *err);
void artifact_free(struct artifact *artifact);
const struct codec *artifact_codec(const struct artifact *artifact);

/* What the artifact says of tensor `index`: NULL nothing (the base's value stays). Matrices:
 * part_count views. Others: one view, F16, of the base's shape. */
const struct tensor *artifact_parts(const struct artifact *artifact, int32_t index);
/* The difference as f32: out [rows · cols], zeros where the artifact has nothing. */
void artifact_expand(const struct artifact *artifact, int32_t index, float *out);

#endif
