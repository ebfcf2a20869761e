#include "engine/gguf.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "engine/base/file_io.h"

enum {
    BLOCK = 32, /* elements of a quantised block */
    Q4_1_BYTES = 20,
    Q8_0_BYTES = 34,
    DEFAULT_ALIGNMENT = 32,
    MAX_ALIGNMENT = 65536,
    MAX_KEY = 65535,
};

struct entry {
    struct gguf_string key;
    enum gguf_kind kind;
    struct gguf_array array; /* of kind ARRAY */
    const unsigned char *value;
};

struct gguf {
    struct file_map map;   /* data is NULL when the caller owns the bytes */
    struct entry *entries; /* sorted by key */
    int64_t entry_count;
    struct gguf_tensor *tensors; /* sorted by name */
    int64_t tensor_count;
};

static const int kind_bytes[GGUF_KIND_COUNT] = {
    [GGUF_KIND_U8] = 1,  [GGUF_KIND_I8] = 1,  [GGUF_KIND_U16] = 2,     [GGUF_KIND_I16] = 2,
    [GGUF_KIND_U32] = 4, [GGUF_KIND_I32] = 4, [GGUF_KIND_FLOAT32] = 4, [GGUF_KIND_BOOL] = 1,
    [GGUF_KIND_U64] = 8, [GGUF_KIND_I64] = 8, [GGUF_KIND_FLOAT64] = 8,
};

struct cursor {
    const unsigned char *data;
    size_t len, at;
};

static size_t left(const struct cursor *c)
{
    return c->len - c->at;
}

static uint64_t load(const unsigned char *p, int bytes)
{
    uint64_t value = 0;

    for (int i = 0; i < bytes; i++)
        value |= (uint64_t)p[i] << (8 * i);
    return value;
}

static int take(struct cursor *c, int bytes, uint64_t *out, struct err *err)
{
    if (left(c) < (size_t)bytes)
        return err_set(err, ERR_INVALID, "ends at byte %zu, in the middle of its header", c->len);
    *out = load(c->data + c->at, bytes);
    c->at += (size_t)bytes;
    return 0;
}

static int take_string(struct cursor *c, struct gguf_string *out, struct err *err)
{
    uint64_t len = 0;

    if (take(c, 8, &len, err) != 0)
        return -1;
    if (len > left(c))
        return err_set(err, ERR_INVALID,
                       "a string at byte %zu declares %llu bytes, but only %zu follow", c->at,
                       (unsigned long long)len, left(c));
    out->data = (const char *)c->data + c->at;
    out->len = (size_t)len;
    c->at += (size_t)len;
    return 0;
}

static int take_elements(struct cursor *c, struct gguf_array *array, struct err *err)
{
    struct gguf_string string;
    size_t least = array->kind == GGUF_KIND_STRING ? 8 : (size_t)kind_bytes[array->kind];

    array->data = c->data + c->at;
    if (array->count > left(c) / least)
        return err_set(err, ERR_INVALID,
                       "an array declares %llu elements, more than the file has bytes for",
                       (unsigned long long)array->count);
    if (array->kind != GGUF_KIND_STRING) {
        c->at += (size_t)array->count * least;
        return 0;
    }
    for (uint64_t i = 0; i < array->count; i++) {
        if (take_string(c, &string, err) != 0)
            return -1;
    }
    return 0;
}

static int take_value(struct cursor *c, struct entry *entry, struct err *err)
{
    struct gguf_string string;
    uint64_t kind = 0;

    entry->value = c->data + c->at;
    if (entry->kind == GGUF_KIND_STRING)
        return take_string(c, &string, err);
    if (entry->kind != GGUF_KIND_ARRAY)
        return take(c, kind_bytes[entry->kind], &kind, err);
    if (take(c, 4, &kind, err) != 0 || take(c, 8, &entry->array.count, err) != 0)
        return -1;
    if (kind >= GGUF_KIND_COUNT || kind == GGUF_KIND_ARRAY)
        return err_set(err, ERR_INVALID, "an array of elements of kind %llu is not supported",
                       (unsigned long long)kind);
    entry->array.kind = (enum gguf_kind)kind;
    return take_elements(c, &entry->array, err);
}

