#include "engine/safetensors.h"

#include <assert.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "engine/base/file_io.h"
#include "engine/base/json_text.h"

struct safetensors {
    struct file_map map; /* data is NULL when the caller owns the bytes */
    json_t *metadata;    /* object or NULL */
    json_t *by_name;     /* name -> index, for find */
    struct safetensors_tensor *tensors;
    int64_t count;
};

static int parse_dtype(const char *name, enum dtype *dtype)
{
    for (int i = 0; i < DTYPE_COUNT; i++) {
        if (strcmp(name, dtype_name((enum dtype)i)) == 0) {
            *dtype = (enum dtype)i;
            return 0;
        }
    }
    return -1;
}

/* Shape into the view; *bytes of a tensor of this shape and dtype. */
static int parse_shape(const json_t *shape, struct safetensors_tensor *t, struct err *err)
{
    int64_t elements = 1;
    size_t rank = json_array_size(shape);

    if (!json_is_array(shape))
        return err_set(err, ERR_INVALID, "tensor \"%s\": \"shape\" must be an array", t->name);
    if (rank > TENSOR_MAX_RANK)
        return err_set(err, ERR_INVALID, "tensor \"%s\" has %zu dimensions; at most %d are allowed",
                       t->name, rank, TENSOR_MAX_RANK);
    for (size_t i = 0; i < rank; i++) {
        const json_t *dim = json_array_get(shape, i);

        if (!json_is_integer(dim) || json_integer_value(dim) < 0)
            return err_set(err, ERR_INVALID,
                           "tensor \"%s\": \"shape\" must hold integers of 0 or more", t->name);
        t->view.shape[i] = json_integer_value(dim);
        if (__builtin_mul_overflow(elements, t->view.shape[i], &elements))
            return err_set(err, ERR_INVALID, "tensor \"%s\": the shape overflows 64 bits", t->name);
    }
    t->view.rank = (int)rank;
    if (__builtin_mul_overflow(elements, (int64_t)dtype_size(t->view.dtype), &t->bytes))
        return err_set(err, ERR_INVALID, "tensor \"%s\": the shape overflows 64 bits", t->name);
    for (int64_t i = (int64_t)rank - 1, stride = 1; i >= 0; i--) {
        t->view.stride[i] = stride;
        if (__builtin_mul_overflow(stride, t->view.shape[i], &stride)) /* empty, yet huge */
            return err_set(err, ERR_INVALID, "tensor \"%s\": the shape overflows 64 bits", t->name);
    }
    return 0;
}

/* One header entry. The view's data becomes the offset within the data section, added to `base`. */
static int parse_tensor(const char *name, const json_t *spec, unsigned char *base, size_t size,
                        struct safetensors_tensor *t, struct err *err)
{
    const json_t *dtype = json_object_get(spec, "dtype");
    const json_t *offsets = json_object_get(spec, "data_offsets");
    int64_t begin, end;

    t->name = name;
    if (name[0] == '\0' || strlen(name) > SAFETENSORS_MAX_NAME)
        return err_set(err, ERR_INVALID, "tensor name \"%.64s…\" must have 1 to %d bytes", name,
                       SAFETENSORS_MAX_NAME);
    if (!json_is_object(spec) || json_object_size(spec) != 3 || !json_is_string(dtype))
        return err_set(err, ERR_INVALID,
                       "tensor \"%s\" must have \"dtype\", \"shape\" and \"data_offsets\", "
                       "nothing else",
                       name);
    if (parse_dtype(json_string_value(dtype), &t->view.dtype) != 0)
        return err_set(err, ERR_INVALID,
                       "tensor \"%s\" has dtype \"%.32s\", which is not supported; supported: "
                       "F32, BF16, F16, I8, U8, I32",
                       name, json_string_value(dtype));
    if (parse_shape(json_object_get(spec, "shape"), t, err) != 0)
        return -1;
    if (!json_is_array(offsets) || json_array_size(offsets) != 2 ||
        !json_is_integer(json_array_get(offsets, 0)) ||
        !json_is_integer(json_array_get(offsets, 1)))
        return err_set(err, ERR_INVALID, "tensor \"%s\": \"data_offsets\" must be two integers",
                       name);
    begin = json_integer_value(json_array_get(offsets, 0));
    end = json_integer_value(json_array_get(offsets, 1));
    if (begin < 0 || end < begin || (uint64_t)end > size)
        return err_set(err, ERR_INVALID,
                       "tensor \"%s\" is declared at bytes %lld to %lld, but the file has only %zu "
                       "bytes of data; it is cut short or damaged",
                       name, (long long)begin, (long long)end, size);
    if (end - begin != t->bytes)
        return err_set(err, ERR_INVALID,
                       "tensor \"%s\" needs %lld bytes by its shape but has %lld by its offsets",
                       name, (long long)t->bytes, (long long)(end - begin));
    t->view.data = base + begin;
    return 0;
}

