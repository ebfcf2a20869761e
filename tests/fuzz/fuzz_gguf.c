/* Any bytes: read as GGUF, every row expanded, the tokenizer in the metadata converted. */
#include "engine/gguf.h"
#include "engine/import_gguf_tokenizer.h"
#include "tests/fuzz/fuzz.h"

static void read_rows(const struct gguf *file)
{
    enum { WIDEST = 4096 };
    float row[WIDEST];

    for (int64_t i = 0; i < gguf_count(file); i++) {
        const struct gguf_tensor *t = gguf_at(file, i);

        if (gguf_find(file, t->name) != t)
            abort();
        for (int64_t k = 0; t->columns <= WIDEST && k < t->rows && k < 64; k++)
            gguf_row_to_f32(t, k, row);
        if (t->columns <= WIDEST)
            gguf_row_to_f32(t, t->rows - 1, row);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct gguf *file = NULL;
    struct err err = {0};
    struct gguf_string string;
    char *text = NULL;
    size_t len = 0;
    int64_t number;
    double real;

    if (gguf_open_memory(&file, data, size, "input", &err) != 0) {
        fuzz_check_error(&err);
        return 0;
    }
    read_rows(file);
    gguf_get_int(file, "llama.block_count", 0, &number, NULL);
    gguf_get_float(file, "llama.rope.freq_base", 0, &real, NULL);
    gguf_get_string(file, "general.architecture", &string, NULL);
    if (import_gguf_tokenizer(file, &text, &len, &err) != 0)
        fuzz_check_error(&err);
    free(text);
    gguf_free(file);
    return 0;
}
