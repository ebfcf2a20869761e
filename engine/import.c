#include "engine/import.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/base/file_io.h"
#include "engine/base/strbuf.h"
#include "engine/base_file.h"
#include "engine/chat_template.h"
#include "engine/safetensors.h"
#include "engine/tokenizer.h"

enum { PORTION = 1 << 20 }; /* elements at a time: 4 MiB of f32 */

struct import {
    struct import_source *source;
    struct base_layout_tensor *list;
    int64_t count;
    enum dtype *dtypes;
    char (*hex)[SHA256_HEX]; /* of each tensor's values */
    struct safetensors_writer *writer;
    unsigned char *raw; /* PORTION elements as the source has them */
    float *values;      /* the same as f32 */
};

static int open_source(struct import_source *source, const char *path, struct err *err)
{
    struct stat st;
    char magic[4] = {0};
    int fd;
    ssize_t n;

    if (stat(path, &st) != 0)
        return err_set(err, errno == ENOENT ? ERR_INVALID : ERR_IO, "%s: %s", path,
                       errno == ENOENT ? "there is no such file or folder" : strerror(errno));
    if (S_ISDIR(st.st_mode))
        return import_hf_open(source, path, err);
    if (!S_ISREG(st.st_mode))
        return err_set(err, ERR_INVALID, "%s is neither a file nor a folder", path);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return err_set_errno(err, errno, "open %s", path);
    n = read(fd, magic, sizeof magic);
    close(fd);
    if (n == (ssize_t)sizeof magic && memcmp(magic, "GGUF", 4) == 0)
        return import_gguf_open(source, path, err);
    return import_base_open(source, path, err);
}

/* The texts must work before they are stored: better refused here than by the first job. */
static int check_texts(const struct import_source *source, struct err *err)
{
    struct tokenizer *tokenizer = NULL;
    struct chat_template *chat = NULL;
    int rc = -1;

    if (tokenizer_open(&tokenizer, source->tokenizer_json, source->tokenizer_len, err) != 0) {
        err_prefix(err, "tokenizer");
        goto out;
    }
    if (tokenizer_size(tokenizer) > source->config.vocabulary) {
        err_set(err, ERR_INVALID, "the tokenizer has %d tokens, but the model only %d",
                tokenizer_size(tokenizer), source->config.vocabulary);
        goto out;
    }
    rc =
        chat_template_open(&chat, source->chat_template, source->chat_template_len, tokenizer, err);
out:
    chat_template_free(chat);
    tokenizer_free(tokenizer);
    return rc;
}

static int prepare(struct import *im, struct err *err)
{
    if (base_layout_list(&im->source->config, &im->list, &im->count, err) != 0)
        return -1;
    im->dtypes = calloc((size_t)im->count, sizeof *im->dtypes);
    im->hex = calloc((size_t)im->count, sizeof *im->hex);
    im->raw = malloc((size_t)PORTION * sizeof(float));
    im->values = malloc((size_t)PORTION * sizeof(float));
    if (im->dtypes == NULL || im->hex == NULL || im->raw == NULL || im->values == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    for (int64_t i = 0; i < im->count; i++) {
        if (im->source->ops->find(im->source, &im->list[i], &im->dtypes[i], err) != 0)
            return -1;
    }
    return im->source->ops->check_rest(im->source, im->list, im->count, err);
}

static int declare_text(struct import *im, const char *name, size_t len, struct err *err)
{
    int64_t shape = (int64_t)len;

    return safetensors_writer_declare(im->writer, name, DTYPE_U8, 1, &shape, err);
}

/* Wide tensors first, so that each is aligned. */
static int declare(struct import *im, const char *config, struct err *err)
{
    struct safetensors_writer *w = im->writer;
    char placeholder[SHA256_HEX];

    memset(placeholder, '0', sizeof placeholder - 1);
    placeholder[sizeof placeholder - 1] = '\0';
    if (safetensors_writer_metadata(w, BASE_FILE_VERSION_KEY, BASE_FILE_VERSION, err) != 0 ||
        safetensors_writer_metadata(w, BASE_FILE_CONFIG_KEY, config, err) != 0 ||
        safetensors_writer_metadata(w, BASE_FILE_DIGEST_KEY, placeholder, err) != 0)
        return -1;
    for (int wide = 1; wide >= 0; wide--) {
        for (int64_t i = 0; i < im->count; i++) {
            if ((im->dtypes[i] == DTYPE_F32) == (wide == 1) &&
                safetensors_writer_declare(w, im->list[i].name, im->dtypes[i], im->list[i].rank,
                                           im->list[i].shape, err) != 0)
                return -1;
        }
    }
    if (declare_text(im, BASE_FILE_TOKENIZER, im->source->tokenizer_len, err) != 0)
        return -1;
    if (im->source->chat_template != NULL &&
        declare_text(im, BASE_FILE_CHAT_TEMPLATE, im->source->chat_template_len, err) != 0)
        return -1;
    return safetensors_writer_begin(w, err);
}

static bool all_finite(const float *values, int64_t count)
{
    bool bad = false;

    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;

        memcpy(&bits, &values[i], sizeof bits);
        bad |= (bits & 0x7f800000u) == 0x7f800000u;
    }
    return !bad;
}

