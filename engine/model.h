/* model.h: a Llama-family model on a backend: its base weights, the forward pass for serving
 * (decoder) and forward and backward for training.
 *
 * A model borrows its base file and backend, which must outlive it; decoders, training passes and
 * caches borrow the model. All of it belongs to the thread that owns the backend. Nothing
 * allocates after the X_open calls. */
#ifndef GRAFT_MODEL_H
#define GRAFT_MODEL_H

#include "engine/backend.h"
#include "engine/base_file.h"

struct model;

int model_open(struct model **out, struct backend *backend, const struct base_file *base,
               struct err *err);

/* The same from tensors that lie elsewhere: `tensor` looks one up by its canonical name, false when
 * there is none. Shapes must be those of the configuration, and what it asks for must be there
 * (base_file_open checks that; asserted here). The memory must outlive the model. */
struct model_source {
    const struct model_config *config;
    bool (*tensor)(const void *context, const char *name, struct tensor *out);
    const void *context;
};
int model_open_source(struct model **out, struct backend *backend,
                      const struct model_source *source, struct err *err);
void model_free(struct model *model);
const struct model_config *model_get_config(const struct model *model);
struct backend *model_backend(const struct model *model);
/* The base's weights, in place from the mapped file where the backend can read that. */
const struct model_weights *model_base_weights(const struct model *model);

/* Every tensor of a model has an index and its canonical name (base_file.h); a tied head is not
 * counted. Works on any model_weights of this model: base, trained copy, gradients. */
#define MODEL_NAME_MAX 96
int32_t model_tensor_count(const struct model *model);
struct tensor *model_tensor(const struct model *model, struct model_weights *weights, int32_t index,
                            char name[MODEL_NAME_MAX]);
/* Matrices of the blocks: what a delta compresses. */
bool model_tensor_is_linear(const struct model *model, int32_t index);
/* embed_tokens and lm_head: frozen unless asked. */
bool model_tensor_is_embedding(const struct model *model, int32_t index);

/* An empty set of weights (every tensor with shape and without data), to be filled by the caller.
 */
int model_weights_alloc(struct model_weights *weights, const struct model *model, struct err *err);
void model_weights_release(struct model_weights *weights); /* the layer array, not the data */

/* ------------------------------------------------------------------ serving */

int model_kv_cache_open(struct kv_cache *cache, const struct model *model, int32_t slots,
                        int32_t max_len, struct err *err);
void model_kv_cache_close(struct kv_cache *cache, const struct model *model);
/* What model_kv_cache_open takes; -1 when that overflows. */
int64_t model_kv_cache_bytes(const struct model_config *config, enum dtype precision, int32_t slots,
                             int32_t max_len);

struct model_decoder;

/* Scratch for batches of up to max_rows rows, of which up to max_logits want logits. */
int model_decoder_open(struct model_decoder **out, struct model *model, int32_t max_rows,
                       int32_t max_logits, struct err *err);
void model_decoder_free(struct model_decoder *decoder);

struct model_decode_args {
    const struct model_weights *weights; /* NULL: the base's; else e.g. a trainer's */
    const struct batch *batch;           /* documents are prompt chunks or single tokens, mixed */
    struct kv_cache *cache;              /* gets the new keys and values; NULL: whole documents */
    const int32_t *logit_row;            /* [logit_count] rows, ascending */
    int32_t logit_count;
    float *logits;                   /* [logit_count, V] host, out; NULL: not wanted */
    const struct sample_row *sample; /* [logit_count] how tokens are chosen; NULL: none is */
    int32_t *chosen;                 /* [logit_count] host, out: tokens, or -1: see sample_args */
};

/* One step. A row's logits do not depend on the other rows of the batch, nor on chunking. The
 * caller keeps tokens below V and past + rows within the cache (asserted). */
int model_decode(struct model_decoder *decoder, const struct model_decode_args *args,
                 struct err *err);

/* ------------------------------------------------------------------ training */

struct model_training;

/* Activations and scratch for batches of up to max_rows rows; `teacher`: there may be one. */
int model_training_open(struct model_training **out, struct model *model, int32_t max_rows,
                        bool teacher, struct err *err);
void model_training_free(struct model_training *training);
/* What that takes of the backend's memory. */
int64_t model_training_bytes(const struct backend *backend, const struct model_config *config,
                             int32_t max_rows, bool teacher);

/* The loss of a row is -log p(target), with `margins` or `teacher` what head_loss_args says. */
struct model_loss_args {
    const struct model_weights *weights;
    struct model_weights *grads; /* +=; NULL: loss only. Tensors without data are frozen. */
    const struct batch *batch;   /* without slots and segments */
    const int32_t *target; /* [rows]: the token that should follow row i; not read with a teacher */
    const float *weight;   /* [rows]: d(loss)/d(nll of row i), 0: row is not trained */
    const struct loss_margins *margins; /* or NULL */
    /* A model of the same shapes in the memory of this backend, which reads the batch first; only
     * what its last layer gives is kept. NULL, or the training was opened for one. */
    const struct model_weights *teacher;
    /* What the teacher gave for these rows before (model_teacher_rows): it does not read them
     * again. Host [rows, D] of the backend's activations; NULL: it does. */
    const void *teacher_rows;
};

struct model_loss {
    double nll;      /* Σ over rows with weight ≠ 0 of their loss, nats */
    double weighted; /* Σ weight · nll: the loss whose gradient was added, but for margins */
    int64_t correct; /* rows with weight ≠ 0 whose best logit is the target, or the teacher's */
    int64_t rows;    /* rows with weight ≠ 0 */
};

int model_loss(struct model_training *training, const struct model_loss_args *args,
               struct model_loss *out, struct err *err);
/* Of the model_loss() before, which had a teacher: what that gave for the first rows of the batch,
 * to host [rows, D]. */
int model_teacher_rows(const struct model_training *training, int32_t rows, void *host,
                       struct err *err);

#endif
