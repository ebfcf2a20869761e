/* safetensors.h: the safetensors format (huggingface.co/docs/safetensors): a JSON header that names
 * tensors, then their bytes. A reader that believes nothing, and a streaming writer.
 *
 * Reader: the file is mapped; before anything is sized by what the file declares, the declaration
 * is held against the file. Accepted are files whose header is at most 16 MiB, whose tensors have a
 * known dtype, rank ≤ 4, a unique name of 1 to 256 bytes and shape × dtype == end − begin, and lie
 * end to end from the first byte behind the header to the last byte of the file. Anything else is
 * ERR_INVALID that names the tensor. An open file is read-only: any thread.
 *
 * Writer: metadata and tensors are declared, then the bytes come in declared order; the same calls
 * give the same bytes. The file appears at its path only in finish, durably, or not at all. What is
 * known only when the file has been read goes into its header by safetensors_patch_metadata.
 * Data starts at a multiple of 64; a tensor whose offset is no multiple of its element is refused
 * at declaration, so declare wide dtypes first (F32 and I32, then F16 and BF16, then U8 and I8). */
#ifndef GRAFT_SAFETENSORS_H
#define GRAFT_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

#include "engine/base/err.h"
#include "engine/tensor.h"

#define SAFETENSORS_MAX_HEADER (16u << 20)
#define SAFETENSORS_MAX_NAME 256

struct safetensors;

struct safetensors_tensor {
    const char *name;   /* NUL-terminated, no NUL inside */
    struct tensor view; /* data in the mapping, never to be written; rank 0 is one element */
    int64_t bytes;
};

/* `path` also names the file in messages. */
int safetensors_open(struct safetensors **out, const char *path, struct err *err);
/* The same on `len` bytes in memory, which must outlive it; `name` is for messages. */
int safetensors_open_memory(struct safetensors **out, const void *data, size_t len,
                            const char *name, struct err *err);
void safetensors_free(struct safetensors *file);

/* Tensors in the order of their bytes. */
int64_t safetensors_count(const struct safetensors *file);
const struct safetensors_tensor *safetensors_at(const struct safetensors *file, int64_t index);
const struct safetensors_tensor *safetensors_find(const struct safetensors *file,
                                                  const char *name); /* NULL: none */
/* A string of __metadata__, or NULL. */
const char *safetensors_metadata(const struct safetensors *file, const char *key);
/* Foreign files may hold tensors whose data is no multiple of the element size away from the start:
 * those may only be read by memcpy. ERR_INVALID names the first such tensor. */
int safetensors_check_aligned(const struct safetensors *file, struct err *err);
/* The file's bytes [from the start of `tensor`, all of it] will not be needed soon: lets the kernel
 * drop them, so that a pass over a file larger than memory does not fill it. */
void safetensors_done_with(const struct safetensors *file, const struct safetensors_tensor *tensor);

struct safetensors_writer;

int safetensors_writer_open(struct safetensors_writer **out, const char *path, struct err *err);
/* Without finish before it, leaves no trace on disk. NULL is fine. */
void safetensors_writer_free(struct safetensors_writer *writer);
/* UTF-8 strings; a key once. */
int safetensors_writer_metadata(struct safetensors_writer *writer, const char *key,
                                const char *value, struct err *err);
int safetensors_writer_declare(struct safetensors_writer *writer, const char *name,
                               enum dtype dtype, int rank, const int64_t *shape, struct err *err);
/* Ends the declarations and writes the header. */
int safetensors_writer_begin(struct safetensors_writer *writer, struct err *err);
/* The next bytes of the data section, in portions of any size, across tensors too. */
int safetensors_writer_append(struct safetensors_writer *writer, const void *data, size_t len,
                              struct err *err);
/* Behind begin: a new value for a declared metadata key, as long as the old one and, like it, of
 * characters that JSON does not escape (a digest that is known only when the bytes have passed). */
int safetensors_writer_replace_metadata(struct safetensors_writer *writer, const char *key,
                                        const char *value, struct err *err);
/* Fails if bytes are missing. Then: fsync, rename to the path, fsync of the folder. `bytes`: size
 * of the file; may be NULL. */
int safetensors_writer_finish(struct safetensors_writer *writer, int64_t *bytes, struct err *err);

/* A new value for a metadata key of a file that is there; no tensor moves, and the file's length
 * stays. Written as JSON it must fit where the old value and the header's blanks are; blanks, which
 * JSON ignores, fill what is left. Synced. Nobody may have the file open, and it should not yet be
 * where it is looked for: a crash in between leaves half of the header. ERR_INVALID that names the
 * file, which stays as it was: no such file as safetensors_open takes, no such key, a value that is
 * too long or not UTF-8. */
int safetensors_patch_metadata(const char *path, const char *key, const char *value,
                               struct err *err);

#endif
