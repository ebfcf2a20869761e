/* Any bytes: read as safetensors, every tensor touched to its end, a metadata value replaced. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "engine/safetensors.h"
#include "tests/fuzz/fuzz.h"

static volatile unsigned total; /* so that the reads stay */

static unsigned sum(const unsigned char *bytes, int64_t count)
{
    unsigned n = 0;

    for (int64_t i = 0; i < count; i++)
        n += bytes[i];
    return n;
}

/* Either the value is there afterwards, or nothing has changed. */
static void patch(const uint8_t *data, size_t size, const char *value)
{
    int fd = memfd_create("patched", MFD_CLOEXEC);
    unsigned char *after = malloc(size);
    struct safetensors *file;
    struct err err = {0};
    char path[32];

    if (fd < 0 || !after || write(fd, data, size) != (ssize_t)size)
        abort();
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    if (safetensors_patch_metadata(path, "format", value, &err) != 0) {
        fuzz_check_error(&err);
        if (pread(fd, after, size, 0) != (ssize_t)size || memcmp(after, data, size) != 0)
            abort();
    } else {
        if (pread(fd, after, size, 0) != (ssize_t)size ||
            safetensors_open_memory(&file, after, size, "patched", &err) != 0 ||
            strcmp(safetensors_metadata(file, "format"), value) != 0)
            abort();
        safetensors_free(file);
    }
    free(after);
    close(fd);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct safetensors *file = NULL;
    struct err err = {0};

    if (safetensors_open_memory(&file, data, size, "input", &err) != 0) {
        fuzz_check_error(&err);
        return 0;
    }
    for (int64_t i = 0; i < safetensors_count(file); i++) {
        const struct safetensors_tensor *t = safetensors_at(file, i);

        total += sum(t->view.data, t->bytes);
        if (safetensors_find(file, t->name) != t)
            abort();
    }
    patch(data, size, safetensors_metadata(file, "format") ? "a \"b\"" : "");
    safetensors_check_aligned(file, NULL);
    safetensors_free(file);
    return 0;
}
