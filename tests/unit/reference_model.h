/* reference_model.h: the Llama family in double precision, written to be read, not to be fast: what
 * the backends' stages are held to. And small random models in memory, with every flag a model can
 * have.
 *
 * A stage's gradient is checked by central differences of a scalar that is computed here. */
#ifndef GRAFT_TESTS_REFERENCE_MODEL_H
#define GRAFT_TESTS_REFERENCE_MODEL_H

#include "engine/model.h"

/* ------------------------------------------------------------------ models in memory */

struct memory_model {
    struct model_config config;
    int32_t count;
    char name[256][MODEL_NAME_MAX];
    struct tensor tensor[256];
};

/* Random weights of `dtype`, by seed; norms around 1. Exits the test on failure. */
struct memory_model *memory_model_new(const struct model_config *config, enum dtype dtype,
                                      uint64_t seed);
void memory_model_free(struct memory_model *model);
struct model_source memory_model_source(const struct memory_model *model);

/* hidden 40, heads 4 of 10, so that no width is a multiple of sixteen. */
struct model_config memory_model_config(int32_t kv_heads, bool tied, bool bias, bool qk_norm);

/* ------------------------------------------------------------------ the reference */

struct reference_linear {
    double *w, *b; /* [out, in]; [out] or NULL */
};
struct reference_layer {
    double *attn_norm, *q_norm, *k_norm, *mlp_norm;
    struct reference_linear q, k, v, o, gate, up, down;
};
struct reference {
    struct model_config config;
    double inv_freq[128];
    double *embed, *final_norm, *head; /* head == embed when tied */
    struct reference_layer layer[8];
    double *memory; /* all of it, tensor after tensor, as memory_model has them */
    int64_t elements;
    int64_t at[257]; /* where tensor i begins */
};

struct reference *reference_new(const struct memory_model *model);
void reference_free(struct reference *r);

/* The batch's rows, documents and positions; all arrays row-major like the backend's. */
void reference_attn_in(const struct reference *r, int32_t layer, const struct batch *batch,
                       const double *x, double *q, double *k, double *v);
void reference_attention(const struct reference *r, const struct batch *batch, const double *q,
                         const double *k, const double *v, double *out);
void reference_attn_out(const struct reference *r, int32_t layer, int32_t rows, const double *attn,
                        const double *x, double *y);
void reference_mlp(const struct reference *r, int32_t layer, int32_t rows, const double *x,
                   double *y);
/* [rows, V] */
void reference_head(const struct reference *r, int32_t rows, const double *x, double *logits);
/* Σ weight · nll */
double reference_head_loss(const struct reference *r, int32_t rows, const double *x,
                           const int32_t *target, const float *weight);
/* gap[row] = logit(best) - logit(other) */
void reference_gaps(const struct reference *r, int32_t rows, const double *x, const int32_t *best,
                    const int32_t *other, double *gap);
/* Σ weight · KL(teacher || model); teacher_logits: [rows, V], as reference_head gives them */
double reference_divergence(const struct reference *r, int32_t rows, const double *x,
                            const double *teacher_logits, const float *weight);
/* Hidden states behind the last layer, [rows, D]. */
void reference_forward(const struct reference *r, const struct batch *batch, double *x);
double reference_loss(const struct reference *r, const struct batch *batch, const int32_t *target,
                      const float *weight);

#endif
