#include "tests/unit/golden.h"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

#include <glob.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/file_io.h"

char *golden_text(const char *path, size_t *len)
{
    char *text = NULL;
    struct err err = {0};

    if (file_read_all(path, 16 << 20, &text, len, &err) != 0)
        fail_msg("%s (tests run in the root of the tree)", err.message);
    return text;
}

json_t *golden_load(const char *path)
{
    json_error_t at;
    json_t *value = json_load_file(path, JSON_ALLOW_NUL, &at);

    if (value == NULL)
        fail_msg("%s: %s (tests run in the root of the tree)", path, at.text);
    return value;
}

struct tokenizer *golden_tokenizer(const char *path)
{
    struct tokenizer *tokenizer = NULL;
    struct err err = {0};
    size_t len = 0;
    char *text = golden_text(path, &len);

    if (tokenizer_open(&tokenizer, text, len, &err) != 0)
        fail_msg("%s: %s", path, err.message);
    free(text);
    return tokenizer;
}

void golden_compare(const char *what, const json_t *ids, const int32_t *got, size_t count)
{
    for (size_t i = 0; i < count && i < json_array_size(ids); i++) {
        if (json_integer_value(json_array_get(ids, i)) != got[i])
            fail_msg("\"%.100s\": token %zu is %d, the reference has %lld", what, i, got[i],
                     (long long)json_integer_value(json_array_get(ids, i)));
    }
    if (count != json_array_size(ids))
        fail_msg("\"%.100s\": %zu tokens, the reference has %zu", what, count,
                 json_array_size(ids));
}

const char *golden_smollm2(void)
{
    static char found[512];
    const char *given = getenv("GRAFT_TEST_SMOLLM2");
    glob_t files;

    if (given != NULL && given[0] != '\0')
        return given;
    if (found[0] == '\0' &&
        glob(".cache/models/SmolLM2-135M-Instruct*.gguf", 0, NULL, &files) == 0) {
        snprintf(found, sizeof found, "%s", files.gl_pathv[0]);
        globfree(&files);
    }
    return found[0] != '\0' ? found : NULL;
}