static int by_place(const void *a, const void *b)
{
    const struct safetensors_tensor *x = a, *y = b;
    uintptr_t p = (uintptr_t)x->view.data, q = (uintptr_t)y->view.data;

    if (p != q)
        return p < q ? -1 : 1;
    if (x->bytes != y->bytes) /* empty tensors come before what lies at the same place */
        return x->bytes < y->bytes ? -1 : 1;
    return strcmp(x->name, y->name);
}

static int check_contiguous(const struct safetensors *file, const unsigned char *base, size_t size,
                            struct err *err)
{
    const unsigned char *at = base;

    for (int64_t i = 0; i < file->count; i++) {
        const struct safetensors_tensor *t = &file->tensors[i];

        if (t->view.data != at)
            return err_set(err, ERR_INVALID, "tensor \"%s\" %s; tensors must lie end to end",
                           t->name,
                           (unsigned char *)t->view.data < at ? "overlaps the one before it"
                                                              : "leaves a gap before it");
        at += t->bytes;
    }
    if (at != base + size)
        return err_set(err, ERR_INVALID, "%zu bytes behind the last tensor belong to none",
                       (size_t)(base + size - at));
    return 0;
}

static int take_metadata(struct safetensors *file, json_t *header, struct err *err)
{
    json_t *metadata = json_object_get(header, "__metadata__");
    const char *key;
    json_t *value;

    if (metadata == NULL)
        return 0;
    if (!json_is_object(metadata))
        return err_set(err, ERR_INVALID, "\"__metadata__\" must be an object");
    json_object_foreach(metadata, key, value)
    {
        if (!json_is_string(value))
            return err_set(err, ERR_INVALID, "metadata \"%.64s\" must be a string", key);
    }
    file->metadata = json_incref(metadata);
    json_object_del(header, "__metadata__");
    return 0;
}

/* Header object, then every declaration against the `size` bytes at `base`. */
static int parse_header(struct safetensors *file, json_t *header, unsigned char *base, size_t size,
                        struct err *err)
{
    const char *name;
    json_t *spec;
    int64_t n = 0;

