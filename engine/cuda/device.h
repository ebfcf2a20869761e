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
#include <cstring>
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

/* From here on launches are held back, and go to the device together when anything but a launch or
 * device_copy_ahead is asked for. A pass that launches just what one before it did becomes one
 * launch of a CUDA graph (launch_list.h). */
void device_hold(struct device *device);
void device_flush(struct device *device); /* now */
/* device_copy_in that does not wait for the launches held back: none of them may read or write
 * there. */
void device_copy_ahead(struct device *device, void *to, const void *host, size_t bytes);

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

/* A kernel with its parameters: a std::tuple of them, `bytes` long. */
struct device_call {
    const char *name;
    const void *kernel;
    void *parameters;
    size_t bytes;
#ifdef __CUDACC__
    void (*places)(void *parameters, void **place); /* the address of each */
#else
    void (*thread)(const void *kernel, const void *parameters); /* what one thread does */
#endif
};
#define DEVICE_MAX_PARAMETERS 32

void device_launch_call(struct device *device, const struct device_call *call, dim3 grid,
                        dim3 block, size_t shared);

#ifdef __CUDACC__

/* For a library that launches by itself: what was held back has gone before. false: nothing may be
 * launched. */
bool device_library_begin(struct device *device);
void device_library_end(struct device *device, const char *name);
cudaStream_t device_stream(struct device *device);

template <typename... P> static void device_places(void *parameters, void **place)
{
    static_assert(sizeof...(P) <= DEVICE_MAX_PARAMETERS, "raise DEVICE_MAX_PARAMETERS");
    int i = 0;

    std::apply([place, &i](P &...p) { ((place[i++] = &p), ...); },
               *static_cast<std::tuple<P...> *>(parameters));
}

template <typename... P, typename... A>
void device_launch(struct device *device, const char *name, void (*kernel)(P...), dim3 grid,
                   dim3 block, size_t shared, A... arguments)
{
    std::tuple<P...> parameters(arguments...);
    const struct device_call call = {name, (const void *)kernel, &parameters, sizeof parameters,
                                     device_places<P...>};

    if (grid.x != 0 && grid.y != 0 && grid.z != 0)
        device_launch_call(device, &call, grid, block, shared);
}

#else

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

template <typename... P> static void shim_thread(const void *kernel, const void *parameters)
{
    void (*f)(P...);

    memcpy(&f, &kernel, sizeof f);
    std::apply(f, *static_cast<const std::tuple<P...> *>(parameters));
}

template <typename... P, typename... A>
void device_launch(struct device *device, const char *name, void (*kernel)(P...), dim3 grid,
                   dim3 block, size_t shared, A... arguments)
{
    std::tuple<P...> parameters(arguments...);
    const struct device_call call = {name, reinterpret_cast<const void *>(kernel), &parameters,
                                     sizeof parameters, shim_thread<P...>};

    if (grid.x == 0 || grid.y == 0 || grid.z == 0)
        return;
    std::apply([name](const P &...p) { (shim_check_parameter(name, p), ...); }, parameters);
    device_launch_call(device, &call, grid, block, shared);
}

#endif
#endif
