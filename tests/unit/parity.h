/* parity.h: runs one operation on two backends, the CPU's and another, and compares what they
 * wrote.
 *
 * A tensor of a case exists twice, `t[0]` in the CPU backend's memory and `t[1]` in the other's,
 * with the same start values. A case is a function that runs the operation on one side:
 *
 *   static void run(void *context, int side) {... ops->mlp(b, &(struct mlp_args){.x = c->x->t[side]
 * ...
 *
 *   struct parity p;
 *   parity_open(&p, "cpu against shim", other, &shape);
 *   c.x = parity_random(&p, 2, (int64_t[]){rows, d}, 1.0f);
 *   c.y = parity_output(&p, 2, (int64_t[]){rows, d});
 *   parity_run(&p, run, &c);            runs both sides, from the start values
 *   parity_equal(&p, "y", c.y, 1e-5);   fails the test where they differ
 *   parity_close(&p);                   frees everything
 *
 * Outputs and scratch start as NaN, so that what is not written shows; memory past the end of a
 * tensor is not looked at. Everything random is a function of the shape's seed. */
#ifndef GRAFT_TESTS_PARITY_H
#define GRAFT_TESTS_PARITY_H

#include "engine/backend.h"

#define PARITY_MAX_TENSORS 512

struct parity_tensor {
    struct tensor t[2]; /* each in the precision of its backend, or F32, or I32 */
    void *start;        /* host copy of the start values: F32 or I32 */
    bool is_weight;     /* opened by weight_open */
};

/* A layer and a batch over it. Zeros take the default behind them. */
struct parity_shape {
    const char *name;
    int32_t hidden;          /* 64 */
    int32_t intermediate;    /* 96 */
    int32_t heads, kv_heads; /* 4, 2 */
    int32_t head_dim;        /* 16 */
    int32_t vocabulary;      /* 101 */
    bool bias, qk_norm;      /* q, k, v biases; q and k norms */
    enum dtype weights;      /* F32 */
    int32_t doc_rows[6];     /* rows of each document, 0 ends; {13, 1, 9} */
    int32_t past[6];         /* tokens of each document that the cache holds already */
    bool cache;              /* with a kv cache: serving */
    int32_t cache_len;       /* tokens of a slot; 96 */
    bool serving;            /* serving without one */
    int32_t tenants;         /* adapters, mixed over the rows; 0: the base alone. Serving only. */
    int32_t planes;          /* 0: their deltas are of all kinds; or every second is of so many */
    uint64_t seed;
};

/* Shapes that every stage must get right, for training and for serving; a NULL name ends them. */
extern const struct parity_shape parity_training_shapes[], parity_serving_shapes[];

struct parity {
    struct backend *backend[2];
    struct parity_shape shape;
    struct model_config config;
    int32_t rows, docs;
    struct batch batch[2]; /* differ in their adapters only */
    struct parity_tensor *rope;
    struct layer_weights layer[2];   /* random weights of the shape; biases and norms as it says */
    struct tensor embed[2], head[2]; /* [V, D] */
    struct tensor final_norm[2];     /* [D] */
    struct kv_cache kv[2]; /* with a cache: 2 layers, random where `past` says it is filled */
    int32_t layer_index;   /* of the layer that is run: 1 of 2 */

    struct parity_tensor tensor[PARITY_MAX_TENSORS];
    int32_t count;
    struct parity_adapters *adapters;
    int32_t *token, *position, *cu_seqlens, *segment_start;
    struct batch_slot *slot;
    float *inv_freq;
    uint64_t streams; /* of random numbers, used so far */
};

/* The CPU backend is opened here, in the precision of `other`, which is the caller's. Runs begin()
 * on both. Fails the test where something can not be made. */
void parity_open(struct parity *p, struct backend *other, const struct parity_shape *shape);
void parity_close(struct parity *p);

/* Activations, in the precision: uniform in [-size, size), or NaN. */
struct parity_tensor *parity_random(struct parity *p, int rank, const int64_t *shape, float size);
struct parity_tensor *parity_output(struct parity *p, int rank, const int64_t *shape);
/* What is F32 in each precision: gradients of parameters, rstd, logits and so on. */
struct parity_tensor *parity_random_f32(struct parity *p, int rank, const int64_t *shape,
                                        float size);
struct parity_tensor *parity_output_f32(struct parity *p, int rank, const int64_t *shape);
struct parity_tensor *parity_integers(struct parity *p, int64_t count); /* I32, -1 */
/* What two bodies of one operation may differ by: 1e-5 in F32, 2e-2 in BF16. */
double parity_tolerance(const struct parity *p);

typedef void parity_case(void *context, int side);
/* Start values, begin(), the case; both sides, each checked. */
void parity_run(struct parity *p, parity_case *run, void *context);
/* ‖other - cpu‖₂ / ‖cpu‖₂ ≤ tolerance, and nothing is NaN; I32: equal. */
void parity_equal(struct parity *p, const char *name, const struct parity_tensor *t,
                  double tolerance);
/* The same as a question, for tests that expect red. The error goes to *error where not NULL. */
bool parity_is_equal(struct parity *p, const struct parity_tensor *t, double tolerance,
                     double *error);

#endif
