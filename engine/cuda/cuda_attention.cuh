/* cuda_attention.cuh: what the kernels of attention share: who computes which rows, and how parts
 * of a row are put together.
 *
 * Softmax runs over blocks of keys, keeping for each query the largest score and the sum so far
 * (FlashAttention, https://arxiv.org/abs/2205.14135; https://arxiv.org/abs/2307.08691). Scores are
 * kept as exponents of two: score · log2 e.
 *
 * Keys are cut at multiples of ATTENTION_CHUNK, counted from the document's first position. A chunk
 * starts afresh, and its part joins the row's total when it ends, in order. So a row's sums depend
 * on its own position and keys alone, whatever tile it is computed in; and a document of which one
 * row is wanted (decode) can have its chunks computed side by side, to the same bits: the parts
 * then go through memory, and attention_combine joins them. */
#ifndef GRAFT_CUDA_CUDA_ATTENTION_CUH
#define GRAFT_CUDA_CUDA_ATTENTION_CUH

#include "engine/cuda/cuda.h"

#define ATTENTION_CHUNK 256 /* keys; a multiple of every kernel's block of keys */

/* What a pass over one layer reads and writes, in device memory. */
template <typename T> struct attention_job {
    int32_t heads, kv_heads, head_dim;
    float scale; /* log2 e / √E */
    const T *q;
    const T *k, *v;  /* rows of the batch; with a cache, this layer of it */
    int32_t max_len; /* of a slot; 0: no cache */
    T *out;
    float *lse;     /* [T, H] or NULL */
    float *partial; /* [docs][chunks][H][E] sums, then [docs][chunks][H][2]: largest score, sum */
    int32_t chunks; /* most of a document that is decoded */
};

/* The queries of a thread block. In a prompt or in training: rows of one head, `step` 1 row. In
 * decode: the heads of one row that read the same keys, `step` 1 head. */
struct attention_tile {
    int32_t count; /* slots in use; 0: nothing to do */
    int32_t row, head, position;
    int32_t row_step, head_step;
    int32_t key_from, key_to; /* keys that some slot may see */
    int32_t doc, chunk;       /* of decode; chunk -1: the rows are computed whole */
    int64_t kv_at;            /* element of position 0's key, of this kv head */
};

template <typename T>
static __device__ __forceinline__ int64_t attention_kv_at(const cuda_batch &batch,
                                                          const attention_job<T> &job, int32_t doc,
                                                          int32_t kv)
{
    int64_t ld = (int64_t)job.kv_heads * job.head_dim;
    int64_t first = job.max_len ? (int64_t)batch.slot[doc] * job.max_len : batch.cu_seqlens[doc];

    return first * ld + (int64_t)kv * job.head_dim;
}

static __device__ __forceinline__ int32_t attention_past(const cuda_batch &batch, int32_t doc,
                                                         int32_t max_len)
{
    return max_len ? batch.past[doc] : 0;
}

/* Block (head, tile · 64 / SLOTS + part) of a grid over the batch's tiles, the last first: they
 * have most keys. Documents of one row are left to decode, where `decoded`. */
template <int SLOTS, typename T>
static __device__ __forceinline__ attention_tile attention_rows(const cuda_batch &batch,
                                                                const attention_job<T> &job,
                                                                bool decoded)
{
    const int32_t parts = CUDA_QUERY_TILE / SLOTS;
    int32_t at = (int32_t)(gridDim.y - 1 - blockIdx.y), tile = at / parts;
    int32_t doc = batch.tile_doc[tile], start = batch.cu_seqlens[doc];
    int32_t rows = batch.cu_seqlens[doc + 1], row = batch.tile_from[tile] + at % parts * SLOTS;
    attention_tile t;

    rows = decoded && rows - start == 1 ? 0 : rows - row;
    t.count = rows < 0 ? 0 : rows < SLOTS ? rows : SLOTS;
    t.row = row;
    t.head = (int32_t)blockIdx.x;
    t.position = attention_past(batch, doc, job.max_len) + row - start;
    t.row_step = 1;
    t.head_step = 0;
    t.key_from = 0;
    t.key_to = t.position + t.count;
    t.doc = doc;
    t.chunk = -1;
    t.kv_at = attention_kv_at(batch, job, doc, t.head / (job.heads / job.kv_heads));
    return t;
}

/* Block (kv head · parts + part, chunk, doc): one chunk of the keys of a document of one row. */
template <int SLOTS, typename T>
static __device__ __forceinline__ attention_tile attention_chunk(const cuda_batch &batch,
                                                                 const attention_job<T> &job)
{
    int32_t group = job.heads / job.kv_heads, parts = (group + SLOTS - 1) / SLOTS;
    int32_t kv = (int32_t)blockIdx.x / parts, part = (int32_t)blockIdx.x % parts;
    int32_t doc = (int32_t)blockIdx.z, row = batch.cu_seqlens[doc];
    attention_tile t;

    t.row = row;
    t.head = kv * group + part * SLOTS;
    t.position = attention_past(batch, doc, job.max_len);
    t.row_step = 0;
    t.head_step = 1;
    t.doc = doc;
    t.chunk = (int32_t)blockIdx.y;
    t.key_from = t.chunk * ATTENTION_CHUNK;
    t.key_to = min(t.position + 1, t.key_from + ATTENTION_CHUNK);
    t.count = min(group - part * SLOTS, SLOTS);
    if (batch.cu_seqlens[doc + 1] - row != 1 || t.key_from > t.position)
        t.count = 0;
    if (t.position < ATTENTION_CHUNK)
        t.chunk = -1;
    t.kv_at = attention_kv_at(batch, job, doc, kv);
    return t;
}

/* ------------------------------------------------------------------ sums of a row */

struct softmax_sums {
    float max; /* -INFINITY: no key yet */
    float sum;
};

/* Factors of what was summed so far and of what comes, when a largest score comes that may be
 * larger. Exactly 1 and 0 where nothing comes: such a part changes no bit. */
struct softmax_factors {
    float old, part;
};
static __device__ __forceinline__ softmax_factors softmax_join(softmax_sums *total,
                                                               softmax_sums part)
{
    float max = fmaxf(total->max, part.max), base = max == -INFINITY ? 0.0f : max;
    softmax_factors f = {exp2f(total->max - base), exp2f(part.max - base)};

    total->max = max;
    total->sum = fmaf(part.sum, f.part, __fmul_rn(total->sum, f.old));
    return f;
}
static __device__ __forceinline__ float softmax_joined(float total, float part, softmax_factors f)
{
    return fmaf(part, f.part, __fmul_rn(total, f.old));
}

static __device__ __forceinline__ float attention_lse(softmax_sums total)
{
    return (total.max + log2f(total.sum)) * 0.69314718055994531f; /* ln 2 */
}

/* Where the part of one head's chunk lies in job.partial. */
template <typename T>
static __device__ __forceinline__ int64_t partial_at(const attention_job<T> &job, int32_t doc,
                                                     int32_t chunk, int32_t head)
{
    return ((int64_t)doc * job.chunks + chunk) * job.heads + head;
}
template <typename T>
static __device__ __forceinline__ float *partial_sums(const attention_job<T> &job, int32_t docs,
                                                      int64_t at)
{
    return job.partial + (int64_t)docs * job.chunks * job.heads * job.head_dim + 2 * at;
}

/* ------------------------------------------------------------------ bodies */

#define ATTENTION_MAX_HEAD 512

#endif
