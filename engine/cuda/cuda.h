/* cuda.h: what the files of the CUDA backend share. The CPU's table defines what is right; each
 * stage here is held to it by a test of the same name (tests/unit/test_cuda_*.c).
 *
 *   device.cuh, ptx.cuh   the language of kernels, on CUDA and on the test shim
 *   device.h              memory, copies, launches, failures
 *   launch_list.h         launches held back, and graphs of them: a step of decoding is one
 *   gemm.h                matrix products of training
 *   cuda_backend.cu       the table, memory, begin: what kernels know of a batch
 *   cuda_embed.cu         rope's angles, embeddings and their gradient
 *   cuda_norm.cu, .cuh    RMSNorm, rope, the kv cache's new rows
 *   cuda_linear.cu, .cuh  products with weights and deltas: training's, and serving's own kernels
 *   cuda_planes.cu, .cuh  what deltas of planes add to them
 *   cuda_forward.cu       the stages of a layer, the head's logits
 *   cuda_backward.cu      the stages of a layer backward
 *   cuda_norm_backward.cu norms, rope and biases backward
 *   cuda_sample.cu        from logits to tokens
 *   cuda_loss.cu          losses, from the last rows to the gradient at them
 *   cuda_optimizer.cu     norm of the gradients, AdamW
 *   cuda_statistics.cu    second moments, for compression
 *   cuda_delta.cu, .cuh   packed deltas
 *   cuda_bench.cu         what the device can do at best
 *   cuda_attention*.cu    attention, forward and backward; _mma: on tensor cores
 *
 * A stage is a function of the CPU table's name, cuda_X for cpu_X, that reads its arguments,
 * chooses kernels by dtype and shape, and launches them. It must not allocate, wait, or look at
 * device memory. Sums run in an order that depends on shapes alone: a pass gives the same bits each
 * time it runs, and in serving a row's order does not depend on the other rows. */
#ifndef GRAFT_CUDA_CUDA_H
#define GRAFT_CUDA_CUDA_H

#include "engine/cuda/device.h"
#include "engine/cuda/gemm.h"

extern "C" {
#include "engine/backend.h"
}

/* ------------------------------------------------------------------ what kernels know of a batch
 */

/* A packed delta in device memory. Signs lie in the order of mma.m16n8k16's A operand, so that a
 * warp reads its tile as 32 neighbouring words: [⌈rows/16⌉][⌈cols/64⌉][32 lanes], see
 * cuda_delta.cuh. Rows and columns that pad have sign bits 0 and scale 0. */
struct delta_view {
    const unsigned *bits; /* or NULL: dense, factors, planes, or nothing at all */
    const float *scale; /* [⌈rows/16⌉ · 16]; halved where there are more signs. Planes: of rows */
    const unsigned *more; /* the second signs, like `bits`; or NULL */
    const void *dense;    /* [rows, cols] */
    int32_t dtype;        /* of dense */
    int32_t rows, cols;
    const void *left, *right; /* factors: [rank, rows], [rank, cols]; planes: their signs */
    int32_t left_dtype, right_dtype;
    int32_t rank;   /* 0: no factors */
    float factor;   /* their scale */
    int32_t planes; /* 0: none; else with those that pad a multiple of 64 (DELTA_BLOCK) */
    const struct delta_plane *plane; /* [planes] */
    const float *col_scale;          /* [⌈cols/64⌉ · 64], zeros behind the last */
};

struct delta_plane {
    float left, right;     /* scales; all is 0 of a plane that pads */
    uint16_t first, count; /* the planes of its vector, in its block of 64 */
};

/* Rows of the same adapter are a group. What a group has of its own, or NULL: the base's. */
struct group_linear {
    struct delta_view delta;
    const float *bias;
};
struct group_layer {
    struct group_linear q, k, v, o, gate, up, down;
    const float *attn_norm, *q_norm, *k_norm, *mlp_norm;
};
struct group_outer {
    const float *final_norm;
    struct delta_view embed, head;
};

#define CUDA_QUERY_TILE 64 /* rows of a document that one tile of attention covers at most */

/* Everything is device memory, written by begin; passed to kernels by value. */
struct cuda_batch {
    int32_t rows, docs, groups, tiles;
    const int32_t *token, *position; /* [rows] */
    const int32_t *row_doc;          /* [rows] document of a row */
    const int32_t *order;            /* [rows] rows sorted by token, then row; training only */
    const int32_t *row_group;        /* [rows] group of a row; -1: the base alone */
    const int32_t *cu_seqlens;       /* [docs + 1] */
    const int32_t *slot, *past;      /* [docs]; NULL without a kv cache */
    const int32_t *group_start;      /* [groups + 1] where a group begins in group_row */
    const int32_t *group_row;        /* [rows] of group 0, of group 1, …, the base's */
    const int32_t *tile_doc;         /* [tiles] document of a tile */
    const int32_t *tile_from;        /* [tiles] its first row in the batch */
    const struct group_layer *layer; /* [layers][groups] */
    const struct group_outer *outer; /* [groups] */
};

