/* gemm.h: matrix products of training. Bodies: gemm_lt.cu (cuBLASLt, loaded at run time) and
 * shim/gemm.cpp (plain loops, for tests). Serving has kernels of its own, whose sums do not depend
 * on the number of rows. */
#ifndef GRAFT_CUDA_GEMM_H
#define GRAFT_CUDA_GEMM_H

#include <cstdint>

#include "engine/cuda/device.h"

extern "C" {
#include "engine/tensor.h"
}

struct gemm_context;

/* Can products be computed here? ERR_UNAVAILABLE: the library is missing, and the remedy. */
int gemm_available(struct err *err);
int gemm_open(struct gemm_context **out, struct device *device, struct err *err);
void gemm_close(struct gemm_context *context); /* NULL is fine */

/* C [m, n] (+)= op(A) [m, k] · op(B) [k, n], row-major, in device memory. Float sums; f32 factors
 * are multiplied as f32 (no TF32). The same shapes give the same bits. */
struct gemm {
    bool transpose_a;   /* A is [k, m] */
    bool transpose_b;   /* B is [n, k] */
    int32_t m, n, k;    /* 0: nothing is done (k = 0 without `add` is not asked for) */
    enum dtype dtype;   /* of A and B: F32 or BF16 */
    enum dtype c_dtype; /* F32, or as A and B */
    const void *a, *b;
    void *c;
    int64_t lda, ldb, ldc; /* elements from row to row, as stored */
    bool add;
};
/* Enqueues; a failure sticks to the device. */
void gemm_run(struct gemm_context *context, const struct gemm *gemm);

#endif
