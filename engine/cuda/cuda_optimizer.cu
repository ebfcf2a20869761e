/* The norm of all gradients, and AdamW, for many parameters in one launch: a table of them is an
 * argument of the kernel, so that nothing is kept on the device and the parameters may be others
 * each time. */
#include <cmath>
#include <cstring>

#include "engine/cuda/cuda.h"

#define THREADS 256
#define CHUNK 4096 /* elements of one block at a time */
#define TABLE 56   /* parameters of one launch: arguments are 4 KB at most */

/* ------------------------------------------------------------------ tables */

struct parameter_view {
    void *w; /* float, or bf16: narrow */
    float *g, *m, *v;
    bf16 *copy;
    uint64_t random; /* key of the stream of random numbers */
    int64_t elements;
    int32_t first;         /* chunk of the table that is this parameter's first */
    float decay;           /* weight decay */
    bool narrow, in_fours; /* in_fours: all of it is aligned for reads of four */
};

struct parameter_table {
    struct parameter_view at[TABLE];
    int32_t count, chunks;
};

/* rng.c's mixing: rng_at(seed, stream, counter) = mix(mix(mix(seed) ^ stream) ^ counter). */
static __host__ __device__ __forceinline__ uint64_t mix(uint64_t z)
{
    z += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static bool aligned(const void *memory, size_t bytes)
{
    return reinterpret_cast<uintptr_t>(memory) % bytes == 0;
}

static struct parameter_view view_of(const struct parameter *p)
{
    struct parameter_view v = {};

    v.w = p->w.data;
    v.g = data_of<float>(p->g);
    v.m = data_of<float>(p->m);
    v.v = data_of<float>(p->v);
    v.copy = data_of<bf16>(p->copy);
    v.elements = tensor_elements(&p->g);
    v.narrow = p->w.dtype == DTYPE_BF16;
    v.in_fours = aligned(v.w, v.narrow ? 8 : 16) && aligned(v.g, 16) && aligned(v.m, 16) &&
                 aligned(v.v, 16) && aligned(v.copy, 8);
    return v;
}

static void add_to_table(struct parameter_table *table, const struct parameter_view &view)
{
    struct parameter_view *to = &table->at[table->count++];

    *to = view;
    to->first = table->chunks;
    table->chunks += (int32_t)ceil_div(view.elements, CHUNK);
}

/* The parameter that a chunk of the table belongs to. */
static __device__ __forceinline__ int32_t parameter_of(const struct parameter_table &table,
                                                       int32_t chunk)
{
    int32_t low = 0, high = table.count;

    while (high - low > 1) {
        int32_t middle = (low + high) / 2;

        if (table.at[middle].first <= chunk)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* ------------------------------------------------------------------ four elements at a time */

template <typename T> struct alignas(4 * sizeof(T)) four {
    T value[4];
};

/* The first n of four; n = 4 only where they are aligned. */
template <typename T>
static __device__ __forceinline__ void load_four(float x[4], const T *from, int n)
{
    four<T> all;

    if (n == 4)
        all = *reinterpret_cast<const four<T> *>(from);
    else
        for (int k = 0; k < 4; k++)
            all.value[k] = k < n ? from[k] : from_float<T>(0);
    for (int k = 0; k < 4; k++)
        x[k] = to_float(all.value[k]);
}

template <typename T>
static __device__ __forceinline__ void store_four(T *to, const four<T> &all, int n)
{
    if (n == 4)
        *reinterpret_cast<four<T> *>(to) = all;
    else
        for (int k = 0; k < 4; k++)
            if (k < n)
                to[k] = all.value[k];
}

static __device__ __forceinline__ void store_floats(float *to, const float x[4], int n)
{
    four<float> all = {{x[0], x[1], x[2], x[3]}};

    store_four(to, all, n);
}

/* ------------------------------------------------------------------ the norm */

static __device__ __forceinline__ double block_sum_double(double x)
{
    SHARED(double, parts, [THREADS / 32]);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

    for (int bits = 16; bits > 0; bits >>= 1)
        x += __shfl_xor_sync(WARP, x, bits);
    if (lane == 0)
        parts[warp] = x;
    __syncthreads();
    x = lane < THREADS / 32 ? parts[lane] : 0;
    for (int bits = 16; bits > 0; bits >>= 1)
        x += __shfl_xor_sync(WARP, x, bits);
    return x;
}

/* parts[block] (+)= the squares of every gridDim-th chunk; blocks from `seen` on had no part yet.
 */
static __global__ void squares_kernel(struct parameter_table table, double *parts, int32_t seen)
{
    double sum = 0;

    for (int32_t chunk = blockIdx.x; chunk < table.chunks; chunk += gridDim.x) {
        int32_t i = parameter_of(table, chunk);
        const float *g = table.at[i].g;
        int64_t elements = table.at[i].elements,
                from = (int64_t)(chunk - table.at[i].first) * CHUNK;
        bool in_fours = table.at[i].in_fours;

        for (int32_t k = threadIdx.x * 4; k < CHUNK && from + k < elements; k += THREADS * 4) {
            int64_t left = elements - from - k;
            float x[4], squares = 0;

            if (left >= 4 && in_fours)
                load_four(x, g + from + k, 4);
            else
                for (int j = 0; j < 4; j++)
                    x[j] = j < left ? g[from + k + j] : 0;
            for (int j = 0; j < 4; j++)
                squares += x[j] * x[j];
            sum += (double)squares;
        }
    }
    sum = block_sum_double(sum);
    if (threadIdx.x == 0)
        parts[blockIdx.x] = ((int32_t)blockIdx.x < seen ? parts[blockIdx.x] : 0) + sum;
}

/* One block: the root of the sum of all parts. */
static __global__ void root_kernel(const double *parts, int32_t count, float *norm)
{
    double sum = 0;

    for (int32_t i = threadIdx.x; i < count; i += THREADS)
        sum += parts[i];
    sum = block_sum_double(sum);
    if (threadIdx.x == 0)
        *norm = (float)sqrt(sum);
}

void cuda_gradient_norm(struct backend *backend, const struct gradient_norm_args *a)
{
    struct cuda *cuda = cuda_of(backend);
    int32_t seen = 0;

    for (int32_t i = 0; i < a->count;) {
        struct parameter_table table = {};

        while (i < a->count && table.count < TABLE)
            add_to_table(&table, view_of(&a->parameter[i++]));
        int32_t blocks = table.chunks < CUDA_NORM_PARTS ? table.chunks : CUDA_NORM_PARTS;

        CUDA_LAUNCH(cuda->device, squares_kernel, (unsigned)blocks, THREADS, 0, table,
                    cuda->norm_parts, seen);
        seen = blocks > seen ? blocks : seen;
    }
    CUDA_LAUNCH(cuda->device, root_kernel, 1, THREADS, 0, cuda->norm_parts, seen,
                data_of<float>(a->norm));
}

/* ------------------------------------------------------------------ AdamW */

struct adamw_numbers {
    const float *norm;
    float max_norm, rate, from_gradient1, from_gradient2; /* 1 - beta */
    float scale1, scale2;                                 /* 1 / (1 - beta^step) */
    float epsilon;
};
static_assert(sizeof(parameter_table) + sizeof(adamw_numbers) <= 4096, "arguments of a kernel");

/* To one of the two neighbours in bf16, away from zero with the probability of the distance. */
static __device__ __forceinline__ bf16 round_randomly(float x, uint64_t random)
{
    unsigned bits = __float_as_uint(x) + (unsigned)(random >> 48);

    if (!(fabsf(x) < INFINITY))
        return from_float<bf16>(x);
    return from_float<bf16>(__uint_as_float(bits & 0xffff0000u)); /* which is exact */
}

/* The CPU's arithmetic to the bit: fused where it is fused there, and nowhere else. */
static __device__ __forceinline__ void step(float &w, float g, float &m, float &v, float clip,
                                            float decay, const struct adamw_numbers &a)
{
    g = __fmul_rn(g, clip);
    m = fmaf(g - m, a.from_gradient1, m);
    v = fmaf(__fmul_rn(g, g) - v, a.from_gradient2, v);
    float update = m * a.scale1 / (sqrtf(v * a.scale2) + a.epsilon);
    w = fmaf(fmaf(w, decay, update), -a.rate, w);
}

template <typename W>
static __device__ __forceinline__ void update_four(const struct parameter_view &p, int64_t at,
                                                   int n, float clip, const struct adamw_numbers &a)
{
    const float zero[4] = {0, 0, 0, 0};
    W *to = static_cast<W *>(p.w) + at;
    float w[4], g[4], m[4], v[4];
    four<bf16> copy;
    four<W> out;

    load_four(w, to, n);
    load_four(g, p.g + at, n);
    load_four(m, p.m + at, n);
    load_four(v, p.v + at, n);
    for (int k = 0; k < 4; k++) {
        step(w[k], g[k], m[k], v[k], clip, p.decay, a);
        copy.value[k] = from_float<bf16>(w[k]);
        if (sizeof(W) == sizeof(bf16))
            w[k] = to_float(round_randomly(w[k], mix(p.random ^ (uint64_t)(at + k))));
        out.value[k] = from_float<W>(w[k]);
    }
    store_four(to, out, n);
    store_floats(p.m + at, m, n);
    store_floats(p.v + at, v, n);
    store_floats(p.g + at, zero, n);
    if (p.copy)
        store_four(p.copy + at, copy, n);
}

/* One element at a time where memory is not aligned. */
template <typename W>
static __device__ __forceinline__ void update(const struct parameter_view &p, int64_t at,
                                              float clip, const struct adamw_numbers &a)
{
    int64_t left = p.elements - at;

    if (left >= 4 && p.in_fours)
        update_four<W>(p, at, 4, clip, a);
    else if (left > 0)
        for (int k = 0; k < 4 && k < left; k++)
            update_four<W>(p, at + k, 1, clip, a);
}

/* One block for each chunk of the table. */
static __global__ void adamw_kernel(struct parameter_table table, struct adamw_numbers a)
{
    int32_t chunk = blockIdx.x;
    const struct parameter_view &p = table.at[parameter_of(table, chunk)];
    int64_t from = (int64_t)(chunk - p.first) * CHUNK;
    float norm = *a.norm, clip = norm > a.max_norm ? a.max_norm / norm : 1.0f;

    for (int32_t k = threadIdx.x * 4; k < CHUNK; k += THREADS * 4)
        if (p.narrow)
            update<bf16>(p, from + k, clip, a);
        else
            update<float>(p, from + k, clip, a);
}

static bool known(struct device *device, const struct parameter *p)
{
    if ((p->w.dtype == DTYPE_F32 && (!p->copy.data || p->copy.dtype == DTYPE_BF16)) ||
        (p->w.dtype == DTYPE_BF16 && !p->copy.data))
        return true;
    device_fail(device, ERR_INTERNAL, "adamw: a weight of dtype %s%s", dtype_name(p->w.dtype),
                p->copy.data ? " with a copy" : "");
    return false;
}

void cuda_adamw(struct backend *backend, const struct adamw_args *args)
{
    struct cuda *cuda = cuda_of(backend);
    struct adamw_numbers a = {};

    a.norm = data_of<const float>(args->norm);
    a.max_norm = args->max_norm;
    a.rate = args->learning_rate;
    a.from_gradient1 = 1.0f - args->beta1;
    a.from_gradient2 = 1.0f - args->beta2;
    a.scale1 = 1.0f / (float)(1.0 - pow((double)args->beta1, args->step));
    a.scale2 = 1.0f / (float)(1.0 - pow((double)args->beta2, args->step));
    a.epsilon = args->epsilon;
    for (int32_t i = 0; i < args->count;) {
        struct parameter_table table = {};

        for (; i < args->count && table.count < TABLE; i++) {
            struct parameter_view view = view_of(&args->parameter[i]);

            if (!known(cuda->device, &args->parameter[i]))
                return;
            view.decay = args->parameter[i].decay ? args->weight_decay : 0.0f;
            view.random = mix(mix(args->seed) ^ ((uint64_t)args->step << 32 | (uint32_t)i));
            add_to_table(&table, view);
        }
        CUDA_LAUNCH(cuda->device, adamw_kernel, (unsigned)table.chunks, THREADS, 0, table, a);
    }
}