static int compare_strings(const char *a, size_t a_len, const char *b, size_t b_len)
{
    int order = memcmp(a, b, a_len < b_len ? a_len : b_len);

    return order != 0 ? order : (a_len > b_len) - (a_len < b_len);
}

static int by_key(const void *a, const void *b)
{
    const struct entry *x = a, *y = b;

    return compare_strings(x->key.data, x->key.len, y->key.data, y->key.len);
}

static int read_entries(struct gguf *file, struct cursor *c, uint64_t count, struct err *err)
{
    uint64_t kind = 0;

    /* 13 bytes: the least that a key and a value take. */
    if (count > GGUF_MAX_ENTRIES || count > left(c) / 13)
        return err_set(err, ERR_INVALID, "declares %llu metadata keys, more than %s",
                       (unsigned long long)count,
                       count > GGUF_MAX_ENTRIES ? "the 65536 allowed" : "the file has bytes for");
    file->entries = calloc((size_t)count + 1, sizeof *file->entries);
    if (file->entries == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    for (uint64_t i = 0; i < count; i++) {
        struct entry *entry = &file->entries[i];

        if (take_string(c, &entry->key, err) != 0 || take(c, 4, &kind, err) != 0)
            return -1;
        if (entry->key.len == 0 || entry->key.len > MAX_KEY || kind >= GGUF_KIND_COUNT)
            return err_set(err, ERR_INVALID, "metadata key %llu has no sensible name or kind",
                           (unsigned long long)i);
        entry->kind = (enum gguf_kind)kind;
        if (take_value(c, entry, err) != 0)
            return err_prefix(err, "metadata \"%.*s\"",
                              (int)(entry->key.len < 64 ? entry->key.len : 64), entry->key.data);
        file->entry_count++;
    }
    qsort(file->entries, (size_t)count, sizeof *file->entries, by_key);
    for (uint64_t i = 1; i < count; i++) {
        const struct gguf_string *key = &file->entries[i].key;

        if (by_key(&file->entries[i - 1], &file->entries[i]) == 0)
            return err_set(err, ERR_INVALID, "metadata \"%.*s\" is there twice",
                           (int)(key->len < 64 ? key->len : 64), key->data);
    }
    return 0;
}

static int check_type(struct gguf_tensor *t, uint64_t type, struct err *err)
{
    static const char *const names[] = {
        "F32",     "F16",    "Q4_0",    "Q4_1",  "Q4_2",   "Q4_3",  "Q5_0",  "Q5_1",
        "Q8_0",    "Q8_1",   "Q2_K",    "Q3_K",  "Q4_K",   "Q5_K",  "Q6_K",  "Q8_K",
        "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS",
        "I8",      "I16",    "I32",     "I64",   "F64",    "IQ1_M", "BF16"};

    if (type != GGUF_F32 && type != GGUF_F16 && type != GGUF_BF16 && type != GGUF_Q4_1 &&
        type != GGUF_Q8_0) {
        const char *name = type < sizeof names / sizeof *names ? names[type] : "unknown";

        return err_set(err, ERR_INVALID,
                       "tensor \"%s\" has type %s (%llu), which is not supported yet; supported: "
                       "F32, F16, BF16, Q8_0, Q4_1",
                       t->name, name, (unsigned long long)type);
    }
    t->type = (enum gguf_type)type;
    return 0;
}

bool gguf_is_quantized(enum gguf_type type)
{
    return type == GGUF_Q4_1 || type == GGUF_Q8_0;
}

static int64_t bytes_of_row(const struct gguf_tensor *t)
{
    switch (t->type) {
    case GGUF_F32:
        return t->columns * 4;
    case GGUF_F16:
    case GGUF_BF16:
        return t->columns * 2;
    case GGUF_Q4_1:
        return t->columns / BLOCK * Q4_1_BYTES;
    case GGUF_Q8_0:
        return t->columns / BLOCK * Q8_0_BYTES;
    }
    return 0;
}

static int take_shape(struct cursor *c, struct gguf_tensor *t, struct err *err)
{
    uint64_t rank = 0, dim = 0;
    int64_t elements = 1;

    if (take(c, 4, &rank, err) != 0)
        return -1;
    if (rank < 1 || rank > 4)
        return err_set(err, ERR_INVALID, "tensor \"%s\" has %llu dimensions; 1 to 4 are allowed",
                       t->name, (unsigned long long)rank);
    t->rank = (int)rank;
    for (int i = t->rank - 1; i >= 0; i--) {
        if (take(c, 8, &dim, err) != 0)
            return -1;
        /* 2^40: a row of it times 34 bytes is far from overflowing; no tensor comes near. */
        if (dim < 1 || dim > (uint64_t)1 << 40 ||
            __builtin_mul_overflow(elements, (int64_t)dim, &elements))
            return err_set(
                err, ERR_INVALID,
                "tensor \"%s\" has a dimension of 0, or more elements than 64 bits count", t->name);
        t->shape[i] = (int64_t)dim;
    }
    t->columns = t->shape[t->rank - 1];
    t->rows = elements / t->columns;
    return 0;
}

static int take_name(struct cursor *c, struct gguf_tensor *t, struct err *err)
{
    struct gguf_string name;

    if (take_string(c, &name, err) != 0)
        return -1;
    if (name.len < 1 || name.len > GGUF_MAX_NAME || memchr(name.data, '\0', name.len) != NULL)
        return err_set(err, ERR_INVALID, "a tensor name must have 1 to %d bytes, none of them 0",
                       GGUF_MAX_NAME);
    memcpy(t->name, name.data, name.len);
    return 0;
}

/* One tensor's description; *offset: of its data in the data section. */
static int take_tensor(struct cursor *c, struct gguf_tensor *t, uint64_t *offset, struct err *err)
{
    uint64_t type = 0;

    if (take_name(c, t, err) != 0 || take_shape(c, t, err) != 0 || take(c, 4, &type, err) != 0 ||
        check_type(t, type, err) != 0)
        return -1;
    if (gguf_is_quantized(t->type) && t->columns % BLOCK != 0)
        return err_set(err, ERR_INVALID,
                       "tensor \"%s\" has rows of %lld elements; a quantised type needs a multiple "
                       "of %d",
                       t->name, (long long)t->columns, BLOCK);
    t->row_bytes = bytes_of_row(t);
    return take(c, 8, offset, err);
}

static int check_extent(struct gguf_tensor *t, uint64_t offset, const unsigned char *base,
                        size_t size, uint64_t alignment, struct err *err)
{
    int64_t bytes;

    if (offset % alignment != 0)
        return err_set(err, ERR_INVALID, "tensor \"%s\" is not aligned to %llu bytes", t->name,
                       (unsigned long long)alignment);
    if (__builtin_mul_overflow(t->rows, t->row_bytes, &bytes) || offset > size ||
        (uint64_t)bytes > size - offset)
        return err_set(
            err, ERR_INVALID,
            "tensor \"%s\" does not fit into the %zu bytes of data that the file has; it "
            "is cut short or damaged",
            t->name, size);
    t->data = base + offset;
    return 0;
}

static int by_place(const void *a, const void *b)
{
    const struct gguf_tensor *x = a, *y = b;

    return (x->data > y->data) - (x->data < y->data);
}

static int by_name(const void *a, const void *b)
{
    const struct gguf_tensor *x = a, *y = b;

    return strcmp(x->name, y->name);
}

static int check_tensors(struct gguf *file, struct err *err)
{
    struct gguf_tensor *t = file->tensors;

    qsort(t, (size_t)file->tensor_count, sizeof *t, by_place);
    for (int64_t i = 1; i < file->tensor_count; i++) {
        if (t[i].data < t[i - 1].data + t[i - 1].rows * t[i - 1].row_bytes)
            return err_set(err, ERR_INVALID, "tensors \"%s\" and \"%s\" overlap", t[i - 1].name,
                           t[i].name);
    }
    qsort(t, (size_t)file->tensor_count, sizeof *t, by_name);
    for (int64_t i = 1; i < file->tensor_count; i++) {
        if (strcmp(t[i - 1].name, t[i].name) == 0)
            return err_set(err, ERR_INVALID, "tensor \"%s\" is there twice", t[i].name);
    }
    return 0;
}

static int get_alignment(const struct gguf *file, uint64_t *alignment, struct err *err)
{
    int64_t value = 0;

    if (gguf_get_int(file, "general.alignment", DEFAULT_ALIGNMENT, &value, err) != 0)
        return -1;
    if (value < 8 || value > MAX_ALIGNMENT || (value & (value - 1)) != 0)
        return err_set(err, ERR_INVALID,
                       "\"general.alignment\" is %lld; it must be a power of two from 8 to %d",
                       (long long)value, MAX_ALIGNMENT);
    *alignment = (uint64_t)value;
    return 0;
}

static int read_tensors(struct gguf *file, struct cursor *c, uint64_t count, struct err *err)
{
    uint64_t alignment = 0, padding;
    uint64_t *offsets = NULL;
    int rc = -1;

    /* 33 bytes: the least that a description takes. */
    if (count > GGUF_MAX_ENTRIES || count > left(c) / 33)
        return err_set(err, ERR_INVALID, "declares %llu tensors, more than %s",
                       (unsigned long long)count,
                       count > GGUF_MAX_ENTRIES ? "the 65536 allowed" : "the file has bytes for");
    file->tensors = calloc((size_t)count + 1, sizeof *file->tensors);
    offsets = calloc((size_t)count + 1, sizeof *offsets);
    if (file->tensors == NULL || offsets == NULL) {
        err_set(err, ERR_NO_MEMORY, "out of memory");
        goto out;
    }
    for (uint64_t i = 0; i < count; i++) {
        if (take_tensor(c, &file->tensors[i], &offsets[i], err) != 0)
            goto out;
    }
    if (get_alignment(file, &alignment, err) != 0)
        goto out;
    padding = (alignment - c->at % alignment) % alignment;
    c->at += padding < left(c) ? (size_t)padding : left(c);
    for (uint64_t i = 0; i < count; i++) {
        if (check_extent(&file->tensors[i], offsets[i], c->data + c->at, left(c), alignment, err) !=
            0)
            goto out;
    }
    file->tensor_count = (int64_t)count;
    rc = check_tensors(file, err);
out:
    free(offsets);
    return rc;
}

static int parse(struct gguf *file, const unsigned char *data, size_t len, struct err *err)
{
    struct cursor c = {.data = data, .len = len};
    uint64_t version = 0, tensors = 0, entries = 0;

    if (len < 4 || memcmp(data, "GGUF", 4) != 0)
        return err_set(err, ERR_INVALID, "is not a GGUF file");
    c.at = 4;
    if (take(&c, 4, &version, err) != 0)
        return -1;
    if (version != 2 && version != 3)
        return err_set(
            err, ERR_INVALID, "has GGUF version %llu%s; supported: 2 and 3, little-endian",
            (unsigned long long)version, (version & 0xffff) == 0 ? " (or is big-endian)" : "");
    if (take(&c, 8, &tensors, err) != 0 || take(&c, 8, &entries, err) != 0 ||
        read_entries(file, &c, entries, err) != 0)
        return -1;
    return read_tensors(file, &c, tensors, err);
}

static struct gguf *new_file(struct err *err)
{
    struct gguf *file = calloc(1, sizeof *file);

    if (file == NULL)
        err_set(err, ERR_NO_MEMORY, "out of memory");
    return file;
}

int gguf_open(struct gguf **out, const char *path, struct err *err)
{
    struct gguf *file = new_file(err);

    if (file == NULL || file_map_open(&file->map, path, err) != 0) {
        free(file);
        return -1;
    }
    if (parse(file, file->map.data, file->map.len, err) != 0) {
        gguf_free(file);
        return err_prefix(err, "%s", path);
    }
    *out = file;
    return 0;
}

int gguf_open_memory(struct gguf **out, const void *data, size_t len, const char *name,
                     struct err *err)
{
    struct gguf *file = new_file(err);

    if (file == NULL)
        return -1;
    if (parse(file, data, len, err) != 0) {
        gguf_free(file);
        return err_prefix(err, "%s", name);
    }
    *out = file;
    return 0;
}

void gguf_free(struct gguf *file)
{
    if (file == NULL)
        return;
    free(file->entries);
    free(file->tensors);
    file_map_close(&file->map);
    free(file);
}

int64_t gguf_count(const struct gguf *file)
{
    return file->tensor_count;
}

const struct gguf_tensor *gguf_at(const struct gguf *file, int64_t index)
{
    assert(index >= 0 && index < file->tensor_count);
    return &file->tensors[index];
}

const struct gguf_tensor *gguf_find(const struct gguf *file, const char *name)
{
    int64_t low = 0, high = file->tensor_count;

    while (low < high) {
        int64_t middle = (low + high) / 2;
        int order = strcmp(name, file->tensors[middle].name);

        if (order == 0)
            return &file->tensors[middle];
        if (order < 0)
            high = middle;
        else
            low = middle + 1;
    }
    return NULL;
}

void gguf_done_with(const struct gguf *file, const struct gguf_tensor *tensor)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t from = ((uintptr_t)tensor->data + page - 1) / page * page;
    uintptr_t to = (uintptr_t)(tensor->data + tensor->rows * tensor->row_bytes) / page * page;

    /* Advice only: when it fails, the pages stay until the kernel wants them. */
    if (file->map.data != NULL && to > from)
        madvise((void *)from, to - from, MADV_DONTNEED);
}

