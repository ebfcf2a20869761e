#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/base/file_io.h"
#include "engine/base/json_text.h"
#include "engine/base/strbuf.h"
#include "engine/safetensors.h"

enum {
    HEADER_AT = 8, /* behind its length */
    DATA_ALIGNMENT = 64,
    BUFFER_BYTES = 1 << 20,
};

struct safetensors_writer {
    char *path, *temp;
    int fd;
    json_t *metadata, *tensors; /* in order of declaration */
    int64_t declared, appended; /* bytes of data */
    int64_t header_len;         /* 0 before begin; with the 8 length bytes */
    unsigned char *buffer;
    size_t buffered;
    bool finished;
};

int safetensors_writer_open(struct safetensors_writer **out, const char *path, struct err *err)
{
    struct safetensors_writer *w = calloc(1, sizeof *w);

    if (w == NULL)
        return err_set(err, ERR_NO_MEMORY, "write %s: out of memory", path);
    w->fd = -1;
    w->path = strdup(path);
    w->metadata = json_object();
    w->tensors = json_object();
    w->buffer = malloc(BUFFER_BYTES);
    if (asprintf(&w->temp, "%s.XXXXXX", path) < 0)
        w->temp = NULL;
    if (w->path == NULL || w->temp == NULL || w->metadata == NULL || w->tensors == NULL ||
        w->buffer == NULL) {
        err_set(err, ERR_NO_MEMORY, "write %s: out of memory", path);
        goto fail;
    }
    w->fd = mkostemp(w->temp, O_CLOEXEC);
    if (w->fd < 0) {
        err_set_errno(err, errno, "create a file beside %s", path);
        goto fail;
    }
    *out = w;
    return 0;
fail:
    safetensors_writer_free(w);
    return -1;
}

void safetensors_writer_free(struct safetensors_writer *w)
{
    if (w == NULL)
        return;
    if (w->fd >= 0) {
        close(w->fd);
        if (!w->finished)
            unlink(w->temp);
    }
    json_decref(w->metadata);
    json_decref(w->tensors);
    free(w->buffer);
    free(w->path);
    free(w->temp);
    free(w);
}

int safetensors_writer_metadata(struct safetensors_writer *w, const char *key, const char *value,
                                struct err *err)
{
    json_t *string = json_string(value);

    if (w->header_len != 0 || json_object_get(w->metadata, key) != NULL) {
        json_decref(string);
        return err_set(err, ERR_INTERNAL, "%s: metadata \"%s\" comes %s", w->path, key,
                       w->header_len != 0 ? "too late" : "twice");
    }
    if (json_object_set_new(w->metadata, key, string) != 0)
        return err_set(err, ERR_INVALID, "%s: metadata \"%s\" is not UTF-8", w->path, key);
    return 0;
}

static int check_declaration(const struct safetensors_writer *w, const char *name, enum dtype dtype,
                             int rank, struct err *err)
{
    size_t n = strlen(name);

    if (w->header_len != 0)
        return err_set(err, ERR_INTERNAL, "%s: tensor \"%s\" is declared too late", w->path, name);
    if (n == 0 || n > SAFETENSORS_MAX_NAME || strcmp(name, "__metadata__") == 0)
        return err_set(err, ERR_INVALID, "%s: \"%.64s\" can not name a tensor", w->path, name);
    if (json_object_get(w->tensors, name) != NULL)
        return err_set(err, ERR_INVALID, "%s: tensor \"%s\" is declared twice", w->path, name);
    if (rank < 0 || rank > TENSOR_MAX_RANK)
        return err_set(err, ERR_INTERNAL, "%s: tensor \"%s\" has rank %d", w->path, name, rank);
    if (w->declared % dtype_size(dtype) != 0)
        return err_set(err, ERR_INTERNAL,
                       "%s: tensor \"%s\" would not be aligned; declare wide dtypes first", w->path,
                       name);
    return 0;
}

