#include "engine/cuda/cuda_attention_mma.cuh"

#include <cassert>
#include <type_traits>

#define THREADS 128
#define WARPS (THREADS / 32)
#define SLOTS 16                   /* queries of a block */
#define WARP_SLOTS (SLOTS / WARPS) /* of a warp */
#define KEYS 32                    /* of a step: one for each lane */

/* ------------------------------------------------------------------ plain */

/* Any type, any head_dim up to 32 · COLUMNS. A warp has WARP_SLOTS queries. For scores a lane has
 * a key, for sums it has columns lane, lane + 32, … of the head. */
template <int COLUMNS> struct plain_rows {
    softmax_sums part[WARP_SLOTS], total[WARP_SLOTS];
    float sum[WARP_SLOTS][COLUMNS], joined[WARP_SLOTS][COLUMNS]; /* of part, of total */
};

/* In shared memory, after the keys of a step: queries [SLOTS][E], probabilities [SLOTS][KEYS]. */
struct plain_memory {
    float *key; /* [KEYS][E + 1] */
    float *query, *p;
};
static __host__ __device__ __forceinline__ int32_t plain_floats(int32_t e)
{
    return KEYS * (e + 1) + SLOTS * e + SLOTS * KEYS;
}

template <typename T>
static __device__ void plain_load_queries(const attention_job<T> &job, const attention_tile &t,
                                          float *query)
{
    int32_t e = job.head_dim;

    for (int32_t i = threadIdx.x; i < t.count * e; i += THREADS) {
        int32_t slot = i / e;
        int64_t head =
            (int64_t)(t.row + slot * t.row_step) * job.heads + t.head + slot * t.head_step;

        query[i] = to_float(job.q[head * e + i % e]) * job.scale;
    }
}

/* Keys [from, from + KEYS) of the document, zero behind the last. */
template <typename T>
static __device__ void plain_load_keys(const attention_job<T> &job, const attention_tile &t,
                                       int32_t from, float *key)
{
    int32_t e = job.head_dim;
    int64_t ld = (int64_t)job.kv_heads * e;

    for (int32_t i = threadIdx.x; i < KEYS * e; i += THREADS) {
        int32_t at = i / e, column = i % e;

        key[at * (e + 1) + column] =
            from + at < t.key_to ? to_float(job.k[t.kv_at + (from + at) * ld + column]) : 0.0f;
    }
}

/* The warp's scores for the lane's key become probabilities; what was summed so far is scaled to
 * the new largest score. */
template <int COLUMNS>
static __device__ void plain_softmax(const plain_memory &m, int32_t e, const attention_tile &t,
                                     int32_t from, plain_rows<COLUMNS> &rows)
{
    int lane = threadIdx.x % 32, slot0 = threadIdx.x / 32 * WARP_SLOTS;
    float score[WARP_SLOTS] = {};

    for (int32_t i = 0; i < e; i++) {
        float key = m.key[lane * (e + 1) + i];

        UNROLL
        for (int r = 0; r < WARP_SLOTS; r++)
            score[r] = fmaf(m.query[min(slot0 + r, t.count - 1) * e + i], key, score[r]);
    }
    UNROLL
    for (int r = 0; r < WARP_SLOTS; r++) {
        float s = from + lane <= t.position + (slot0 + r) * t.row_step ? score[r] : -INFINITY;
        float max = fmaxf(rows.part[r].max, warp_max(s)), base = max == -INFINITY ? 0.0f : max;
        float scale = exp2f(rows.part[r].max - base), p = exp2f(s - base);

        rows.part[r].max = max;
        rows.part[r].sum = fmaf(rows.part[r].sum, scale, warp_sum(p));
        m.p[(slot0 + r) * KEYS + lane] = p;
        UNROLL
        for (int c = 0; c < COLUMNS; c++)
            rows.sum[r][c] *= scale;
    }
}

