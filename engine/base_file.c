#include "engine/base_file.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base_layout.h"
#include "engine/safetensors.h"

enum { PORTION = 1 << 16 }; /* values that are hashed at a time */

struct base_file {
    struct safetensors *file;
    struct model_config config;
    struct engine_base_info info;
    const struct safetensors_tensor *tokenizer, *chat_template; /* the latter may be NULL */
};

static bool is_digest(const char *s)
{
    return s != NULL && strlen(s) == SHA256_HEX - 1 && strspn(s, "0123456789abcdef") == 64;
}

static int read_metadata(struct base_file *base, struct err *err)
{
    const char *version = safetensors_metadata(base->file, BASE_FILE_VERSION_KEY);
    const char *config = safetensors_metadata(base->file, BASE_FILE_CONFIG_KEY);
    const char *digest = safetensors_metadata(base->file, BASE_FILE_DIGEST_KEY);

    if (version == NULL)
        return err_set(
            err, ERR_INVALID,
            "is not an imported base model; of a Hugging Face model, name the directory");
    if (strcmp(version, BASE_FILE_VERSION) != 0)
        return err_set(err, ERR_INVALID,
                       "is a base file of version \"%.16s\"; this build reads version "
                       "%s: import the model again",
                       version, BASE_FILE_VERSION);
    if (config == NULL || !is_digest(digest))
        return err_set(err, ERR_INVALID, "has no configuration or no digest; it is damaged");
    if (model_config_from_json(&base->config, config, strlen(config), err) != 0)
        return err_prefix(err, "the configuration");
    snprintf(base->info.digest, sizeof base->info.digest, "%s", digest);
    return 0;
}

static int check_text(const struct base_file *base, const char *name, bool required,
                      const struct safetensors_tensor **out, struct err *err)
{
    const struct safetensors_tensor *t = safetensors_find(base->file, name);

    if (t == NULL && required)
        return err_set(err, ERR_INVALID, "has no \"%s\"; it is damaged", name);
    if (t != NULL && (t->view.dtype != DTYPE_U8 || t->view.rank != 1 || t->bytes == 0))
        return err_set(err, ERR_INVALID, "\"%s\" must be a text of bytes; the file is damaged",
                       name);
    *out = t;
    return 0;
}

static int check_tensor(const struct base_file *base, const struct base_layout_tensor *expected,
                        struct err *err)
{
    const struct safetensors_tensor *t = safetensors_find(base->file, expected->name);

    if (t == NULL)
        return err_set(err, ERR_INVALID, "tensor \"%s\" is missing", expected->name);
    if (t->view.dtype != DTYPE_F32 && t->view.dtype != DTYPE_F16 && t->view.dtype != DTYPE_BF16)
        return err_set(err, ERR_INVALID, "tensor \"%s\" has dtype %s; it must be a float type",
                       expected->name, dtype_name(t->view.dtype));
    if (t->view.rank != expected->rank ||
        memcmp(t->view.shape, expected->shape, (size_t)expected->rank * sizeof(int64_t)) != 0)
        return err_set(err, ERR_INVALID,
                       "tensor \"%s\" has another shape than the configuration calls for",
                       expected->name);
    return 0;
}

static int check_tensors(struct base_file *base, struct err *err)
{
    struct base_layout_tensor *list = NULL;
    char digest[SHA256_HEX];
    int64_t count = 0, others = base->chat_template != NULL ? 2 : 1;
    int rc = -1;

    if (base_layout_list(&base->config, &list, &count, err) != 0)
        return -1;
    for (int64_t i = 0; i < count; i++) {
        if (check_tensor(base, &list[i], err) != 0)
            goto out;
    }
    if (safetensors_count(base->file) != count + others) {
        err_set(err, ERR_INVALID, "has %lld tensors, but the configuration calls for %lld",
                (long long)safetensors_count(base->file), (long long)(count + others));
        goto out;
    }
    memcpy(digest, base->info.digest, sizeof digest);
    base_layout_info(&base->config, list, count, &base->info);
    memcpy(base->info.digest, digest, sizeof digest);
    rc = 0;
out:
    free(list);
    return rc;
}

