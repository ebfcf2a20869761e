/* Any bytes: read as a config.json. What is accepted is within bounds and reads back the same. */
#include "engine/base_layout.h"
#include "engine/model_config.h"
#include "tests/fuzz/fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct model_config config = {0}, again = {0};
    struct base_layout_tensor *list = NULL;
    struct err err = {0};
    struct strbuf text;
    int64_t count = 0;

    if (model_config_from_json(&config, (const char *)data, size, &err) != 0) {
        fuzz_check_error(&err);
        return 0;
    }
    if (model_config_check(&config, &err) != 0)
        abort();
    strbuf_init(&text, 1 << 16);
    model_config_to_json(&config, &text);
    if (model_config_from_json(&again, text.data, text.len, &err) != 0 ||
        memcmp(&config, &again, sizeof config) != 0)
        abort();
    strbuf_release(&text);
    if (base_layout_list(&config, &list, &count, &err) != 0 || count < 11)
        abort();
    free(list);
    return 0;
}
