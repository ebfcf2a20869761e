/* import.h: from a model as others store it to a base file (base_file.h).
 *
 * A source (import_hf.c, import_gguf.c, import_base.c) says what it holds and hands out rows in
 * canonical names, shapes and order of rows; import.c checks, hashes and writes, a portion at a
 * time, so that a model larger than memory passes. Not thread-safe; any thread. */
#ifndef GRAFT_IMPORT_H
#define GRAFT_IMPORT_H

#include <stddef.h>
#include <stdint.h>

#include "engine/base/err.h"
#include "engine/base_layout.h"
#include "engine/model_config.h"
#include "engine/tensor.h"

#define IMPORT_MAX_CHAT_TEMPLATE (1u << 20)

struct import_source;

struct import_ops {
    /* Is this tensor there, in this shape? Sets the dtype that read() gives: F32, F16 or BF16. */
    int (*find)(struct import_source *source, const struct base_layout_tensor *tensor,
                enum dtype *dtype, struct err *err);
    /* Elements of rows [first, first + rows) in that dtype; a vector is rows of one element. */
    int (*read)(struct import_source *source, const struct base_layout_tensor *tensor,
                int64_t first, int64_t rows, void *out, struct err *err);
    /* The tensor was read to its end. */
    void (*done)(struct import_source *source, const struct base_layout_tensor *tensor);
    /* Every tensor of the source that is not in the list must be one that changes nothing. */
    int (*check_rest)(struct import_source *source, const struct base_layout_tensor *list,
                      int64_t count, struct err *err);
    void (*close)(struct import_source *source);
};

struct import_source {
    const struct import_ops *ops;
    void *state; /* the source's own */
    struct model_config config;
    char *tokenizer_json; /* malloc'ed */
    size_t tokenizer_len;
    char *chat_template; /* malloc'ed; NULL: none */
    size_t chat_template_len;
    char digest[SHA256_HEX]; /* what the values must hash to; "": not known */
};

/* Each fills *source; on failure nothing is left to close. */
int import_hf_open(struct import_source *source, const char *dir, struct err *err);
int import_gguf_open(struct import_source *source, const char *path, struct err *err);
int import_base_open(struct import_source *source, const char *path, struct err *err);

#endif
