/* bitdelta.h: one bit per weight and one scale per row (BitDelta, https://arxiv.org/abs/2402.10193,
 * with a scale for each row instead of one for the matrix).
 *
 * The difference d of a row becomes a·sign(d) with a = mean |d|, which is the a of least squared
 * error. Zero counts as plus. Parts:
 *   sign   I32 [rows, (cols + 31) / 32]  column c is bit c % 32 of word c / 32, 1 = plus; bits
 *                                        behind the last column are 0
 *   scale  F16 [rows], or [1] for the whole matrix: finite, not negative
 * F16 keeps a scale to 2^-11 of itself down to 6e-5 and to 2^-25 below, which is what rounding does
 * to an f32 weight of size 1: nothing beside what one bit per weight loses. */
#ifndef GRAFT_CODEC_BITDELTA_H
#define GRAFT_CODEC_BITDELTA_H

#include "engine/codec/codec.h"

extern const struct codec codec_bitdelta;

#endif