template <typename T, int COLUMNS>
static __device__ void plain_add_values(const attention_job<T> &job, const attention_tile &t,
                                        int32_t from, const float *p, plain_rows<COLUMNS> &rows)
{
    int lane = threadIdx.x % 32, slot0 = threadIdx.x / 32 * WARP_SLOTS;
    int32_t keys = min(t.key_to - from, KEYS);
    const T *v = job.v + t.kv_at + (int64_t)from * job.kv_heads * job.head_dim;

    for (int32_t k = 0; k < keys; k++, v += (int64_t)job.kv_heads * job.head_dim)
        UNROLL
    for (int c = 0; c < COLUMNS; c++) {
        float value = lane + 32 * c < job.head_dim ? to_float(v[lane + 32 * c]) : 0.0f;

        UNROLL
        for (int r = 0; r < WARP_SLOTS; r++)
            rows.sum[r][c] = fmaf(p[(slot0 + r) * KEYS + k], value, rows.sum[r][c]);
    }
}

template <int COLUMNS> static __device__ void plain_join(plain_rows<COLUMNS> &rows)
{
    UNROLL
    for (int r = 0; r < WARP_SLOTS; r++) {
        softmax_factors f = softmax_join(&rows.total[r], rows.part[r]);

        rows.part[r] = {-INFINITY, 0.0f};
        UNROLL
        for (int c = 0; c < COLUMNS; c++) {
            rows.joined[r][c] = softmax_joined(rows.joined[r][c], rows.sum[r][c], f);
            rows.sum[r][c] = 0;
        }
    }
}

template <typename T, int COLUMNS>
static __device__ void plain_store(const cuda_batch &batch, const attention_job<T> &job,
                                   const attention_tile &t, const plain_rows<COLUMNS> &rows)
{
    int lane = threadIdx.x % 32, slot0 = threadIdx.x / 32 * WARP_SLOTS;
    int32_t e = job.head_dim;

    UNROLL
    for (int r = 0; r < WARP_SLOTS; r++) {
        int32_t slot = slot0 + r, head = t.head + slot * t.head_step;
        int64_t at = (int64_t)(t.row + slot * t.row_step) * job.heads + head;
        bool whole = t.chunk < 0;
        float factor = 1.0f / rows.total[r].sum;

        if (slot >= t.count)
            continue;
        if (!whole)
            at = partial_at(job, t.doc, t.chunk, head);
        UNROLL
        for (int c = 0; c < COLUMNS; c++)
            if (lane + 32 * c < e && whole)
                job.out[at * e + lane + 32 * c] = from_float<T>(rows.joined[r][c] * factor);
            else if (lane + 32 * c < e)
                job.partial[at * e + lane + 32 * c] = rows.sum[r][c];
        if (lane == 0 && !whole) {
            partial_sums(job, batch.docs, at)[0] = rows.part[r].max;
            partial_sums(job, batch.docs, at)[1] = rows.part[r].sum;
        } else if (lane == 0 && job.lse) {
            job.lse[at] = attention_lse(rows.total[r]);
        }
    }
}

/* `decode`: blocks by attention_chunk, else by attention_rows. */
template <typename T, int COLUMNS>
static __global__ void __launch_bounds__(THREADS, 2)
    attention_plain_kernel(struct cuda_batch batch, attention_job<T> job, bool decode, bool serving)
{
    DYNAMIC_SHARED(float, shared);
    int32_t e = job.head_dim;
    plain_memory m = {shared, shared + KEYS * (e + 1), shared + KEYS * (e + 1) + SLOTS * e};
    attention_tile t =
        decode ? attention_chunk<SLOTS>(batch, job) : attention_rows<SLOTS>(batch, job, serving);
    plain_rows<COLUMNS> rows = {};
    bool busy = (int32_t)threadIdx.x / 32 * WARP_SLOTS < t.count;

    if (t.count == 0)
        return; /* the whole block */
    for (int r = 0; r < WARP_SLOTS; r++)
        rows.part[r].max = rows.total[r].max = -INFINITY;
    plain_load_queries(job, t, m.query);
    for (int32_t from = t.key_from; from < t.key_to; from += KEYS) {
        __syncthreads(); /* the queries are there, the keys before have been read */
        plain_load_keys(job, t, from, m.key);
        __syncthreads();
        if (!busy)
            continue;
        plain_softmax(m, e, t, from, rows);
        __syncwarp();
        plain_add_values(job, t, from, m.p, rows);
        if (t.chunk < 0 && ((from + KEYS) % ATTENTION_CHUNK == 0 || from + KEYS >= t.key_to))
            plain_join(rows);
    }
    if (busy)
        plain_store(batch, job, t, rows);
}

