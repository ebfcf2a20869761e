/* engine_devices: what this machine could compute on, and why not. */
#include <sched.h>
#include <stdio.h>
#include <string.h>

#include "engine/backend_library.h"
#include "engine/base/utf8.h"
#include "engine/engine.h"

/* ------------------------------------------------------------------ cpu */

/* The first line of a file of /proc that begins with `key`: what stands behind its colon. */
static bool proc_line(const char *path, const char *key, char *out, size_t size)
{
    FILE *file = fopen(path, "re");
    char line[512];
    bool found = false;

    while (file && !found && fgets(line, sizeof line, file)) {
        const char *colon = strchr(line, ':');

        if (strncmp(line, key, strlen(key)) != 0 || !colon)
            continue;
        colon += strspn(colon, ": \t");
        snprintf(out, size, "%.*s", (int)strcspn(colon, "\n"), colon);
        found = true;
    }
    if (file)
        fclose(file);
    return found;
}

static int64_t memory_of(const char *key)
{
    char text[64];
    long long kib = 0;

    if (!proc_line("/proc/meminfo", key, text, sizeof text) || sscanf(text, "%lld", &kib) != 1)
        return 0;
    return (int64_t)kib * 1024;
}

static void find_cpu(struct engine_device *out)
{
    char model[96] = "processor";
    cpu_set_t allowed;
    int cores = 1;

    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0)
        cores = CPU_COUNT(&allowed);
    proc_line("/proc/cpuinfo", "model name", model, sizeof model);
    snprintf(out->name, sizeof out->name, "cpu");
    snprintf(out->description, sizeof out->description, "%s, %d core%s, %s kernels", model, cores,
             cores == 1 ? "" : "s", backend_cpu_kernels());
    out->memory_bytes = memory_of("MemTotal");
    out->memory_free = memory_of("MemAvailable");
    out->usable = true;
}

/* ------------------------------------------------------------------ cuda */

#define MAX_LISTED (ENGINE_MAX_DEVICES - 1)

/* What a library lists; none of it usable: *count is 0 and err says why. */
static int list_library(const char *family, struct cuda_device *list, int *count, struct err *err)
{
    struct backend_library library;

    *count = 0;
    if (backend_library_load(&library, family, err) || library.list(list, MAX_LISTED, count, err))
        return -1;
    if (*count > MAX_LISTED)
        *count = MAX_LISTED;
    return *count > 0 ? 0 : err_set(err, ERR_UNAVAILABLE, "there is no CUDA device");
}

/* Cut to its room, and valid UTF-8 whatever a driver says. */
static void set_text(char *to, size_t size, const char *text)
{
    size_t length = strnlen(text, size - 1);

    memcpy(to, text, length);
    to[length] = '\0';
    utf8_scrub(to);
}

static void take(struct engine_device *out, const struct backend_name *name,
                 const struct cuda_device *device)
{
    snprintf(out->name, sizeof out->name, "%.6s:%d", name->family, name->ordinal % 10000);
    set_text(out->description, sizeof out->description, device->description);
    set_text(out->reason, sizeof out->reason, device->reason);
    out->memory_bytes = device->memory_bytes;
    out->memory_free = device->memory_free;
    out->usable = device->usable;
}

static void absent(struct engine_device *out, const char *name, const char *reason)
{
    set_text(out->name, sizeof out->name, name);
    set_text(out->description, sizeof out->description, "CUDA");
    set_text(out->reason, sizeof out->reason, reason);
}

int engine_devices(struct engine_device *out, int max, int *count, struct err *err)
{
    struct cuda_device list[MAX_LISTED];
    struct err why = {0};
    int cuda, failed = list_library("cuda", list, &cuda, &why);

    *count = 0;
    if (1 + (failed ? 1 : cuda) > max)
        return err_set(err, ERR_INVALID, "there are more devices than the %d asked for", max);
    memset(out, 0, (size_t)max * sizeof *out);
    find_cpu(&out[0]);
    if (failed)
        absent(&out[1], "cuda", why.message);
    for (int i = 0; i < cuda; i++)
        take(&out[1 + i], &(struct backend_name){.family = "cuda", .ordinal = i}, &list[i]);
    *count = 1 + (failed ? 1 : cuda);
    return 0;
}

int engine_device_find(const char *name, struct engine_device *out, struct err *err)
{
    struct cuda_device list[MAX_LISTED];
    struct backend_name parsed;
    struct err why = {0};
    char text[64];
    int count;

    memset(out, 0, sizeof *out);
    if (backend_name_parse(&parsed, name, err))
        return -1;
    if (strcmp(parsed.family, "cpu") == 0) {
        find_cpu(out);
        return 0;
    }
    snprintf(text, sizeof text, "%s:%d", parsed.family, parsed.ordinal);
    if (list_library(parsed.family, list, &count, &why)) {
        absent(out, text, why.message);
    } else if (parsed.ordinal >= count) {
        err_set(&why, ERR_UNAVAILABLE, "there is no device %s: this machine has %d", text, count);
        absent(out, text, why.message);
    } else {
        take(out, &parsed, &list[parsed.ordinal]);
    }
    return 0;
}
