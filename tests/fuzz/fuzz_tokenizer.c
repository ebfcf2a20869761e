/* Two inputs with a 0xff between them: a tokenizer.json and a text for it. What it encodes must be
 * tokens that it knows, in the order of the text. */
#include "engine/tokenizer.h"
#include "tests/fuzz/fuzz.h"

static void encode(const struct tokenizer *tokenizer, const char *text, size_t len, bool special)
{
    struct token_list list;
    struct err err = {0};

    token_list_init(&list);
    if (tokenizer_encode(tokenizer, text, len, special, &list, &err) != 0) {
        fuzz_check_error(&err);
        if (list.count != 0)
            abort();
    }
    for (size_t i = 0; i < list.count; i++) {
        size_t n = 0;

        if (tokenizer_piece(tokenizer, list.ids[i], &n) == NULL || list.starts[i] > len)
            abort();
        if (!special && tokenizer_is_special(tokenizer, list.ids[i]) && len == 0)
            abort();
    }
    token_list_release(&list);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const uint8_t *cut = size > 0 ? memchr(data, 0xff, size) : NULL;
    size_t json = cut != NULL ? (size_t)(cut - data) : size;
    struct tokenizer *tokenizer = NULL;
    struct err err = {0};

    if (tokenizer_open(&tokenizer, (const char *)data, json, &err) != 0) {
        fuzz_check_error(&err);
        return 0;
    }
    if (cut != NULL) {
        encode(tokenizer, (const char *)cut + 1, size - json - 1, true);
        encode(tokenizer, (const char *)cut + 1, size - json - 1, false);
    }
    tokenizer_free(tokenizer);
    return 0;
}
