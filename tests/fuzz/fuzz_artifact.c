/* Delta files: whatever the bytes, an artifact whose every part can be used, or an error.
 *
 * The tensors and the base are those of tests/unit/test_artifact.c, which writes this corpus's
 * files of each codec: build/tests/unit/test_artifact tests/fuzz/corpus/artifact */
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
    {"frozen.weight", ARTIFACT_MATRIX, 5, 5},
    {"lm_head.weight", ARTIFACT_EMBEDDING, 11, 5},
};
enum { COUNT = sizeof(tensors) / sizeof(tensors[0]) };

/* Distillation's side of a matrix. */
static void use_scales(const struct codec *codec, const struct tensor *part,
                       const struct artifact_tensor *t)
{
    float gradient[7 * 64], scale[512], slope[512];
    int32_t count = codec->scales(part, t->rows, t->cols);

    if (count < 0 || count > 512)
        abort();
    for (int32_t k = 0; k < t->rows * t->cols; k++)
        gradient[k] = (float)(k % 5 - 2);
    codec->read_scales(part, t->rows, t->cols, scale);
    if (codec->slope(part, t->rows, t->cols, gradient, slope, NULL) != 0)
        abort();
    for (int32_t k = 0; k < count; k++)
        if (!isfinite(scale[k]) || !isfinite(slope[k]))
            abort();
}

static void use(const struct artifact *artifact)
{
    const struct codec *codec = artifact_codec(artifact);

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
        if (part == NULL || t->kind != ARTIFACT_MATRIX)
            continue;
        if (codec->view(part, t->rows, t->cols, &view, &memory, NULL) != 0)
            abort();
        if (view.rows != t->rows || view.cols != t->cols)
            abort();
        free(memory);
        if (codec->scales)
            use_scales(codec, part, t);
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
