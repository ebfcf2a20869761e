/* bitdelta.h: at most one bit per weight and one scale per row (BitDelta,
 * https://arxiv.org/abs/2402.10193, with a scale for each row instead of one for the matrix).
 *
 * The difference d of a row becomes a·sign(d) with a = mean |d|, which is the a of least squared
 * error. Zero counts as plus. Parts:
 *   sign   I32 [rows, (cols + 31) / 32]  column c is bit c % 32 of word c / 32, 1 = plus; bits
 *                                        behind the last column are 0
 *   scale  F16 [rows], or [1] for the whole matrix: finite, not negative
 * In fewer bytes than that takes, only some entries are kept, at random (sparse_signs.h), and the
 * sign is U8 [bytes]; the others become 0, as ImPart has BitDelta on DARE's entries
 * (https://arxiv.org/abs/2504.13237). The scale is the mean |d| of what is kept: it has the least
 * squared error, which is what counts where inputs do not correlate. DARE's factor of all to kept
 * would keep the sum of a row in the mean instead, and has a squared error that is larger by
 * (factor - 1)² Σ_kept mean²; distillation may find what is between.
 * F16 keeps a scale to 2^-11 of itself down to 6e-5 and to 2^-25 below, which is what rounding does
 * to an f32 weight of size 1: nothing beside what one bit per weight loses. */
#ifndef GRAFT_CODEC_BITDELTA_H
#define GRAFT_CODEC_BITDELTA_H

#include "engine/codec/codec.h"

extern const struct codec codec_bitdelta;

#endif
