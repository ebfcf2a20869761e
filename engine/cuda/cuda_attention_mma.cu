#include "engine/cuda/cuda_attention_mma.cuh"

#define KEYS 64 /* of a step */

/* A warp's 16 queries: two rows for each lane (mma_row), of which four lanes share each. Steps
 * whose keys a row does not see change no bit of it: it has no more to do with its tile's other
 * rows than the plain kernel's. */
template <int E> struct mma_rows {
    unsigned q[E / 16][4];
    float max[2], sum[2]; /* of the row so far; `sum` of this lane's columns alone */
    float out[E / 8][4];
};

template <int E>
static __device__ __forceinline__ void load_queries(const attention_job<bf16> &job,
                                                    const attention_tile &t, int32_t slot0,
                                                    unsigned q[E / 16][4])
{
    const int64_t ld = (int64_t)job.heads * E;

    UNROLL
    for (int half = 0; half < 2; half++) {
        int32_t slot = min(slot0 + mma_row(2 * half), t.count - 1);
        const bf16 *row = job.q + (t.row + slot) * ld + (int64_t)t.head * E + mma_column(0);

        UNROLL
        for (int k = 0; k < E / 16; k++) {
            q[k][half] = *reinterpret_cast<const unsigned *>(row + k * 16);
            q[k][half + 2] = *reinterpret_cast<const unsigned *>(row + k * 16 + 8);
        }
    }
}

/* Scores of a step, in exponents of two; -INFINITY for keys that come later than the query. */
template <int E>
static __device__ __forceinline__ void scores_of(const bf16 *key, const mma_rows<E> &rows,
                                                 float scale, int32_t first, int32_t from,
                                                 float score[KEYS / 8][4])
{
    UNROLL
    for (int j = 0; j < KEYS / 8; j++)
        UNROLL
    for (int i = 0; i < 4; i++)
        score[j][i] = 0;
    UNROLL
    for (int k = 0; k < E / 16; k++)
        UNROLL
    for (int j = 0; j < KEYS / 16; j++) {
        unsigned b[4];

        mma_b<E>(b, key, j * 16, k);
        mma_bf16(score[2 * j], rows.q[k], b);
        mma_bf16(score[2 * j + 1], rows.q[k], b + 2);
    }
    UNROLL
    for (int j = 0; j < KEYS / 8; j++)
        UNROLL
    for (int i = 0; i < 4; i++)
        score[j][i] =
            from + j * 8 + mma_column(i) <= first + mma_row(i) ? score[j][i] * scale : -INFINITY;
}

/* Scores become probabilities; what was summed so far is scaled to the new largest score. */
template <int E>
static __device__ __forceinline__ void softmax_step(mma_rows<E> &rows, float score[KEYS / 8][4])
{
    UNROLL
    for (int half = 0; half < 2; half++) {
        float max = rows.max[half], base, old, sum = 0;

        UNROLL
        for (int j = 0; j < KEYS / 8; j++)
            max = fmaxf(max, fmaxf(score[j][2 * half], score[j][2 * half + 1]));
        max = fmaxf(max, __shfl_xor_sync(WARP, max, 1));
        max = fmaxf(max, __shfl_xor_sync(WARP, max, 2));
        base = max == -INFINITY ? 0.0f : max;
        old = exp2f(rows.max[half] - base);
        UNROLL
        for (int j = 0; j < KEYS / 8; j++)
            UNROLL
        for (int i = 2 * half; i < 2 * half + 2; i++) {
            score[j][i] = exp2f(score[j][i] - base);
            sum += score[j][i];
        }
        rows.max[half] = max;
        rows.sum[half] = fmaf(rows.sum[half], old, sum);
        UNROLL
        for (int n = 0; n < E / 8; n++) {
            rows.out[n][2 * half] *= old;
            rows.out[n][2 * half + 1] *= old;
        }
    }
}

template <int E>
static __device__ __forceinline__ void add_values(const bf16 *value, const float p[KEYS / 8][4],
                                                  mma_rows<E> &rows)
{
    UNROLL
    for (int k = 0; k < KEYS / 16; k++) {
        unsigned a[4];

        mma_a_of_sums(a, p[2 * k], p[2 * k + 1]);
        UNROLL
        for (int n = 0; n < E / 16; n++) {
            unsigned b[4];

            mma_b_down<E>(b, value, k * 16, n);
            mma_bf16(rows.out[2 * n], a, b);
            mma_bf16(rows.out[2 * n + 1], a, b + 2);
        }
    }
}

