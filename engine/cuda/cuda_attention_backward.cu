#include <type_traits>

#include "engine/cuda/cuda_attention_mma.cuh"

/* The probabilities again from lse, then what they owe: for query i and key j of a head
 *
 *   p = exp(q·k/√E - lse)    ds = p · (d_out·v - delta) / √E    delta = Σ d_out·out
 *   dv_j = Σ p · d_out_i     dk_j = Σ ds · q_i                  dq_i = Σ ds · k_j
 *
 * dk and dv by tiles of keys, which read all later queries; dq by tiles of queries, which read all
 * earlier keys. Scores are computed twice: no two blocks write the same sum, so that its order is
 * fixed (FlashAttention-2, https://arxiv.org/abs/2307.08691, adds dq by atomics instead). */

#define THREADS 128
#define WARPS (THREADS / 32)
#define SLOTS 16                   /* rows of a block's own */
#define WARP_SLOTS (SLOTS / WARPS) /* of a warp */
#define STEP 32                    /* rows that it reads at a time: one for each lane */
#define MAX_HEAD 512
#define LOG2_E 1.4426950408889634f

/* ------------------------------------------------------------------ delta */

/* One warp for each row and head. */
template <typename T>
static __global__ void __launch_bounds__(THREADS, 2)
    attention_delta_kernel(const T *out, const T *d_out, float *delta, int64_t count, int32_t e)
{
    int64_t i = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
    int lane = threadIdx.x % 32;
    float sum = 0;

    for (int32_t c = lane; i < count && c < e; c += 32)
        sum = fmaf(to_float(out[i * e + c]), to_float(d_out[i * e + c]), sum);
    sum = warp_sum(sum);
    if (i < count && lane == 0)
        delta[i] = sum;
}

/* ------------------------------------------------------------------ plain */

/* Rows [from, from + count) of a document: a block's own, or those it reads. */
struct backward_rows {
    int32_t from, count;
    int32_t start, end; /* of the document, in the batch */
};

template <int PARTS>
static __device__ __forceinline__ backward_rows own_rows(const cuda_batch &batch, int32_t at)
{
    int32_t tile = at / PARTS, doc = batch.tile_doc[tile];
    backward_rows r;

    r.start = batch.cu_seqlens[doc];
    r.end = batch.cu_seqlens[doc + 1];
    r.from = batch.tile_from[tile] - r.start + at % PARTS * SLOTS;
    r.count = max(0, min(r.end - r.start - r.from, SLOTS));
    return r;
}

/* Rows of a head of x [T, heads, E], `count` of them and zeros up to STEP. */
template <typename T>
static __device__ void load_step(const T *x, int64_t ld, int32_t count, int32_t e, float *to)
{
    for (int32_t i = threadIdx.x; i < STEP * e; i += THREADS) {
        int32_t row = i / e, column = i % e;

        to[row * (e + 1) + column] = row < count ? to_float(x[row * ld + column]) : 0.0f;
    }
}

/* A warp's own rows of two matrices, times the lane's row of two others. */
template <typename T>
static __device__ void plain_products(const T *const a[WARP_SLOTS], const T *const b[WARP_SLOTS],
                                      const float *other_a, const float *other_b, int32_t e,
                                      float ab[2][WARP_SLOTS])
{
    int lane = threadIdx.x % 32;

    UNROLL
    for (int r = 0; r < WARP_SLOTS; r++)
        ab[0][r] = ab[1][r] = 0;
    for (int32_t i = 0; i < e; i++) {
        float x = other_a[lane * (e + 1) + i], y = other_b[lane * (e + 1) + i];

        UNROLL
        for (int r = 0; r < WARP_SLOTS; r++) {
            ab[0][r] = fmaf(to_float(a[r][i]), x, ab[0][r]);
            ab[1][r] = fmaf(to_float(b[r][i]), y, ab[1][r]);
        }
    }
}

/* sum[r] += Σ factor[r][row] · other[row], over the rows of a step. */
template <int COLUMNS>
static __device__ void plain_add(const float *factor, const float *other, int32_t count, int32_t e,
                                 float sum[WARP_SLOTS][COLUMNS])
{
    int lane = threadIdx.x % 32;

    for (int32_t row = 0; row < count; row++)
        UNROLL
    for (int c = 0; c < COLUMNS; c++) {
        float value = lane + 32 * c < e ? other[row * (e + 1) + lane + 32 * c] : 0.0f;

        UNROLL
        for (int r = 0; r < WARP_SLOTS; r++)
            sum[r][c] = fmaf(factor[r * STEP + row], value, sum[r][c]);
    }
}

template <typename T, int COLUMNS>
static __device__ void plain_store(T *x, int64_t ld, int32_t slots, int32_t e,
                                   const float sum[WARP_SLOTS][COLUMNS])
{
    int lane = threadIdx.x % 32;

    UNROLL
    for (int r = 0; r < WARP_SLOTS; r++)
        UNROLL
    for (int c = 0; c < COLUMNS; c++)
        if (r < slots && lane + 32 * c < e)
            x[r * ld + lane + 32 * c] = from_float<T>(sum[r][c]);
}

