#include "server/capacity.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <unistd.h>

/* The number behind `key` in a file of "key: number kB" lines, in bytes. */
static bool read_field(const char *path, const char *key, int64_t *bytes)
{
    FILE *f = fopen(path, "re");
    size_t n = strlen(key);
    char line[256];
    bool found = false;

    if (f == NULL)
        return false;
    while (!found && fgets(line, sizeof line, f) != NULL) {
        if (strncmp(line, key, n) == 0 && line[n] == ':') {
            *bytes = strtoll(line + n + 1, NULL, 10) * 1024;
            found = true;
        }
    }
    fclose(f);
    return found;
}

/* A file that holds one number; "max" and absent files are false. */
static bool read_number(const char *path, int64_t *out)
{
    FILE *f = fopen(path, "re");
    long long v;
    bool ok;

    if (f == NULL)
        return false;
    ok = fscanf(f, "%lld", &v) == 1;
    fclose(f);
    *out = v;
    return ok;
}

/* Limit and free bytes of our cgroup (version 2). Page cache is counted as used there although the
 * kernel gives it back first, so it is added. */
static bool cgroup_memory(int64_t *limit, int64_t *bytes)
{
    char line[512], path[600];
    FILE *f = fopen("/proc/self/cgroup", "re");
    int64_t max, current, file = 0;
    const char *group = NULL;

    if (f == NULL)
        return false;
    while (group == NULL && fgets(line, sizeof line, f) != NULL) {
        line[strcspn(line, "\n")] = '\0';
        if (strncmp(line, "0::", 3) == 0)
            group = line + 3;
    }
    fclose(f);
    if (group == NULL)
        return false;
    snprintf(path, sizeof path, "/sys/fs/cgroup%s/memory.max", group);
    if (!read_number(path, &max))
        return false;
    snprintf(path, sizeof path, "/sys/fs/cgroup%s/memory.current", group);
    if (!read_number(path, &current))
        return false;
    snprintf(path, sizeof path, "/sys/fs/cgroup%s/memory.stat", group);
    f = fopen(path, "re");
    while (f != NULL && fgets(line, sizeof line, f) != NULL) {
        if (strncmp(line, "file ", 5) == 0)
            file = strtoll(line + 5, NULL, 10);
    }
    if (f != NULL)
        fclose(f);
    *limit = max;
    *bytes = max - current + file;
    return true;
}

int64_t capacity_memory(void)
{
    int64_t free_bytes, own = 0, group, limit;

    if (!read_field("/proc/meminfo", "MemAvailable", &free_bytes))
        return INT64_MAX;
    read_field("/proc/self/status", "RssAnon", &own);
    if (cgroup_memory(&limit, &group) && group < free_bytes)
        free_bytes = group;
    return (free_bytes > 0 ? free_bytes : 0) + own;
}

void capacity_machine(int64_t *bytes, int64_t *bytes_free)
{
    int64_t limit, group;

    *bytes = *bytes_free = 0;
    if (!read_field("/proc/meminfo", "MemTotal", bytes) ||
        !read_field("/proc/meminfo", "MemAvailable", bytes_free))
        return;
    if (!cgroup_memory(&limit, &group))
        return;
    if (limit < *bytes)
        *bytes = limit;
    if (group < *bytes_free)
        *bytes_free = group > 0 ? group : 0;
}

int capacity_disk(const char *dir, int64_t *bytes, struct err *err)
{
    struct statvfs st;
    unsigned long long n;

    if (statvfs(dir, &st) != 0)
        return err_set_errno(err, errno, "ask for the free space of %s", dir);
    if (__builtin_mul_overflow((unsigned long long)st.f_bavail, (unsigned long long)st.f_frsize,
                               &n) ||
        n > INT64_MAX)
        n = INT64_MAX;
    *bytes = (int64_t)n;
    return 0;
}
