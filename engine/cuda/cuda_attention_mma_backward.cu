/* The sums of cuda_attention_backward.cu on tensor cores, cut the same way: dk and dv by tiles of
 * keys, dq by tiles of queries, each sum in an order of its own. A block's own rows of two matrices
 * stay in shared memory; those it goes through come in steps, one ahead. */
#include "engine/cuda/cuda_attention_mma.cuh"

#define STEP(E) ((E) > 96 ? 16 : 32) /* rows that are gone through at a time: registers set it */
#define LOG2_E 1.4426950408889634f

/* In shared memory. */
template <int E> struct mma_memory {
    bf16 *own_a, *own_b; /* [MMA_ROWS][E] */
    bf16 *step;          /* [2] of two matrices [STEP(E)][E] */
};
template <int E> static __host__ __device__ __forceinline__ size_t mma_bytes()
{
    return (2 * MMA_ROWS + 4 * STEP(E)) * E * sizeof(bf16);
}
template <int E> static __device__ __forceinline__ mma_memory<E> memory_of(bf16 *shared)
{
    return {shared, shared + MMA_ROWS * E, shared + 2 * MMA_ROWS * E};
}

/* Rows of a document: a block's own [from, from + count), and where it lies in the batch. */
struct mma_own {
    int32_t from, count, start, end;
};
static __device__ __forceinline__ mma_own own_rows(const cuda_batch &batch, int32_t tile)
{
    int32_t doc = batch.tile_doc[tile];
    mma_own r;

    r.start = batch.cu_seqlens[doc];
    r.end = batch.cu_seqlens[doc + 1];
    r.from = batch.tile_from[tile] - r.start;
    r.count = min(r.end - r.start - r.from, MMA_ROWS);
    return r;
}

/* sum = own rows [row, row + 16) · stepᵀ */
template <int E>
static __device__ __forceinline__ void product(const bf16 *own, int32_t row, const bf16 *step,
                                               float sum[STEP(E) / 8][4])
{
    UNROLL
    for (int j = 0; j < STEP(E) / 8; j++)
        UNROLL
    for (int i = 0; i < 4; i++)
        sum[j][i] = 0;
    /* Wide heads have no registers left for the addresses of all turns. */
    UNROLL_BY(E > 96 ? 1 : E / 16)
    for (int k = 0; k < E / 16; k++) {
        unsigned a[4], b[4];

        mma_a<E>(a, own, row, k);
        UNROLL
        for (int j = 0; j < STEP(E) / 16; j++) {
            mma_b<E>(b, step, j * 16, k);
            mma_bf16(sum[2 * j], a, b);
            mma_bf16(sum[2 * j + 1], a, b + 2);
        }
    }
}

/* sum += factor · step */
template <int E>
static __device__ __forceinline__ void add_product(const float factor[STEP(E) / 8][4],
                                                   const bf16 *step, float sum[E / 8][4])
{
    UNROLL
    for (int k = 0; k < STEP(E) / 16; k++) {
        unsigned a[4], b[4];

        mma_a_of_sums(a, factor[2 * k], factor[2 * k + 1]);
        UNROLL
        for (int n = 0; n < E / 16; n++) {
            mma_b_down<E>(b, step, k * 16, n);
            mma_bf16(sum[2 * n], a, b);
            mma_bf16(sum[2 * n + 1], a, b + 2);
        }
    }
}

/* A pair of query and key: `s` their product, becomes p; `d` d_out·v, becomes ds. */
static __device__ __forceinline__ void pair_of(float &s, float &d, float lse, float delta,
                                               float scale, bool seen)
{
    float p = seen ? exp2f((s * scale - lse) * LOG2_E) : 0.0f;

    d = p * (d - delta) * scale;
    s = p;
}