static const struct entry *find_entry(const struct gguf *file, const char *key)
{
    struct entry wanted = {.key = {.data = key, .len = strlen(key)}};

    return bsearch(&wanted, file->entries, (size_t)file->entry_count, sizeof wanted, by_key);
}

static bool is_integer(enum gguf_kind kind)
{
    return kind <= GGUF_KIND_I32 || kind == GGUF_KIND_U64 || kind == GGUF_KIND_I64;
}

static int64_t integer_at(enum gguf_kind kind, const unsigned char *p)
{
    uint64_t value = load(p, kind_bytes[kind]);

    switch (kind) {
    case GGUF_KIND_I8:
        return (int8_t)value;
    case GGUF_KIND_I16:
        return (int16_t)value;
    case GGUF_KIND_I32:
        return (int32_t)value;
    default:
        return (int64_t)value;
    }
}

int gguf_get_int(const struct gguf *file, const char *key, int64_t fallback, int64_t *out,
                 struct err *err)
{
    const struct entry *entry = find_entry(file, key);

    *out = fallback;
    if (entry == NULL)
        return 0;
    if (!is_integer(entry->kind) ||
        (entry->kind == GGUF_KIND_U64 && load(entry->value, 8) > INT64_MAX))
        return err_set(err, ERR_INVALID, "metadata \"%s\" must be an integer", key);
    *out = integer_at(entry->kind, entry->value);
    return 0;
}

