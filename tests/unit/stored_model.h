/* stored_model.h: the files of a tiny model and of deltas of it as a worker is told of them, by
 * their places in a store and by their digests, for tests. What cannot be made fails the test. */
#ifndef GRAFT_TESTS_STORED_MODEL_H
#define GRAFT_TESTS_STORED_MODEL_H

#include "engine/engine.h"

struct stored_file {
    char path[64], sha256[65];
};

/* FOLDER/NAME, imported from the Hugging Face directory `source`. */
void stored_base(struct stored_file *out, const char *source, const char *folder, const char *name);
/* Deltas of an engine's base that differ, each of noise: FOLDER/delta0, ... */
void stored_deltas(struct stored_file *out, int count, struct engine *engine, const char *codec,
                   const char *folder);
/* An engine of a base, on one thread of the CPU. */
struct engine *stored_engine(const struct stored_file *base);

#endif
