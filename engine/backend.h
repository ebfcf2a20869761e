/* backend.h: what a device must be able to do: the fused stages of a Llama-family layer, forward
 * and backward, the optimizer's update, statistics for compression, and memory. One table of
 * functions, filled by engine/cpu/ and engine/cuda/; only backend.c knows who they are.
 *
 * The contract, stated once:
 * - Forward operations and operations on activations write (`=`); gradients of parameters are
 *   added (`+=`). A gradient tensor without data is not wanted and not computed.
 * - Operations enqueue and return nothing. The first failure sticks, later operations may do
 *   nothing, and check() reports it: once per step, and before host code reads what an operation
 *   wrote (download() waits for what was enqueued before it).
 * - Arguments are structs, filled with designated initialisers; the operation reads the struct
 *   before it returns, the memory behind it until check() or download(). Tensors are row-major and
 *   contiguous, with the shapes in the comments; T is the number of rows (tokens) of the batch,
 *   D hidden, F intermediate, H heads, G kv heads, E head_dim, V vocabulary.
 * - Nothing allocates in a stage: scratch comes in the arguments, and its content is undefined
 *   before and after.
 * - Precision is a property of an open backend (`activation`). F32: activations are F32, weights
 *   F32, BF16 or F16. BF16: activations, their gradients, the kv cache and all matrices are BF16,
 *   rounded to nearest even when they are stored; every sum and function is computed in float. In
 *   both, these are F32: norms, biases, rope, rstd, lse, delta, logits, nll, the gradients of
 *   parameters, and what the optimizer keeps. Products take what is stored: the scratch `n` and
 *   `act` are rounded like any activation. An operation that does not know a dtype fails by name.
 * - Serving (batch.serving): what a row gets does not depend on the rows beside it, on
 *   threads, or on how a prompt was cut into chunks. Training: the result does not depend on the
 *   number of threads.
 * - A backend and its memory belong to one thread at a time. */
#ifndef GRAFT_BACKEND_H
#define GRAFT_BACKEND_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/err.h"
#include "engine/model_config.h"
#include "engine/tensor.h"

/* ------------------------------------------------------------------ weights */

struct linear {
    struct tensor w; /* [out, in] */
    struct tensor b; /* [out], mostly absent */
};

struct layer_weights {
    struct tensor attn_norm;      /* [D] */
    struct linear q, k, v, o;     /* [H·E, D], [G·E, D], [G·E, D], [D, H·E] */
    struct tensor q_norm, k_norm; /* [E] with qk_norm, else absent */
    struct tensor mlp_norm;       /* [D] */
    struct linear gate, up, down; /* [F, D], [F, D], [D, F] */
};

/* Values, or gradients of the same shapes (absent: frozen). */
struct model_weights {
    struct tensor embed;         /* [V, D] */
    struct layer_weights *layer; /* [layers] */
    struct tensor final_norm;    /* [D] */
    struct tensor head;          /* [V, D]; tied: the same memory as embed */
};

/* ------------------------------------------------------------------ deltas */

enum delta_kind {
    DELTA_SIGN,   /* tuned - base ≈ scale · sign */
    DELTA_DENSE,  /* tuned - base, as it is */
    DELTA_PLANES, /* tuned - base ≈ a product of two factors, each a sum of signed planes */
    DELTA_FACTORS /* tuned - base = scale · left · right */
};

#define DELTA_VECTOR_PLANES 64 /* that a vector has at most */

/* tuned - base ≈ diag(row_scale) · Σ_v left_v right_vᵀ · diag(col_scale), v over `rank` vectors.
 * Each side of a vector is the sum of its planes p: right_v = Σ right_scale[p] ·
 * sign(right_bits[p]) and left_v = Σ left_scale[p] · sign(column p of left_bits). Words of bits as
 * for DELTA_SIGN. */
struct delta_planes {
    int32_t planes, rank;
    const int32_t *vector;      /* [planes] the vector of a plane, 0..rank-1, never descending */
    const uint32_t *right_bits; /* [planes][(cols + 31) / 32] */
    const uint32_t *left_bits;  /* [rows][(planes + 31) / 32] */
    const float *right_scale;   /* [planes] */
    const float *left_scale;    /* [planes] */
    const float *row_scale;     /* [rows] */
    const float *col_scale;     /* [cols] */
};

