/* vector.cuh: numbers read and written 8 at a time, as floats. Addresses are multiples of 16 bytes
 * there; one at a time, they may be any. */
#ifndef GRAFT_CUDA_VECTOR_CUH
#define GRAFT_CUDA_VECTOR_CUH

#include <cstring>

#include "engine/cuda/device.cuh"

/* The two bf16 of a register, the lower first. */
static __device__ __forceinline__ float2 unpack_bf16(unsigned pair)
{
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
static __device__ __forceinline__ unsigned pack_bf16(bf16 low, bf16 high)
{
    unsigned short half[2];

    memcpy(&half[0], &low, sizeof low);
    memcpy(&half[1], &high, sizeof high);
    return half[0] | (unsigned)half[1] << 16;
}

template <int WIDE> static __device__ __forceinline__ void load_wide(const float *from, float *to)
{
    static_assert(WIDE == 1 || WIDE == 8, "one or eight");
    if constexpr (WIDE == 1) {
        to[0] = *from;
    } else {
        float4 a = reinterpret_cast<const float4 *>(from)[0];
        float4 b = reinterpret_cast<const float4 *>(from)[1];

        to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w;
        to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
    }
}

template <int WIDE> static __device__ __forceinline__ void load_wide(const bf16 *from, float *to)
{
    static_assert(WIDE == 1 || WIDE == 8, "one or eight");
    if constexpr (WIDE == 1) {
        to[0] = to_float(*from);
    } else {
        uint4 all = *reinterpret_cast<const uint4 *>(from);
        const unsigned pair[4] = {all.x, all.y, all.z, all.w};

        UNROLL
        for (int i = 0; i < 4; i++) {
            float2 two = unpack_bf16(pair[i]);

            to[2 * i] = two.x;
            to[2 * i + 1] = two.y;
        }
    }
}

template <int WIDE> static __device__ __forceinline__ void store_wide(float *to, const float *from)
{
    if constexpr (WIDE == 1) {
        *to = from[0];
    } else {
        reinterpret_cast<float4 *>(to)[0] = make_float4(from[0], from[1], from[2], from[3]);
        reinterpret_cast<float4 *>(to)[1] = make_float4(from[4], from[5], from[6], from[7]);
    }
}

template <int WIDE> static __device__ __forceinline__ void store_wide(bf16 *to, const float *from)
{
    if constexpr (WIDE == 1) {
        *to = from_float<bf16>(from[0]);
    } else {
        unsigned pair[4];

        UNROLL
        for (int i = 0; i < 4; i++)
            pair[i] = pack_bf16(from_float<bf16>(from[2 * i]), from_float<bf16>(from[2 * i + 1]));
        *reinterpret_cast<uint4 *>(to) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
    }
}

#endif
