#include <cstdio>
#include <cstring>

#include "engine/cuda/device_state.h"
#include "engine/cuda/gemm.h"

#define LEAST_MAJOR 8 /* compute capability: bf16 in tensor cores, cp.async */

/* ------------------------------------------------------------------ the driver */

/* cudart loads the driver's library when it is first asked for something. */
static int count_devices(int *count, struct err *err)
{
    int driver = 0, runtime = CUDART_VERSION;
    cudaError_t error = cudaGetDeviceCount(count);

    if (error == cudaSuccess && *count > 0)
        return 0;
    cudaGetLastError();
    cudaDriverGetVersion(&driver);
    if (driver == 0)
        return err_set(err, ERR_UNAVAILABLE,
                       "the NVIDIA driver (libcuda.so.1) is missing: install it; in a container, "
                       "start that with its GPUs (--gpus all)");
    if (driver < runtime &&
        (error == cudaErrorInsufficientDriver || driver / 1000 < runtime / 1000))
        return err_set(err, ERR_UNAVAILABLE,
                       "the NVIDIA driver is for CUDA %d.%d and this program for %d.%d: update the "
                       "driver",
                       driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    if (error == cudaSuccess || error == cudaErrorNoDevice)
        return err_set(err, ERR_UNAVAILABLE,
                       "the NVIDIA driver sees no GPU: look at nvidia-smi and at "
                       "CUDA_VISIBLE_DEVICES");
    return err_set(err, ERR_UNAVAILABLE, "the NVIDIA driver does not answer: %s (%s)",
                   cudaGetErrorString(error), cudaGetErrorName(error));
}

static void describe(int ordinal, struct cuda_device *out)
{
    struct cudaDeviceProp p;
    cudaError_t error = cudaGetDeviceProperties(&p, ordinal);
    int mode = cudaComputeModeDefault;
    struct err err = {};

    *out = cuda_device();
    if (error != cudaSuccess) {
        cudaGetLastError();
        snprintf(out->reason, sizeof out->reason, "the driver does not describe it: %s",
                 cudaGetErrorString(error));
        return;
    }
    snprintf(out->description, sizeof out->description, "%.80s, compute capability %d.%d", p.name,
             p.major, p.minor);
    out->memory_bytes = (int64_t)p.totalGlobalMem;
    cudaDeviceGetAttribute(&mode, cudaDevAttrComputeMode, ordinal);
    if (p.major < LEAST_MAJOR)
        snprintf(out->reason, sizeof out->reason,
                 "compute capability %d.%d: an Ampere GPU (8.0) or a later one is needed", p.major,
                 p.minor);
    else if (mode == cudaComputeModeProhibited)
        snprintf(out->reason, sizeof out->reason,
                 "its compute mode forbids all programs: nvidia-smi -c DEFAULT");
    else if (gemm_available(&err))
        snprintf(out->reason, sizeof out->reason, "%.250s", err.message);
    else
        out->usable = true;
}

int device_find(int ordinal, struct cuda_device *out, struct err *err)
{
    int count;

    if (count_devices(&count, err))
        return -1;
    if (ordinal < 0 || ordinal >= count)
        return err_set(err, ERR_UNAVAILABLE, "there is no such device: this machine has %d", count);
    describe(ordinal, out);
    return 0;
}

/* ------------------------------------------------------------------ free memory */

/* Does this process use the device already? Asked of the driver, which the runtime has loaded. */
static bool in_use(int ordinal)
{
    typedef int state_fn(int device, unsigned *flags, int *active);
    cudaDriverEntryPointQueryResult found;
    void *function = nullptr;
    unsigned flags;
    int active = 0;

    if (cudaGetDriverEntryPointByVersion("cuDevicePrimaryCtxGetState", &function, 12000,
                                         cudaEnableDefault, &found) != cudaSuccess ||
        !function || ((state_fn *)function)(ordinal, &flags, &active) != 0) {
        cudaGetLastError();
        return true; /* as long as nobody knows, nothing is reset */
    }
    return active != 0;
}

static void measure(int ordinal, struct cuda_device *out)
{
    bool before = in_use(ordinal);
    size_t free_bytes = 0, total = 0;
    cudaError_t error = cudaSetDevice(ordinal);

    if (error == cudaSuccess)
        error = cudaMemGetInfo(&free_bytes, &total);
    out->memory_free = (int64_t)free_bytes;
    if (error != cudaSuccess && out->usable) {
        cudaGetLastError();
        out->usable = false;
        snprintf(out->reason, sizeof out->reason, "it can not be opened: %s (%s)",
                 cudaGetErrorString(error), cudaGetErrorName(error));
    }
    if (!before)
        cudaDeviceReset();
}

int cuda_device_list(struct cuda_device *out, int max, int *count, struct err *err)
{
    int current = -1;

    *count = 0;
    if (count_devices(count, err))
        return -1;
    if (cudaGetDevice(&current) != cudaSuccess || !in_use(current))
        current = -1;
    for (int i = 0; i < *count && i < max; i++) {
        describe(i, &out[i]);
        if (out[i].usable)
            measure(i, &out[i]);
    }
    if (current >= 0)
        cudaSetDevice(current);
    cudaGetLastError();
    return 0;
}
