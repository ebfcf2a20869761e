/* model_pass.h: what the files behind model.h share: the model itself, and how a pass carves its
 * memory and begins a batch. Nobody else includes it. */
#ifndef GRAFT_MODEL_PASS_H
#define GRAFT_MODEL_PASS_H

#include "engine/base_layout.h"
#include "engine/model.h"

struct model {
    struct backend *backend;
    struct model_config config;
    struct model_weights weights;
    struct tensor inv_freq; /* [E/2] host */
    float rope_magnitude;
};

/* Tensors carved out of one allocation: first counted, then placed. */
struct model_arena {
    char *memory; /* NULL: counting */
    int64_t used; /* bytes */
};

/* [rows, cols], or [rows] where cols is 0; begins on a cache line. */
struct tensor model_arena_carve(struct model_arena *arena, enum dtype dtype, int64_t rows,
                                int64_t cols);
/* The first `rows` rows of a tensor that was made for more. */
struct tensor model_first_rows(struct tensor t, int64_t rows);
/* The backend's `begin` for this model; `rope` gets the angles of the batch's positions. */
void model_begin_batch(const struct model *model, const struct batch *batch, struct tensor rope);

/* A training pass between its forward part and its loss. */
struct model_head_pass {
    struct tensor rope;         /* what model_begin_batch wants */
    struct tensor x;            /* [T, D] behind the last layer */
    struct tensor n, logits;    /* [C, D], [C, V] scratch */
    struct tensor nll, correct; /* [T] scratch */
};

/* What model_moments.c sees of a pass. Every tensor is valid during the call. */
struct model_watch {
    void *context;
    /* After each layer: `done` of `all` steps of the pass, which differ in how long they take; not
     * 0 ends it. NULL: nobody asks. */
    int (*step)(void *context, int32_t done, int32_t all, struct err *err);
    /* May still write what args.target and args.weight point to. */
    int (*head)(void *context, const struct model_head_pass *head, struct err *err);
    /* In backward, for each matrix of a block: the gradient at its output, [T, out], then what its
     * input was, [T, in]. */
    void (*gradient)(void *context, int32_t layer, enum base_layout_part part,
                     const struct tensor *g);
    void (*input)(void *context, const struct tensor *x);
    void (*taken)(void *context, int32_t layer, enum base_layout_part part, const struct tensor *x);
};
/* model_loss, watched. args->grads must be there, its tensors may be absent. */
int model_loss_watched(struct model_training *training, const struct model_loss_args *args,
                       const struct model_watch *watch, struct model_loss *out, struct err *err);
/* A forward without a loss. Of the watch it calls `step`, and `taken` for what matrices of a block
 * take: q (k and v alike), o, gate (up alike), down. */
int model_forward_watched(struct model_training *training, const struct model_weights *weights,
                          const struct batch *batch, const struct model_watch *watch,
                          struct err *err);

/* The promises of a batch that callers keep: ids in the vocabulary, documents that add up, and with
 * a cache (else NULL) room for them. */
void model_assert_batch(const struct model *model, const struct batch *batch,
                        const struct kv_cache *cache);

#endif
