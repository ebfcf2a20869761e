#include "engine/cuda/device.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <unordered_map>

#include "engine/cuda/device_state.h"
#include "engine/cuda/launch_list.h"

/* What the host writes goes through page-locked memory, so that a copy is the device's work: a ring
 * of segments, filled one behind the other. A segment is written again when the stream has passed
 * the event that was set when it was left; small copies meet that only after thousands. */
#define SEGMENTS 16
#define SEGMENT_BYTES ((size_t)2 << 20)
#define OUT_BYTES ((size_t)4 << 20) /* each of two buffers for what the host reads */

struct device {
    int ordinal;
    cudaStream_t stream;
    char *in, *out; /* [SEGMENTS · SEGMENT_BYTES], [2 · OUT_BYTES] page-locked */
    int segment;
    size_t used; /* of the segment */
    cudaEvent_t left[SEGMENTS], filled[2];
    struct err failure;
    bool lost;
    const char *last; /* what was launched last, for messages */
    std::unordered_map<const void *, size_t> shared_limit;
    bool holding;
    struct launch_list held;
    struct launch_cache<cudaGraphExec_t> graphs;
};

/* ------------------------------------------------------------------ failures */

/* A call was refused and the device is none the worse. */
static bool is_refusal(cudaError_t error)
{
    switch (error) {
    case cudaErrorInvalidValue:
    case cudaErrorInvalidConfiguration:
    case cudaErrorLaunchOutOfResources:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorMemoryAllocation:
    case cudaErrorNotSupported:
        return true;
    default:
        return false;
    }
}

/* Takes note of an error, if it is the first. One that the stream still shows after it was cleared
 * is the context's: nothing in this process cures it. */
static bool failed(struct device *device, cudaError_t error, const char *what)
{
    if (error == cudaSuccess)
        return false;
    cudaGetLastError();
    cudaError_t still = cudaStreamQuery(device->stream);
    bool lost = !is_refusal(error) || (still != cudaSuccess && still != cudaErrorNotReady);

    cudaGetLastError();
    if (lost) {
        device->lost = true;
        err_set(&device->failure, ERR_DEVICE,
                "cuda:%d: %s: %s (%s); the last kernel launched was %s", device->ordinal, what,
                cudaGetErrorString(error), cudaGetErrorName(error),
                device->last ? device->last : "none");
    } else {
        err_set(&device->failure, error == cudaErrorMemoryAllocation ? ERR_NO_MEMORY : ERR_INTERNAL,
                "cuda:%d: %s: %s (%s)", device->ordinal, what, cudaGetErrorString(error),
                cudaGetErrorName(error));
    }
    return true;
}

void device_fail(struct device *device, enum err_kind kind, const char *format, ...)
{
    char text[512];
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    err_set(&device->failure, kind, "%s", text);
    device->lost = device->lost || device->failure.kind == ERR_DEVICE;
}

bool device_failed(const struct device *device)
{
    return device->lost || err_is_set(&device->failure);
}

int device_check(struct device *device, struct err *err)
{
    device_flush(device);
    if (!device->lost)
        failed(device, cudaStreamSynchronize(device->stream), "waiting for the device");
    if (!device_failed(device))
        return 0;
    err_set(err, device->failure.kind, "%s", device->failure.message);
    if (!device->lost)
        err_clear(&device->failure);
    return -1;
}

/* The runtime's current device belongs to the thread, and a device may change threads. */
void device_use(struct device *device)
{
    static thread_local int current = -1;

    if (current == device->ordinal)
        return;
    if (!failed(device, cudaSetDevice(device->ordinal), "choosing the device"))
        current = device->ordinal;
}

/* ------------------------------------------------------------------ memory */

