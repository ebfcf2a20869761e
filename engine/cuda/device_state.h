/* device_state.h: what the files behind device.h on CUDA share: device.cu, device_list.cu and
 * gemm_lt.cu. */
#ifndef GRAFT_CUDA_DEVICE_STATE_H
#define GRAFT_CUDA_DEVICE_STATE_H

#include "engine/cuda/cuda_backend.h"
#include "engine/cuda/device.h"

/* Makes it the calling thread's current device. */
void device_use(struct device *device);

/* What there is to say of a device, without opening it: memory_free is 0. ERR_UNAVAILABLE: there is
 * no driver, or no such device. */
int device_find(int ordinal, struct cuda_device *out, struct err *err);

#endif
