/* base_layout.h: which tensors a model of a given configuration has: canonical names (base_file.h)
 * and shapes, in canonical order; and the digest over their values. Pure functions: any thread. */
#ifndef GRAFT_BASE_LAYOUT_H
#define GRAFT_BASE_LAYOUT_H

#include <stdbool.h>
#include <stdint.h>

#include "engine/base/err.h"
#include "engine/base/sha256.h"
#include "engine/engine.h"
#include "engine/model_config.h"
#include "engine/tensor.h"

struct base_layout_tensor {
    char name[80];
    int rank;                       /* 1 or 2 */
    int64_t shape[TENSOR_MAX_RANK]; /* [rows, columns] or [columns] */
    bool linear;                    /* a matrix of a block: what a delta compresses */
};

/* *out: malloc'ed, free() it. `config` has passed model_config_check. */
int base_layout_list(const struct model_config *config, struct base_layout_tensor **out,
                     int64_t *count, struct err *err);
int64_t base_layout_elements(const struct base_layout_tensor *tensor);
/* Everything of the info but the digest. */
void base_layout_info(const struct model_config *config, const struct base_layout_tensor *list,
                      int64_t count, struct engine_base_info *info);
/* SHA-256 over one line "NAME SHAPE HEX\n" for each tensor in canonical order: SHAPE like
 * 49152x576, HEX the SHA-256 of the tensor's values as little-endian f32, row-major. `hex[i]` is
 * that of list[i]. */
int base_layout_digest(const struct base_layout_tensor *list, int64_t count,
                       const char (*hex)[SHA256_HEX], char digest[SHA256_HEX], struct err *err);

#endif