/* What a query and a key have to do with one another; `seen` false: nothing. */
struct backward_pair {
    float p, ds;
};
static __device__ __forceinline__ backward_pair pair_of(float product, float d_product, float lse,
                                                        float delta, float scale, bool seen)
{
    backward_pair pair = {};

    if (seen) {
        pair.p = exp2f((product * scale - lse) * LOG2_E);
        pair.ds = pair.p * (d_product - delta) * scale;
    }
    return pair;
}

/* In shared memory: two matrices of a step, then factors for each of the block's own rows. */
struct plain_memory {
    float *a, *b;  /* [STEP][E + 1] */
    float *p, *ds; /* [WARP_SLOTS][STEP] of this warp */
};
static __host__ __device__ __forceinline__ int32_t plain_floats(int32_t e)
{
    return 2 * STEP * (e + 1) + 2 * SLOTS * STEP;
}
static __device__ __forceinline__ plain_memory memory_of(float *shared, int32_t e)
{
    float *factors = shared + 2 * STEP * (e + 1) + threadIdx.x / 32 * 2 * WARP_SLOTS * STEP;

    return {shared, shared + STEP * (e + 1), factors, factors + WARP_SLOTS * STEP};
}

/* Block (kv head, tile of keys): the queries of each head of its group, in order. */
template <typename T, int COLUMNS>
static __global__ void __launch_bounds__(THREADS, 2)
    attention_dkv_plain_kernel(struct cuda_batch batch, backward_job<T> job)
{
    DYNAMIC_SHARED(float, shared);
    backward_rows own = own_rows<CUDA_QUERY_TILE / SLOTS>(batch, blockIdx.y);
    int32_t e = job.head_dim, kv = blockIdx.x, group = job.heads / job.kv_heads;
    int lane = threadIdx.x % 32, slot0 = threadIdx.x / 32 * WARP_SLOTS, slots = own.count - slot0;
    int64_t ldk = (int64_t)job.kv_heads * e, ldq = (int64_t)job.heads * e;
    int64_t at = (own.start + own.from + slot0) * ldk + kv * e;
    plain_memory m = memory_of(shared, e);
    float dk[WARP_SLOTS][COLUMNS] = {}, dv[WARP_SLOTS][COLUMNS] = {};
    const T *k[WARP_SLOTS], *v[WARP_SLOTS];

    if (own.count == 0)
        return; /* the whole block */
    UNROLL
    for (int r = 0; r < WARP_SLOTS; r++) { /* rows behind the last: the last again, not stored */
        k[r] = job.k + at + min(r, slots - 1) * ldk;
        v[r] = job.v + at + min(r, slots - 1) * ldk;
    }
    for (int32_t head = kv * group; head < (kv + 1) * group; head++)
        for (int32_t from = own.from; from < own.end - own.start; from += STEP) {
            int32_t count = min(own.end - own.start - from, STEP);
            int64_t query = own.start + from;
            float product[2][WARP_SLOTS];

            __syncthreads(); /* the step before has been read */
            load_step(job.q + query * ldq + head * e, ldq, count, e, m.a);
            load_step(job.d_out + query * ldq + head * e, ldq, count, e, m.b);
            __syncthreads();
            if (slots <= 0)
                continue;
            int64_t stat = (query + min(lane, count - 1)) * job.heads + head;
            plain_products(k, v, m.a, m.b, e, product);
            UNROLL
            for (int r = 0; r < WARP_SLOTS; r++) {
                bool seen = lane < count && from + lane >= own.from + slot0 + r;
                backward_pair pair = pair_of(product[0][r], product[1][r], job.lse[stat],
                                             job.delta[stat], job.scale, seen);

                m.p[r * STEP + lane] = pair.p;
                m.ds[r * STEP + lane] = pair.ds;
            }
            __syncwarp();
            plain_add(m.p, m.b, count, e, dv);
            plain_add(m.ds, m.a, count, e, dk);
        }
    plain_store(job.dk + at, ldk, slots, e, dk);
    plain_store(job.dv + at, ldk, slots, e, dv);
}

