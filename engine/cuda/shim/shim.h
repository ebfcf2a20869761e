/* shim.h: stands for CUDA's device language when a .cu file is compiled by a host compiler, for
 * tests only. engine/cuda/device.cuh includes it; nothing else does.
 *
 * A block's threads are fibers on one host thread. Only what the engine's kernels use is here; a
 * kernel that needs more adds it beside its test. What the shim checks, that a GPU does not:
 *
 * - Warps of a block run in random order, and the lanes of a warp too, each up to its next point
 *   of synchronisation. Shared memory is filled with NaN patterns before each block. So a missing
 *   barrier and a read of what nobody wrote come out as wrong numbers.
 * - All threads that meet at a barrier, shuffle or vote must be at the same line, and all threads
 *   of the block (lanes of the mask) must come. Anything else ends the process with a message.
 * - Pointers among a kernel's parameters must be device memory (device.cpp).
 *
 * Blocks run one after another in random order: races between blocks are not found, results that
 * depend on the order of blocks are. */
#ifndef GRAFT_CUDA_SHIM_SHIM_H
#define GRAFT_CUDA_SHIM_SHIM_H

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

/* ------------------------------------------------------------------ vectors */

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_)
    {
    }
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
static inline float2 make_float2(float x, float y)
{
    return {x, y};
}
static inline float4 make_float4(float x, float y, float z, float w)
{
    return {x, y, z, w};
}
static inline uint2 make_uint2(unsigned x, unsigned y)
{
    return {x, y};
}
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w)
{
    return {x, y, z, w};
}
static inline int2 make_int2(int x, int y)
{
    return {x, y};
}

/* ------------------------------------------------------------------ where a thread is */

struct shim_thread {
    uint3 thread, block;
};
extern thread_local const struct shim_thread *shim_self;
extern thread_local dim3 shim_block_dim, shim_grid_dim;

#define threadIdx (shim_self->thread)
#define blockIdx (shim_self->block)
#define blockDim shim_block_dim
#define gridDim shim_grid_dim
#define warpSize 32

/* ------------------------------------------------------------------ synchronisation */

/* A line that synchronises. Tests list the barriers and leave them out one at a time. */
struct shim_site {
    const char *file;
    int line;
    bool barrier, known, skip;
    struct shim_site *next;
};
#define SHIM_SITE(barrier_)                                                                   \
    ([]() -> struct shim_site * {                                                             \
        static struct shim_site site = {__FILE__, __LINE__, barrier_, false, false, nullptr}; \
        return &site;                                                                         \
    }())

void shim_syncthreads(struct shim_site *site);
void shim_syncwarp(struct shim_site *site, unsigned mask);
#define __syncthreads() shim_syncthreads(SHIM_SITE(true))
#define SHIM_FULL_MASK 0xffffffffu
static inline unsigned shim_mask(unsigned mask = SHIM_FULL_MASK)
{
    return mask;
}
#define __syncwarp(...) shim_syncwarp(SHIM_SITE(true), shim_mask(__VA_ARGS__))

/* Lays `mine` before the warp and waits for all its lanes; gives what lane 0 laid down, the other
 * lanes' SHIM_EXCHANGE bytes apart, valid until the warp meets again. */
#define SHIM_EXCHANGE 64
const char *shim_exchange(struct shim_site *site, unsigned mask, const void *mine, size_t bytes);
int shim_lane(void); /* this thread's */

template <typename T>
static inline T shim_take(struct shim_site *site, unsigned mask, T value, int lane)
{
    static_assert(sizeof(T) <= SHIM_EXCHANGE, "shuffle of a large type");
    const char *all = shim_exchange(site, mask, &value, sizeof value);

    memcpy(&value, all + lane * SHIM_EXCHANGE, sizeof value);
    return value;
}
template <typename T>
static inline T shim_shfl(struct shim_site *site, unsigned mask, T value, int lane, int width = 32)
{
    return shim_take(site, mask, value, (shim_lane() & ~(width - 1)) | (lane & (width - 1)));
}
template <typename T>
static inline T shim_shfl_xor(struct shim_site *site, unsigned mask, T value, int bits,
                              int width = 32)
{
    int lane = shim_lane() ^ bits;

    return shim_take(site, mask, value,
                     (lane & ~(width - 1)) == (shim_lane() & ~(width - 1)) ? lane : shim_lane());
}
template <typename T>
static inline T shim_shfl_down(struct shim_site *site, unsigned mask, T value, int by,
                               int width = 32)
{
    int within = (shim_lane() & (width - 1)) + by;

    return shim_take(site, mask, value, within < width ? shim_lane() + by : shim_lane());
}
template <typename T>
static inline T shim_shfl_up(struct shim_site *site, unsigned mask, T value, int by, int width = 32)
{
    int within = (shim_lane() & (width - 1)) - by;

    return shim_take(site, mask, value, within >= 0 ? shim_lane() - by : shim_lane());
}
#define __shfl_sync(...) shim_shfl(SHIM_SITE(false), __VA_ARGS__)
#define __shfl_xor_sync(...) shim_shfl_xor(SHIM_SITE(false), __VA_ARGS__)
#define __shfl_down_sync(...) shim_shfl_down(SHIM_SITE(false), __VA_ARGS__)
#define __shfl_up_sync(...) shim_shfl_up(SHIM_SITE(false), __VA_ARGS__)

