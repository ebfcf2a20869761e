/* Training files: whatever the bytes, a dataset or an error that is valid UTF-8. Runs in the root
 * of the tree (it reads the test tokenizer). */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "engine/base/file_io.h"
#include "engine/base/json_text.h"
#include "engine/base/utf8.h"
#include "engine/chat_template.h"
#include "engine/dataset.h"
#include "engine/tokenizer.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static struct tokenizer *tokenizer;
static struct chat_template *chat;

static void setup(void)
{
    struct err err = {0};
    char *text = NULL;
    size_t len;

    json_text_setup();
    if (file_read_all("tests/golden/tiny_tokenizer.json", 1 << 20, &text, &len, &err) != 0 ||
        tokenizer_open(&tokenizer, text, len, &err) != 0 ||
        chat_template_open(&chat, NULL, 0, tokenizer, &err) != 0) {
        fprintf(stderr, "%s\n", err.message);
        exit(1);
    }
    free(text);
}

/* Reads everything a trainer would. */
static void use(const struct engine_dataset *dataset)
{
    double sum = 0;

    for (int64_t i = 0; i < dataset_count(dataset); i++) {
        struct dataset_example e = dataset_example(dataset, i);
        struct dataset_question q;

        if (e.length < 1 || e.length > 64 || e.weight[0] != 0)
            abort();
        for (int32_t t = 0; t < e.length; t++) {
            if (e.token[t] < 0 || e.token[t] >= tokenizer_size(tokenizer))
                abort();
            sum += e.weight[t];
        }
        if (dataset_question(dataset, i, &q) &&
            !(q.begin > 0 && q.begin < q.end && q.end <= e.length))
            abort();
    }
    if (sum < 1)
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct engine_dataset_options options = {
        .file_id = "file-fuzz", .validation = true, .max_sequence = 64};
    struct engine_dataset *dataset = NULL;
    struct err err = {0};
    char path[64];
    int fd;

    if (tokenizer == NULL)
        setup();
    fd = memfd_create("dataset", MFD_CLOEXEC);
    if (fd < 0 || file_write_full(fd, data, size, "dataset", &err) != 0)
        exit(1);
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    if (dataset_open(&dataset, tokenizer, chat, path, &options, NULL, &err) == 0)
        use(dataset);
    else if (err.kind != ERR_INVALID || !utf8_valid(err.message, strlen(err.message)))
        abort();
    engine_dataset_free(dataset);
    close(fd);
    return 0;
}
