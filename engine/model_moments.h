/* model_moments.h: what the matrices of a model meet: one forward and backward of a micro-batch
 * that leaves, for each matrix of the blocks, the second moments of its inputs and of the gradients
 * at its outputs. A change E of the matrix costs about ½·tr(G·E·H·Eᵀ) nats a token (K-FAC,
 * https://arxiv.org/abs/1503.05671; engine/codec/factor.h), with
 *   g_r  the gradient of the summed loss at the matrix's output in row r, x_r its input there,
 *   u_r = ‖g_r‖²: a row's input counts as much as its gradient,
 *   h += Σ u_r·x_r·x_rᵀ, weight += Σ u_r, so H = h / weight,
 *   g += Σ g_r·g_rᵀ, rows += T, so G = g / rows.
 *
 * Or of the inputs alone, in a forward without a loss: u = 1, no g.
 *
 * No gradient of a weight is computed: a pass takes a forward, half a backward, and the sums. The
 * sums lie in the caller's memory on the host; beside them a pass takes the memory of a training
 * pass, and on a device one sum and a micro-batch's widest rows.
 *
 * One thread, that of the model's backend. The same sums for any number of threads. */
#ifndef GRAFT_MODEL_MOMENTS_H
#define GRAFT_MODEL_MOMENTS_H

#include "engine/model.h"

/* Of one tensor of the model, by its index (model_tensor). Of h and g the part where column >= row
 * is summed, what lies below is undefined: model_moments_mirror. */
struct model_moments {
    float *h; /* [cols, cols] host, +=; NULL: not wanted */
    float *g; /* [rows, rows] host, +=; NULL: not wanted */
    double weight;
    int64_t rows;
};

struct model_moments_pass;

/* For micro-batches of up to max_rows rows. */
int model_moments_open(struct model_moments_pass **out, struct model *model, int32_t max_rows,
                       struct err *err);
void model_moments_free(struct model_moments_pass *pass);

struct model_moments_args {
    const struct model_weights *weights;
    const struct batch *batch; /* without slots and segments */
    const float *weight;       /* [rows]: d(loss)/d(nll of row i); NULL: 1 for each */
    /* [rows]: the token that should follow row i. NULL: drawn from what the model itself gives, at
     * temperature 1, and the sums are those of its Fisher information. */
    const int32_t *target;
    const struct loss_margins *margins; /* with a target: see head_loss_args; or NULL */
    /* [rows], without a target: how much the row's margin counts, NULL: not at all. The Fisher
     * information does not show what a model is sure of. So the loss of a row whose margin is not 0
     * also has ±margin · gap / max(1, gap) with a random sign, where gap is how far the best logit
     * is above that of another token, drawn from what the model gives beside the best. As the sign
     * is random the sums are, on average, those of both losses one by one. */
    const float *margin;
    /* Row r draws its target by random number `first` + r under `seed`; first + rows < 2^40. */
    uint64_t seed, first;
    /* Nothing but weights and batch is looked at, there is no loss, and of matrices that read the
     * same (model_moments_reads) the first one's h is summed and no other's. */
    bool inputs_only;
    /* After each layer, with the share of the pass that is done; not 0: it ends, with that error.
     * NULL: nobody asks. */
    int (*step)(void *context, double share, struct err *err);
    void *context;
};
/* Adds to moments[0 .. model_tensor_count), of which only matrices of blocks are looked at. *loss
 * may be NULL, and is left alone by inputs_only. ERR_INVALID: what the model gives is not finite.
 * After an error the sums are of no use. */
int model_moments_add(struct model_moments_pass *pass, const struct model_moments_args *args,
                      struct model_moments *moments, struct model_loss *loss, struct err *err);

/* The first matrix of a block that has the inputs of matrix `index`: q for k and v, gate for up,
 * itself else. */
int32_t model_moments_reads(const struct model *model, int32_t index);

/* What lies below the diagonal of m [n, n] becomes what lies above. */
void model_moments_mirror(float *m, int64_t n);

#endif