/* Block (head, tile of queries, the last first). */
template <typename T, int COLUMNS>
static __global__ void __launch_bounds__(THREADS, 2)
    attention_dq_plain_kernel(struct cuda_batch batch, backward_job<T> job)
{
    DYNAMIC_SHARED(float, shared);
    backward_rows own = own_rows<CUDA_QUERY_TILE / SLOTS>(batch, gridDim.y - 1 - blockIdx.y);
    int32_t e = job.head_dim, head = blockIdx.x, kv = head / (job.heads / job.kv_heads);
    int lane = threadIdx.x % 32, slot0 = threadIdx.x / 32 * WARP_SLOTS, slots = own.count - slot0;
    int64_t ldk = (int64_t)job.kv_heads * e, ldq = (int64_t)job.heads * e;
    int64_t row = own.start + own.from + slot0, at = row * ldq + head * e;
    plain_memory m = memory_of(shared, e);
    float dq[WARP_SLOTS][COLUMNS] = {};
    const T *q[WARP_SLOTS], *d_out[WARP_SLOTS];

    if (own.count == 0)
        return; /* the whole block */
    UNROLL
    for (int r = 0; r < WARP_SLOTS; r++) {
        q[r] = job.q + at + min(r, slots - 1) * ldq;
        d_out[r] = job.d_out + at + min(r, slots - 1) * ldq;
    }
    for (int32_t from = 0; from < own.from + own.count; from += STEP) {
        int32_t count = min(own.from + own.count - from, STEP);
        int64_t key = (own.start + from) * ldk + kv * e;
        float product[2][WARP_SLOTS];

        __syncthreads(); /* the step before has been read */
        load_step(job.k + key, ldk, count, e, m.a);
        load_step(job.v + key, ldk, count, e, m.b);
        __syncthreads();
        if (slots <= 0)
            continue;
        plain_products(q, d_out, m.a, m.b, e, product);
        UNROLL
        for (int r = 0; r < WARP_SLOTS; r++) {
            int64_t stat = (row + min(r, slots - 1)) * job.heads + head;
            bool seen = r < slots && from + lane <= own.from + slot0 + r;
            backward_pair pair = pair_of(product[0][r], product[1][r], job.lse[stat],
                                         job.delta[stat], job.scale, seen);

            m.ds[r * STEP + lane] = pair.ds;
        }
        __syncwarp();
        plain_add(m.ds, m.a, count, e, dq);
    }
    plain_store(job.dq + at, ldq, slots, e, dq);
}

/* ------------------------------------------------------------------ the stage */

template <typename T> static bool on_tensor_cores(struct cuda *cuda, const backward_job<T> &job)
{
    uintptr_t places = (uintptr_t)job.q | (uintptr_t)job.k | (uintptr_t)job.v |
                       (uintptr_t)job.d_out | (uintptr_t)job.dq | (uintptr_t)job.dk |
                       (uintptr_t)job.dv;

    if constexpr (std::is_same<T, bf16>::value)
        if (cuda_attention_mma_fits(job.head_dim) && places % 16 == 0) {
            cuda_attention_mma_backward(cuda, job);
            return true;
        }
    return false;
}

template <typename T, int COLUMNS>
static void launch_plain(struct cuda *cuda, const backward_job<T> &job)
{
    size_t shared = (size_t)plain_floats(job.head_dim) * sizeof(float);
    unsigned tiles = (unsigned)(cuda->batch.tiles * (CUDA_QUERY_TILE / SLOTS));

    CUDA_LAUNCH(cuda->device, (attention_dkv_plain_kernel<T, COLUMNS>),
                dim3((unsigned)job.kv_heads, tiles), THREADS, shared, cuda->batch, job);
    CUDA_LAUNCH(cuda->device, (attention_dq_plain_kernel<T, COLUMNS>),
                dim3((unsigned)job.heads, tiles), THREADS, shared, cuda->batch, job);
}

template <typename T> static void run(struct cuda *cuda, const struct attention_backward_args *a)
{
    backward_job<T> job = {};
    int64_t stats = (int64_t)cuda->batch.rows * a->config->heads;

    job.heads = a->config->heads;
    job.kv_heads = a->config->kv_heads;
    job.head_dim = a->config->head_dim;
    job.scale = 1.0f / sqrtf((float)job.head_dim);
    job.q = data_of<const T>(a->q);
    job.k = data_of<const T>(a->k);
    job.v = data_of<const T>(a->v);
    job.d_out = data_of<const T>(a->d_out);
    job.lse = data_of<const float>(a->lse);
    job.delta = data_of<const float>(a->delta);
    job.dq = data_of<T>(a->dq);
    job.dk = data_of<T>(a->dk);
    job.dv = data_of<T>(a->dv);
    CUDA_LAUNCH(cuda->device, attention_delta_kernel<T>, (unsigned)ceil_div(stats, WARPS), THREADS,
                0, data_of<const T>(a->out), job.d_out, data_of<float>(a->delta), stats,
                job.head_dim);
    if (on_tensor_cores(cuda, job))
        return;
    if (job.head_dim <= 32)
        launch_plain<T, 1>(cuda, job);
    else if (job.head_dim <= 64)
        launch_plain<T, 2>(cuda, job);
    else if (job.head_dim <= 128)
        launch_plain<T, 4>(cuda, job);
    else if (job.head_dim <= 256)
        launch_plain<T, 8>(cuda, job);
    else
        launch_plain<T, 16>(cuda, job);
}

void cuda_attention_backward(struct backend *backend, const struct attention_backward_args *a)
{
    struct cuda *cuda = cuda_of(backend);

    if (device_failed(cuda->device))
        return;
    if (a->config->head_dim > MAX_HEAD) {
        device_fail(cuda->device, ERR_INVALID, "attention: heads of %d, at most %d are known",
                    a->config->head_dim, MAX_HEAD);
        return;
    }
    WITH_PRECISION(cuda, T, run<T>(cuda, a));
}
