/* peft.h: a LoRA adapter as Hugging Face's peft saves it: a directory with adapter_config.json and
 * adapter_model.safetensors (huggingface.co/docs/peft, "PEFT checkpoint format"), read as the parts
 * of the codec lora.
 *
 * For each linear layer that it adapts there are lora_A.weight [rank, in] and lora_B.weight
 * [out, rank]; the difference is scale · B · A, with lora_alpha / rank, or lora_alpha / sqrt(rank)
 * where use_rslora says so. Both files are hostile input. What would change the model in another
 * way (DoRA, biases, embeddings, whole modules, a base that was changed at the start) is refused by
 * name: a part of an adapter is not the adapter. */
#ifndef GRAFT_CODEC_PEFT_H
#define GRAFT_CODEC_PEFT_H

#include <stdbool.h>
#include <stddef.h>

#include "engine/codec/artifact.h"

struct peft;

/* It has an adapter_config.json. */
bool peft_is_adapter(const char *dir);

/* tensor: [count] of the base that the adapter is for; not kept. ERR_INVALID names what can not be
 * taken, and a way out. */
int peft_open(struct peft **out, const char *dir, const struct artifact_tensor *tensor,
              int32_t count, struct err *err);

struct peft_files { /* the same from memory, which need not outlive the call */
    const char *config;
    size_t config_len;
    const void *weights;
    size_t weights_len;
};
int peft_open_memory(struct peft **out, const struct peft_files *files,
                     const struct artifact_tensor *tensor, int32_t count, struct err *err);
void peft_free(struct peft *peft);

/* [LORA_PARTS] of tensor `index`, as codec_lora accepts them; NULL: it is not adapted. */
const struct tensor *peft_parts(const struct peft *peft, int32_t index);

#endif