struct delta_factors {   /* BF16, F16 or F32, each its own */
    struct tensor left;  /* [rows, rank] */
    struct tensor right; /* [rank, cols] */
    float scale;         /* finite, not 0 */
};

/* Host view of the difference of one matrix, as it lies in an artifact. */
struct delta_tensor {
    enum delta_kind kind;
    int32_t rows, cols; /* of the matrix: out, in */
    /* DELTA_SIGN: row-major sign bits, [rows][(cols + 31) / 32] little-endian words, column c is
     * bit c % 32, 1 = plus; bits behind the last column are ignored. more_bits, or NULL: likewise;
     * where the two differ the difference is 0. */
    const uint32_t *bits, *more_bits;
    const float *scale;  /* [scale_count] */
    int32_t scale_count; /* 1 or rows */
    /* DELTA_DENSE: [rows, cols], BF16, F16 or F32. */
    struct tensor dense;
    struct delta_planes planes;   /* DELTA_PLANES */
    struct delta_factors factors; /* DELTA_FACTORS */
};

/* Before a backend packs one: shapes, dtypes, scales and vectors that fit each other. ERR_INVALID.
 */
int delta_tensor_check(const struct delta_tensor *delta, struct err *err);

struct packed_delta; /* the backend's own form of one delta_tensor, from delta_pack */

struct adapter_linear {
    const struct packed_delta *delta; /* NULL: unchanged */
    struct tensor b;                  /* F32 [out], replaces the base's bias; absent: the base's */
};

struct adapter_layer {
    struct adapter_linear q, k, v, o, gate, up, down;
    struct tensor attn_norm, q_norm, k_norm, mlp_norm; /* F32, replace the base's; or absent */
};

/* One tenant's fine-tune in the backend's memory. Whoever made the parts frees them. */
struct adapter {
    struct adapter_layer *layer;             /* [layers] */
    struct tensor final_norm;                /* F32, replaces; or absent */
    const struct packed_delta *embed, *head; /* tied models: the same, or both NULL */
};

/* Rows of a batch by adapter: segment s is rows [start[s], start[s+1]). An adapter may own several
 * segments; its bits are read once per stage where they lie side by side. */
struct row_segments {
    int32_t count;
    const int32_t *start;                 /* [count + 1], start[0] = 0, start[count] = rows */
    const struct adapter *const *adapter; /* [count], NULL: the base alone */
};

/* ------------------------------------------------------------------ batches */

/* Keys and values of running sequences, contiguous for each slot. */
struct kv_cache {
    struct tensor k, v; /* [layers, slots, max_len, G·E] */
    int32_t slots, max_len;
};

struct batch_slot {
    int32_t slot; /* of the kv cache */
    int32_t past; /* tokens of this sequence that the cache holds already */
};

/* Documents packed back to back, no padding: document i is rows [cu_seqlens[i], cu_seqlens[i+1]).
 * Attention is causal and never leaves a document. All arrays are host memory. */
struct batch {
    int32_t rows;
    const int32_t *token;    /* [rows], each in [0, V) */
    const int32_t *position; /* [rows], for RoPE; with a cache: past + index in document */
    int32_t docs;
    const int32_t *cu_seqlens;     /* [docs + 1] */
    const struct batch_slot *slot; /* [docs] with a kv cache, else NULL */
    struct row_segments segments;  /* count 0: the base for every row */
    bool serving;                  /* else training: see the contract above */
};

/* ------------------------------------------------------------------ stage arguments */

struct backend;

struct begin_args { /* first operation of every pass over a batch */
    const struct model_config *config;
    const struct batch *batch;
    struct tensor inv_freq; /* [E/2] host: radians per position */
    float rope_magnitude;   /* factor on cos and sin (yarn), else 1 */
    struct tensor rope;     /* [T, E] out: E/2 cosines, then E/2 sines */
};

struct embed_args {
    const struct batch *batch;
    struct tensor embed; /* [V, D] */
    struct tensor x;     /* [T, D] out */
};