int base_file_open(struct base_file **out, const char *path, struct err *err)
{
    struct base_file *base = calloc(1, sizeof *base);

    if (base == NULL)
        return err_set(err, ERR_NO_MEMORY, "%s: out of memory", path);
    if (safetensors_open(&base->file, path, err) != 0) { /* names the file itself */
        base_file_free(base);
        return -1;
    }
    if (read_metadata(base, err) != 0 || safetensors_check_aligned(base->file, err) != 0 ||
        check_text(base, BASE_FILE_TOKENIZER, true, &base->tokenizer, err) != 0 ||
        check_text(base, BASE_FILE_CHAT_TEMPLATE, false, &base->chat_template, err) != 0 ||
        check_tensors(base, err) != 0) {
        base_file_free(base);
        return err_prefix(err, "%s", path);
    }
    *out = base;
    return 0;
}

static int hash_tensor(const struct base_file *base, const struct base_layout_tensor *tensor,
                       float values[PORTION], char hex[SHA256_HEX], struct err *err)
{
    const struct safetensors_tensor *t = safetensors_find(base->file, tensor->name);
    int64_t elements = base_layout_elements(tensor);
    struct sha256 *hash = sha256_new();

    if (hash == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    for (int64_t at = 0; at < elements; at += PORTION) {
        int64_t count = elements - at < PORTION ? elements - at : PORTION;

        tensor_to_f32(&t->view, at, count, values);
        sha256_update(hash, values, (size_t)count * sizeof *values);
    }
    sha256_final_hex(hash, hex);
    sha256_free(hash);
    safetensors_done_with(base->file, t);
    return 0;
}

int base_file_verify(const struct base_file *base, struct err *err)
{
    struct base_layout_tensor *list = NULL;
    float *values = malloc(PORTION * sizeof *values);
    char(*hex)[SHA256_HEX] = NULL, digest[SHA256_HEX];
    int64_t count = 0;
    int rc = -1;

    if (base_layout_list(&base->config, &list, &count, err) != 0)
        goto out;
    hex = calloc((size_t)count, sizeof *hex);
    if (values == NULL || hex == NULL) {
        err_set(err, ERR_NO_MEMORY, "out of memory");
        goto out;
    }
    for (int64_t i = 0; i < count; i++) {
        if (hash_tensor(base, &list[i], values, hex[i], err) != 0)
            goto out;
    }
    if (base_layout_digest(list, count, (const char(*)[SHA256_HEX])hex, digest, err) != 0)
        goto out;
    if (strcmp(digest, base->info.digest) == 0)
        rc = 0;
    else
        err_set(err, ERR_INVALID,
                "the weights do not have the digest that the file declares; it is damaged");
out:
    free(hex);
    free(values);
    free(list);
    return rc;
}

void base_file_free(struct base_file *base)
{
    if (base == NULL)
        return;
    safetensors_free(base->file);
    free(base);
}

const struct model_config *base_file_config(const struct base_file *base)
{
    return &base->config;
}

const struct engine_base_info *base_file_info(const struct base_file *base)
{
    return &base->info;
}

bool base_file_tensor(const struct base_file *base, const char *name, struct tensor *out)
{
    const struct safetensors_tensor *t = safetensors_find(base->file, name);

    if (t == NULL)
        return false;
    *out = t->view;
    return true;
}

void base_file_done_with(const struct base_file *base, const char *name)
{
    const struct safetensors_tensor *t = safetensors_find(base->file, name);

    if (t != NULL)
        safetensors_done_with(base->file, t);
}

const char *base_file_tokenizer_json(const struct base_file *base, size_t *len)
{
    *len = (size_t)base->tokenizer->bytes;
    return base->tokenizer->view.data;
}

const char *base_file_chat_template(const struct base_file *base, size_t *len)
{
    *len = base->chat_template != NULL ? (size_t)base->chat_template->bytes : 0;
    return base->chat_template != NULL ? base->chat_template->view.data : NULL;
}

int engine_base_read(const char *base_path, struct engine_base_info *info, struct err *err)
{
    struct base_file *base = NULL;

    if (base_file_open(&base, base_path, err) != 0)
        return -1;
    *info = base->info;
    base_file_free(base);
    return 0;
}