/* ------------------------------------------------------------------ decode's second half */

/* Block (head, doc): joins the parts of one head in order. */
template <typename T>
static __global__ void __launch_bounds__(THREADS, 2)
    attention_combine_kernel(struct cuda_batch batch, attention_job<T> job)
{
    int32_t head = blockIdx.x, doc = blockIdx.y, e = job.head_dim, row = batch.cu_seqlens[doc];
    int32_t position = attention_past(batch, doc, job.max_len);

    if (batch.cu_seqlens[doc + 1] - row != 1 || position < ATTENTION_CHUNK)
        return;
    for (int32_t c = threadIdx.x; c < e; c += THREADS) {
        softmax_sums total = {-INFINITY, 0.0f};
        float joined = 0;

        for (int32_t chunk = 0; chunk <= position / ATTENTION_CHUNK; chunk++) {
            int64_t at = partial_at(job, doc, chunk, head);
            const float *sums = partial_sums(job, batch.docs, at);
            softmax_factors f = softmax_join(&total, {sums[0], sums[1]});

            joined = softmax_joined(joined, job.partial[at * e + c], f);
        }
        job.out[((int64_t)row * job.heads + head) * e + c] =
            from_float<T>(joined * (1.0f / total.sum));
        if (c == 0 && job.lse)
            job.lse[(int64_t)row * job.heads + head] = attention_lse(total);
    }
}

/* ------------------------------------------------------------------ the stage */

/* Chunks of the longest document that is decoded; 0: none is. */
static int32_t decode_chunks(const struct batch *b)
{
    int32_t chunks = 0;

    for (int32_t doc = 0; b->serving && doc < b->docs; doc++) {
        int32_t keys = (b->slot ? b->slot[doc].past : 0) + 1;

        if (b->cu_seqlens[doc + 1] - b->cu_seqlens[doc] == 1)
            chunks = max(chunks, (int32_t)ceil_div(keys, ATTENTION_CHUNK));
    }
    return chunks;
}

/* Is some document computed in tiles of rows? */
static bool whole_rows(const struct batch *b)
{
    for (int32_t doc = 0; doc < b->docs; doc++)
        if (!b->serving || b->cu_seqlens[doc + 1] - b->cu_seqlens[doc] > 1)
            return true;
    return false;
}

static size_t partial_bytes(const struct model_config *c, int32_t docs, int32_t chunks)
{
    return chunks < 2 ? 0
                      : (size_t)docs * (size_t)chunks * (size_t)c->heads *
                            ((size_t)c->head_dim + 2) * sizeof(float);
}

int cuda_attention_room(struct cuda *cuda, const struct begin_args *a, struct err *err)
{
    size_t bytes = partial_bytes(a->config, a->batch->docs, decode_chunks(a->batch));

    if (bytes <= cuda->partial_bytes)
        return 0;
    device_free(cuda->device, cuda->partial);
    cuda->partial_bytes = 0;
    cuda->partial = (float *)device_alloc(cuda->device, 2 * bytes, err);
    if (!cuda->partial)
        return -1;
    cuda->partial_bytes = 2 * bytes;
    return 0;
}

