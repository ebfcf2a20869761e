#include "engine/cpu/kernels.h"

#include <stddef.h>

const struct cpu_kernels *const *cpu_kernels_usable(void)
{
    static const struct cpu_kernels *const list[] = {
        &cpu_kernels_avx512,
        &cpu_kernels_avx2,
        &cpu_kernels_plain,
        NULL,
    };

    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return list;
    /* F16C came a generation before AVX2, and clang 14 does not know it by name here. */
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return list + 1;
    return list + 2;
}
