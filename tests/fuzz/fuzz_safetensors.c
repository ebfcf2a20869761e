/* Any bytes: read as safetensors, every tensor touched to its end. */
#include <stdlib.h>

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
    safetensors_metadata(file, "format");
    safetensors_check_aligned(file, NULL);
    safetensors_free(file);
    return 0;
}
