/* The whole file is compiled for the instruction set; cpu_kernels_usable() keeps it from running
 * where that is not there. */
#include <math.h>
#include <string.h>

#include "engine/cpu/kernels.h"

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC optimize("O3")
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#include "engine/cpu/simd_avx512.h"

#include "engine/cpu/kernels_body.h"

const struct cpu_kernels cpu_kernels_avx512 = KERNELS_TABLE("avx512");

#if defined(__clang__)
#pragma clang attribute pop
#endif
