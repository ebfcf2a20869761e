/* lossless.h: the difference as it is, in f32, entropy coded: for an archive, for a delta that
 * others will be made from, and as the yardstick of those that lose something. One part:
 *
 *   deflated  U8 [bytes]  a zlib stream (RFC 1950) of 4·rows·cols bytes: the lowest byte of every
 *                         value in row-major order, then the second of every value, and so on, so
 *                         that exponents lie beside exponents and the zeros of 16-bit models beside
 *                         zeros
 *
 * Its size is known only when it is made: a size can not be asked for. */
#ifndef GRAFT_CODEC_LOSSLESS_H
#define GRAFT_CODEC_LOSSLESS_H

#include "engine/codec/codec.h"

extern const struct codec codec_lossless;

#endif