template <int E>
static __device__ __forceinline__ void
finish(const attention_job<bf16> &job, const attention_tile &t, int32_t slot0, mma_rows<E> &rows)
{
    const int64_t ld = (int64_t)job.heads * E;

    UNROLL
    for (int half = 0; half < 2; half++) {
        int32_t slot = slot0 + mma_row(2 * half);
        float sum = rows.sum[half] + __shfl_xor_sync(WARP, rows.sum[half], 1);

        sum += __shfl_xor_sync(WARP, sum, 2);
        UNROLL
        for (int n = 0; n < E / 8; n++) {
            rows.out[n][2 * half] *= 1.0f / sum;
            rows.out[n][2 * half + 1] *= 1.0f / sum;
        }
        if (job.lse && slot < t.count && threadIdx.x % 4 == 0)
            job.lse[(int64_t)(t.row + slot) * job.heads + t.head] =
                attention_lse({rows.max[half], sum});
    }
    mma_store<E>(job.out + (t.row + slot0) * ld + (int64_t)t.head * E, ld, t.count - slot0,
                 rows.out);
}

/* Block (head, tile of queries). Keys and values of a step are fetched while the step before is
 * computed. */
template <int E>
static __global__ void __launch_bounds__(MMA_THREADS, 2)
    attention_mma_kernel(struct cuda_batch batch, attention_job<bf16> job, bool decoded)
{
    DYNAMIC_SHARED(bf16, shared); /* [2] of keys, values: [KEYS][E] */
    attention_tile t = attention_rows<MMA_ROWS>(batch, job, decoded);
    const bf16 *k = job.k + t.kv_at, *v = job.v + t.kv_at;
    int64_t ld = (int64_t)job.kv_heads * E;
    int32_t slot0 = (int32_t)threadIdx.x / 32 * 16;
    mma_rows<E> rows = {};

    if (t.count == 0)
        return; /* the whole block */
    rows.max[0] = rows.max[1] = -INFINITY;
    load_queries<E>(job, t, slot0, rows.q);
    mma_fetch<E, KEYS>(shared, k, ld, t.key_to);
    mma_fetch<E, KEYS>(shared + KEYS * E, v, ld, t.key_to);
    copy_commit();
    for (int32_t from = 0, at = 0; from < t.key_to; from += KEYS, at ^= 1) {
        bf16 *key = shared + at * 2 * KEYS * E, *next = shared + (at ^ 1) * 2 * KEYS * E;
        float p[KEYS / 8][4];

        copy_wait<0>();
        __syncthreads(); /* this step is there for all, and the one before has been read */
        if (from + KEYS < t.key_to) {
            mma_fetch<E, KEYS>(next, k + (from + KEYS) * ld, ld, t.key_to - from - KEYS);
            mma_fetch<E, KEYS>(next + KEYS * E, v + (from + KEYS) * ld, ld, t.key_to - from - KEYS);
            copy_commit();
        }
        if (slot0 >= t.count)
            continue;
        scores_of<E>(key, rows, job.scale, t.position + slot0, from, p);
        softmax_step<E>(rows, p);
        add_values<E>(key + KEYS * E, p, rows);
    }
    if (slot0 < t.count)
        finish<E>(job, t, slot0, rows);
}

template <int E> static void launch(struct cuda *cuda, const attention_job<bf16> &job, bool decoded)
{
    CUDA_LAUNCH(cuda->device, attention_mma_kernel<E>,
                dim3((unsigned)job.heads, (unsigned)cuda->batch.tiles), MMA_THREADS,
                4 * KEYS * E * sizeof(bf16), cuda->batch, job, decoded);
}

void cuda_attention_mma(struct cuda *cuda, const attention_job<bf16> &job, bool decoded)
{
    switch (job.head_dim) {
    case 32:
        return launch<32>(cuda, job, decoded);
    case 64:
        return launch<64>(cuda, job, decoded);
    case 96:
        return launch<96>(cuda, job, decoded);
    default:
        return launch<128>(cuda, job, decoded);
    }
}
