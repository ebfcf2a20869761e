/* delta_come.h: the difference's singular vectors in mixed precision (Delta-CoMe,
 * https://arxiv.org/abs/2406.08903): the first 2 in 8 bits, the next 32 in 3, the rest in 2, as
 * many as fit.
 *
 * Groups of 128 values share a scale and a zero point, chosen for the least squared error. The
 * right side is rounded with the error fed forward in the metric of the inputs (gptq.h), the left
 * one, which holds the singular values, fitted to what came of it and rounded likewise. One part:
 *
 *   factors  U8 [bytes], little-endian:
 *     u32 rank
 *     u8  width[rank]     1..8
 *     for each vector its left side, n = rows, then its right side, n = cols:
 *       f16 scale[(n + 127) / 128]
 *       codes of `width` bits, the first in the lowest bits, zeros up to a whole byte:
 *       (n + 127) / 128 zero points, then n values
 *
 *   value = (code - zero point) · scale,   difference = Σ_v left_v · right_vᵀ */
#ifndef GRAFT_CODEC_DELTA_COME_H
#define GRAFT_CODEC_DELTA_COME_H

#include "engine/codec/codec.h"

extern const struct codec codec_delta_come;

#endif