void *device_alloc(struct device *device, size_t bytes, struct err *err)
{
    size_t free_bytes = 0, total = 0;
    void *memory = nullptr;
    cudaError_t error;

    device_flush(device);
    if (device->lost) {
        err_set(err, device->failure.kind, "%s", device->failure.message);
        return nullptr;
    }
    error = cudaMalloc(&memory, bytes ? bytes : 1);
    if (error == cudaSuccess)
        return memory;
    if (error == cudaErrorMemoryAllocation) {
        cudaGetLastError();
        cudaMemGetInfo(&free_bytes, &total);
        err_set(err, ERR_NO_MEMORY, "cuda:%d: %zu bytes of device memory wanted, %zu of %zu free",
                device->ordinal, bytes, free_bytes, total);
        return nullptr;
    }
    failed(device, error, "allocating");
    err_set(err, device->failure.kind, "%s", device->failure.message);
    return nullptr;
}

void device_free(struct device *device, void *memory)
{
    if (!memory)
        return;
    device_flush(device);
    failed(device, cudaFree(memory), "freeing memory");
}

void device_memory(struct device *device, int64_t *bytes, int64_t *bytes_free)
{
    size_t available = 0, total = 0;

    device_use(device);
    if (device->lost || failed(device, cudaMemGetInfo(&available, &total), "asking for memory"))
        available = total = 0;
    *bytes = (int64_t)total;
    *bytes_free = (int64_t)available;
}

/* ------------------------------------------------------------------ copies */

/* Leaves the segment: the stream will say when its copies are through. False after a failure. */
static bool next_segment(struct device *device)
{
    int next = (device->segment + 1) % SEGMENTS;

    if (failed(device, cudaEventRecord(device->left[device->segment], device->stream),
               "a copy to the device") ||
        failed(device, cudaEventSynchronize(device->left[next]), "a copy to the device"))
        return false;
    device->segment = next;
    device->used = 0;
    return true;
}

void device_copy_in(struct device *device, void *to, const void *host, size_t bytes)
{
    device_flush(device);
    device_copy_ahead(device, to, host, bytes);
}

void device_copy_ahead(struct device *device, void *to, const void *host, size_t bytes)
{
    const char *from = static_cast<const char *>(host);
    char *target = static_cast<char *>(to);

    device_use(device);
    if (device_failed(device))
        return;
    while (bytes > 0) {
        size_t room = SEGMENT_BYTES - device->used, part = bytes < room ? bytes : room;

        if (room == 0 || (part < bytes && part < SEGMENT_BYTES / 2)) {
            if (!next_segment(device))
                return;
            continue;
        }
        char *stage = device->in + (size_t)device->segment * SEGMENT_BYTES + device->used;
        memcpy(stage, from, part);
        if (failed(device,
                   cudaMemcpyAsync(target, stage, part, cudaMemcpyHostToDevice, device->stream),
                   "a copy to the device"))
            return;
        device->used += (part + 15) / 16 * 16;
        from += part;
        target += part;
        bytes -= part;
    }
}

/* While one buffer is read by the host, the other fills. */
void device_copy_out(struct device *device, void *host, const void *from, size_t bytes)
{
    const char *source = static_cast<const char *>(from);
    char *to = static_cast<char *>(host);
    size_t parts = (bytes + OUT_BYTES - 1) / OUT_BYTES;

    device_flush(device);
    if (device_failed(device))
        return;
    for (size_t i = 0; i < parts + 1; i++) {
        size_t at = i * OUT_BYTES;

        if (i < parts) {
            size_t part = bytes - at < OUT_BYTES ? bytes - at : OUT_BYTES;

            if (failed(device,
                       cudaMemcpyAsync(device->out + i % 2 * OUT_BYTES, source + at, part,
                                       cudaMemcpyDeviceToHost, device->stream),
                       "a copy from the device") ||
                failed(device, cudaEventRecord(device->filled[i % 2], device->stream),
                       "a copy from the device"))
                return;
        }
        if (i > 0) {
            size_t before = at - OUT_BYTES;
            size_t part = bytes - before < OUT_BYTES ? bytes - before : OUT_BYTES;

            if (failed(device, cudaEventSynchronize(device->filled[(i - 1) % 2]),
                       "a copy from the device"))
                return;
            memcpy(to + before, device->out + (i - 1) % 2 * OUT_BYTES, part);
        }
    }
}

