/* Sampling: one block for each row of logits, which never leave the device. All sums are of whole
 * numbers, so they do not depend on their order (sampler.h). */
#include "engine/cuda/cuda.h"

#include "engine/sampler.h"

extern "C" {
#include "engine/base/rng.h"
}

#define THREADS 1024
#define WARPS (THREADS / 32)

struct choice {     /* of one row; device memory */
    double inverse; /* of the temperature; 0: greedy */
    double top_p;
    uint64_t random;
};

/* ------------------------------------------------------------------ over the block */

static __device__ __forceinline__ uint64_t warp_sum_whole(uint64_t x)
{
    for (int bits = 16; bits > 0; bits >>= 1)
        x += __shfl_xor_sync(WARP, x, bits);
    return x;
}

static __device__ __forceinline__ uint64_t block_sum_whole(uint64_t x)
{
    SHARED(uint64_t, parts, [WARPS]);

    x = warp_sum_whole(x);
    if (threadIdx.x % 32 == 0)
        parts[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_sum_whole(parts[threadIdx.x % 32]);
}

/* The sum of all threads up to this one. A barrier must lie between two calls. */
static __device__ __forceinline__ uint64_t block_prefix_whole(uint64_t x)
{
    SHARED(uint64_t, parts, [WARPS]);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

    for (int by = 1; by < 32; by <<= 1) {
        uint64_t other = __shfl_up_sync(WARP, x, by);

        x += lane >= by ? other : 0;
    }
    if (lane == 31)
        parts[warp] = x;
    __syncthreads();
    return x + warp_sum_whole(lane < warp ? parts[lane] : 0);
}

struct best {
    float logit;
    int32_t id; /* lowest of equal ones */
};

static __device__ __forceinline__ struct best warp_best(struct best b)
{
    for (int bits = 16; bits > 0; bits >>= 1) {
        struct best other = {__shfl_xor_sync(WARP, b.logit, bits),
                             __shfl_xor_sync(WARP, b.id, bits)};

        if (other.logit > b.logit || (other.logit == b.logit && other.id < b.id))
            b = other;
    }
    return b;
}

/* id -1 where there is a NaN, or nothing that is finite. */
static __device__ __forceinline__ struct best block_best(const float *logit, int32_t vocabulary)
{
    SHARED(struct best, parts, [WARPS]);
    SHARED(bool, broken, [WARPS]);
    struct best b = {-INFINITY, INT32_MAX};
    bool nan = false;

    for (int32_t i = threadIdx.x; i < vocabulary; i += THREADS) {
        float x = logit[i];

        nan |= x != x;
        if (x > b.logit) {
            b.logit = x;
            b.id = i;
        }
    }
    b = warp_best(b);
    nan = __any_sync(WARP, nan);
    if (threadIdx.x % 32 == 0) {
        parts[threadIdx.x / 32] = b;
        broken[threadIdx.x / 32] = nan;
    }
    __syncthreads();
    b = warp_best(parts[threadIdx.x % 32]);
    if (__any_sync(WARP, broken[threadIdx.x % 32]) || !(fabsf(b.logit) < INFINITY))
        b.id = -1;
    return b;
}

/* ------------------------------------------------------------------ top_p */

/* cpu_sample.c's find_set, with a thread for each bin. */
static __device__ __forceinline__ struct sampler_set find_set(const float *weight,
                                                              int32_t vocabulary, uint64_t needed)
{
    static_assert(SAMPLER_BINS == THREADS, "a thread for each bin");
    SHARED(unsigned long long, bin, [SAMPLER_BINS]);
    SHARED(uint64_t, larger, [1]); /* shares of all weights above the digits found */
    SHARED(uint32_t, digits, [1]);
    uint32_t found = 0;
    uint64_t above = 0;

    for (int shift = (SAMPLER_PASSES - 1) * SAMPLER_DIGIT; shift >= 0; shift -= SAMPLER_DIGIT) {
        bin[threadIdx.x] = 0;
        __syncthreads();
        for (int32_t i = threadIdx.x; i < vocabulary; i += THREADS) {
            uint32_t bits = sampler_bits(weight[i]);
            uint64_t share = sampler_share(weight[i]);

            if (share > 0 && (bits ^ found) >> shift < SAMPLER_BINS)
                atomicAdd(&bin[bits >> shift & (SAMPLER_BINS - 1)], (unsigned long long)share);
        }
        __syncthreads();
        uint32_t digit = SAMPLER_BINS - 1 - threadIdx.x;
        uint64_t own = bin[digit], reached = above + block_prefix_whole(own);
        if (reached >= needed && reached - own < needed) {
            digits[0] = found | digit << shift;
            larger[0] = reached - own;
        }
        __syncthreads();
        found = digits[0];
        above = larger[0];
    }
    return sampler_set_of(sampler_from_bits(found), above, needed);
}

/* ------------------------------------------------------------------ the choice */

/* What a part of the row holds of the set. */
struct part {
    uint64_t larger; /* shares above the lowest weight */
    uint32_t ties;   /* tokens of the lowest weight */
};

/* Of tokens [from, to), by a warp; every lane gets it. */
static __device__ __forceinline__ struct part count_part(const float *weight, int32_t from,
                                                         int32_t to, float lowest)
{
    uint64_t larger = 0;
    uint32_t ties = 0;

    for (int32_t i = from + threadIdx.x % 32; i < to; i += 32) {
        if (weight[i] > lowest)
            larger += sampler_share(weight[i]);
        ties += weight[i] == lowest;
    }
    larger = warp_sum_whole(larger);
    for (int bits = 16; bits > 0; bits >>= 1)
        ties += __shfl_xor_sync(WARP, ties, bits);
    return {larger, ties};
}

/* cpu_sample.c's choose: the row is cut into a part for each warp, the part where `point` falls is
 * cut again, until a part is one token. */
static __device__ __forceinline__ int32_t choose(const float *weight, int32_t vocabulary,
                                                 struct sampler_set set, uint64_t point)
{
    SHARED(struct part, parts, [WARPS]);
    uint64_t share = sampler_share(set.lowest);
    int32_t from = 0, to = vocabulary, warp = threadIdx.x / 32;

    while (to - from > 1) {
        int32_t each = (to - from + WARPS - 1) / WARPS, begin = from + warp * each;
        int32_t end = begin + each < to ? begin + each : to, chosen = 0;
        struct part own = count_part(weight, begin, end, set.lowest);

        __syncthreads(); /* the last turn's parts have been read */
        if (threadIdx.x % 32 == 0)
            parts[warp] = own;
        __syncthreads();
        for (;; chosen++) {
            uint64_t ties = parts[chosen].ties < set.ties ? parts[chosen].ties : set.ties;
            uint64_t here = parts[chosen].larger + ties * share;

            if (point < here || chosen == WARPS - 1)
                break;
            point -= here;
            set.ties -= ties;
        }
        from += chosen * each;
        to = from + each < to ? from + each : to;
    }
    return from;
}

static __global__ void sample_kernel(const struct choice *choices, float *logits,
                                     int32_t vocabulary, int32_t *token)
{
    float *weight = logits + (int64_t)blockIdx.x * vocabulary; /* logits, then weights */
    struct choice c = choices[blockIdx.x];
    struct best top = block_best(weight, vocabulary);
    struct sampler_set set = {0, 0, 0};
    int32_t chosen = top.id;

    if (top.id >= 0 && c.inverse > 0) { /* alike in all threads */
        for (int32_t i = threadIdx.x; i < vocabulary; i += THREADS) {
            float w = sampler_weight(weight[i], top.logit, c.inverse);

            weight[i] = w;
            set.kept += sampler_share(w);
        }
        set.kept = block_sum_whole(set.kept); /* behind its barrier all weights are there */
        if (c.top_p < 1)
            set = find_set(weight, vocabulary, sampler_needed(c.top_p, set.kept));
        chosen = choose(weight, vocabulary, set, sampler_point(c.random, set.kept));
    }
    if (threadIdx.x == 0)
        token[blockIdx.x] = chosen;
}

void cuda_sample(struct backend *backend, const struct sample_args *a)
{
    struct cuda *cuda = cuda_of(backend);
    int32_t count = (int32_t)a->logits.shape[0];
    struct choice *choices = reinterpret_cast<struct choice *>(cuda->staging);

    if (device_failed(cuda->device))
        return;
    /* begin has copied its staging to the device: what is brought may be built there. */
    for (int32_t i = 0; i < count; i++) {
        const struct sample_row *row = &a->row[i];

        choices[i].inverse =
            row->temperature <= 0 || row->top_p <= 0 ? 0 : sampler_inverse(row->temperature);
        choices[i].top_p = row->top_p;
        choices[i].random = rng_at(row->seed, SAMPLER_STREAM, row->index);
    }
    CUDA_LAUNCH(cuda->device, sample_kernel, (unsigned)count, THREADS, 0,
                static_cast<const struct choice *>(
                    cuda_bring(cuda, choices, (size_t)count * sizeof *choices)),
                data_of<float>(a->logits), (int32_t)a->logits.shape[1], data_of<int32_t>(a->token));
}