int gguf_get_float(const struct gguf *file, const char *key, double fallback, double *out,
                   struct err *err)
{
    const struct entry *entry = find_entry(file, key);
    float narrow;

    *out = fallback;
    if (entry == NULL)
        return 0;
    if (entry->kind == GGUF_KIND_FLOAT64) {
        memcpy(out, entry->value, sizeof *out);
        return 0;
    }
    if (entry->kind != GGUF_KIND_FLOAT32)
        return err_set(err, ERR_INVALID, "metadata \"%s\" must be a float", key);
    memcpy(&narrow, entry->value, sizeof narrow);
    *out = (double)narrow;
    return 0;
}

int gguf_get_string(const struct gguf *file, const char *key, struct gguf_string *out,
                    struct err *err)
{
    const struct entry *entry = find_entry(file, key);
    const unsigned char *at;

    *out = (struct gguf_string){0};
    if (entry == NULL)
        return 0;
    if (entry->kind != GGUF_KIND_STRING)
        return err_set(err, ERR_INVALID, "metadata \"%s\" must be a string", key);
    at = entry->value;
    *out = gguf_next_string(&at);
    return 0;
}

int gguf_get_array(const struct gguf *file, const char *key, struct gguf_array *out,
                   struct err *err)
{
    const struct entry *entry = find_entry(file, key);

    *out = (struct gguf_array){0};
    if (entry == NULL)
        return 0;
    if (entry->kind != GGUF_KIND_ARRAY)
        return err_set(err, ERR_INVALID, "metadata \"%s\" must be an array", key);
    *out = entry->array;
    return 0;
}

struct gguf_string gguf_next_string(const unsigned char **at)
{
    struct gguf_string string = {.len = (size_t)load(*at, 8)};

    string.data = (const char *)*at + 8;
    *at += 8 + string.len;
    return string;
}

int64_t gguf_array_int(const struct gguf_array *array, uint64_t index)
{
    assert(is_integer(array->kind) && index < array->count);
    return integer_at(array->kind, array->data + index * (uint64_t)kind_bytes[array->kind]);
}