struct attn_in_args { /* q, k, v = rope(norm_qk(linear(rms_norm(x)))) */
    const struct model_config *config;
    const struct layer_weights *weights;
    int32_t layer;
    const struct batch *batch;
    struct tensor rope;     /* [T, E] from begin */
    struct tensor x;        /* [T, D] */
    struct tensor n;        /* [T, D] out: what q, k and v took */
    struct tensor q;        /* [T, H·E] out */
    struct tensor k, v;     /* [T, G·E] out; scratch when there is a cache */
    struct kv_cache *cache; /* k and v also go to rows [past, …) of the slot; or NULL */
    struct tensor rstd;     /* [T] out, for backward; absent when serving */
    struct tensor q_raw,
        k_raw; /* [T, H·E], [T, G·E] out: before qk_norm, for backward; or absent */
};

struct attention_args { /* out = softmax(q·kᵀ/√E)·v, causal inside each document */
    const struct model_config *config;
    int32_t layer;
    const struct batch *batch;
    struct tensor q;              /* [T, H·E] */
    struct tensor k, v;           /* [T, G·E]; not read when there is a cache */
    const struct kv_cache *cache; /* keys [0, past + index] of the slot; or NULL */
    struct tensor out;            /* [T, H·E] out */
    struct tensor lse;            /* [T, H] out: log-sum-exp, for backward; absent when serving */
};

struct attn_out_args { /* y = x + o(attn) */
    const struct layer_weights *weights;
    int32_t layer;
    const struct batch *batch;
    struct tensor attn; /* [T, H·E] */
    struct tensor x;    /* [T, D] */
    struct tensor y;    /* [T, D] out; may be x */
};

struct mlp_args { /* y = x + down(silu(gate(n))·up(n)), n = rms_norm(x) */
    const struct model_config *config;
    const struct layer_weights *weights;
    int32_t layer;
    const struct batch *batch;
    struct tensor x;        /* [T, D] */
    struct tensor n;        /* [T, D] out: what gate and up took */
    struct tensor gate, up; /* [T, F] out, kept for backward */
    struct tensor act;      /* [T, F] out: what down took; may be gate when that is not kept */
    struct tensor rstd;     /* [T] out, for backward; absent when serving */
    struct tensor y;        /* [T, D] out; may be x */
};

struct head_args { /* logits = head(rms_norm(x)) of chosen rows */
    const struct model_config *config;
    struct tensor final_norm, head;
    const struct batch *batch;
    struct tensor x;    /* [T, D] */
    const int32_t *row; /* [count] host, ascending */
    int32_t count;
    struct tensor n;      /* [count, D] scratch */
    struct tensor logits; /* [count, V] out */
};

/* How the token behind one row of logits is chosen; sampler.h has the arithmetic. */
struct sample_row {
    double temperature; /* finite; 0: greedy, the best logit, the lowest id of equal ones */
    double top_p; /* the smallest set of best tokens that holds this share; 1: all; 0: greedy */
    uint64_t seed;
    uint64_t index; /* of the token in its answer: the random number is a function of both */
};

struct sample_args {
    struct tensor logits;         /* [count, V] in; overwritten, but for greedy rows */
    const struct sample_row *row; /* [count] host; count is at most T */
    /* [count] I32 out: the token; -1 where the logits hold a NaN or no finite value: the model has
     * broken down, nothing may be made of it. */
    struct tensor token;
};

/* Beside a row's cross-entropy the gap by which its best token leads another one: the loss that is
 * differentiated also has weight · gap / divisor, gap = logit(best) - logit(other), with the
 * divisor max(1, gap) as it is, not differentiated. */
struct loss_margins {
    const int32_t *best, *other; /* [T] host */
    const float *weight;         /* [T] host, of either sign; 0: none of this row */
};

/* The loss of the rows whose weight is not 0, never more than C of them at a time: logits, softmax,
 * and with dx the gradient, chunk by chunk. Cross-entropy, nll = -log p(target), with `margins`
 * beside it, of which only dx and what follows from it tell; or with teacher_x nll = KL(teacher ||
 * model) over the vocabulary, the gradient weight · (p - p_teacher). That is a sum of terms that
 * are not negative, so that near models keep their digits; of the same bits it is 0. */