int safetensors_writer_declare(struct safetensors_writer *w, const char *name, enum dtype dtype,
                               int rank, const int64_t *shape, struct err *err)
{
    int64_t bytes = dtype_size(dtype), end;
    json_t *dims, *spec;

    if (check_declaration(w, name, dtype, rank, err) != 0)
        return -1;
    dims = json_array();
    for (int i = 0; i < rank; i++) {
        if (shape[i] < 0 || __builtin_mul_overflow(bytes, shape[i], &bytes)) {
            json_decref(dims);
            return err_set(err, ERR_INTERNAL, "%s: tensor \"%s\" has no sensible shape", w->path,
                           name);
        }
        json_array_append_new(dims, json_integer(shape[i]));
    }
    if (__builtin_add_overflow(w->declared, bytes, &end)) {
        json_decref(dims);
        return err_set(err, ERR_INTERNAL, "%s: more than 2^63 bytes are declared", w->path);
    }
    spec = json_pack("{s:s, s:o, s:[I, I]}", "dtype", dtype_name(dtype), "shape", dims,
                     "data_offsets", (json_int_t)w->declared, (json_int_t)end);
    if (spec == NULL || json_object_set_new(w->tensors, name, spec) != 0)
        return err_set(err, ERR_NO_MEMORY,
                       "%s: tensor \"%s\": out of memory, or a name that is "
                       "not UTF-8",
                       w->path, name);
    w->declared = end;
    return 0;
}

/* `text`, which it takes, with blanks behind it up to `len` bytes; NULL: out of memory. */
static char *padded(char *text, size_t len)
{
    size_t n = strlen(text);
    char *longer = realloc(text, len + 1);

    if (longer == NULL)
        free(text);
    else
        memset(longer + n, ' ', len - n);
    return longer;
}

/* Metadata first, as other writers do; the JSON text is padded with spaces. */
static char *header_text(const struct safetensors_writer *w, size_t *len)
{
    json_t *header = json_object();
    char *text = NULL;

    if (header == NULL)
        return NULL;
    if (json_object_size(w->metadata) > 0 &&
        json_object_set(header, "__metadata__", w->metadata) != 0)
        goto out;
    if (json_object_update(header, w->tensors) != 0)
        goto out;
    text = json_dumps(header, JSON_COMPACT);
    if (text != NULL) {
        *len = (strlen(text) + HEADER_AT + DATA_ALIGNMENT - 1) / DATA_ALIGNMENT * DATA_ALIGNMENT -
               HEADER_AT;
        text = padded(text, *len);
    }
out:
    json_decref(header);
    return text;
}

int safetensors_writer_begin(struct safetensors_writer *w, struct err *err)
{
    unsigned char prefix[8];
    size_t len = 0;
    char *text = header_text(w, &len);
    int rc = -1;

    if (text == NULL)
        return err_set(err, ERR_NO_MEMORY, "write %s: out of memory", w->path);
    for (int i = 0; i < 8; i++)
        prefix[i] = (unsigned char)((uint64_t)len >> (8 * i));
    if (len > SAFETENSORS_MAX_HEADER)
        err_set(err, ERR_INVALID, "%s: the header would have %zu bytes; at most %u are allowed",
                w->path, len, SAFETENSORS_MAX_HEADER);
    else if (file_write_full(w->fd, prefix, sizeof prefix, w->temp, err) == 0 &&
             file_write_full(w->fd, text, len, w->temp, err) == 0) {
        w->header_len = (int64_t)len + 8;
        rc = 0;
    }
    free(text);
    return rc;
}

static int flush(struct safetensors_writer *w, struct err *err)
{
    size_t n = w->buffered;

    w->buffered = 0;
    return file_write_full(w->fd, w->buffer, n, w->temp, err);
}

int safetensors_writer_append(struct safetensors_writer *w, const void *data, size_t len,
                              struct err *err)
{
    if (w->header_len == 0 || len > (uint64_t)(w->declared - w->appended))
        return err_set(err, ERR_INTERNAL, "%s: bytes that no declared tensor asks for", w->path);
    w->appended += (int64_t)len;
    if (len > BUFFER_BYTES - w->buffered && flush(w, err) != 0)
        return -1;
    if (len >= BUFFER_BYTES)
        return file_write_full(w->fd, data, len, w->temp, err);
    if (len > 0)
        memcpy(w->buffer + w->buffered, data, len);
    w->buffered += len;
    return 0;
}

