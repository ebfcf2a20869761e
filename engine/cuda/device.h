/* device.h: a CUDA device as the stages see it: memory, copies, launches, and the first failure,
 * which sticks. Bodies: device.cu (the CUDA runtime) and shim/device.cpp (the host, for tests).
 *
 * Everything but device_open, device_alloc and device_free is enqueued on one stream, in order, and
 * returns at once; device_copy_out and device_check wait. After a failure nothing more is enqueued.
 * A device belongs to one thread at a time. */
#ifndef GRAFT_CUDA_DEVICE_H
#define GRAFT_CUDA_DEVICE_H

#include <cstddef>
#include <cstdint>
#include <tuple>

#include "engine/cuda/device.cuh"

extern "C" {
#include "engine/base/err.h"
}

struct device;

/* Number `ordinal` of this machine; ERR_UNAVAILABLE says what is missing. */
int device_open(struct device **out, int ordinal, struct err *err);
void device_close(struct device *device); /* NULL is fine */

/* Not zeroed, aligned to 256 bytes. NULL: err says what was asked for and what there was. */
void *device_alloc(struct device *device, size_t bytes, struct err *err);
void device_free(struct device *device, void *memory); /* NULL is fine */
/* All there is on it and what is free now, others' use counted; zeros where nobody can tell. */
void device_memory(struct device *device, int64_t *bytes, int64_t *bytes_free);

/* The host's memory is free again when it returns. */
void device_copy_in(struct device *device, void *to, const void *host, size_t bytes);
void device_copy_out(struct device *device, void *host, const void *from, size_t bytes);
void device_copy(struct device *device, void *to, const void *from, size_t bytes);
void device_fill(struct device *device, void *to, int byte, size_t bytes);

/* Notes a failure of our own, if it is the first. */
void device_fail(struct device *device, enum err_kind kind, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
bool device_failed(const struct device *device);
/* Waits for everything enqueued; gives the first failure since the last check. A failure of the
 * hardware or the driver stays, as ERR_DEVICE: the process must end. */
int device_check(struct device *device, struct err *err);

/* CUDA_LAUNCH(device, kernel, grid, block, dynamic shared bytes, arguments…). A kernel with several
 * template parameters goes in parentheses. A grid with no block in it is no launch. */
#define CUDA_LAUNCH(device, kernel, grid, block, shared, ...) \
    device_launch(device, #kernel, kernel, grid, block, shared, __VA_ARGS__)

#ifdef __CUDACC__

/* May it be launched? Raises the kernel's limit of dynamic shared memory where that is needed. */
bool device_launch_begin(struct device *device, const void *kernel, size_t shared);
void device_launch_end(struct device *device, const char *name);
cudaStream_t device_stream(struct device *device);

template <typename... P, typename... A>
void device_launch(struct device *device, const char *name, void (*kernel)(P...), dim3 grid,
                   dim3 block, size_t shared, A... arguments)
{
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 ||
        !device_launch_begin(device, (const void *)kernel, shared))
        return;
    kernel<<<grid, block, shared, device_stream(device)>>>(arguments...);
    device_launch_end(device, name);
}

#else

struct shim_launch_args {
    const char *name;
    dim3 grid, block;
    size_t shared;
    void (*thread)(const void *context);
    const void *context;
};
void shim_launch_kernel(struct device *device, const struct shim_launch_args *args);
void shim_check_pointer(const char *kernel, const void *pointer);
/* For a library's part that the host plays: counts as a launch (and may fail like one), checks that
 * the spans are device memory, and puts them in reach until shim_host_end. */
struct shim_span {
    const void *memory;
    size_t bytes;
};
bool shim_host_begin(struct device *device, const char *name, const struct shim_span *spans,
                     int count);
void shim_host_end(void);

template <typename T> static inline void shim_check_parameter(const char *kernel, const T &)
{
}
template <typename T> static inline void shim_check_parameter(const char *kernel, T *const &p)
{
    shim_check_pointer(kernel, p);
}

template <typename... P> struct shim_call {
    void (*kernel)(P...);
    std::tuple<P...> parameters;

    static void thread(const void *context)
    {
        const shim_call *call = static_cast<const shim_call *>(context);

        std::apply(call->kernel, call->parameters);
    }
};

template <typename... P, typename... A>
void device_launch(struct device *device, const char *name, void (*kernel)(P...), dim3 grid,
                   dim3 block, size_t shared, A... arguments)
{
    shim_call<P...> call = {kernel, std::tuple<P...>(arguments...)};
    shim_launch_args args = {name, grid, block, shared, shim_call<P...>::thread, &call};

    if (grid.x == 0 || grid.y == 0 || grid.z == 0)
        return;
    std::apply([name](const P &...p) { (shim_check_parameter(name, p), ...); }, call.parameters);
    shim_launch_kernel(device, &args);
}

#endif
#endif
