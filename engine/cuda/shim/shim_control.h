/* shim_control.h: what tests may ask of the shim: random orders, faults, and what was launched.
 *
 * C, exported by libgraft_shim.so; state of the whole process, used by one thread. */
#ifndef GRAFT_CUDA_SHIM_SHIM_CONTROL_H
#define GRAFT_CUDA_SHIM_SHIM_CONTROL_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SHIM_EXPORT __attribute__((visibility("default")))

/* Another order of blocks, warps and lanes from here on; the same for the same seed. */
SHIM_EXPORT void shim_seed(uint64_t seed);

/* How often a kernel (the name of its function) was launched since the library was loaded. */
SHIM_EXPORT int64_t shim_launches(const char *kernel);

/* How many passes were launched as a graph, being just what one before them was. */
SHIM_EXPORT int64_t shim_graphs(void);

/* Barriers (__syncthreads, __syncwarp) that some kernel has reached so far, in no special order.
 * shim_barrier_skip leaves out barrier `index`, and no other; -1: none. Gives its place,
 * "file:line", for the message. */
SHIM_EXPORT int shim_barrier_count(void);
SHIM_EXPORT const char *shim_barrier_skip(int index);

enum shim_fault {
    SHIM_FAULT_ALLOC,  /* an allocation finds no memory */
    SHIM_FAULT_LAUNCH, /* a launch fails, and the device is lost: ERR_DEVICE at once */
    SHIM_FAULT_HANG,   /* a launch never ends */
    SHIM_FAULT_POISON, /* a kernel breaks the device: ERR_DEVICE where the host waits next */
    SHIM_FAULT_COUNT
};
/* The nth from now (1: the next) of what the fault strikes; 0: never. Allocations and launches are
 * counted from here on: shim_counted gives how many there were. Devices that were lost can be
 * opened again, as after a new start of the process. */
SHIM_EXPORT void shim_fail(enum shim_fault fault, int64_t nth);
SHIM_EXPORT int64_t shim_counted(enum shim_fault fault);

/* The same from outside, for processes that a test can not reach. Read when the library is loaded,
 * counted from there on; shim_fail takes its place.
 *
 *   GRAFT_SHIM_FAULT=alloc:17               or launch:120, hang:80, poison:50
 *   GRAFT_SHIM_FAULT=alloc:17@1             counts and fails on shim:1 alone
 *   GRAFT_SHIM_FAULT=alloc:17:/path/token   strikes only where this file can be removed then: so
 *                                           once, whatever number of processes is started again
 *   GRAFT_SHIM_MEMORY=67108864              bytes that a device has (1 GiB)
 *   GRAFT_SHIM_COUNTS=/folder               a process that ends writes /folder/PID: lines "program
 * PATH", "seconds S" (of its processor), "alloc N", "launch N", …, "kernel NAME N" for each
 * launched, "barrier FILE:LINE" for each reached
 *
 * A value that is not understood ends the process with a message. */

/* Device memory in use, over all devices: 0 when everything was freed. */
SHIM_EXPORT int64_t shim_memory_used(void);
/* As much as a device has; more is refused. 0: as it was first, 1 GiB. */
SHIM_EXPORT void shim_memory_limit(int64_t bytes);
/* Puts device memory out of the host's reach except while a kernel or a copy runs, so that host
 * code that touches it dies. Slow; off by default. */
SHIM_EXPORT void shim_protect(bool on);

/* Small kernels that use each piece of the language once (self_test.cu). Gives how many values
 * came out wrong; -1: the device failed. */
enum shim_self_test {
    SHIM_TEST_SUMS,      /* block_sum and block_max, twice in a row */
    SHIM_TEST_SHUFFLES,  /* every shuffle and vote, with widths */
    SHIM_TEST_SHARED,    /* a transpose through shared memory, static and dynamic */
    SHIM_TEST_UNWRITTEN, /* reads shared memory that nobody wrote: must be wrong */
    SHIM_TEST_MMA,       /* ldmatrix and mma against plain loops */
    SHIM_TEST_COPY,      /* cp.async in two stages */
    SHIM_TEST_NUMBERS,   /* bf16, f16 and lop3 */
    SHIM_TEST_COUNT
};
SHIM_EXPORT int64_t shim_self_test(enum shim_self_test test);

#ifdef __cplusplus
}
#endif

#endif
