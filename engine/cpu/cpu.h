/* cpu.h: what the files of the CPU backend share. The CPU table is the definition of correct: other
 * backends are held to it.
 *
 *   cpu_backend.c     the table, memory, begin, embeddings
 *   kernels*          inner loops for each instruction set
 *   gemm.c            products of whole matrices, for training
 *   cpu_linear.c      linear layers: training products, or serving ones with deltas
 *   cpu_delta.c       packed deltas
 *   cpu_delta_apply.c their products with rows
 *   cpu_attention.c   attention, both regimes, and its backward
 *   cpu_forward.c     the stages of a layer, the head's logits
 *   cpu_backward.c    their gradients
 *   cpu_loss.c        head and losses in chunks
 *   cpu_optimizer.c   gradient norm and AdamW
 *   cpu_statistics.c  second moments, for compression
 *   cpu_bf16.c        precision BF16: the table around these stages
 *
 * Work is cut into tasks by shape alone, never by the number of threads. */
#ifndef GRAFT_CPU_CPU_H
#define GRAFT_CPU_CPU_H

#include "engine/backend.h"
#include "engine/base/thread_pool.h"
#include "engine/cpu/kernels.h"

#define CPU_ROW_BLOCK 64 /* rows of a task in products and in loops over rows */

/* Attention works on tiles of queries by keys; the tiles lie in each worker's scratch. */
#define CPU_QUERY_BLOCK 64
#define CPU_KEY_BLOCK 256

/* gemm packs this much of the right-hand matrix, and of a transposed left-hand one. */
#define CPU_GEMM_K 256
#define CPU_GEMM_COLS 192
#define CPU_GEMM_ROWS 96

struct cpu_scratch { /* one for each worker */
    _Alignas(64) float pack[CPU_GEMM_K * CPU_GEMM_COLS];
    _Alignas(64) float rows[CPU_GEMM_K * CPU_GEMM_ROWS];
    _Alignas(64) float scores[CPU_QUERY_BLOCK * CPU_KEY_BLOCK];
    _Alignas(64) float d_scores[CPU_QUERY_BLOCK * CPU_KEY_BLOCK];
};

/* Of factored deltas. It grows when one is packed, so that no stage allocates. */
struct cpu_delta_scratch {
    int32_t inner, width; /* floats of a row of `sums`; of a worker's `operand` */
    float *sums;          /* [CPU_DELTA_CALLS][inner] what the right side gives the left one */
    float *operand;       /* [threads][width] the scaled x of a product of planes */
};

struct cpu {
    struct thread_pool *pool;
    const struct cpu_kernels *k;
    struct cpu_scratch *scratch; /* [threads] */
    struct cpu_delta_scratch delta;
    bool blas;                   /* gemm by OpenBLAS instead of the kernels */
    bool bf16;                   /* the precision: see cpu_round */
    float *wide;                 /* BF16 only: room for a stage's activations in float */
    size_t wide_size, wide_used; /* floats */
    int32_t rows;                /* of the pass that begin opened */
    struct err failure;          /* the first, until check() */
};

static inline struct cpu *cpu_of(struct backend *backend)
{
    return backend->state;
}

/* The stages compute in float in either precision. In BF16 they call this where a value is stored
 * that they read again, so that it is what was stored. */
static inline void cpu_round(const struct cpu *cpu, float *x, int64_t n)
{
    for (int64_t i = 0; cpu->bf16 && i < n; i++)
        x[i] = bf16_to_f32(f32_to_bf16(x[i]));
}

static inline float *f32(const struct tensor *t)
{
    return t->data;
}

static inline int64_t ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

/* Part `i` of `parts` equal parts of [0, n), cut at multiples of `unit`. */
struct span {
    int32_t from, to;
};
static inline struct span span_part(int32_t n, int32_t unit, int64_t parts, int64_t i)
{
    int64_t units = ceil_div(n, unit);
    int64_t from = units * i / parts * unit, to = units * (i + 1) / parts * unit;

    return (struct span){(int32_t)from, to < n ? (int32_t)to : n};
}

/* The adapter of a row; NULL: the base. */
const struct adapter *cpu_row_adapter(const struct batch *batch, int32_t row);
/* A norm or bias of one row: the adapter's vector at `offset` of adapter_layer, or the base's. */
const float *cpu_row_vector(const struct batch *batch, int32_t row, int32_t layer, size_t offset,
                            const struct tensor *base);

/* ------------------------------------------------------------------ products (gemm.c) */

enum gemm_kind {
    GEMM_NT, /* C[m, n] = A[m, k] · B[n, k]ᵀ: forward */
    GEMM_NN, /* C[m, n] = A[m, k] · B[k, n]: gradient of the input */
    GEMM_TN, /* C[m, n] = A[k, m]ᵀ · B[k, n]: gradient of the weights */
};

