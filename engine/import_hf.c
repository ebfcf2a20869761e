/* A Hugging Face directory as a source: config.json, tokenizer.json, a chat template, and
 * model.safetensors, or the shards that model.safetensors.index.json names. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/base/file_io.h"
#include "engine/base/json_text.h"
#include "engine/import.h"
#include "engine/safetensors.h"
#include "engine/tokenizer.h"

enum {
    MAX_SHARDS = 4096,
    MAX_INDEX_BYTES = 64 << 20,
};

struct hf {
    struct safetensors *files[MAX_SHARDS];
    int file_count;
};

static char *path_in(const char *dir, const char *name, struct err *err)
{
    char *path = NULL;

    if (asprintf(&path, "%s/%s", dir, name) < 0) {
        err_set(err, ERR_NO_MEMORY, "out of memory");
        return NULL;
    }
    return path;
}

/* 1: read; 0: there is no such file; -1: error. */
static int read_if_there(const char *dir, const char *name, size_t max, char **data, size_t *len,
                         struct err *err)
{
    char *path = path_in(dir, name, err);
    int rc;

    if (path == NULL)
        return -1;
    if (access(path, F_OK) != 0 && (errno == ENOENT || errno == ENOTDIR))
        rc = 0;
    else
        rc = file_read_all(path, max, data, len, err) == 0 ? 1 : -1;
    free(path);
    return rc;
}

static const struct safetensors_tensor *lookup(const struct hf *hf, const char *name)
{
    const struct safetensors_tensor *t = NULL;

    for (int i = 0; t == NULL && i < hf->file_count; i++)
        t = safetensors_find(hf->files[i], name);
    return t;
}

static int find(struct import_source *source, const struct base_layout_tensor *tensor,
                enum dtype *dtype, struct err *err)
{
    const struct safetensors_tensor *t = lookup(source->state, tensor->name);

    if (t == NULL)
        return err_set(err, ERR_INVALID, "tensor \"%s\" is missing", tensor->name);
    if (t->view.dtype != DTYPE_F32 && t->view.dtype != DTYPE_F16 && t->view.dtype != DTYPE_BF16)
        return err_set(err, ERR_INVALID, "tensor \"%s\" has dtype %s; supported: F32, F16, BF16",
                       tensor->name, dtype_name(t->view.dtype));
    if (t->view.rank != tensor->rank ||
        memcmp(t->view.shape, tensor->shape, (size_t)tensor->rank * sizeof(int64_t)) != 0)
        return err_set(err, ERR_INVALID,
                       "tensor \"%s\" has another shape than config.json calls for", tensor->name);
    *dtype = t->view.dtype;
    return 0;
}

static int read_rows(struct import_source *source, const struct base_layout_tensor *tensor,
                     int64_t first, int64_t rows, void *out, struct err *err)
{
    const struct safetensors_tensor *t = lookup(source->state, tensor->name);
    int64_t size = (tensor->rank == 2 ? tensor->shape[1] : 1) * dtype_size(t->view.dtype);

    memcpy(out, (const char *)t->view.data + first * size, (size_t)(rows * size));
    return 0;
}

static void done(struct import_source *source, const struct base_layout_tensor *tensor)
{
    const struct hf *hf = source->state;

    for (int i = 0; i < hf->file_count; i++) {
        const struct safetensors_tensor *t = safetensors_find(hf->files[i], tensor->name);

        if (t != NULL)
            safetensors_done_with(hf->files[i], t);
    }
}

/* Old checkpoints store the rope's frequencies, which follow from the configuration; and a tied
 * head may be there a second time. */
static bool is_redundant(const struct model_config *config, const char *name)
{
    static const char suffix[] = ".rotary_emb.inv_freq";
    size_t n = strlen(name);

    if (n > sizeof suffix && strcmp(name + n - (sizeof suffix - 1), suffix) == 0)
        return true;
    return config->tied_embeddings && strcmp(name, "lm_head.weight") == 0;
}

static int by_name(const void *key, const void *item)
{
    return strcmp(key, *(const char *const *)item);
}

