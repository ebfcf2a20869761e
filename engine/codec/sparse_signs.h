/* sparse_signs.h: the signs of some of a matrix's entries, drawn by a seed, and nothing of the
 * others: one bit for each entry that is kept (DARE's random mask,
 * https://arxiv.org/abs/2311.03099, before BitDelta's signs). api-spec/delta-format.md has the
 * layout and the generator.
 *
 * Of each 32 neighbouring columns of a row `kept` stay, at random places; of a last group of fewer
 * at most as many as it has. So a row has as many bits as any other, wherever they lie. */
#ifndef GRAFT_CODEC_SPARSE_SIGNS_H
#define GRAFT_CODEC_SPARSE_SIGNS_H

#include <stddef.h>
#include <stdint.h>

#include "engine/base/err.h"

#define SPARSE_SIGNS_MOST 31 /* of 32: with all of them, there is no need for a mask */

int64_t sparse_signs_bytes(int32_t rows, int32_t cols, int32_t kept);
/* To `out`, of that size; mean[rows]: the mean |delta| of what is kept of each row, which as the
 * row's scale has the least squared error. */
void sparse_signs_write(const float *delta, int32_t rows, int32_t cols, int32_t kept, void *out,
                        double *mean);

/* ERR_INVALID: not so many bytes of a matrix of that shape. What follows takes what it accepts. */
int sparse_signs_accept(const void *data, int64_t bytes, int32_t rows, int32_t cols,
                        struct err *err);
/* sign[cols]: +1, -1, or 0 of what was dropped. */
void sparse_signs_row(const void *data, int32_t cols, int32_t row, int8_t *sign);

#endif
