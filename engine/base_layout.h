/* base_layout.h: which tensors a model of a given configuration has: canonical names (base_file.h)
 * and shapes, in canonical order; and the digest over their values. Pure functions: any thread.
 *
 * Canonical order: the embedding, the tensors of each block in the order of the enum, the final
 * norm, the head. The digest goes through them in this order, so it never changes. */
#ifndef GRAFT_BASE_LAYOUT_H
#define GRAFT_BASE_LAYOUT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/err.h"
#include "engine/base/sha256.h"
#include "engine/engine.h"
#include "engine/model_config.h"
#include "engine/tensor.h"

enum base_layout_part {
    BASE_LAYOUT_ATTN_NORM, /* of a block, once in each layer */
    BASE_LAYOUT_Q,
    BASE_LAYOUT_K,
    BASE_LAYOUT_V,
    BASE_LAYOUT_O,
    BASE_LAYOUT_Q_BIAS, /* with attention_bias */
    BASE_LAYOUT_K_BIAS,
    BASE_LAYOUT_V_BIAS,
    BASE_LAYOUT_Q_NORM, /* with qk_norm */
    BASE_LAYOUT_K_NORM,
    BASE_LAYOUT_MLP_NORM,
    BASE_LAYOUT_GATE,
    BASE_LAYOUT_UP,
    BASE_LAYOUT_DOWN,
    BASE_LAYOUT_BLOCK, /* how many there are */
    BASE_LAYOUT_EMBED = BASE_LAYOUT_BLOCK,
    BASE_LAYOUT_FINAL_NORM,
    BASE_LAYOUT_HEAD, /* without tied_embeddings */
    BASE_LAYOUT_PARTS
};

bool base_layout_has(const struct model_config *config, enum base_layout_part part);
bool base_layout_is_linear(enum base_layout_part part); /* a matrix of a block */
/* The rank; shape is [rows, columns], or [columns] of a vector. */
int base_layout_shape(const struct model_config *config, enum base_layout_part part,
                      int64_t shape[TENSOR_MAX_RANK]);
/* `layer` of a block's tensor; else it is not looked at. */
void base_layout_name(enum base_layout_part part, int layer, char *out, size_t size);

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
