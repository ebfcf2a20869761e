#include "engine/cuda/cuda_bench.h"

#include <cstdlib>
#include <time.h>

#include "engine/cuda/cuda.h"

#define THREADS 256

/* ------------------------------------------------------------------ kernels */

static __device__ __forceinline__ float random_of(uint64_t i)
{
    uint64_t z = (i + 1) * 0x9e3779b97f4a7c15u;

    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (float)(int32_t)(z >> 32) * (1.0f / 2147483648.0f);
}

template <typename T> static __global__ void random_fill_kernel(T *out, int64_t count, float size)
{
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += (int64_t)gridDim.x * blockDim.x)
        out[i] = from_float<T>(size * random_of((uint64_t)i));
}

/* Each block folds its share to one word, so that every byte was needed. */
static __global__ void read_kernel(const uint4 *from, int64_t count, unsigned *out)
{
    unsigned fold = 0;

    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += (int64_t)gridDim.x * blockDim.x) {
        uint4 v = from[i];

        fold ^= v.x ^ v.y ^ v.z ^ v.w;
    }
    for (int bits = 16; bits > 0; bits >>= 1)
        fold ^= __shfl_xor_sync(WARP, fold, bits);
    if (threadIdx.x % 32 == 0)
        out[blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32] = fold;
}

static __global__ void small_kernel(unsigned *out)
{
    out[threadIdx.x] = threadIdx.x;
}

/* ------------------------------------------------------------------ measuring */

struct ceiling_bench {
    struct device *device;
    struct gemm_context *gemm;
    const struct cuda_ceiling_sizes *sizes;
    void *a, *b, *c; /* of the larger of the products and the copies */
    struct err *err;
};

static double now()
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

template <typename T> static void fill(struct device *device, void *to, int64_t count, float size)
{
    CUDA_LAUNCH(device, random_fill_kernel<T>, 1024, THREADS, 0, static_cast<T *>(to), count, size);
}

/* Seconds of one turn: two to warm up, then as many as asked for. */
template <typename F> static double time_of(struct ceiling_bench *x, F turn)
{
    double began = 0;

    for (int32_t i = -2; i < x->sizes->repeats; i++) {
        if (i == 0) {
            if (device_check(x->device, x->err))
                return 0;
            began = now();
        }
        turn();
    }
    if (device_check(x->device, x->err))
        return 0;
    return (now() - began) / x->sizes->repeats;
}

static double gemm_rate(struct ceiling_bench *x, enum dtype dtype)
{
    int32_t n = x->sizes->gemm;
    double seconds;
    struct gemm g = {};

    g.transpose_b = true;
    g.m = g.n = g.k = n;
    g.lda = g.ldb = g.ldc = n;
    g.dtype = g.c_dtype = dtype;
    g.a = x->a;
    g.b = x->b;
    g.c = x->c;
    if (dtype == DTYPE_BF16) {
        fill<bf16>(x->device, x->a, (int64_t)n * n, 1);
        fill<bf16>(x->device, x->b, (int64_t)n * n, 1);
    } else {
        fill<float>(x->device, x->a, (int64_t)n * n, 1);
        fill<float>(x->device, x->b, (int64_t)n * n, 1);
    }
    seconds = time_of(x, [&]() { gemm_run(x->gemm, &g); });
    return seconds > 0 ? 2.0 * n * n * n / seconds : 0;
}

static void measure(struct ceiling_bench *x, struct cuda_ceilings *out)
{
    int64_t bytes = x->sizes->bytes / 16 * 16;
    double seconds;

    fill<float>(x->device, x->a, bytes / 4, 1);
    seconds = time_of(x, [&]() { device_copy(x->device, x->b, x->a, (size_t)bytes); });
    out->copy = seconds > 0 ? 2.0 * (double)bytes / seconds : 0;
    seconds = time_of(x, [&]() {
        CUDA_LAUNCH(x->device, read_kernel, 2048, THREADS, 0, static_cast<const uint4 *>(x->a),
                    bytes / 16, static_cast<unsigned *>(x->c));
    });
    out->read = seconds > 0 ? (double)bytes / seconds : 0;
    out->launch = time_of(x, [&]() {
        for (int i = 0; i < 100; i++)
            CUDA_LAUNCH(x->device, small_kernel, 1, 32, 0, static_cast<unsigned *>(x->c));
    });
    out->launch /= 100;
    out->gemm_f32 = gemm_rate(x, DTYPE_F32);
    out->gemm_bf16 = gemm_rate(x, DTYPE_BF16);
}

int cuda_bench_ceilings(int ordinal, const struct cuda_ceiling_sizes *sizes,
                        struct cuda_ceilings *out, struct err *err)
{
    struct ceiling_bench x = {};
    int64_t bytes = (int64_t)sizes->gemm * sizes->gemm * 4;
    int rc = -1;

    bytes = bytes > sizes->bytes ? bytes : sizes->bytes;
    bytes = bytes > 1 << 17 ? bytes : 1 << 17; /* read_kernel's words */
    *out = cuda_ceilings();
    x.sizes = sizes;
    x.err = err;
    if (device_open(&x.device, ordinal, err) || gemm_open(&x.gemm, x.device, err))
        goto out;
    x.a = device_alloc(x.device, (size_t)bytes, err);
    x.b = device_alloc(x.device, (size_t)bytes, err);
    x.c = device_alloc(x.device, (size_t)bytes, err);
    if (!x.a || !x.b || !x.c)
        goto out;
    measure(&x, out);
    rc = err_is_set(err) ? -1 : 0;
out:
    if (x.device) {
        device_free(x.device, x.c);
        device_free(x.device, x.b);
        device_free(x.device, x.a);
    }
    gemm_close(x.gemm);
    device_close(x.device);
    return rc;
}

/* ------------------------------------------------------------------ material */

void cuda_bench_fill(struct backend *backend, const struct tensor *tensor, float size)
{
    struct device *device = cuda_of(backend)->device;

    if (tensor->dtype == DTYPE_BF16)
        fill<bf16>(device, tensor->data, tensor_elements(tensor), size);
    else
        fill<float>(device, tensor->data, tensor_elements(tensor), size);
}

int cuda_bench_clone(struct backend *backend, const struct packed_delta *delta,
                     struct packed_delta **out, struct err *err)
{
    return cuda_delta_clone(backend, delta, out, err);
}
