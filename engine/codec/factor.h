/* factor.h: the difference of one matrix, decomposed in the metric of what it does to the model's
 * answers, and rounded to planes (planes.h).
 *
 * With H = E[x·xᵀ] over a layer's inputs and G = E[g·gᵀ] over the gradients of the log-likelihood
 * at its outputs, a change E of the weights costs about ½·tr(G·E·H·Eᵀ) nats a token: the Fisher
 * information in Kronecker factors (K-FAC, https://arxiv.org/abs/1503.05671). So the singular
 * values of G^½·D·H^½ are in one currency for all matrices of a model, and bits go where they keep
 * most of their squares: factor_allot. The right side is rounded with the error fed forward in H
 * (GPTQ, https://arxiv.org/abs/2210.17323), the left one fitted anew to that and rounded likewise,
 * in G and from vector to vector.
 *
 * Without statistics H and G are the identity: the plain singular vectors.
 *
 *   factor_open and factor_energy for each matrix → factor_allot over all → factor_open and
 *   factor_compress for each
 *
 * Deterministic. Any thread, each factor by one at a time. */
#ifndef GRAFT_CODEC_FACTOR_H
#define GRAFT_CODEC_FACTOR_H

#include <stdbool.h>
#include <stdint.h>

#include "engine/codec/codec.h"

#define FACTOR_DAMPING 0.01 /* of the mean of the diagonal, added to H and G */

struct factor_statistics { /* symmetric; NULL: the identity */
    const float *h;        /* [cols, cols] */
    const float *g;        /* [rows, rows] */
};

struct factor;

/* delta: [rows, cols], copied. vectors: for how many of the first singular vectors widths may be
 * asked for; 0 where the energy will do. Takes memory for about 4·rows·cols + 3·(rows² + cols²)
 * doubles. ERR_INVALID: not finite. */
int factor_open(struct factor **out, const float *delta, int32_t rows, int32_t cols,
                const struct factor_statistics *statistics, int32_t vectors, struct err *err);
void factor_free(struct factor *factor);
int32_t factor_rank(const struct factor *factor); /* min(rows, cols) */
/* [rank] squared singular values in the metric, descending: their sum is twice the cost of leaving
 * the matrix out. */
const double *factor_energy(const struct factor *factor);

/* ------------------------------------------------------------------ bits */

/* Plans, with energies, that together take at most `bytes` (planes_bytes of each matrix, all
 * counted) and lose least; widths are 0 to 8. *cost: what they are expected to lose, in nats a
 * token; fitting and feedback do better. false: not even empty matrices fit; all widths are 0 then.
 */
bool factor_allot(struct codec_plan *plan, int32_t count, int64_t bytes, double *cost);

/* ------------------------------------------------------------------ rounding */

/* width: [rank], 0 from `vectors` on. What they take in a plan to `out`: see planes.h. ERR_INVALID:
 * too large for the scales of planes. */
int factor_compress(const struct factor *factor, const uint8_t *width, void *out, struct err *err);

#endif
