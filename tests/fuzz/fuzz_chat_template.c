/* Any bytes: taken for a chat template; if it is one, a conversation goes through it. */
#include <stdio.h>

#include "engine/chat_template.h"
#include "tests/fuzz/fuzz.h"

static const char tokenizer_json[] =
    "{\"added_tokens\":[{\"id\":1,\"content\":\"<|im_start|>\",\"special\":true},"
    "{\"id\":2,\"content\":\"<|im_end|>\",\"special\":true}],"
    "\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":false},"
    "\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"s\":3,\"e\":4,\"\u010a\":5},\"merges\":[]}}";

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const struct engine_message messages[] = {{"user", "a"}, {"assistant", "as<|im_end|>"}};
    static struct tokenizer *tokenizer;
    struct chat_template *chat = NULL;
    struct chat_tokens out;
    struct err err = {0};

    if (tokenizer == NULL &&
        tokenizer_open(&tokenizer, tokenizer_json, sizeof tokenizer_json - 1, &err) != 0)
        abort();
    if (chat_template_open(&chat, (const char *)data, size, tokenizer, &err) != 0) {
        fuzz_check_error(&err);
        return 0;
    }
    chat_tokens_init(&out);
    if (chat_template_encode(chat, messages, 2, true, &out, &err) != 0)
        fuzz_check_error(&err);
    else if (out.count < 8 || out.ids[0] != 1)
        abort();
    chat_tokens_release(&out);
    chat_template_free(chat);
    return 0;
}
