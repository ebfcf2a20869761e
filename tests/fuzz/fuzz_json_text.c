/* Any bytes: read as JSON, as every body, dataset row and header is. */
#include "engine/base/json_text.h"
#include "tests/fuzz/fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct err err = {0};
    json_t *value = json_text_load((const char *)data, size, JSON_DECODE_ANY, &err);
    char *text;

    if (value == NULL) {
        fuzz_check_error(&err);
        return 0;
    }
    text = json_dumps(value, JSON_ENCODE_ANY);
    if (text == NULL)
        abort();
    free(text);
    json_decref(value);
    return 0;
}