struct head_loss_args {
    const struct model_config *config;
    struct tensor final_norm, head;
    const struct batch *batch;
    const int32_t *target; /* [T] host: what should follow row i; not read with a teacher */
    const float *weight;   /* [T] host: d(total loss)/d(nll of row i) */
    const struct loss_margins *margins;       /* or NULL; not with a teacher */
    struct tensor x;                          /* [T, D] */
    struct tensor teacher_x;                  /* [T, D]; absent: no teacher, nor the next three */
    struct tensor teacher_norm, teacher_head; /* [D], [V, D]: what it is read with */
    struct tensor teacher_logits;             /* [C, V] scratch */
    struct tensor nll;                        /* [T] F32 out, 0 where weight is 0 */
    struct tensor correct; /* [T] I32 out: 1 where the best logit is the target, or the teacher's */
    struct tensor dx;      /* [T, D] out: gradient at x; absent: loss only */
    struct tensor d_final_norm, d_head; /* +=, or absent */
    struct tensor n, dn;                /* [C, D] scratch */
    struct tensor logits;               /* [C, V] scratch */
};

/* Backward leaves the inputs of the linear layers and the gradients at their outputs, both as they
 * are stored: statistics (gram) read them. Of down and o the latter is what dx and dy are before
 * the stage. */
struct mlp_backward_args {
    const struct model_config *config;
    const struct layer_weights *weights;
    struct layer_weights *grads; /* mlp_norm, gate, up, down += */
    struct tensor x, rstd;       /* as in forward */
    struct tensor gate, up;      /* [T, F] as in forward; out: the gradients there */
    struct tensor n;             /* [T, D] out: as in forward, what gate and up took */
    struct tensor act;           /* [T, F] out: as in forward, what down took */
    struct tensor dn, d_act;     /* [T, D], [T, F] scratch */
    struct tensor dx;            /* [T, D] in: gradient at y; out: gradient at x */
};

struct attn_out_backward_args {
    const struct layer_weights *weights;
    struct layer_weights *grads; /* o += */
    struct tensor attn;          /* [T, H·E] as in forward */
    struct tensor dy;            /* [T, D]: gradient at y, which is also the residual's */
    struct tensor d_attn;        /* [T, H·E] out */
};

struct attention_backward_args {
    const struct model_config *config;
    const struct batch *batch;
    struct tensor q, k, v, out, lse; /* as in forward */
    struct tensor d_out;             /* [T, H·E] */
    struct tensor delta;             /* [T, H] F32 scratch: Σ d_out·out */
    struct tensor dq, dk, dv;        /* [T, H·E], [T, G·E], [T, G·E] out */
};

struct attn_in_backward_args {
    const struct model_config *config;
    const struct layer_weights *weights;
    struct layer_weights *grads; /* attn_norm, q, k, v, q_norm, k_norm += */
    const struct batch *batch;
    struct tensor rope;
    struct tensor x, rstd, q_raw, k_raw; /* as in forward */
    struct tensor dq, dk, dv;            /* in; out: the gradients at the products' outputs */
    struct tensor n;                     /* [T, D] out: as in forward, what q, k and v took */
    struct tensor dn;                    /* [T, D] scratch */
    struct tensor dx;                    /* [T, D] in: gradient at the residual; out: at x */
};

struct embed_backward_args {
    const struct batch *batch;
    struct tensor dx;      /* [T, D] */
    struct tensor d_embed; /* [V, D] += */
};

/* ------------------------------------------------------------------ statistics */

/* Second moments of rows, a symmetric matrix: out += Σ_r weight_r · x_r·x_rᵀ, over a linear layer's
 * inputs or the gradients at its outputs: what a change of its weights costs
 * (engine/codec/factor.h). */
struct gram_args {
    struct tensor x;      /* [T, n] */
    struct tensor weight; /* F32 [T]; absent: 1 */
    struct tensor scaled; /* [T, n] scratch, where there is a weight */
    struct tensor out;    /* F32 [n, n] +=, where column >= row; below lies scratch */
};

/* ------------------------------------------------------------------ optimizer */

/* What stages read is `w`, or `copy` where there is one. */
struct parameter {
    /* Same shape; w, m, v updated, g left zero. F32, but for a w of BF16: the new value is rounded
     * to one of its two neighbours, up with the probability of its distance (stochastic rounding).
     * The random numbers are rng_at(adamw_args.seed, step << 32 | index of the parameter, element):
     * a resumed run draws the same. */
    struct tensor w, g, m, v;
    struct tensor copy; /* BF16: w to nearest even, written with it; absent in precision F32 */
    bool decay;         /* weight decay applies: matrices yes, norms and biases no */
};

