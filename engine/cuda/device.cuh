/* device.cuh: the language kernels are written in: CUDA under nvcc, the shim under a host compiler;
 * number types; sums over warps and blocks.
 *
 * Rules for kernels, so that they run on both (shim/shim.h says what is checked):
 * - Shared memory is declared with SHARED(type, name, dimensions) or DYNAMIC_SHARED(type, name).
 * - Blocks are of whole warps; every thread of a block reaches every __syncthreads(), and every
 *   lane of a warp every shuffle, with WARP as the mask. So a thread without work does not return
 *   before the last of them.
 * - No float atomics, nor any order of sums that depends on scheduling: the same bits each run.
 * - Values are read with to_float() and written with from_float<T>(); all arithmetic is in float.
 * - A kernel is `static __global__ void NAME_kernel(...)`, and is launched by CUDA_LAUNCH alone. */
#ifndef GRAFT_CUDA_DEVICE_CUH
#define GRAFT_CUDA_DEVICE_CUH

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define SHARED(type, name, ...) __shared__ type name __VA_ARGS__
#define DYNAMIC_SHARED(type, name)                                   \
    extern __shared__ __align__(128) unsigned char dynamic_shared[]; \
    type *name = reinterpret_cast<type *>(dynamic_shared)
#else
#include "engine/cuda/shim/shim.h"
#define SHARED(type, name, ...)           \
    static char name##_key;               \
    typedef type name##_type __VA_ARGS__; \
    name##_type &name = *static_cast<name##_type *>(shim_shared(&name##_key, sizeof(name##_type)))
#define DYNAMIC_SHARED(type, name) type *name = static_cast<type *>(shim_dynamic_shared())
#endif

/* Before a loop of a fixed count whose arrays must be in registers. UNROLL_BY: so many turns of it.
 */
#ifdef __CUDACC__
#define DEVICE_PRAGMA(text) _Pragma(#text)
#define UNROLL _Pragma("unroll")
#define UNROLL_BY(n) DEVICE_PRAGMA(unroll n)
#else
#define UNROLL
#define UNROLL_BY(n)
#endif

#define WARP 0xffffffffu /* the mask of all lanes */

/* ------------------------------------------------------------------ numbers */

typedef __nv_bfloat16 bf16;
typedef __half f16;

__device__ __forceinline__ float to_float(float x)
{
    return x;
}
__device__ __forceinline__ float to_float(bf16 x)
{
    return __bfloat162float(x);
}
__device__ __forceinline__ float to_float(f16 x)
{
    return __half2float(x);
}

template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x)
{
    return x;
}
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x)
{
    return __float2bfloat16_rn(x);
}
template <> __device__ __forceinline__ f16 from_float<f16>(float x)
{
    return __float2half_rn(x);
}

/* ------------------------------------------------------------------ sums */

/* Every lane gets the result; the tree is fixed. */
__device__ __forceinline__ float warp_sum(float x)
{
    for (int bits = 16; bits > 0; bits >>= 1)
        x += __shfl_xor_sync(WARP, x, bits);
    return x;
}

__device__ __forceinline__ float warp_max(float x)
{
    for (int bits = 16; bits > 0; bits >>= 1)
        x = fmaxf(x, __shfl_xor_sync(WARP, x, bits));
    return x;
}

/* Of a one-dimensional block of up to 1024 threads. Every thread gets the result. May be called
 * again at once. */
__device__ __forceinline__ float block_sum(float x)
{
    SHARED(float, parts, [32]);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;

    x = warp_sum(x);
    __syncthreads(); /* an earlier call's results have been read */
    if (lane == 0)
        parts[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? parts[lane] : 0.0f);
}

__device__ __forceinline__ float block_max(float x)
{
    SHARED(float, parts, [32]);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;

    x = warp_max(x);
    __syncthreads();
    if (lane == 0)
        parts[warp] = x;
    __syncthreads();
    return warp_max(lane < warps ? parts[lane] : -INFINITY);
}

#endif
