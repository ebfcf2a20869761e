#include "engine/cuda/shim/fault.h"

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <map>
#include <string>
#include <unistd.h>

#include "engine/cuda/shim/machine.h"

#define DEFAULT_MEMORY ((int64_t)1 << 30)
#define ANY_DEVICE -1

static const char *const fault_name[SHIM_FAULT_COUNT] = {"alloc", "launch", "hang", "poison"};

/* Never destroyed: what a process has counted is written when the library goes, after its statics.
 */
static struct faults {
    int64_t at[SHIM_FAULT_COUNT], counted[SHIM_FAULT_COUNT];
    int device[SHIM_FAULT_COUNT]; /* that counts and fails, or ANY_DEVICE */
    std::string token;            /* of the environment's fault */
    int64_t limit, environment_limit;
    unsigned lost; /* a bit for each device */
    std::map<std::string, int64_t> launches;
} &state = *new faults();

/* ------------------------------------------------------------------ the environment */

static int64_t number(const char *text, char **end, const char *what)
{
    int64_t n = *text >= '0' && *text <= '9' ? strtoll(text, end, 10) : -1;

    if (n < 0)
        shim_die("%s: a number is missing at \"%s\"", what, text);
    return n;
}

/* KIND:N, KIND:N@DEVICE, either with :/token behind. */
static void read_fault(const char *text)
{
    const char *colon = strchr(text, ':');
    char *rest = nullptr;
    int fault = 0;

    while (fault < SHIM_FAULT_COUNT &&
           (!colon || std::string(text, (size_t)(colon - text)) != fault_name[fault]))
        fault++;
    if (fault == SHIM_FAULT_COUNT)
        shim_die("GRAFT_SHIM_FAULT: \"%s\": alloc:N, launch:N, hang:N or poison:N", text);
    state.at[fault] = number(colon + 1, &rest, "GRAFT_SHIM_FAULT");
    if (*rest == '@')
        state.device[fault] = (int)number(rest + 1, &rest, "GRAFT_SHIM_FAULT");
    if (*rest == ':')
        state.token = rest + 1;
    else if (*rest)
        shim_die("GRAFT_SHIM_FAULT: \"%s\": what is \"%s\"?", text, rest);
}

static bool read_environment(void)
{
    const char *fault = getenv("GRAFT_SHIM_FAULT"), *memory = getenv("GRAFT_SHIM_MEMORY");
    char *rest = nullptr;

    for (int &device : state.device)
        device = ANY_DEVICE;
    if (fault && *fault)
        read_fault(fault);
    if (memory && *memory) {
        state.environment_limit = number(memory, &rest, "GRAFT_SHIM_MEMORY");
        if (*rest || state.environment_limit == 0)
            shim_die("GRAFT_SHIM_MEMORY: \"%s\" is no number of bytes", memory);
    }
    return true;
}
/* When the library is loaded, after `state` was made. */
[[maybe_unused]] static const bool environment_read = read_environment();

/* ------------------------------------------------------------------ faults */

bool shim_strikes(enum shim_fault fault, int ordinal)
{
    if (state.device[fault] != ANY_DEVICE && state.device[fault] != ordinal)
        return false;
    if (++state.counted[fault] != state.at[fault])
        return false;
    return state.token.empty() || unlink(state.token.c_str()) == 0;
}

void shim_lose(int ordinal)
{
    state.lost |= 1u << ordinal;
}

bool shim_is_lost(int ordinal)
{
    return state.lost >> ordinal & 1;
}

void shim_fail(enum shim_fault fault, int64_t nth)
{
    state.at[fault] = nth;
    state.counted[fault] = 0;
    state.device[fault] = ANY_DEVICE;
    state.token.clear();
    state.lost = 0;
}

int64_t shim_counted(enum shim_fault fault)
{
    return state.counted[fault];
}

/* ------------------------------------------------------------------ memory, launches */

int64_t shim_memory(void)
{
    return state.limit               ? state.limit
           : state.environment_limit ? state.environment_limit
                                     : DEFAULT_MEMORY;
}

void shim_memory_limit(int64_t bytes)
{
    state.limit = bytes;
}

void shim_count_launch(const char *kernel)
{
    state.launches[kernel]++;
}

int64_t shim_launches(const char *kernel)
{
    auto found = state.launches.find(kernel);

    return found == state.launches.end() ? 0 : found->second;
}

/* One file for each process, so that programs may run side by side. */
__attribute__((destructor)) static void write_counts(void)
{
    const char *folder = getenv("GRAFT_SHIM_COUNTS");
    char path[4096];
    FILE *file;

    if (!folder || !*folder)
        return;
    snprintf(path, sizeof path, "%s/%ld", folder, (long)getpid());
    file = fopen(path, "w");
    if (!file) {
        fprintf(stderr, "shim: GRAFT_SHIM_COUNTS: %s can not be written\n", path);
        return;
    }
    fprintf(file, "program %s\nseconds %.2f\n", program_invocation_name,
            (double)clock() / CLOCKS_PER_SEC);
    for (int i = 0; i < SHIM_FAULT_COUNT; i++)
        fprintf(file, "%s %lld\n", fault_name[i], (long long)state.counted[i]);
    for (const auto &kernel : state.launches)
        fprintf(file, "kernel %s %lld\n", kernel.first.c_str(), (long long)kernel.second);
    shim_write_barriers(file);
    fclose(file);
}
