/* noisy_delta.h: a delta file of an open engine's base that changes what the model says, made up
 * from noise; and the weights that it stands for, to hold what is served to. */
#ifndef GRAFT_TESTS_NOISY_DELTA_H
#define GRAFT_TESTS_NOISY_DELTA_H

#include "engine/engine.h"
#include "engine/model.h"

struct noisy_delta {
    const char *codec;
    int64_t bytes; /* of the file, at most; 0: as large as it likes */
    uint64_t seed;
    bool embeddings; /* they change too */
};

/* Every matrix moves by a fifth of its size, norms by a tenth. */
int noisy_delta_write(struct engine *engine, const struct noisy_delta *what, const char *path,
                      struct err *err);

/* base + what the file at `path` says, as a full set of f32 weights in the memory of the host.
 * Fails the test where it can not be made. */
void expanded_weights_open(struct model_weights *out, struct engine *engine, const char *path);
void expanded_weights_free(struct model_weights *weights, struct engine *engine);
/* The same from differences that another program has expanded: [elements] of each tensor in the
 * model's order, NULL: none. */
void expanded_weights_add(struct model_weights *out, struct engine *engine,
                          const float *const *difference);

#endif