static int by_pointed_name(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static int check_rest(struct import_source *source, const struct base_layout_tensor *list,
                      int64_t count, struct err *err)
{
    const struct hf *hf = source->state;
    const char **names = malloc((size_t)count * sizeof *names);
    int rc = 0;

    if (names == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    for (int64_t i = 0; i < count; i++)
        names[i] = list[i].name;
    qsort(names, (size_t)count, sizeof *names, by_pointed_name);
    for (int f = 0; rc == 0 && f < hf->file_count; f++) {
        for (int64_t i = 0; rc == 0 && i < safetensors_count(hf->files[f]); i++) {
            const char *name = safetensors_at(hf->files[f], i)->name;

            if (bsearch(name, names, (size_t)count, sizeof *names, by_name) == NULL &&
                !is_redundant(&source->config, name))
                rc = err_set(err, ERR_INVALID,
                             "tensor \"%s\" is none that a %s model of this configuration has",
                             name, source->config.architecture);
        }
    }
    free(names);
    return rc;
}

static void close_hf(struct import_source *source)
{
    struct hf *hf = source->state;

    if (hf == NULL)
        return;
    for (int i = 0; i < hf->file_count; i++)
        safetensors_free(hf->files[i]);
    free(hf);
}

static const struct import_ops ops = {
    .find = find,
    .read = read_rows,
    .done = done,
    .check_rest = check_rest,
    .close = close_hf,
};

static int open_file(struct hf *hf, const char *dir, const char *name, struct err *err)
{
    char *path = path_in(dir, name, err);
    int rc;

    if (path == NULL)
        return -1;
    rc = safetensors_open(&hf->files[hf->file_count], path, err);
    if (rc == 0)
        hf->file_count++;
    free(path);
    return rc;
}

/* The index comes from outside: a shard is a plain file name in the same folder. */
static bool is_plain_name(const char *name)
{
    size_t n = strlen(name);

    return n > 12 && n <= 255 && name[0] != '.' && strchr(name, '/') == NULL &&
           strcmp(name + n - 12, ".safetensors") == 0;
}

static int open_shards(struct hf *hf, const char *dir, const json_t *index, struct err *err)
{
    json_t *map = json_object_get(index, "weight_map");
    json_t *seen = json_object();
    const char *name;
    json_t *file;
    int rc = -1;

    if (!json_is_object(map) || seen == NULL) {
        err_set(err, ERR_INVALID, "\"weight_map\" must be an object");
        goto out;
    }
    json_object_foreach(map, name, file)
    {
        const char *shard = json_string_value(file);

        if (shard == NULL || !is_plain_name(shard)) {
            err_set(err, ERR_INVALID,
                    "\"weight_map\" of \"%.64s\" must be the name of a .safetensors file in the "
                    "same folder",
                    name);
            goto out;
        }
        if (json_object_get(seen, shard) != NULL)
            continue;
        if (hf->file_count == MAX_SHARDS) {
            err_set(err, ERR_INVALID, "names more than %d files", MAX_SHARDS);
            goto out;
        }
        if (json_object_set(seen, shard, file) != 0 || open_file(hf, dir, shard, err) != 0)
            goto out;
    }
    rc = 0;
out:
    json_decref(seen);
    return rc;
}

/* A tensor in two shards would be ambiguous. */
static int check_unique(const struct hf *hf, struct err *err)
{
    for (int f = 1; f < hf->file_count; f++) {
        for (int64_t i = 0; i < safetensors_count(hf->files[f]); i++) {
            const char *name = safetensors_at(hf->files[f], i)->name;

            for (int g = 0; g < f; g++) {
                if (safetensors_find(hf->files[g], name) != NULL)
                    return err_set(err, ERR_INVALID, "tensor \"%s\" is in two files", name);
            }
        }
    }
    return 0;
}

static int open_weights(struct hf *hf, const char *dir, struct err *err)
{
    char *single = path_in(dir, "model.safetensors", err);
    char *text = NULL;
    size_t len = 0;
    json_t *index;
    int rc, found;

    if (single == NULL)
        return -1;
    found = access(single, F_OK) == 0;
    free(single);
    if (found)
        return open_file(hf, dir, "model.safetensors", err);
    found = read_if_there(dir, "model.safetensors.index.json", MAX_INDEX_BYTES, &text, &len, err);
    if (found < 0)
        return -1;
    if (found == 0)
        return err_set(err, ERR_INVALID,
                       "has neither model.safetensors nor model.safetensors.index.json; other "
                       "formats of weights (pytorch_model.bin) are not read");
    index = json_text_load(text, len, 0, err);
    free(text);
    rc = index != NULL && open_shards(hf, dir, index, err) == 0 ? 0 : -1;
    json_decref(index);
    if (rc != 0)
        return err_prefix(err, "model.safetensors.index.json");
    return check_unique(hf, err);
}

static int read_config(struct import_source *source, const char *dir, struct err *err)
{
    char *text = NULL;
    size_t len = 0;
    int found = read_if_there(dir, "config.json", MODEL_CONFIG_MAX_JSON, &text, &len, err);
    int rc = -1;

    if (found == 0)
        return err_set(err, ERR_INVALID,
                       "has no config.json; a Hugging Face directory or a .gguf file is needed");
    if (found == 1)
        rc = model_config_from_json(&source->config, text, len, err);
    free(text);
    if (rc != 0 && found == 1)
        err_prefix(err, "config.json");
    return rc;
}

static int read_tokenizer(struct import_source *source, const char *dir, struct err *err)
{
    int found = read_if_there(dir, "tokenizer.json", TOKENIZER_MAX_JSON, &source->tokenizer_json,
                              &source->tokenizer_len, err);

    if (found == 0)
        return err_set(err, ERR_INVALID,
                       "has no tokenizer.json; a tokenizer.model (SentencePiece) is not supported "
                       "yet");
    return found == 1 ? 0 : -1;
}

/* tokenizer_config.json: "chat_template" is a text, or a list of named ones. */
static const char *template_of_config(const json_t *config)
{
    json_t *value = json_object_get(config, "chat_template");
    json_t *item;
    size_t i;

    if (json_is_string(value))
        return json_string_value(value);
    json_array_foreach(value, i, item)
    {
        const char *name = json_string_value(json_object_get(item, "name"));

        if (name != NULL && strcmp(name, "default") == 0)
            return json_string_value(json_object_get(item, "template"));
    }
    return NULL;
}

/* An empty template is none. */
static int drop_empty_template(struct import_source *source)
{
    if (source->chat_template_len == 0) {
        free(source->chat_template);
        source->chat_template = NULL;
    }
    return 0;
}

static int read_chat_template(struct import_source *source, const char *dir, struct err *err)
{
    char *text = NULL;
    size_t len = 0;
    json_t *config;
    const char *found_text;
    int found = read_if_there(dir, "chat_template.jinja", IMPORT_MAX_CHAT_TEMPLATE,
                              &source->chat_template, &source->chat_template_len, err);

    if (found != 0)
        return found == 1 ? drop_empty_template(source) : -1;
    found = read_if_there(dir, "tokenizer_config.json", MAX_INDEX_BYTES, &text, &len, err);
    if (found <= 0)
        return found;
    config = json_text_load(text, len, 0, err);
    free(text);
    if (config == NULL)
        return err_prefix(err, "tokenizer_config.json");
    found_text = template_of_config(config);
    if (found_text != NULL) {
        source->chat_template = strdup(found_text);
        source->chat_template_len = strlen(found_text);
    }
    json_decref(config);
    if (source->chat_template_len > 0 && source->chat_template == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    return drop_empty_template(source);
}

int import_hf_open(struct import_source *source, const char *dir, struct err *err)
{
    *source = (struct import_source){.ops = &ops};
    source->state = calloc(1, sizeof(struct hf));
    if (source->state == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    if (read_config(source, dir, err) == 0 && open_weights(source->state, dir, err) == 0 &&
        read_tokenizer(source, dir, err) == 0 && read_chat_template(source, dir, err) == 0)
        return 0;
    close_hf(source);
    free(source->tokenizer_json);
    free(source->chat_template);
    return err_prefix(err, "%s", dir);
}
