/* Delta files: whatever the bytes, an artifact whose every part can be used, or an error. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#include "engine/codec/artifact.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const struct artifact_tensor tensors[] = {
    {"model.embed_tokens.weight", ARTIFACT_EMBEDDING, 11, 5},
    {"a.weight", ARTIFACT_MATRIX, 3, 37},
    {"a_norm.weight", ARTIFACT_VECTOR, 1, 37},
    {"b.weight", ARTIFACT_MATRIX, 7, 64},
};
enum { COUNT = sizeof(tensors) / sizeof(tensors[0]) };

static void use(const struct artifact *artifact)
{
    for (int32_t i = 0; i < COUNT; i++) {
        const struct artifact_tensor *t = &tensors[i];
        const struct tensor *part = artifact_parts(artifact, i);
        float out[7 * 64];
        struct delta_tensor view;
        void *memory;

        if (artifact_expand(artifact, i, out, NULL) != 0)
            abort();
        for (int32_t k = 0; k < t->rows * t->cols; k++) {
            if (!isfinite(out[k]))
                abort();
        }
        if (part != NULL && t->kind == ARTIFACT_MATRIX) {
            if (artifact_codec(artifact)->view(part, t->rows, t->cols, &view, &memory, NULL) != 0)
                abort();
            free(memory);
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const struct artifact_expectation want = {
        tensors, COUNT, "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"};
    struct artifact *artifact = NULL;
    struct err err = {0};

    if (artifact_open_memory(&artifact, data, size, "fuzz", &want, &err) == 0)
        use(artifact);
    else if (err.kind != ERR_INVALID)
        abort();
    artifact_free(artifact);
    return 0;
}
