/* adapter.h: an open delta: one fine-tune in the backend's memory, ready to be mixed into a batch.
 *
 * Matrices are packed by the backend from the artifact's bits; only those of `lossless` are
 * inflated to the f32 difference that they are, those of `delta-come` to two thin f32 factors.
 * Norms and biases become base + difference in f32. The artifact's file is not needed after
 * opening. */
#ifndef GRAFT_ADAPTER_H
#define GRAFT_ADAPTER_H

#include "engine/backend.h"
#include "engine/engine.h"

/* NULL for NULL: the base alone. */
const struct adapter *engine_delta_adapter(const struct engine_delta *delta);

#endif
