#include "engine/cuda/device.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <new>
#include <string>
#include <sys/mman.h>
#include <unistd.h>

#include "engine/cuda/cuda_backend.h"
#include "engine/cuda/launch_list.h"
#include "engine/cuda/shim/fault.h"
#include "engine/cuda/shim/machine.h"

#define DEVICES 8

struct device {
    int ordinal;
    struct err failure;
    bool lost;     /* as after a fault: for good */
    bool poisoned; /* lost, and the host does not know yet */
    bool holding;
    struct launch_list held;
    struct launch_cache<bool> graphs; /* is there one? */
};

/* What a process has of all its devices: host memory stands for theirs. */
static struct {
    std::map<const char *, size_t> allocation;
    int64_t used[DEVICES], graphs;
    bool protect;
} shim;

#define PAGE 4096u

static void lose(struct device *device, const char *what, const char *name)
{
    device->lost = true;
    device->poisoned = false;
    shim_lose(device->ordinal);
    err_set(&device->failure, ERR_DEVICE, "shim:%d: %s%s: an injected fault", device->ordinal, what,
            name);
}

/* The host waits: what a kernel broke comes out. True: the device has failed. */
static bool broken(struct device *device)
{
    if (device->poisoned)
        lose(device, "an illegal address was met", "");
    return device_failed(device);
}

/* Nothing reaches a device that has failed, whether the host knows or not. */
static bool idle(const struct device *device)
{
    return device->poisoned || device_failed(device);
}

/* ------------------------------------------------------------------ memory */

/* An allocation has pages of its own, so that it can be put out of reach: a page with its ordinal
 * and size, then the memory, at the end of its pages, with an unreadable page behind. */
struct allocation_head {
    int ordinal;
    size_t bytes, mapped;
};

static size_t pages(size_t bytes)
{
    return (bytes + PAGE - 1) / PAGE * PAGE;
}

static struct allocation_head *head_of(const void *memory)
{
    return (struct allocation_head *)((uintptr_t)memory / PAGE * PAGE - PAGE);
}

static void reach(bool on)
{
    if (!shim.protect)
        return;
    for (const auto &a : shim.allocation)
        if (mprotect((void *)((uintptr_t)a.first / PAGE * PAGE), pages(a.second),
                     on ? PROT_READ | PROT_WRITE : PROT_NONE))
            abort();
}

void *device_alloc(struct device *device, size_t bytes, struct err *err)
{
    int64_t limit = shim_memory();
    size_t wanted = bytes ? (bytes + 255) / 256 * 256 : 256, mapped;
    int64_t *used = &shim.used[device->ordinal];
    char *memory;

    device_flush(device);
    if (broken(device) && device->lost) {
        err_set(err, device->failure.kind, "%s", device->failure.message);
        return nullptr;
    }
    if (shim_strikes(SHIM_FAULT_ALLOC, device->ordinal) || bytes > (size_t)limit ||
        *used + (int64_t)wanted > limit) {
        err_set(err, ERR_NO_MEMORY, "shim:%d: %zu bytes of device memory wanted, %lld of %lld free",
                device->ordinal, bytes, (long long)(limit - *used), (long long)limit);
        return nullptr;
    }
    mapped = pages(wanted) + 2 * PAGE;
    memory =
        (char *)mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        err_set_errno(err, ENOMEM, "shim:%d: %zu bytes", device->ordinal, bytes);
        return nullptr;
    }
    if (mprotect(memory + mapped - PAGE, PAGE, PROT_NONE))
        abort();
    struct allocation_head *head = (struct allocation_head *)memory;
    head->ordinal = device->ordinal;
    head->bytes = wanted;
    head->mapped = mapped;
    memory += PAGE + pages(wanted) - wanted;
    memset(memory, 0xff, wanted);
    *used += (int64_t)wanted;
    shim.allocation[memory] = wanted;
    reach(false);
    return memory;
}

void device_memory(struct device *device, int64_t *bytes, int64_t *bytes_free)
{
    *bytes = device->lost ? 0 : shim_memory();
    *bytes_free = device->lost ? 0 : shim_memory() - shim.used[device->ordinal];
}

void device_free(struct device *device, void *memory)
{
    auto found = shim.allocation.find((const char *)memory);

    if (!memory)
        return;
    device_flush(device);
    if (found == shim.allocation.end()) {
        fprintf(stderr, "shim: %p is freed and is no device memory\n", memory);
        abort();
    }
    struct allocation_head *head = head_of(memory);
    shim.used[head->ordinal] -= (int64_t)head->bytes;
    shim.allocation.erase(found);
    munmap(head, head->mapped);
}

static void check_span(const char *what, const void *memory, size_t bytes)
{
    auto next = shim.allocation.upper_bound((const char *)memory);

    if (next != shim.allocation.begin()) {
        --next;
        if ((const char *)memory + bytes <= next->first + next->second)
            return;
    }
    fprintf(stderr, "shim: %s: %p, %zu bytes: not device memory\n", what, memory, bytes);
    abort();
}

void shim_check_pointer(const char *kernel, const void *pointer)
{
    if (pointer)
        check_span(kernel, pointer, 1);
}

/* ------------------------------------------------------------------ copies */

void device_copy_in(struct device *device, void *to, const void *host, size_t bytes)
{
    device_flush(device);
    device_copy_ahead(device, to, host, bytes);
}

void device_copy_ahead(struct device *device, void *to, const void *host, size_t bytes)
{
    if (idle(device) || bytes == 0)
        return;
    check_span("copy in", to, bytes);
    reach(true);
    memcpy(to, host, bytes);
    reach(false);
}

