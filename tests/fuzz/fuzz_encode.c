/* Any text, with the tiny tokenizer: valid UTF-8 comes back byte for byte, and without special
 * tokens when those are not asked for. */
#include <stdio.h>

#include "engine/base/file_io.h"
#include "engine/base/utf8.h"
#include "engine/tokenizer.h"
#include "tests/fuzz/fuzz.h"

static struct tokenizer *open_tiny(void)
{
    struct tokenizer *tokenizer = NULL;
    struct err err = {0};
    char *json = NULL;
    size_t len = 0;

    if (file_read_all("tests/golden/tiny_tokenizer.json", 1 << 20, &json, &len, &err) != 0 ||
        tokenizer_open(&tokenizer, json, len, &err) != 0) {
        fprintf(stderr, "%s (run it in the root of the tree)\n", err.message);
        exit(2);
    }
    free(json);
    return tokenizer;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct tokenizer *tokenizer;
    struct token_list list;
    struct err err = {0};
    size_t at = 0;

    if (tokenizer == NULL)
        tokenizer = open_tiny();
    token_list_init(&list);
    if (tokenizer_encode(tokenizer, (const char *)data, size, false, &list, &err) != 0) {
        fuzz_check_error(&err);
        if (utf8_valid((const char *)data, size))
            abort();
    }
    for (size_t i = 0; i < list.count; i++) {
        size_t n = 0;
        const char *piece = tokenizer_piece(tokenizer, list.ids[i], &n);

        if (tokenizer_is_special(tokenizer, list.ids[i]) || n > size - at ||
            memcmp(piece, data + at, n) != 0)
            abort();
        at += n;
    }
    if (err.kind == ERR_NONE && at != size)
        abort();
    token_list_release(&list);
    return 0;
}