void device_copy(struct device *device, void *to, const void *from, size_t bytes)
{
    device_flush(device);
    if (device_failed(device) || bytes == 0)
        return;
    failed(device, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, device->stream),
           "a copy on the device");
}

void device_fill(struct device *device, void *to, int byte, size_t bytes)
{
    device_flush(device);
    if (device_failed(device) || bytes == 0)
        return;
    failed(device, cudaMemsetAsync(to, byte, bytes, device->stream), "filling memory");
}

/* ------------------------------------------------------------------ launches */

#define SHARED_WITHOUT_ASKING 49152u /* bytes of a block, its static ones counted */

/* Which may be more than a kernel gets unless its limit is raised: once for each kernel. */
static bool raise_limit(struct device *device, const void *kernel, size_t shared)
{
    auto known = device->shared_limit.find(kernel);
    struct cudaFuncAttributes attributes;

    if (known == device->shared_limit.end()) {
        if (failed(device, cudaFuncGetAttributes(&attributes, kernel), "asking for a kernel"))
            return false;
        known =
            device->shared_limit.emplace(kernel, SHARED_WITHOUT_ASKING - attributes.sharedSizeBytes)
                .first;
    }
    if (shared <= known->second)
        return true;
    if (failed(
            device,
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared),
            "shared memory of a kernel"))
        return false;
    known->second = shared;
    return true;
}

static void launch(struct device *device, const struct device_call *call, dim3 grid, dim3 block,
                   size_t shared)
{
    void *place[DEVICE_MAX_PARAMETERS];

    call->places(call->parameters, place);
    device->last = call->name;
    failed(device, cudaLaunchKernel(call->kernel, grid, block, place, shared, device->stream),
           call->name);
}

void device_launch_call(struct device *device, const struct device_call *call, dim3 grid,
                        dim3 block, size_t shared)
{
    device_use(device);
    if (device_failed(device) || (shared > 0 && !raise_limit(device, call->kernel, shared)))
        return;
    if (device->holding)
        device->held.add(*call, grid, block, shared);
    else
        launch(device, call, grid, block, shared);
}

bool device_library_begin(struct device *device)
{
    device_flush(device);
    return !device_failed(device);
}

void device_library_end(struct device *device, const char *name)
{
    device->last = name;
    failed(device, cudaGetLastError(), name);
}

cudaStream_t device_stream(struct device *device)
{
    device_flush(device);
    return device->stream;
}

/* ------------------------------------------------------------------ launches held back */

void device_hold(struct device *device)
{
    device_flush(device);
    device->holding = true;
}

/* The launches one behind the other, as one executable graph; an error is given, not noted. */
static cudaError_t make_graph(struct launch_list *list, cudaGraphExec_t *out)
{
    void *place[DEVICE_MAX_PARAMETERS];
    cudaGraphNode_t node = nullptr, before = nullptr;
    cudaGraph_t graph = nullptr;
    cudaError_t error = cudaGraphCreate(&graph, 0);

    for (size_t i = 0; i < list->launch.size() && error == cudaSuccess; i++) {
        const struct held_launch &l = list->launch[i];
        struct device_call call = list->call_of(i);
        struct cudaKernelNodeParams params = {};

        call.places(call.parameters, place);
        params.func = const_cast<void *>(call.kernel);
        params.gridDim = l.grid;
        params.blockDim = l.block;
        params.sharedMemBytes = (unsigned)l.shared;
        params.kernelParams = place;
        error = cudaGraphAddKernelNode(&node, graph, before ? &before : nullptr, before ? 1 : 0,
                                       &params);
        before = node;
    }
    if (error == cudaSuccess)
        error = cudaGraphInstantiate(out, graph, 0);
    if (graph)
        cudaGraphDestroy(graph);
    return error;
}

