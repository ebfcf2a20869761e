#include "tests/unit/format_reader.h"

#include <stdlib.h>
#include <string.h>

#include "engine/base/file_io.h"
#include "tests/unit/check.h"

#define MAX_LINES 100

void format_reader_need_python(void)
{
    if (system("python3 -c pass >/dev/null 2>&1") != 0) {
        print_message("# no python3: the reader of delta-format.md can not be run\n");
        skip();
    }
}

/* The text between "```python" and "```". */
void format_reader_write(const char *path)
{
    char *text, *begin, *end;
    int lines = 0;
    size_t len;

    CHECK(file_read_all("api-spec/delta-format.md", 1 << 20, &text, &len, &err));
    begin = strstr(text, "```python\n");
    assert_non_null(begin);
    begin += strlen("```python\n");
    end = strstr(begin, "```");
    assert_non_null(end);
    for (const char *at = begin; at < end; at++)
        lines += *at == '\n';
    assert_true(lines <= MAX_LINES);
    CHECK(file_write_durable(path, begin, (size_t)(end - begin), &err));
    free(text);
}
