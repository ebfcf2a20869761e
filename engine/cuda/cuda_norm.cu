#include "engine/cuda/cuda_norm.cuh"
#include "engine/cuda/vector.cuh"

#define THREADS 256
#define HEAD_WARPS 4 /* heads of one block of rotate_kernel */

/* Sums of a row are by thread, thread i taking every THREADS-th element (or vector of 8): their
 * order knows the width alone. */

/* A group's own vector, where it has one. */
static __device__ __forceinline__ const float *vector_of(const float *base, const char *own,
                                                         int64_t stride, int32_t group)
{
    const float *mine = nullptr;

    if (own && group >= 0)
        mine = *reinterpret_cast<const float *const *>(own + group * stride);
    return mine ? mine : base;
}

/* ------------------------------------------------------------------ rows */

/* One block for each row. VECTOR: rows are whole vectors of 8, and so are read. */
template <typename T, bool VECTOR>
static __global__ void norm_kernel(struct norm_call call, struct cuda_batch batch)
{
    constexpr int WIDE = VECTOR ? 8 : 1;
    int64_t i = blockIdx.x, r = call.row ? call.row[i] : i;
    const T *x = static_cast<const T *>(call.x) + r * call.width;
    T *n = static_cast<T *>(call.n) + i * call.width;
    const float *w = vector_of(call.weight, call.own, call.own_stride, batch.row_group[r]);
    float sum = 0;

    for (int32_t c = threadIdx.x * WIDE; c < call.width; c += THREADS * WIDE) {
        float value[WIDE];

        load_wide<WIDE>(x + c, value);
        UNROLL
        for (int k = 0; k < WIDE; k++)
            sum = fmaf(value[k], value[k], sum);
    }
    float rstd = 1.0f / sqrtf(block_sum(sum) / (float)call.width + call.eps);
    for (int32_t c = threadIdx.x * WIDE; c < call.width; c += THREADS * WIDE) {
        float value[WIDE], weight[WIDE];

        load_wide<WIDE>(x + c, value);
        load_wide<WIDE>(w + c, weight);
        UNROLL
        for (int k = 0; k < WIDE; k++)
            value[k] = value[k] * rstd * weight[k];
        store_wide<WIDE>(n + c, value);
    }
    if (call.rstd && threadIdx.x == 0)
        call.rstd[i] = rstd;
}

void cuda_norm(struct cuda *cuda, const struct norm_call *call)
{
    unsigned rows = (unsigned)call->count;
    /* A trainer's weights lie back to back; an adapter's are allocations of their own. */
    uintptr_t places = (uintptr_t)call->x | (uintptr_t)call->n | (uintptr_t)call->weight;

    if (call->width % 8 == 0 && places % 16 == 0)
        WITH_PRECISION(cuda, T,
                       CUDA_LAUNCH(cuda->device, (norm_kernel<T, true>), rows, THREADS, 0, *call,
                                   cuda->batch));
    else
        WITH_PRECISION(cuda, T,
                       CUDA_LAUNCH(cuda->device, (norm_kernel<T, false>), rows, THREADS, 0, *call,
                                   cuda->batch));
}

/* ------------------------------------------------------------------ heads */

struct rotate_call {
    void *q, *k, *q_raw, *k_raw;
    const void *v;
    void *k_cache, *v_cache; /* of the layer: [slots, max_len, G·E]; or NULL */
    const float *rope;
    const float *q_norm, *k_norm; /* NULL: no norm */
    const char *own_q_norm, *own_k_norm;
    int32_t heads, kv_heads, head_dim, max_len;
    float eps;
};

/* A warp's head: normed and turned, from x to `to` (where not NULL, also to `also`). */
template <typename T>
static __device__ __forceinline__ void rotate_head(const struct rotate_call &call, const T *x,
                                                   const float *w, const float *turn, T *raw, T *to,
                                                   T *also)
{
    int32_t lane = threadIdx.x % 32, half = call.head_dim / 2;
    float rstd = 1;

    if (w) {
        float sum = 0;

        for (int32_t c = lane; c < call.head_dim; c += 32) {
            float value = to_float(x[c]);

            sum = fmaf(value, value, sum);
        }
        rstd = 1.0f / sqrtf(warp_sum(sum) / (float)call.head_dim + call.eps);
    }
    for (int32_t c = lane; c < half; c += 32) {
        float a = to_float(x[c]), b = to_float(x[c + half]), cosine = turn[c],
              sine = turn[half + c];

        if (raw) {
            raw[c] = x[c];
            raw[c + half] = x[c + half];
        }
        if (w) {
            a = a * rstd * w[c];
            b = b * rstd * w[c + half];
        }
        T low = from_float<T>(a * cosine - b * sine), high = from_float<T>(b * cosine + a * sine);
        to[c] = low;
        to[c + half] = high;
        if (also) {
            also[c] = low;
            also[c + half] = high;
        }
    }
}