static void drop_graph(cudaGraphExec_t graph)
{
    if (graph)
        cudaGraphExecDestroy(graph);
}

/* A driver that will not have a graph of this still has its launches. */
static bool launch_graph(struct device *device)
{
    bool again;
    auto *entry = device->graphs.find(device->held, &again, drop_graph);

    if (again && !entry->graph && make_graph(&device->held, &entry->graph) != cudaSuccess) {
        cudaGetLastError();
        entry->graph = nullptr;
    }
    if (!entry->graph)
        return false;
    device->last = "a graph of a step";
    failed(device, cudaGraphLaunch(entry->graph, device->stream), device->last);
    return true;
}

void device_flush(struct device *device)
{
    device_use(device);
    if (!device->holding)
        return;
    device->holding = false;
    if (!device_failed(device) && !device->held.launch.empty() && !launch_graph(device))
        for (size_t i = 0; i < device->held.launch.size() && !device_failed(device); i++) {
            const struct held_launch &l = device->held.launch[i];
            const struct device_call call = device->held.call_of(i);

            launch(device, &call, l.grid, l.block, l.shared);
        }
    device->held.clear();
}

/* ------------------------------------------------------------------ open and close */

static cudaError_t make(struct device *device)
{
    cudaError_t error = cudaStreamCreateWithFlags(&device->stream, cudaStreamNonBlocking);

    if (error == cudaSuccess)
        error = cudaHostAlloc((void **)&device->in, SEGMENTS * SEGMENT_BYTES, 0);
    if (error == cudaSuccess)
        error = cudaHostAlloc((void **)&device->out, 2 * OUT_BYTES, 0);
    for (int i = 0; i < SEGMENTS && error == cudaSuccess; i++)
        error = cudaEventCreateWithFlags(&device->left[i], cudaEventDisableTiming);
    for (int i = 0; i < 2 && error == cudaSuccess; i++)
        error = cudaEventCreateWithFlags(&device->filled[i], cudaEventDisableTiming);
    return error;
}

int device_open(struct device **out, int ordinal, struct err *err)
{
    struct cuda_device info;
    struct device *device;
    cudaError_t error;

    *out = nullptr;
    if (device_find(ordinal, &info, err))
        return err_prefix(err, "cuda:%d", ordinal);
    if (!info.usable)
        return err_set(err, ERR_UNAVAILABLE, "cuda:%d: %s", ordinal, info.reason);
    device = new (std::nothrow) struct device();
    if (!device)
        return err_set(err, ERR_NO_MEMORY, "no memory for a device");
    device->ordinal = ordinal;
    error = cudaSetDevice(ordinal);
    if (error == cudaSuccess) {
        device_use(device);
        error = make(device);
    }
    if (error != cudaSuccess) {
        err_set(err, error == cudaErrorMemoryAllocation ? ERR_NO_MEMORY : ERR_UNAVAILABLE,
                "cuda:%d can not be opened: %s (%s)", ordinal, cudaGetErrorString(error),
                cudaGetErrorName(error));
        device_close(device);
        return -1;
    }
    *out = device;
    return 0;
}

void device_close(struct device *device)
{
    if (!device)
        return;
    device_use(device);
    if (device->stream)
        cudaStreamSynchronize(device->stream);
    for (auto &entry : device->graphs.entry)
        drop_graph(entry.graph);
    for (cudaEvent_t event : device->left)
        if (event)
            cudaEventDestroy(event);
    for (cudaEvent_t event : device->filled)
        if (event)
            cudaEventDestroy(event);
    if (device->out)
        cudaFreeHost(device->out);
    if (device->in)
        cudaFreeHost(device->in);
    if (device->stream)
        cudaStreamDestroy(device->stream);
    cudaGetLastError();
    delete device;
}
