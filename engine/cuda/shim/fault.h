/* fault.h: when the shim fails on purpose, and what it counts (shim_control.h says what tests may
 * ask for). State of the whole process. */
#ifndef GRAFT_CUDA_SHIM_FAULT_H
#define GRAFT_CUDA_SHIM_FAULT_H

#include <cstdint>

#include "engine/cuda/shim/shim_control.h"

/* Counts one more of what the fault strikes, on a device; true: it fails now. */
bool shim_strikes(enum shim_fault fault, int ordinal);
/* A device that was lost stays so for this process, until shim_fail. */
void shim_lose(int ordinal);
bool shim_is_lost(int ordinal);

void shim_count_launch(const char *kernel);
/* As much as a device has. */
int64_t shim_memory(void);

#endif