struct gradient_norm_args {
    const struct parameter *parameter;
    int32_t count;
    struct tensor norm; /* [1] F32 out: ‖all gradients‖₂ */
};

struct adamw_args { /* Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101 */
    const struct parameter *parameter;
    int32_t count;
    struct tensor norm; /* [1] from gradient_norm */
    float max_norm;     /* gradients are scaled by min(1, max_norm / norm) */
    float learning_rate, beta1, beta2, epsilon, weight_decay;
    int32_t step;  /* 1-based, for bias correction */
    uint64_t seed; /* of stochastic rounding */
};

/* ------------------------------------------------------------------ the table */

struct backend_ops {
    const char *name;

    void (*close)(struct backend *backend);
    /* Waits for everything enqueued; the first failure since the last check. */
    int (*check)(struct backend *backend, struct err *err);

    /* Memory, zeroed, aligned to 64 bytes. */
    void *(*alloc)(struct backend *backend, size_t bytes, struct err *err);
    void (*free)(struct backend *backend, void *memory);
    void (*upload)(struct backend *backend, void *to, const void *host, size_t bytes);
    void (*download)(struct backend *backend, void *host, const void *from, size_t bytes);
    /* What the device has and has free at the moment, whoever uses the rest. NULL: it is the
     * host's. */
    void (*memory)(struct backend *backend, int64_t *bytes, int64_t *bytes_free);
    /* A host tensor that outlives the view (a mapped base), readable by the stages: in place where
     * the backend shares the host's memory and precision allows, else a copy. Vectors become F32,
     * matrices BF16 in precision BF16. On failure out->data is NULL. */
    int (*weight_open)(struct backend *backend, const struct tensor *host, struct tensor *out,
                       struct err *err);
    void (*weight_close)(struct backend *backend, struct tensor *weight);

    /* Copies and repacks: `delta` may go afterwards. */
    int (*delta_pack)(struct backend *backend, const struct delta_tensor *delta,
                      struct packed_delta **out, struct err *err);
    void (*delta_free)(struct backend *backend, struct packed_delta *packed);
    int64_t (*delta_bytes)(const struct packed_delta *packed);

    void (*begin)(struct backend *, const struct begin_args *);
    void (*embed)(struct backend *, const struct embed_args *);
    void (*attn_in)(struct backend *, const struct attn_in_args *);
    void (*attention)(struct backend *, const struct attention_args *);
    void (*attn_out)(struct backend *, const struct attn_out_args *);
    void (*mlp)(struct backend *, const struct mlp_args *);
    void (*head)(struct backend *, const struct head_args *);
    void (*sample)(struct backend *, const struct sample_args *);
    void (*head_loss)(struct backend *, const struct head_loss_args *);

    void (*mlp_backward)(struct backend *, const struct mlp_backward_args *);
    void (*attn_out_backward)(struct backend *, const struct attn_out_backward_args *);
    void (*attention_backward)(struct backend *, const struct attention_backward_args *);
    void (*attn_in_backward)(struct backend *, const struct attn_in_backward_args *);
    void (*embed_backward)(struct backend *, const struct embed_backward_args *);

    void (*gram)(struct backend *, const struct gram_args *);

    void (*gradient_norm)(struct backend *, const struct gradient_norm_args *);
    void (*adamw)(struct backend *, const struct adamw_args *);
};

struct backend {
    const struct backend_ops *ops;
    void *state;
    enum dtype activation; /* F32 or BF16: the precision */
    int threads;           /* of the host that work for it */
};

struct backend_options {
    const char *device;   /* "cpu", "cuda:0", … (engine_devices, engine.h); NULL: "cpu" */
    enum dtype precision; /* F32 or BF16 */
    int threads;          /* 0: one for each core this process may use */
};
/* ERR_INVALID: an unknown device; ERR_UNAVAILABLE: what this one lacks, and the remedy. */
int backend_open(struct backend *backend, const struct backend_options *options, struct err *err);
void backend_close(struct backend *backend); /* a zeroed struct is fine */
const char *backend_cpu_kernels(void); /* "avx512", "avx2" or "plain": the best of this processor */
/* ops->check, and a sign of life (base/progress.h): it has waited, so the device has answered. */
int backend_check(struct backend *backend, struct err *err);

#endif
