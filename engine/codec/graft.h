/* graft.h: the codec of our own: the difference decomposed in the metric of what it does to the
 * model's answers (factor.h), its vectors rounded to planes of signs (planes.h). Any size can be
 * asked for. One part:
 *   planes  U8 [bytes]  planes.h says what they mean */
#ifndef GRAFT_CODEC_GRAFT_H
#define GRAFT_CODEC_GRAFT_H

#include "engine/codec/codec.h"

extern const struct codec codec_graft;

#endif