void device_copy_out(struct device *device, void *host, const void *from, size_t bytes)
{
    device_flush(device);
    if (broken(device) || bytes == 0)
        return;
    check_span("copy out", from, bytes);
    reach(true);
    memcpy(host, from, bytes);
    reach(false);
}

void device_copy(struct device *device, void *to, const void *from, size_t bytes)
{
    device_flush(device);
    if (idle(device) || bytes == 0)
        return;
    check_span("copy to", to, bytes);
    check_span("copy from", from, bytes);
    reach(true);
    memmove(to, from, bytes);
    reach(false);
}

void device_fill(struct device *device, void *to, int byte, size_t bytes)
{
    device_flush(device);
    if (idle(device) || bytes == 0)
        return;
    check_span("fill", to, bytes);
    reach(true);
    memset(to, byte, bytes);
    reach(false);
}

/* ------------------------------------------------------------------ launches and failures */

/* "(norm_kernel<float, bf16>)" → "norm_kernel" */
static std::string kernel_name(const char *written)
{
    while (*written == '(')
        written++;
    return std::string(written, strcspn(written, "<)"));
}

/* Counts a launch; false where the device is lost, or is now. */
static bool may_launch(struct device *device, const char *name)
{
    if (idle(device))
        return false;
    if (shim_strikes(SHIM_FAULT_HANG, device->ordinal))
        for (;;)
            pause();
    if (shim_strikes(SHIM_FAULT_LAUNCH, device->ordinal)) {
        lose(device, "kernel ", name);
        return false;
    }
    if (shim_strikes(SHIM_FAULT_POISON, device->ordinal)) {
        device->poisoned = true;
        return false;
    }
    shim_count_launch(name);
    return true;
}

bool shim_host_begin(struct device *device, const char *name, const struct shim_span *spans,
                     int count)
{
    device_flush(device);
    if (!may_launch(device, name))
        return false;
    for (int i = 0; i < count; i++)
        check_span(name, spans[i].memory, spans[i].bytes);
    reach(true);
    return true;
}

void shim_host_end(void)
{
    reach(false);
}

struct shim_context {
    const struct device_call *call;
};

static void run_thread(const void *context)
{
    const struct device_call *call = static_cast<const struct shim_context *>(context)->call;

    call->thread(call->kernel, call->parameters);
}

static void launch(struct device *device, const struct device_call *call, dim3 grid, dim3 block,
                   size_t shared)
{
    std::string name = kernel_name(call->name);
    struct shim_context context = {call};
    struct shim_launch launch = {name.c_str(), grid, block, shared, run_thread, &context};

    if (!may_launch(device, name.c_str()))
        return;
    reach(true);
    shim_run(&launch);
    reach(false);
}

void device_launch_call(struct device *device, const struct device_call *call, dim3 grid,
                        dim3 block, size_t shared)
{
    if (device->holding)
        device->held.add(*call, grid, block, shared);
    else
        launch(device, call, grid, block, shared);
}

void device_hold(struct device *device)
{
    device_flush(device);
    device->holding = true;
}

/* A graph is the list that the cache has kept: were it not what the pass asked for, results would
 * show it. */
void device_flush(struct device *device)
{
    struct launch_list *list = &device->held;
    bool again = false;

    if (!device->holding)
        return;
    device->holding = false;
    if (!list->launch.empty()) {
        auto *entry = device->graphs.find(device->held, &again, [](bool) {});

        list = &entry->list;
        shim.graphs += again;
    }
    for (size_t i = 0; i < list->launch.size(); i++) {
        const struct device_call call = list->call_of(i);

        launch(device, &call, list->launch[i].grid, list->launch[i].block, list->launch[i].shared);
    }
    device->held.clear();
}

void device_fail(struct device *device, enum err_kind kind, const char *format, ...)
{
    char text[512];
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    err_set(&device->failure, kind, "%s", text);
}

bool device_failed(const struct device *device)
{
    return device->lost || err_is_set(&device->failure);
}

int device_check(struct device *device, struct err *err)
{
    device_flush(device);
    if (!broken(device))
        return 0;
    err_set(err, device->failure.kind, "%s", device->failure.message);
    if (!device->lost)
        err_clear(&device->failure);
    return -1;
}

int device_open(struct device **out, int ordinal, struct err *err)
{
    *out = nullptr;
    if (ordinal < 0 || ordinal >= DEVICES)
        return err_set(err, ERR_UNAVAILABLE, "shim:%d: there are %d devices", ordinal, DEVICES);
    if (shim_is_lost(ordinal))
        return err_set(err, ERR_DEVICE, "shim:%d was lost to this process", ordinal);
    *out = new (std::nothrow) struct device();
    if (!*out)
        return err_set(err, ERR_NO_MEMORY, "no memory for a device");
    (*out)->ordinal = ordinal;
    return 0;
}

void device_close(struct device *device)
{
    delete device;
}

int cuda_device_list(struct cuda_device *out, int max, int *count, struct err *err)
{
    *count = DEVICES;
    for (int i = 0; i < DEVICES && i < max; i++) {
        out[i] = cuda_device();
        snprintf(out[i].description, sizeof out[i].description, "test shim of a CUDA device");
        out[i].memory_bytes = shim_memory();
        out[i].memory_free = shim_memory() - shim.used[i];
        out[i].usable = true;
    }
    return 0;
}

/* ------------------------------------------------------------------ for tests */

int64_t shim_memory_used(void)
{
    int64_t sum = 0;

    for (int64_t used : shim.used)
        sum += used;
    return sum;
}

int64_t shim_graphs(void)
{
    return shim.graphs;
}

void shim_protect(bool on)
{
    if (!on)
        reach(true);
    shim.protect = on;
    reach(false);
}