template <typename T>
static attention_job<T> job_of(struct cuda *cuda, const struct attention_args *a)
{
    attention_job<T> job = {};

    job.heads = a->config->heads;
    job.kv_heads = a->config->kv_heads;
    job.head_dim = a->config->head_dim;
    job.scale = 1.4426950408889634f / sqrtf((float)job.head_dim);
    job.q = data_of<const T>(a->q);
    job.k = data_of<const T>(a->k);
    job.v = data_of<const T>(a->v);
    if (a->cache) {
        int64_t layer =
            (int64_t)a->layer * a->cache->slots * a->cache->max_len * job.kv_heads * job.head_dim;

        job.k = data_of<const T>(a->cache->k) + layer;
        job.v = data_of<const T>(a->cache->v) + layer;
        job.max_len = a->cache->max_len;
    }
    job.out = data_of<T>(a->out);
    job.lse = data_of<float>(a->lse);
    job.partial = cuda->partial;
    job.chunks = decode_chunks(a->batch);
    return job;
}

/* Tensor cores have a row beside fifteen others, or none at all: what is decoded is left to the
 * plain kernel, which reads keys and values as fast as they come. */
template <typename T>
static bool on_tensor_cores(struct cuda *cuda, const struct attention_args *a,
                            const attention_job<T> &job)
{
    uintptr_t places = (uintptr_t)job.q | (uintptr_t)job.k | (uintptr_t)job.v | (uintptr_t)job.out;

    if constexpr (std::is_same<T, bf16>::value)
        if (cuda_attention_mma_fits(job.head_dim) && places % 16 == 0) {
            cuda_attention_mma(cuda, job, a->batch->serving);
            return true;
        }
    return false;
}

template <typename T, int COLUMNS>
static void launch_plain(struct cuda *cuda, const struct attention_args *a,
                         const attention_job<T> &job)
{
    bool serving = a->batch->serving;
    int32_t group = job.heads / job.kv_heads, parts = (int32_t)ceil_div(group, SLOTS);
    size_t shared = (size_t)plain_floats(job.head_dim) * sizeof(float);
    unsigned tiles = (unsigned)(cuda->batch.tiles * (CUDA_QUERY_TILE / SLOTS));

    if (whole_rows(a->batch) && !on_tensor_cores(cuda, a, job))
        CUDA_LAUNCH(cuda->device, (attention_plain_kernel<T, COLUMNS>),
                    dim3((unsigned)job.heads, tiles), THREADS, shared, cuda->batch, job, false,
                    serving);
    if (job.chunks)
        CUDA_LAUNCH(
            cuda->device, (attention_plain_kernel<T, COLUMNS>),
            dim3((unsigned)(job.kv_heads * parts), (unsigned)job.chunks, (unsigned)a->batch->docs),
            THREADS, shared, cuda->batch, job, true, serving);
}

template <typename T> static void run(struct cuda *cuda, const struct attention_args *a)
{
    attention_job<T> job = job_of<T>(cuda, a);

    if (job.head_dim <= 32)
        launch_plain<T, 1>(cuda, a, job);
    else if (job.head_dim <= 64)
        launch_plain<T, 2>(cuda, a, job);
    else if (job.head_dim <= 128)
        launch_plain<T, 4>(cuda, a, job);
    else if (job.head_dim <= 256)
        launch_plain<T, 8>(cuda, a, job);
    else
        launch_plain<T, 16>(cuda, a, job);
    if (job.chunks > 1)
        CUDA_LAUNCH(cuda->device, attention_combine_kernel<T>,
                    dim3((unsigned)job.heads, (unsigned)a->batch->docs), THREADS, 0, cuda->batch,
                    job);
}

void cuda_attention(struct backend *backend, const struct attention_args *a)
{
    struct cuda *cuda = cuda_of(backend);

    if (device_failed(cuda->device))
        return;
    if (a->config->head_dim > ATTENTION_MAX_HEAD) {
        device_fail(cuda->device, ERR_INVALID, "attention: heads of %d, at most %d are known",
                    a->config->head_dim, ATTENTION_MAX_HEAD);
        return;
    }
    assert(partial_bytes(a->config, a->batch->docs, decode_chunks(a->batch)) <=
           cuda->partial_bytes);
    WITH_PRECISION(cuda, T, run<T>(cuda, a));
}
