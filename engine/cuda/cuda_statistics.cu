#include "engine/cuda/cuda.h"

#define THREADS 256

/* Block (row): a row of x times its weight. */
template <typename T>
static __global__ void gram_scale_kernel(const T *x, const float *weight, T *scaled, int32_t n)
{
    int64_t at = (int64_t)blockIdx.x * n;
    float factor = weight[blockIdx.x];

    for (int32_t i = threadIdx.x; i < n; i += THREADS)
        scaled[at + i] = from_float<T>(to_float(x[at + i]) * factor);
}

void cuda_gram(struct backend *backend, const struct gram_args *a)
{
    struct cuda *cuda = cuda_of(backend);
    int32_t n = (int32_t)a->x.shape[1];
    struct gemm g = gemm();

    if (a->weight.data)
        WITH_PRECISION(cuda, T,
                       CUDA_LAUNCH(cuda->device, gram_scale_kernel<T>, (unsigned)a->x.shape[0],
                                   THREADS, 0, data_of<const T>(a->x),
                                   data_of<const float>(a->weight), data_of<T>(a->scaled), n));
    g.transpose_a = true;
    g.m = g.n = n;
    g.k = (int32_t)a->x.shape[0];
    g.dtype = cuda->activation;
    g.c_dtype = DTYPE_F32;
    g.a = a->weight.data ? a->scaled.data : a->x.data;
    g.b = a->x.data;
    g.c = a->out.data;
    g.lda = g.ldb = g.ldc = n;
    g.add = true;
    gemm_run(cuda->gemm, &g);
}
