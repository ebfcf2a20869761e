/* twin.h: a second model beside an engine's base: other weights of the very same shapes on the same
 * backend, a model that was tuned elsewhere for example. It is run as the base is, and so what its
 * configuration says of that must be the same. Belongs to the engine's thread; the engine outlives
 * it. */
#ifndef GRAFT_TWIN_H
#define GRAFT_TWIN_H

#include "engine/base_file.h"
#include "engine/engine.h"
#include "engine/model.h"

struct twin {
    struct base_file *file;
    struct model *model;
};

/* `path` is a base file, or anything that can be imported: then by way of a temporary file.
 * `called` names it in messages ("tuned"). ERR_INVALID: it has not the shapes of the base,
 * or computes otherwise with them. What was opened is the caller's to close after -1 too. */
int twin_open(struct twin *twin, const struct engine *engine, const char *path, const char *called,
              struct err *err);
void twin_close(struct twin *twin); /* a zeroed struct is fine */

#endif
