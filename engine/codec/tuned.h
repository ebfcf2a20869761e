/* tuned.h: a model that was tuned elsewhere, as a compression reads it: a base file or what can be
 * imported, of the base's shapes; or a LoRA adapter of the base (peft.h), whose model is base +
 * product. Belongs to the engine's thread; the engine outlives it. */
#ifndef GRAFT_CODEC_TUNED_H
#define GRAFT_CODEC_TUNED_H

#include "engine/codec/artifact.h"
#include "engine/codec/peft.h"

struct tuned;

/* runnable: its weights will be asked for. Of an adapter that takes memory for the matrices that it
 * changes; what is stored of its differences is exact in either case. ERR_INVALID: as twin.h and
 * peft.h say. */
int tuned_open(struct tuned **out, struct engine *engine, const char *path, bool runnable,
               struct err *err);
void tuned_free(struct tuned *tuned);

/* artifact_source.read, its context the tuned model. Any thread. */
int tuned_read(void *context, int32_t index, int64_t from, int64_t count, float *base, float *tuned,
               struct err *err);
/* On the engine's backend; NULL: not runnable. */
const struct model_weights *tuned_weights(const struct tuned *tuned);
const struct peft *tuned_adapter(const struct tuned *tuned); /* NULL: it is none */

#endif