/* ------------------------------------------------------------------ the backend */

#define CUDA_NORM_PARTS 1024 /* sums that a norm is made of at most */
#define CUDA_HEAD_PARTS 256  /* those of the gradient of a q_norm or k_norm */
#define CUDA_MAX_HEAD 512    /* head_dim, backward */

struct cuda {
    struct device *device;
    struct gemm_context *gemm;
    enum dtype activation;   /* F32 or BF16: the precision */
    struct cuda_batch batch; /* of the pass that begin opened */
    int32_t layers;          /* of its model; 0: not told, and no adapters */
    char *staging, *meta;    /* what batch points to: on the host, on the device */
    size_t meta_bytes, meta_used;
    uint64_t *order; /* [order_rows], and as many int32_t behind: host scratch, rows sorted */
    int32_t order_rows;
    double *norm_parts; /* [CUDA_NORM_PARTS] on the device: sums of squares */
    float *head_parts;  /* [CUDA_HEAD_PARTS, CUDA_MAX_HEAD] on the device */
    float *partial;     /* parts of decode's attention, on the device; cuda_attention_room */
    size_t partial_bytes;
    int32_t grouped; /* rows of the batch that are not the base's alone */
    int32_t rank;    /* the highest of the batch's factored deltas; 0: it has none */
    int32_t planes;  /* the most of its deltas of planes; 0: it has none */
    float *sums;     /* x brought down to these, on the device; cuda_linear_room */
    size_t sums_bytes;
};

static inline struct cuda *cuda_of(struct backend *backend)
{
    return static_cast<struct cuda *>(backend->state);
}

template <typename T> static inline T *data_of(const struct tensor &t)
{
    return static_cast<T *>(t.data);
}

static inline int64_t ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

/* A host array, copied to device memory that lasts until the next begin: together up to eight
 * 4-byte numbers for each row of the batch in a pass. NULL after a failure. */
void *cuda_bring(struct cuda *cuda, const void *host, size_t bytes);

/* Runs the statements with T standing for the C++ type of the precision, which is that of all
 * matrices and activations. */
#define WITH_PRECISION(cuda, T, ...)            \
    do {                                        \
        if ((cuda)->activation == DTYPE_BF16) { \
            using T = bf16;                     \
            __VA_ARGS__;                        \
        } else {                                \
            using T = float;                    \
            __VA_ARGS__;                        \
        }                                       \
    } while (0)

/* ------------------------------------------------------------------ stages */

int cuda_delta_pack(struct backend *, const struct delta_tensor *, struct packed_delta **out,
                    struct err *err);
/* The same in memory of its own (benches). */
int cuda_delta_clone(struct backend *, const struct packed_delta *, struct packed_delta **out,
                     struct err *err);
void cuda_delta_free(struct backend *, struct packed_delta *);
int64_t cuda_delta_bytes(const struct packed_delta *);
/* As kernels see it; NULL: all zero. */
struct delta_view cuda_delta_view(const struct packed_delta *packed);

/* The part of begin that writes args->rope. */
void cuda_rope(struct cuda *cuda, const struct begin_args *args, const float *inv_freq);
void cuda_embed(struct backend *, const struct embed_args *);
void cuda_embed_backward(struct backend *, const struct embed_backward_args *);
void cuda_attn_in(struct backend *, const struct attn_in_args *);
void cuda_attn_out(struct backend *, const struct attn_out_args *);
void cuda_mlp(struct backend *, const struct mlp_args *);
void cuda_head(struct backend *, const struct head_args *);
void cuda_sample(struct backend *, const struct sample_args *);
void cuda_head_loss(struct backend *, const struct head_loss_args *);
void cuda_mlp_backward(struct backend *, const struct mlp_backward_args *);
void cuda_attn_out_backward(struct backend *, const struct attn_out_backward_args *);
void cuda_attn_in_backward(struct backend *, const struct attn_in_backward_args *);
void cuda_gram(struct backend *, const struct gram_args *);
void cuda_gradient_norm(struct backend *, const struct gradient_norm_args *);
void cuda_adamw(struct backend *, const struct adamw_args *);

/* The part of begin that makes room for what decode's attention computes in parts. */
int cuda_attention_room(struct cuda *cuda, const struct begin_args *args, struct err *err);
/* … and for the sums of deltas of factors and planes, once the batch's groups are known. */
int cuda_linear_room(struct cuda *cuda, struct err *err);
void cuda_attention(struct backend *, const struct attention_args *);
void cuda_attention_backward(struct backend *, const struct attention_backward_args *);

#endif