unsigned shim_ballot(struct shim_site *site, unsigned mask, bool vote);
#define __ballot_sync(mask, vote) shim_ballot(SHIM_SITE(false), mask, (vote) != 0)
#define __any_sync(mask, vote) (__ballot_sync(mask, vote) != 0)
#define __all_sync(mask, vote) (__ballot_sync(mask, vote) == (mask))

/* ------------------------------------------------------------------ shared memory */

/* The block's memory of one declaration: the same for all its threads. */
void *shim_shared(const void *key, size_t bytes);
void *shim_dynamic_shared(void);

/* cp.async: issued, closed into a group, waited for until `groups_left` groups are in flight. from
 * nullptr: zeros. */
void shim_copy_async(void *to, const void *from, size_t bytes);
void shim_copy_commit(void);
void shim_copy_wait(int groups_left);

/* ------------------------------------------------------------------ atomics */

/* Blocks and threads take turns on one host thread, so these need no lock. */
template <typename T> static inline T atomicAdd(T *at, T value)
{
    T old = *at;
    *at = old + value;
    return old;
}
template <typename T> static inline T atomicMax(T *at, T value)
{
    T old = *at;
    *at = old < value ? value : old;
    return old;
}
template <typename T> static inline T atomicMin(T *at, T value)
{
    T old = *at;
    *at = value < old ? value : old;
    return old;
}
template <typename T> static inline T atomicExch(T *at, T value)
{
    T old = *at;
    *at = value;
    return old;
}
template <typename T> static inline T atomicCAS(T *at, T expected, T value)
{
    T old = *at;
    *at = old == expected ? value : old;
    return old;
}
static inline void __threadfence(void)
{
}

/* ------------------------------------------------------------------ arithmetic */

template <typename T> static inline T __ldg(const T *at)
{
    return *at;
}
template <typename T> static inline T min(T a, T b)
{
    return b < a ? b : a;
}
template <typename T> static inline T max(T a, T b)
{
    return a < b ? b : a;
}
static inline float rsqrtf(float x)
{
    return 1.0f / sqrtf(x);
}
#define __expf(x) expf(x) /* glibc has a function of this name */
static inline float __fdividef(float a, float b)
{
    return a / b;
}
static inline float __fmul_rn(float a, float b)
{
    return a * b;
}
static inline unsigned __float_as_uint(float x)
{
    unsigned bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
static inline float __uint_as_float(unsigned bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
static inline int __popc(unsigned x)
{
    return __builtin_popcount(x);
}
static inline int __ffs(int x)
{
    return __builtin_ffs(x);
}
static inline int __clz(int x)
{
    return x ? __builtin_clz((unsigned)x) : 32;
}

/* ------------------------------------------------------------------ narrow floats */

extern "C" float f16_to_f32(uint16_t bits); /* engine/tensor.c */
extern "C" uint16_t f32_to_f16(float value);

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
static inline float __bfloat162float(__nv_bfloat16 x)
{
    return __uint_as_float((unsigned)x.bits << 16);
}
static inline __nv_bfloat16 __float2bfloat16_rn(float x) /* to nearest even; NaN stays NaN */
{
    unsigned bits = __float_as_uint(x);

    if (x != x)
        return {0x7fff};
    return {(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
static inline float __half2float(__half x)
{
    return f16_to_f32(x.bits);
}
static inline __half __float2half_rn(float x)
{
    return {f32_to_f16(x)};
}

#endif
