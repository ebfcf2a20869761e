/* An imported base as a source: import of one verifies and copies it. */
#include <stdlib.h>
#include <string.h>

#include "engine/base_file.h"
#include "engine/import.h"

static int find(struct import_source *source, const struct base_layout_tensor *tensor,
                enum dtype *dtype, struct err *err)
{
    struct tensor view;

    if (!base_file_tensor(source->state, tensor->name, &view))
        return err_set(err, ERR_INTERNAL, "tensor \"%s\" is missing", tensor->name);
    *dtype = view.dtype;
    return 0;
}

static int read_rows(struct import_source *source, const struct base_layout_tensor *tensor,
                     int64_t first, int64_t rows, void *out, struct err *err)
{
    struct tensor view;
    int64_t columns = tensor->rank == 2 ? tensor->shape[1] : 1;
    int64_t size;

    if (!base_file_tensor(source->state, tensor->name, &view))
        return err_set(err, ERR_INTERNAL, "tensor \"%s\" is missing", tensor->name);
    size = columns * dtype_size(view.dtype);
    memcpy(out, (const char *)view.data + first * size, (size_t)(rows * size));
    return 0;
}

static void done(struct import_source *source, const struct base_layout_tensor *tensor)
{
    base_file_done_with(source->state, tensor->name);
}

static int check_rest(struct import_source *source, const struct base_layout_tensor *list,
                      int64_t count, struct err *err)
{
    return 0; /* base_file_open has refused what does not belong */
}

static void close_base(struct import_source *source)
{
    base_file_free(source->state);
}

static const struct import_ops ops = {
    .find = find,
    .read = read_rows,
    .done = done,
    .check_rest = check_rest,
    .close = close_base,
};

/* malloc'ed copy of a text, NULL for none. */
static int copy_text(const char *text, size_t len, char **out, size_t *out_len, struct err *err)
{
    *out_len = len;
    if (text == NULL)
        return 0;
    *out = malloc(len + 1);
    if (*out == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    memcpy(*out, text, len);
    (*out)[len] = '\0';
    return 0;
}

int import_base_open(struct import_source *source, const char *path, struct err *err)
{
    struct base_file *base = NULL;
    const char *text;
    size_t len;

    if (base_file_open(&base, path, err) != 0)
        return err_prefix(err, "neither GGUF nor a base file");
    *source = (struct import_source){
        .ops = &ops,
        .state = base,
        .config = *base_file_config(base),
    };
    memcpy(source->digest, base_file_info(base)->digest, sizeof source->digest);
    text = base_file_tokenizer_json(base, &len);
    if (copy_text(text, len, &source->tokenizer_json, &source->tokenizer_len, err) != 0)
        goto fail;
    text = base_file_chat_template(base, &len);
    if (copy_text(text, len, &source->chat_template, &source->chat_template_len, err) != 0)
        goto fail;
    return 0;
fail:
    free(source->tokenizer_json);
    base_file_free(base);
    return -1;
}
