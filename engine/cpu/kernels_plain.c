#include "engine/cpu/simd_plain.h"

#include "engine/cpu/kernels_body.h"

const struct cpu_kernels cpu_kernels_plain = KERNELS_TABLE("plain");