/* Where row r's keys go in a layer of the cache. */
static __device__ __forceinline__ int64_t cache_row(const struct cuda_batch &batch, int32_t r,
                                                    int32_t max_len)
{
    int32_t doc = batch.row_doc[r];

    return (int64_t)batch.slot[doc] * max_len + batch.past[doc] + r - batch.cu_seqlens[doc];
}

/* A warp for each head of each row: those of q, of k, and with a cache those of v. */
template <typename T>
static __global__ void rotate_kernel(struct rotate_call call, struct cuda_batch batch)
{
    int32_t r = blockIdx.x, head = blockIdx.y * HEAD_WARPS + threadIdx.x / 32;
    int32_t group = batch.row_group[r], e = call.head_dim;
    const float *turn = call.rope + (int64_t)r * e;
    int64_t q_at = ((int64_t)r * call.heads + head) * e;
    int32_t key = (head - call.heads) % call.kv_heads;
    int64_t k_at = ((int64_t)r * call.kv_heads + key) * e, cache_at = 0;

    if (call.k_cache && head >= call.heads)
        cache_at = (cache_row(batch, r, call.max_len) * call.kv_heads + key) * e;
    if (head < call.heads) {
        T *q = static_cast<T *>(call.q) + q_at;
        const float *w = vector_of(call.q_norm, call.own_q_norm, sizeof(struct group_layer), group);

        rotate_head<T>(call, q, call.q_norm ? w : nullptr, turn,
                       call.q_raw ? static_cast<T *>(call.q_raw) + q_at : nullptr, q, nullptr);
    } else if (head < call.heads + call.kv_heads) {
        T *k = static_cast<T *>(call.k) + k_at;
        const float *w = vector_of(call.k_norm, call.own_k_norm, sizeof(struct group_layer), group);

        rotate_head<T>(call, k, call.k_norm ? w : nullptr, turn,
                       call.k_raw ? static_cast<T *>(call.k_raw) + k_at : nullptr, k,
                       call.k_cache ? static_cast<T *>(call.k_cache) + cache_at : nullptr);
    } else if (call.v_cache && head < call.heads + 2 * call.kv_heads) {
        for (int32_t c = threadIdx.x % 32; c < e; c += 32)
            static_cast<T *>(call.v_cache)[cache_at + c] = static_cast<const T *>(call.v)[k_at + c];
    }
}

static struct rotate_call rotate_call_of(struct cuda *cuda, const struct attn_in_args *a)
{
    const struct model_config *c = a->config;
    struct rotate_call call = rotate_call();

    call.q = a->q.data;
    call.k = a->k.data;
    call.v = a->v.data;
    call.rope = data_of<const float>(a->rope);
    call.heads = c->heads;
    call.kv_heads = c->kv_heads;
    call.head_dim = c->head_dim;
    call.eps = c->rms_norm_eps;
    if (c->qk_norm) {
        call.q_raw = a->q_raw.data;
        call.k_raw = a->k_raw.data;
        call.q_norm = data_of<const float>(a->weights->q_norm);
        call.k_norm = data_of<const float>(a->weights->k_norm);
        call.own_q_norm = OWN_VECTOR(cuda, a->layer, q_norm);
        call.own_k_norm = OWN_VECTOR(cuda, a->layer, k_norm);
    }
    if (a->cache) {
        int64_t layer = (int64_t)a->layer * a->cache->slots * a->cache->max_len * c->kv_heads *
                        c->head_dim * dtype_size(cuda->activation);

        call.k_cache = data_of<char>(a->cache->k) + layer;
        call.v_cache = data_of<char>(a->cache->v) + layer;
        call.max_len = a->cache->max_len;
    }
    return call;
}

void cuda_rotate(struct cuda *cuda, const struct attn_in_args *a)
{
    const struct model_config *c = a->config;
    int64_t heads = c->heads + c->kv_heads * (a->cache ? 2 : 1);
    dim3 grid((unsigned)cuda->batch.rows, (unsigned)ceil_div(heads, HEAD_WARPS));
    struct rotate_call call = rotate_call_of(cuda, a);

    WITH_PRECISION(
        cuda, T,
        CUDA_LAUNCH(cuda->device, rotate_kernel<T>, grid, HEAD_WARPS * 32, 0, call, cuda->batch));
}
