/* cuda_norm.cuh: RMSNorm of whole rows, and what happens to queries and keys between their
 * products and attention. Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467; rope: Su et al.
 * 2021, https://arxiv.org/abs/2104.09864, in the half-split form. */
#ifndef GRAFT_CUDA_CUDA_NORM_CUH
#define GRAFT_CUDA_CUDA_NORM_CUH

#include "engine/cuda/cuda.h"

/* n[i] = x[row[i]] / rms · weight. A row's group may have a weight of its own: `own` points at that
 * of group 0, `own_stride` bytes apart from the next; groups is 0 or own may be read. */
struct norm_call {
    const void *x;       /* [T, D] in the precision */
    void *n;             /* [count, D] */
    float *rstd;         /* [count], or NULL */
    const float *weight; /* [D] */
    const char *own;
    int64_t own_stride;
    const int32_t *row; /* [count] on the device; NULL: row i is i */
    int32_t count, width;
    float eps;
};
void cuda_norm(struct cuda *cuda, const struct norm_call *call);

/* The way back through such a norm: dx[row[i]] (+)= the gradient at x of dn[i], and d_weight +=
 * Σ dn · x · rstd, row by row in 32 strands, whose sums are then added in order. */
struct norm_backward {
    const void *x;       /* [T, D] in the precision */
    const float *weight; /* [D] */
    const void *dn;      /* [count, D] in the precision, as dx */
    void *dx;            /* [T, D] */
    float *rstd;         /* [count]: as forward kept it where `known`; else it is put there */
    bool known, add;
    float *d_weight;    /* [D], or NULL */
    const int32_t *row; /* [count] on the device; NULL: row i is i */
    int32_t count, width;
    float eps;
};
void cuda_norm_backward(struct cuda *cuda, const struct norm_backward *call);

/* grad += Σ dy over its rows; nothing where grad has no data. */
void cuda_bias_gradient(struct cuda *cuda, const struct tensor &grad, const struct tensor &dy);

/* The way back through rope and the norm of each head (absent: none), in place. Heads are at most
 * CUDA_MAX_HEAD wide. */
struct heads_backward {
    struct tensor d;        /* [T, heads · E]: gradient at what rope gave; out: at the product */
    struct tensor raw;      /* [T, heads · E]: before the norm; absent without one */
    struct tensor weight;   /* [E] */
    struct tensor d_weight; /* [E] +=, or absent */
    struct tensor rope;     /* [T, E] */
    float eps;
};
void cuda_heads_backward(struct cuda *cuda, const struct heads_backward *args);

/* What is left of attn_in when q, k and v are products: q and k are normed head by head (qk_norm,
 * q_raw and k_raw keep what they were) and turned by rope; with a cache, k and v go there. */
void cuda_rotate(struct cuda *cuda, const struct attn_in_args *args);

/* The address of a float vector of group 0 in layer `layer`, and its distance to the next group's:
 * for norm_call. */
#define OWN_VECTOR(cuda, layer_, member)                                                    \
    ((cuda)->batch.groups == 0                                                              \
         ? nullptr                                                                          \
         : (const char *)((cuda)->batch.layer + (int64_t)(layer_) * (cuda)->batch.groups) + \
               offsetof(struct group_layer, member))

#endif