static int copy_portion(struct import *im, int64_t i, int64_t first, int64_t rows,
                        struct sha256 *hash, struct err *err)
{
    const struct base_layout_tensor *t = &im->list[i];
    int64_t count = rows * (t->rank == 2 ? t->shape[1] : 1);
    struct tensor view = tensor_view(im->raw, im->dtypes[i], 1, &count);
    const float *values = im->values;

    if (im->source->ops->read(im->source, t, first, rows, im->raw, err) != 0)
        return -1;
    if (im->dtypes[i] == DTYPE_F32)
        values = (const float *)im->raw;
    else
        tensor_to_f32(&view, 0, count, im->values);
    if (!all_finite(values, count))
        return err_set(err, ERR_INVALID,
                       "tensor \"%s\" holds values that are not finite (rows %lld to %lld)",
                       t->name, (long long)first, (long long)(first + rows - 1));
    sha256_update(hash, values, (size_t)count * sizeof *values);
    return safetensors_writer_append(im->writer, im->raw,
                                     (size_t)count * (size_t)dtype_size(im->dtypes[i]), err);
}

static int copy_tensor(struct import *im, int64_t i, struct err *err)
{
    const struct base_layout_tensor *t = &im->list[i];
    int64_t columns = t->rank == 2 ? t->shape[1] : 1;
    int64_t step = PORTION / columns; /* columns ≤ 2^20: model_config_check */
    struct sha256 *hash = sha256_new();
    int rc = 0;

    if (hash == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    for (int64_t row = 0; rc == 0 && row < t->shape[0]; row += step)
        rc = copy_portion(im, i, row, t->shape[0] - row < step ? t->shape[0] - row : step, hash,
                          err);
    if (rc == 0)
        sha256_final_hex(hash, im->hex[i]);
    sha256_free(hash);
    im->source->ops->done(im->source, t);
    return rc;
}

static int copy_all(struct import *im, struct err *err)
{
    const struct import_source *source = im->source;

    for (int wide = 1; wide >= 0; wide--) {
        for (int64_t i = 0; i < im->count; i++) {
            if ((im->dtypes[i] == DTYPE_F32) == (wide == 1) && copy_tensor(im, i, err) != 0)
                return -1;
        }
    }
    if (safetensors_writer_append(im->writer, source->tokenizer_json, source->tokenizer_len, err) !=
        0)
        return -1;
    return safetensors_writer_append(im->writer, source->chat_template, source->chat_template_len,
                                     err);
}

static int finish(struct import *im, struct engine_base_info *info, struct err *err)
{
    base_layout_info(&im->source->config, im->list, im->count, info);
    if (base_layout_digest(im->list, im->count, (const char(*)[SHA256_HEX])im->hex, info->digest,
                           err) != 0)
        return -1;
    if (im->source->digest[0] != '\0' && strcmp(im->source->digest, info->digest) != 0)
        return err_set(err, ERR_INVALID,
                       "the weights do not have the digest that the file declares; it is damaged");
    if (safetensors_writer_replace_metadata(im->writer, BASE_FILE_DIGEST_KEY, info->digest, err) !=
        0)
        return -1;
    return safetensors_writer_finish(im->writer, NULL, err);
}

static int run(struct import_source *source, const char *out_path, struct engine_base_info *info,
               struct err *err)
{
    struct import im = {.source = source};
    struct strbuf config;
    int rc = -1;

    strbuf_init(&config, MODEL_CONFIG_MAX_JSON);
    model_config_to_json(&source->config, &config);
    if (strbuf_failed(&config)) {
        err_set(err, ERR_NO_MEMORY, "out of memory");
        goto out;
    }
    if (check_texts(source, err) != 0 || prepare(&im, err) != 0)
        goto out;
    if (safetensors_writer_open(&im.writer, out_path, err) != 0 ||
        declare(&im, config.data, err) != 0 || copy_all(&im, err) != 0)
        goto out;
    rc = finish(&im, info, err);
out:
    safetensors_writer_free(im.writer);
    free(im.values);
    free(im.raw);
    free(im.hex);
    free(im.dtypes);
    free(im.list);
    strbuf_release(&config);
    return rc;
}

int engine_import(const char *path, const char *out_path, struct engine_base_info *info,
                  struct err *err)
{
    struct import_source source = {0};
    struct engine_base_info made;
    int rc;

    if (open_source(&source, path, err) != 0)
        return -1;
    rc = run(&source, out_path, &made, err);
    source.ops->close(&source);
    free(source.tokenizer_json);
    free(source.chat_template);
    if (rc != 0)
        return err_prefix(err, "%s", path);
    if (info != NULL)
        *info = made;
    return 0;
}