/* Steps of one loop over two matrices, the next on its way while one is computed. */
template <int E>
static __device__ __forceinline__ void fetch_step(const mma_memory<E> &m, int at, const bf16 *a,
                                                  const bf16 *b, int64_t ld, int32_t count)
{
    mma_fetch<E, STEP(E)>(m.step + at * 2 * STEP(E) * E, a, ld, count);
    mma_fetch<E, STEP(E)>(m.step + at * 2 * STEP(E) * E + STEP(E) * E, b, ld, count);
    copy_commit();
}

/* ------------------------------------------------------------------ dk, dv */

/* One step of queries against the warp's 16 keys. */
template <int E>
static __device__ __forceinline__ void keys_step(const backward_job<bf16> &job, const mma_own &own,
                                                 const mma_memory<E> &m, int32_t head, int32_t from,
                                                 int at, float dk[E / 8][4], float dv[E / 8][4])
{
    const bf16 *q = m.step + at * 2 * STEP(E) * E, *d_out = q + STEP(E) * E;
    int32_t slot0 = (int32_t)threadIdx.x / 32 * 16, rows = own.end - own.start;
    float p[STEP(E) / 8][4], ds[STEP(E) / 8][4];

    product<E>(m.own_a, slot0, q, p);
    product<E>(m.own_b, slot0, d_out, ds);
    UNROLL
    for (int j = 0; j < STEP(E) / 8; j++)
        UNROLL
    for (int i = 0; i < 4; i++) {
        int32_t query = from + j * 8 + mma_column(i), key = own.from + slot0 + mma_row(i);
        int64_t stat = (int64_t)(own.start + min(query, rows - 1)) * job.heads + head;

        pair_of(p[j][i], ds[j][i], job.lse[stat], job.delta[stat], job.scale,
                query < rows && query >= key);
    }
    add_product<E>(p, d_out, dv);
    add_product<E>(ds, q, dk);
}

/* Block (kv head, tile of keys): the queries of each head of its group, in order. */
template <int E>
static __global__ void __launch_bounds__(MMA_THREADS, 2)
    attention_dkv_mma_kernel(struct cuda_batch batch, backward_job<bf16> job)
{
    DYNAMIC_SHARED(bf16, shared);
    mma_memory<E> m = memory_of<E>(shared);
    mma_own own = own_rows(batch, blockIdx.y);
    int32_t kv = blockIdx.x, group = job.heads / job.kv_heads, slot0 = threadIdx.x / 32 * 16;
    int32_t rows = own.end - own.start, steps = (rows - own.from + STEP(E) - 1) / STEP(E);
    int64_t ldk = (int64_t)job.kv_heads * E, ldq = (int64_t)job.heads * E;
    int64_t key = (own.start + own.from) * ldk + (int64_t)kv * E;
    int64_t query = (own.start + own.from) * ldq + (int64_t)kv * group * E;
    float dk[E / 8][4] = {}, dv[E / 8][4] = {};

    mma_fetch<E, MMA_ROWS>(m.own_a, job.k + key, ldk, own.count);
    mma_fetch<E, MMA_ROWS>(m.own_b, job.v + key, ldk, own.count);
    fetch_step<E>(m, 0, job.q + query, job.d_out + query, ldq, rows - own.from);
    for (int32_t i = 0; i < group * steps; i++) {
        int32_t next = i + 1, from = own.from + i % steps * STEP(E);

        copy_wait<0>();
        __syncthreads(); /* this step is there for all, and the one before has been read */
        if (next < group * steps) {
            int64_t to = query + (int64_t)(next % steps * STEP(E)) * ldq + next / steps * E;

            fetch_step<E>(m, next % 2, job.q + to, job.d_out + to, ldq,
                          rows - own.from - next % steps * STEP(E));
        }
        if (slot0 < own.count)
            keys_step<E>(job, own, m, kv * group + i / steps, from, i % 2, dk, dv);
    }
    mma_store<E>(job.dk + key + slot0 * ldk, ldk, own.count - slot0, dk);
    mma_store<E>(job.dv + key + slot0 * ldk, ldk, own.count - slot0, dv);
}

