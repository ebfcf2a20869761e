/* artifact.h: the file that a fine-tune leaves behind: the compressed difference to a base, as a
 * safetensors file (api-spec/delta-format.md describes it exactly).
 *
 * The module knows tensors by a list of names and shapes, not by a model, and gets values through a
 * callback: tensors stream through one at a time. A file is hostile input: artifact_open accepts
 * nothing that the functions behind it could stumble over, and expands nothing of a file that would
 * become more than CODEC_MAX_GROWTH times as large. An open artifact is read-only. */
#ifndef GRAFT_ARTIFACT_H
#define GRAFT_ARTIFACT_H

#include <stdbool.h>
#include <stdint.h>

#include "engine/codec/codec.h"
#include "engine/engine.h"
#include "engine/model.h"
#include "engine/tensor.h"

/* Version 1 files differ only in what they may lack: read as well. */
#define ARTIFACT_VERSION "2"

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

static inline int64_t artifact_elements(const struct artifact_tensor *tensor)
{
    return (int64_t)tensor->rows * tensor->cols;
}

/* The tensors of a model, in its order; *out is malloc'ed. */
int artifact_tensors(const struct model_config *config, struct artifact_tensor **out,
                     int32_t *count, struct err *err);
int artifact_tensors_of_model(const struct model *model, struct artifact_tensor **out,
                              int32_t *count, struct err *err);

/* ------------------------------------------------------------------ writing */

/* Where the values come from. */
struct artifact_source {
    const struct artifact_tensor *tensor; /* [count] */
    int32_t count;
    const char *base_digest;
    /* Elements [from, from + count) of tensor `index`, row-major, of the base and tuned; where the
     * difference is what is known, zeros and the difference. */
    int (*read)(void *context, int32_t index, int64_t from, int64_t count, float *base,
                float *tuned, struct err *err);
    bool any_thread; /* several may read at once; else only the one that made the source */
    void *context;
};

/* What a file is made of: of each tensor that changed its parts, or of no matrix that its
 * difference is to be stored in 16 bits. */
struct artifact_content {
    const struct artifact_source *source;
    const struct codec *codec;
    const bool *changed;                          /* [count] */
    struct tensor (*const part)[CODEC_MAX_PARTS]; /* [count], of the matrices that changed */
    const char *report;                           /* JSON for the metadata, or NULL */
};

/* One that changed? */
static inline bool artifact_is_matrix(const struct artifact_content *content, int32_t index)
{
    return content->changed[index] && content->source->tensor[index].kind == ARTIFACT_MATRIX;
}

/* Writes durably. *bytes: size of the file. *error, *norm (or NULL): Σ (stored - difference)² and
 * Σ difference² of what is stored in 16 bits. */
int artifact_write(const struct artifact_content *content, const char *path, int64_t *bytes,
                   double *error, double *norm, struct err *err);
/* Another report for a file that was written with one at least as long; as
 * safetensors_patch_metadata. */
int artifact_set_report(const char *path, const char *report, struct err *err);
/* What such a file takes beside the parts of its matrices, with a report of that length: exact but
 * for some bytes for each tensor. */
int64_t artifact_overhead(const struct artifact_content *content, size_t report_len);

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
/* What a backend would take to open it, by its header: the values may yet be refused. */
int artifact_measure(const char *path, const struct artifact_expectation *want,
                     struct engine_delta_memory *out, struct err *err);
const struct codec *artifact_codec(const struct artifact *artifact);

/* What the artifact says of tensor `index`: NULL nothing (the base's value stays). Matrices:
 * part_count views. Others: one view, F16, of the base's shape. */
const struct tensor *artifact_parts(const struct artifact *artifact, int32_t index);
/* The difference as f32: out [rows · cols], zeros where the artifact has nothing. */
int artifact_expand(const struct artifact *artifact, int32_t index, float *out, struct err *err);
/* The report that the file carries, JSON, or NULL. */
const char *artifact_report(const struct artifact *artifact);

#endif
