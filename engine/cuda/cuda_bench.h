/* cuda_bench.h: what a device can do at best, measured, for `make bench-gpu` to hold our speeds to;
 * exported by libgraft_cuda.so and libgraft_shim.so. */
#ifndef GRAFT_CUDA_CUDA_BENCH_H
#define GRAFT_CUDA_CUDA_BENCH_H

#ifdef __cplusplus
extern "C" {
#endif

#include "engine/cuda/cuda_backend.h"

struct cuda_ceiling_sizes {
    int32_t gemm;  /* m = n = k of the products */
    int64_t bytes; /* that are copied and read */
    int32_t repeats;
};

struct cuda_ceilings {
    double gemm_f32, gemm_bf16; /* FLOP/s of cuBLASLt, on random numbers */
    double copy;                /* bytes/s moved by a copy: read and written */
    double read;                /* bytes/s that kernels can read */
    double launch;              /* seconds from one small kernel to the next */
};

CUDA_EXPORT int cuda_bench_ceilings(int ordinal, const struct cuda_ceiling_sizes *sizes,
                                    struct cuda_ceilings *out, struct err *err);

/* Random numbers, uniform in [-size, size), F32 or BF16. */
CUDA_EXPORT void cuda_bench_fill(struct backend *backend, const struct tensor *tensor, float size);

/* Another delta with the same signs in memory of its own. */
CUDA_EXPORT int cuda_bench_clone(struct backend *backend, const struct packed_delta *delta,
                                 struct packed_delta **out, struct err *err);

#ifdef __cplusplus
}
#endif

#endif