/* ------------------------------------------------------------------ dq */

/* Block (head, tile of queries, the last first). */
template <int E>
static __global__ void __launch_bounds__(MMA_THREADS, 2)
    attention_dq_mma_kernel(struct cuda_batch batch, backward_job<bf16> job)
{
    DYNAMIC_SHARED(bf16, shared);
    mma_memory<E> m = memory_of<E>(shared);
    mma_own own = own_rows(batch, gridDim.y - 1 - blockIdx.y);
    int32_t head = blockIdx.x, kv = head / (job.heads / job.kv_heads);
    int32_t slot0 = threadIdx.x / 32 * 16, keys = own.from + own.count;
    int64_t ldk = (int64_t)job.kv_heads * E, ldq = (int64_t)job.heads * E;
    int64_t query = (own.start + own.from) * ldq + (int64_t)head * E;
    int64_t key = own.start * ldk + (int64_t)kv * E;
    float dq[E / 8][4] = {}, lse[2], delta[2];

    UNROLL
    for (int half = 0; half < 2; half++) {
        int32_t slot = min(slot0 + mma_row(2 * half), own.count - 1);
        int64_t stat = (int64_t)(own.start + own.from + slot) * job.heads + head;

        lse[half] = job.lse[stat];
        delta[half] = job.delta[stat];
    }
    mma_fetch<E, MMA_ROWS>(m.own_a, job.q + query, ldq, own.count);
    mma_fetch<E, MMA_ROWS>(m.own_b, job.d_out + query, ldq, own.count);
    fetch_step<E>(m, 0, job.k + key, job.v + key, ldk, keys);
    for (int32_t from = 0, at = 0; from < keys; from += STEP(E), at ^= 1) {
        const bf16 *k = m.step + at * 2 * STEP(E) * E, *v = k + STEP(E) * E;
        float s[STEP(E) / 8][4], ds[STEP(E) / 8][4];

        copy_wait<0>();
        __syncthreads(); /* this step is there for all, and the one before has been read */
        if (from + STEP(E) < keys)
            fetch_step<E>(m, at ^ 1, job.k + key + (from + STEP(E)) * ldk,
                          job.v + key + (from + STEP(E)) * ldk, ldk, keys - from - STEP(E));
        if (slot0 >= own.count)
            continue;
        product<E>(m.own_a, slot0, k, s);
        product<E>(m.own_b, slot0, v, ds);
        UNROLL
        for (int j = 0; j < STEP(E) / 8; j++)
            UNROLL
        for (int i = 0; i < 4; i++)
            pair_of(s[j][i], ds[j][i], lse[i / 2], delta[i / 2], job.scale,
                    from + j * 8 + mma_column(i) <= own.from + slot0 + mma_row(i));
        add_product<E>(ds, k, dq);
    }
    mma_store<E>(job.dq + query + slot0 * ldq, ldq, own.count - slot0, dq);
}

template <int E> static void launch(struct cuda *cuda, const backward_job<bf16> &job)
{
    unsigned tiles = (unsigned)cuda->batch.tiles;

    CUDA_LAUNCH(cuda->device, attention_dkv_mma_kernel<E>, dim3((unsigned)job.kv_heads, tiles),
                MMA_THREADS, mma_bytes<E>(), cuda->batch, job);
    CUDA_LAUNCH(cuda->device, attention_dq_mma_kernel<E>, dim3((unsigned)job.heads, tiles),
                MMA_THREADS, mma_bytes<E>(), cuda->batch, job);
}

void cuda_attention_mma_backward(struct cuda *cuda, const backward_job<bf16> &job)
{
    switch (job.head_dim) {
    case 32:
        return launch<32>(cuda, job);
    case 64:
        return launch<64>(cuda, job);
    case 96:
        return launch<96>(cuda, job);
    default:
        return launch<128>(cuda, job);
    }
}
