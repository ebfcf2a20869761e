/* lora.h: a low-rank adapter as it is (LoRA, https://arxiv.org/abs/2106.09685): the difference is
 * scale · up · down. Parts:
 *   scale  F32 [1]           finite, not 0: lora_alpha / rank, or what the adapter says instead
 *   down   [rank, cols]      F32, F16 or BF16, as the adapter has it (lora_A)
 *   up     [rows, rank]      likewise (lora_B)
 * Nothing is lost of the adapter: the parts are its own numbers. They are imported from one
 * (peft.h), and not made of a difference; no scales are distilled, as there is nothing to make up
 * for. */
#ifndef GRAFT_CODEC_LORA_H
#define GRAFT_CODEC_LORA_H

#include "engine/codec/codec.h"

#define LORA_MAX_RANK 4096

enum { LORA_SCALE, LORA_DOWN, LORA_UP, LORA_PARTS };

extern const struct codec codec_lora;

/* ERR_INVALID, always: no adapter was named, and what helps. */
int lora_refuse(struct err *err);

/* out[i] = element from + i of scale · up · down, in row-major order: a matrix in portions. */
void lora_product(const struct tensor part[LORA_PARTS], int64_t from, int64_t count, float *out);

#endif