int safetensors_writer_replace_metadata(struct safetensors_writer *w, const char *key,
                                        const char *value, struct err *err)
{
    const char *old = json_string_value(json_object_get(w->metadata, key));
    size_t len = 0;
    char *text;
    ssize_t n;

    if (w->header_len == 0 || old == NULL || strlen(old) != strlen(value) ||
        strpbrk(old, "\"\\") != NULL || strpbrk(value, "\"\\") != NULL)
        return err_set(err, ERR_INTERNAL, "%s: metadata \"%s\" can not be replaced", w->path, key);
    if (json_object_set_new(w->metadata, key, json_string(value)) != 0)
        return err_set(err, ERR_NO_MEMORY, "write %s: out of memory", w->path);
    text = header_text(w, &len);
    if (text == NULL || (int64_t)len + 8 != w->header_len) {
        free(text);
        return err_set(err, ERR_INTERNAL, "%s: metadata \"%s\" changed its length", w->path, key);
    }
    n = pwrite(w->fd, text, len, 8); /* the header of a regular file: short means disk full */
    free(text);
    if (n != (ssize_t)len)
        return err_set_errno(err, n < 0 ? errno : ENOSPC, "write %s", w->temp);
    return 0;
}

int safetensors_writer_finish(struct safetensors_writer *w, int64_t *bytes, struct err *err)
{
    if (w->header_len == 0 || w->appended != w->declared)
        return err_set(err, ERR_INTERNAL, "%s: %lld of %lld declared bytes were written", w->path,
                       (long long)w->appended, (long long)w->declared);
    if (flush(w, err) != 0)
        return -1;
    if (file_sync(w->fd, w->temp, err) != 0)
        return -1;
    if (rename(w->temp, w->path) != 0)
        return err_set_errno(err, errno, "rename to %s", w->path);
    w->finished = true;
    if (bytes != NULL)
        *bytes = w->header_len + w->declared;
    return file_sync_parent(w->path, err);
}

/* ------------------------------------------------------------------ one that is there */

/* A reference to the header's JSON; NULL unless the file is sound and has the key. */
static json_t *load_header(const struct file_map *map, const char *path, const char *key,
                           size_t *len, struct err *err)
{
    struct safetensors *file;
    uint64_t n;
    bool found;

    if (safetensors_open_memory(&file, map->data, map->len, path, err) != 0)
        return NULL;
    found = safetensors_metadata(file, key) != NULL;
    safetensors_free(file);
    if (!found) {
        err_set(err, ERR_INVALID, "%s: there is no metadata \"%.64s\" to replace", path, key);
        return NULL;
    }
    memcpy(&n, map->data, sizeof n);
    *len = (size_t)n;
    return json_text_load((const char *)map->data + HEADER_AT, *len, 0, err);
}

/* The header with the new value and `room` bytes; malloc'ed. Compact, as it is written, it is never
 * longer than it was, but for the value. */
static char *spell(json_t *header, const char *path, const char *key, const char *value,
                   size_t room, struct err *err)
{
    json_t *string = json_string(value);
    char *text = NULL;

    if (string == NULL) {
        err_set(err, ERR_INVALID, "%s: metadata \"%.64s\" is not UTF-8", path, key);
        return NULL;
    }
    if (json_object_set_new(json_object_get(header, "__metadata__"), key, string) == 0)
        text = json_dumps(header, JSON_COMPACT);
    if (text != NULL && strlen(text) > room) {
        err_set(err, ERR_INVALID,
                "%s: metadata \"%.64s\" would take the header to %zu bytes where there is room for "
                "%zu",
                path, key, strlen(text), room);
        free(text);
        return NULL;
    }
    if (text != NULL)
        text = padded(text, room);
    if (text == NULL)
        err_set(err, ERR_NO_MEMORY, "write %s: out of memory", path);
    return text;
}

static int overwrite(const char *path, const char *text, size_t len, struct err *err)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC), rc;

    if (fd < 0)
        return err_set_errno(err, errno, "open %s", path);
    if (lseek(fd, HEADER_AT, SEEK_SET) != HEADER_AT)
        rc = err_set_errno(err, errno, "write %s", path);
    else if ((rc = file_write_full(fd, text, len, path, err)) == 0)
        rc = file_sync(fd, path, err);
    close(fd);
    return rc;
}

int safetensors_patch_metadata(const char *path, const char *key, const char *value,
                               struct err *err)
{
    struct file_map map;
    json_t *header;
    char *text = NULL;
    size_t room = 0;
    int rc = -1;

    if (file_map_open(&map, path, err) != 0)
        return -1;
    header = load_header(&map, path, key, &room, err);
    if (header != NULL)
        text = spell(header, path, key, value, room, err);
    json_decref(header);
    file_map_close(&map);
    if (text != NULL)
        rc = overwrite(path, text, room, err);
    free(text);
    return rc;
}