    if (!json_is_object(header))
        return err_set(err, ERR_INVALID, "the header must be a JSON object");
    if (take_metadata(file, header, err) != 0)
        return -1;
    file->by_name = header; /* keeps the names alive */
    file->tensors = calloc(json_object_size(header) + 1, sizeof *file->tensors);
    if (file->tensors == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    json_object_foreach(header, name, spec)
    {
        if (parse_tensor(name, spec, base, size, &file->tensors[n], err) != 0)
            return -1;
        n++;
    }
    file->count = n;
    qsort(file->tensors, (size_t)n, sizeof *file->tensors, by_place);
    for (int64_t i = 0; i < n; i++) {
        if (json_object_set_new(header, file->tensors[i].name, json_integer(i)) != 0)
            return err_set(err, ERR_NO_MEMORY, "out of memory");
    }
    return check_contiguous(file, base, size, err);
}

static int parse(struct safetensors *file, const unsigned char *data, size_t len, struct err *err)
{
    uint64_t header_len = 0;
    json_t *header;
    int rc;

    if (len < 8)
        return err_set(err, ERR_INVALID, "%zu bytes are too few for a safetensors file", len);
    for (int i = 0; i < 8; i++)
        header_len |= (uint64_t)data[i] << (8 * i);
    if (header_len > len - 8)
        return err_set(err, ERR_INVALID,
                       "declares a header of %llu bytes, but the file has only %zu bytes; it is "
                       "cut short, or no safetensors file",
                       (unsigned long long)header_len, len);
    if (header_len > SAFETENSORS_MAX_HEADER)
        return err_set(err, ERR_INVALID, "declares a header of %llu bytes; at most %u are allowed",
                       (unsigned long long)header_len, SAFETENSORS_MAX_HEADER);
    header = json_text_load((const char *)data + 8, (size_t)header_len, 0, err);
    if (header == NULL)
        return err_prefix(err, "the header");
    rc = parse_header(file, header, (unsigned char *)data + 8 + header_len,
                      len - 8 - (size_t)header_len, err);
    if (file->by_name == NULL)
        json_decref(header);
    return rc;
}

static struct safetensors *new_file(struct err *err)
{
    struct safetensors *file = calloc(1, sizeof *file);

    if (file == NULL)
        err_set(err, ERR_NO_MEMORY, "out of memory");
    return file;
}

int safetensors_open(struct safetensors **out, const char *path, struct err *err)
{
    struct safetensors *file = new_file(err);

    if (file == NULL || file_map_open(&file->map, path, err) != 0) {
        free(file);
        return -1;
    }
    if (parse(file, file->map.data, file->map.len, err) != 0) {
        safetensors_free(file);
        return err_prefix(err, "%s", path);
    }
    *out = file;
    return 0;
}

int safetensors_open_memory(struct safetensors **out, const void *data, size_t len,
                            const char *name, struct err *err)
{
    struct safetensors *file = new_file(err);

    if (file == NULL)
        return -1;
    if (parse(file, data, len, err) != 0) {
        safetensors_free(file);
        return err_prefix(err, "%s", name);
    }
    *out = file;
    return 0;
}

void safetensors_free(struct safetensors *file)
{
    if (file == NULL)
        return;
    free(file->tensors);
    json_decref(file->metadata);
    json_decref(file->by_name);
    file_map_close(&file->map);
    free(file);
}

int64_t safetensors_count(const struct safetensors *file)
{
    return file->count;
}

const struct safetensors_tensor *safetensors_at(const struct safetensors *file, int64_t index)
{
    assert(index >= 0 && index < file->count);
    return &file->tensors[index];
}

const struct safetensors_tensor *safetensors_find(const struct safetensors *file, const char *name)
{
    const json_t *index = json_object_get(file->by_name, name);

    return index != NULL ? &file->tensors[json_integer_value(index)] : NULL;
}

const char *safetensors_metadata(const struct safetensors *file, const char *key)
{
    return json_string_value(json_object_get(file->metadata, key));
}

int safetensors_check_aligned(const struct safetensors *file, struct err *err)
{
    for (int64_t i = 0; i < file->count; i++) {
        const struct safetensors_tensor *t = &file->tensors[i];

        if ((uintptr_t)t->view.data % (uintptr_t)dtype_size(t->view.dtype) != 0)
            return err_set(err, ERR_INVALID, "tensor \"%s\" is not aligned to its element size",
                           t->name);
    }
    return 0;
}

void safetensors_done_with(const struct safetensors *file, const struct safetensors_tensor *tensor)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t from = ((uintptr_t)tensor->view.data + page - 1) / page * page;
    uintptr_t to = ((uintptr_t)tensor->view.data + (uintptr_t)tensor->bytes) / page * page;

    /* Advice only: when it fails, the pages stay until the kernel wants them. */
    if (file->map.data != NULL && to > from)
        madvise((void *)from, to - from, MADV_DONTNEED);
}
