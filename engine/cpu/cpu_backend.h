/* cpu_backend.h: the CPU's table of operations (cpu.h says what lies behind it). */
#ifndef GRAFT_CPU_CPU_BACKEND_H
#define GRAFT_CPU_CPU_BACKEND_H

#include "engine/backend.h"
#include "engine/cpu/kernels.h"

/* threads: 0 means one for each core. kernels: NULL means the best that this processor has. Checks
 * its products against plain loops and refuses where they are wrong. */
int cpu_backend_open(struct backend *backend, int threads, const struct cpu_kernels *kernels,
                     struct err *err);

#endif