struct gemm {
    enum gemm_kind kind;
    int32_t m, n, k;
    const float *a;
    int64_t lda;
    const void *b;
    enum dtype b_dtype;
    int64_t ldb;
    float *c;
    int64_t ldc;
    bool add;       /* C += */
    bool symmetric; /* C need only be right where column >= row */
};

#define GEMM_MAX 4 /* products that run as one set of tasks */
void cpu_gemm(struct cpu *cpu, const struct gemm *gemm, int count);
/* Holds the products that training will use to plain loops; ERR_UNAVAILABLE with the remedy. */
int cpu_gemm_check(struct cpu *cpu, struct err *err);

/* ------------------------------------------------------------------ linear layers */

struct linear_call { /* y = x·Wᵀ + b + delta, or y += */
    const struct linear *linear;
    size_t adapter; /* offset of the adapter_linear in struct adapter_layer */
    const float *x; /* [rows, in] */
    float *y;       /* [rows, out] */
    bool add;
};
void cpu_linear(struct cpu *cpu, const struct batch *batch, int32_t layer,
                const struct linear_call *call, int count);

/* ------------------------------------------------------------------ deltas */

struct packed_delta {
    enum delta_kind kind;
    int32_t rows, cols;
    int32_t inner;  /* DELTA_PLANES: planes, DELTA_FACTORS: rank; else 0 */
    uint32_t *bits; /* as struct sign_args. DELTA_PLANES: the left side, a column for each plane */
    float *scale;   /* [rows]; halved where there are more_bits */
    uint32_t *more_bits; /* DELTA_SIGN: the second signs, likewise; or NULL */
    struct tensor dense; /* DELTA_FACTORS: left */
    struct tensor right; /* DELTA_FACTORS */
    float factor;        /* DELTA_FACTORS: its scale */
    /* DELTA_PLANES */
    uint32_t *right_bits; /* as struct sign_args, a row for each plane */
    float *right_scale, *left_scale, *col_scale;
    int32_t *vector;
    int64_t bytes;
};

int cpu_delta_pack(struct backend *backend, const struct delta_tensor *delta,
                   struct packed_delta **out, struct err *err);
void cpu_delta_free(struct backend *backend, struct packed_delta *packed);
int64_t cpu_delta_bytes(const struct packed_delta *packed);

#define CPU_DELTA_CALLS 256 /* of one run: so many rows of `inner` sums are kept */

struct cpu_delta_call { /* y += delta · x, one row; the y of calls do not overlap */
    const struct packed_delta *delta;
    const float *x; /* [cols] */
    float *y;       /* [rows] */
};
/* Two rounds: factored deltas first bring x down to `inner` sums, for which y need not be there,
 * then everything adds to y. What a task computes depends on its own call and on shapes alone. */
struct cpu_delta_run {
    struct cpu *cpu;
    const struct cpu_delta_call *call;
    int32_t count;
    int64_t right[CPU_DELTA_CALLS + 1], left[CPU_DELTA_CALLS + 1]; /* first tasks of calls */
};
void cpu_delta_open(struct cpu_delta_run *run, struct cpu *cpu, const struct cpu_delta_call *call,
                    int32_t count);
/* Of right[count] tasks of the first round. */
void cpu_delta_right_task(const struct cpu_delta_run *run, int64_t task, int worker);
/* The second round. */
void cpu_delta_finish(struct cpu_delta_run *run);
/* Both. */
void cpu_delta_apply(struct cpu *cpu, const struct cpu_delta_call *call, int32_t count);
/* y += row `row` of the delta: an embedding. */
void cpu_delta_add_row(const struct packed_delta *delta, int32_t row, float *y);

/* ------------------------------------------------------------------ stages */

void cpu_begin(struct backend *, const struct begin_args *);
void cpu_embed(struct backend *, const struct embed_args *);
void cpu_embed_backward(struct backend *, const struct embed_backward_args *);
void cpu_attn_in(struct backend *, const struct attn_in_args *);
void cpu_attention(struct backend *, const struct attention_args *);
void cpu_attn_out(struct backend *, const struct attn_out_args *);
void cpu_mlp(struct backend *, const struct mlp_args *);
void cpu_head(struct backend *, const struct head_args *);
void cpu_sample(struct backend *, const struct sample_args *);
void cpu_head_loss(struct backend *, const struct head_loss_args *);
void cpu_mlp_backward(struct backend *, const struct mlp_backward_args *);
void cpu_attn_out_backward(struct backend *, const struct attn_out_backward_args *);
void cpu_attention_backward(struct backend *, const struct attention_backward_args *);
void cpu_attn_in_backward(struct backend *, const struct attn_in_backward_args *);
void cpu_gram(struct backend *, const struct gram_args *);
void cpu_gradient_norm(struct backend *, const struct gradient_norm_args *);
void cpu_adamw(struct backend *, const struct adamw_args *);

/* ------------------------------------------------------------------ precision BF16 */

/* Puts the stages' BF16 bodies into a table that has the F32 ones. */
void cpu_bf16_table(struct backend_ops *ops);

#endif
