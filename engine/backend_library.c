#include "engine/backend_library.h"

#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ------------------------------------------------------------------ names */

static const char *const families[] = {"cpu", "cuda", "shim"};

int backend_name_parse(struct backend_name *out, const char *device, struct err *err)
{
    const char *text = device ? device : "cpu", *number = strchr(text, ':');
    size_t length = number ? (size_t)(number - text) : strlen(text);
    char *end = NULL;
    long ordinal = 0;

    for (size_t i = 0; i < sizeof families / sizeof families[0]; i++) {
        if (strlen(families[i]) != length || strncmp(text, families[i], length) != 0)
            continue;
        if (number)
            ordinal = strtol(number + 1, &end, 10);
        if (number && (i == 0 || number[1] < '0' || number[1] > '9' || *end || ordinal > 1023))
            break;
        memset(out, 0, sizeof *out);
        memcpy(out->family, families[i], length);
        out->ordinal = (int)ordinal;
        return 0;
    }
    return err_set(err, ERR_INVALID, "device \"%s\" is not known: use \"cpu\" or \"cuda:0\"", text);
}

/* ------------------------------------------------------------------ libraries */

/* In the folder of the program, `below` it. False: there is no such file. */
static bool beside_program(char *path, size_t size, const char *below, const char *file)
{
    char program[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", program, sizeof program - 1);
    char *slash;
    int length;

    if (n < 0)
        return false;
    program[n] = '\0';
    slash = strrchr(program, '/');
    if (!slash)
        return false;
    *slash = '\0';
    length = snprintf(path, size, "%s/%s%s", program, below, file);
    return length > 0 && (size_t)length < size && access(path, R_OK) == 0;
}

static void *open_library(const char *file, struct err *err)
{
    char path[PATH_MAX + 64];
    bool found = beside_program(path, sizeof path, "", file) ||
                 beside_program(path, sizeof path, "../lib/graft/", file);
    void *library = dlopen(found ? path : file, RTLD_NOW | RTLD_LOCAL);
    const char *why = library ? "" : dlerror();

    if (library)
        return library;
    /* A file that is there and can not be loaded lacks something itself: that is the message. */
    if (found || !strstr(why, "No such file"))
        err_set(err, ERR_UNAVAILABLE, "%s can not be loaded: %s", file, why);
    else
        err_set(err, ERR_UNAVAILABLE,
                "%s is neither beside the program nor in ../lib/graft: build it (make CUDA=1)",
                file);
    return NULL;
}

static void *symbol(void *library, const char *file, const char *name, struct err *err)
{
    void *found = dlsym(library, name);

    if (!found)
        err_set(err, ERR_UNAVAILABLE, "%s has no %s: it is not of this build; run make again", file,
                name);
    return found;
}

int backend_library_load(struct backend_library *out, const char *family, struct err *err)
{
    cuda_backend_layout_fn *layout;
    char file[64];
    void *library;

    memset(out, 0, sizeof *out);
    snprintf(file, sizeof file, "libgraft_%s.so", family);
    library = open_library(file, err);
    if (!library)
        return -1;
    layout = (cuda_backend_layout_fn *)symbol(library, file, "cuda_backend_layout", err);
    out->open = (cuda_backend_open_fn *)symbol(library, file, "cuda_backend_open", err);
    out->list = (cuda_device_list_fn *)symbol(library, file, "cuda_device_list", err);
    if (!layout || !out->open || !out->list)
        return -1;
    if (layout() != cuda_backend_layout_here())
        return err_set(err, ERR_UNAVAILABLE, "%s is of another build: run make again", file);
    return 0;
}
