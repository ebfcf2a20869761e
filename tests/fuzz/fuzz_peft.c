/* Adapters: whatever the two files say, parts that lora accepts, or an error that blames them. The
 * input is adapter_config.json up to the first NUL, then adapter_model.safetensors. */
#include "tests/fuzz/fuzz.h"

#include <math.h>

#include "engine/codec/lora.h"
#include "engine/codec/peft.h"

static const struct artifact_tensor tensors[] = {
    {"embed.weight", ARTIFACT_EMBEDDING, 11, 5},
    {"a.weight", ARTIFACT_MATRIX, 3, 7},
    {"a_norm.weight", ARTIFACT_VECTOR, 1, 7},
    {"b.q.weight", ARTIFACT_MATRIX, 6, 4},
};
enum { COUNT = sizeof tensors / sizeof tensors[0] };

static void use(const struct peft *peft)
{
    int pairs = 0;

    for (int32_t i = 0; i < COUNT; i++) {
        const struct artifact_tensor *t = &tensors[i];
        const struct tensor *part = peft_parts(peft, i);
        float out[24];

        if (!part)
            continue;
        if (t->kind != ARTIFACT_MATRIX || codec_lora.accept(part, t->rows, t->cols, NULL) ||
            codec_lora.expand(part, t->rows, t->cols, out, NULL))
            abort();
        for (int k = 0; k < t->rows * t->cols; k++)
            if (!isfinite(out[k]))
                abort();
        pairs++;
    }
    if (pairs == 0)
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const char *end = size ? memchr(data, '\0', size) : NULL;
    struct peft_files files = {.config = (const char *)data, .config_len = size};
    struct peft *peft;
    struct err err = {0};

    if (end) {
        files.config_len = (size_t)(end - (const char *)data);
        files.weights = end + 1;
        files.weights_len = size - files.config_len - 1;
    }
    if (peft_open_memory(&peft, &files, tensors, COUNT, &err) == 0)
        use(peft);
    else
        fuzz_check_error(&err);
    peft_free(peft);
    return 0;
}
