/* cpu_backend.h: the CPU's table of operations (cpu.h says what lies behind it). */
#ifndef GRAFT_CPU_CPU_BACKEND_H
#define GRAFT_CPU_CPU_BACKEND_H

#include "engine/backend.h"
#include "engine/cpu/kernels.h"

/* threads: 0 means one for each core. kernels: NULL means the best that this processor has.
 * precision: F32 or BF16; BF16 is there for other backends to be equal to, and takes longer. Checks
 * its products against plain loops and refuses where they are wrong. */
int cpu_backend_open(struct backend *backend, int threads, const struct cpu_kernels *kernels,
                     enum dtype precision, struct err *err);

#endif
