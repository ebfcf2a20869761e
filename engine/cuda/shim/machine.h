/* machine.h: runs a kernel's blocks on fibers (shim.h says by which rules). */
#ifndef GRAFT_CUDA_SHIM_MACHINE_H
#define GRAFT_CUDA_SHIM_MACHINE_H

#include <cstdio>

#include "engine/cuda/shim/shim.h"

#define SHIM_MAX_THREADS 1024       /* of a block */
#define SHIM_STATIC_SHARED 49152u   /* bytes of SHARED declarations */
#define SHIM_DYNAMIC_SHARED 232448u /* an H100's 227 KB */

/* Ends the process with "shim: kernel NAME: MESSAGE": for bugs of kernels, not of the world. */
[[noreturn]] void shim_die(const char *format, ...) __attribute__((format(printf, 1, 2)));

struct shim_launch {
    const char *name; /* of the kernel, for messages */
    dim3 grid, block;
    size_t shared;                       /* dynamic, in bytes */
    void (*thread)(const void *context); /* the kernel, of one thread */
    const void *context;
};
void shim_run(const struct shim_launch *launch);
/* The barriers that kernels have reached: a line "barrier FILE:LINE" each. */
void shim_write_barriers(FILE *out);

#endif
