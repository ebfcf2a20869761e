/* gguf.h: the GGUF format (github.com/ggml-org/ggml/blob/master/docs/gguf.md), versions 2 and 3,
 * little-endian. A reader that believes nothing.
 *
 * The file is mapped. Every count, length and offset is held against the bytes that are there
 * before anything is allocated or read by it; alignment is a power of two from 8 to 65536; tensors
 * have rank 1 to 4, no dimension of 0, a supported type and a unique name of 1 to 256 bytes, lie
 * inside of the file and do not overlap. Anything else is ERR_INVALID that names key or tensor.
 *
 * An open file is read-only: any thread. Strings and data point into the mapping. */
#ifndef GRAFT_GGUF_H
#define GRAFT_GGUF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/err.h"

#define GGUF_MAX_ENTRIES 65536 /* metadata keys, and tensors */
#define GGUF_MAX_NAME 256

enum gguf_type { /* of tensors, as the format numbers them */
                 GGUF_F32 = 0,
                 GGUF_F16 = 1,
                 GGUF_Q4_1 = 3,
                 GGUF_Q8_0 = 8,
                 GGUF_BF16 = 30,
};

enum gguf_kind { /* of metadata values, as the format numbers them */
                 GGUF_KIND_U8,
                 GGUF_KIND_I8,
                 GGUF_KIND_U16,
                 GGUF_KIND_I16,
                 GGUF_KIND_U32,
                 GGUF_KIND_I32,
                 GGUF_KIND_FLOAT32,
                 GGUF_KIND_BOOL,
                 GGUF_KIND_STRING,
                 GGUF_KIND_ARRAY,
                 GGUF_KIND_U64,
                 GGUF_KIND_I64,
                 GGUF_KIND_FLOAT64,
                 GGUF_KIND_COUNT,
};

struct gguf;

struct gguf_string {
    const char *data; /* not NUL-terminated; any bytes */
    size_t len;
};

struct gguf_tensor {
    char name[GGUF_MAX_NAME + 1];
    enum gguf_type type;
    int rank;
    int64_t shape[4];  /* row-major, as everywhere here: the file has it the other way round */
    int64_t rows;      /* product of all dimensions but the last */
    int64_t columns;   /* last dimension */
    int64_t row_bytes; /* rows have no gaps */
    const unsigned char *data;
};

struct gguf_array {
    enum gguf_kind kind; /* of the elements; never GGUF_KIND_ARRAY */
    uint64_t count;
    const unsigned char *data;
};

int gguf_open(struct gguf **out, const char *path, struct err *err);
/* The same on `len` bytes in memory, which must outlive it; `name` is for messages. */
int gguf_open_memory(struct gguf **out, const void *data, size_t len, const char *name,
                     struct err *err);
void gguf_free(struct gguf *file);

/* Tensors sorted by name. */
int64_t gguf_count(const struct gguf *file);
const struct gguf_tensor *gguf_at(const struct gguf *file, int64_t index);
const struct gguf_tensor *gguf_find(const struct gguf *file, const char *name); /* NULL: none */

bool gguf_is_quantized(enum gguf_type type);
/* One row as f32: `columns` values. F16 and BF16 expand exactly; Q8_0 is d·q, Q4_1 d·q + m, each
 * operation rounded to f32, as ggml's reference does it. */
void gguf_row_to_f32(const struct gguf_tensor *tensor, int64_t row, float *out);
/* The tensor's bytes will not be needed soon (safetensors_done_with has the reason). */
void gguf_done_with(const struct gguf *file, const struct gguf_tensor *tensor);

/* Metadata. Absent: *out = fallback and 0. ERR_INVALID where the value has another kind or does not
 * fit. Integers of every width are accepted for int, both floats for float. */
int gguf_get_int(const struct gguf *file, const char *key, int64_t fallback, int64_t *out,
                 struct err *err);
int gguf_get_float(const struct gguf *file, const char *key, double fallback, double *out,
                   struct err *err);
/* Absent: *out has data NULL (count 0) and 0. */
int gguf_get_string(const struct gguf *file, const char *key, struct gguf_string *out,
                    struct err *err);
int gguf_get_array(const struct gguf *file, const char *key, struct gguf_array *out,
                   struct err *err);
/* Walks an array of strings: start with *at = array->data, call array->count times. */
struct gguf_string gguf_next_string(const unsigned char **at);
/* Element of an array of integers (bounds are the caller's). */
int64_t gguf_array_int(const struct gguf_array *array, uint64_t index);

#endif
