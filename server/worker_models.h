/* worker_models.h: what an infer worker keeps loaded: base models, each with its engine and its
 * continuous batch, and the deltas on them.
 *
 * A base is named by the SHA-256 of its file. The digest of its values would not do, since two
 * imports of the same values may differ in tokenizer, chat template or rope_theta. A delta is named
 * by (base, tenant, SHA-256 of its artifact). Neither goes by a name that could come to mean
 * something else, and no delta is shared by two tenants. Both are loaded when first asked for, stay
 * while in use, and go least-recently-used first when the loaded ones exceed their bytes: before
 * the next is loaded, by what its header says it will take, and again after it. The one just asked
 * for always stays.
 *
 * A delta is hashed before it is loaded. A base may be too large for everybody to wait for that: it
 * is hashed beside the first answers, which end where it turns out to be damaged
 * (worker_models_damaged). What was found damaged is refused, code damaged_file, without another
 * look for as long as the file is not another.
 *
 * A load that finds no memory is tried again for as long as something that nobody uses can go,
 * whatever the bytes say: deltas, then bases, each the longest unused first. It fails only where
 * nothing is left to unload. So does a delta that would take more than the machine or the device
 * has free (insufficient_memory), before it is loaded: the system kills who uses more than it has.
 *
 * Errors may go to a client: they name no place on disk (the log does). A device that can not be
 * opened is ERR_DEVICE: another process may have more luck.
 *
 * One thread. */
#ifndef GRAFT_WORKER_MODELS_H
#define GRAFT_WORKER_MODELS_H

#include <stdint.h>

#include "engine/base/err.h"
#include "engine/base/file_io.h"
#include "engine/base/sha256.h"
#include "engine/engine.h"

struct worker_models_options {
    int64_t base_bytes, delta_bytes; /* kept loaded at most */
    struct engine_options engine;    /* of all engines */
    int32_t max_sequences, max_context;
};

struct worker_delta;

struct worker_check;

struct worker_base {
    struct worker_base *next;
    char sha256[SHA256_HEX];
    struct worker_check *check;
    struct file_identity file; /* as it was when the check began */
    struct engine *engine;
    struct engine_session *session;
    int64_t bytes;
    int32_t active; /* requests in its session: the owner counts */
    uint64_t used;  /* clock of the cache */
};

struct worker_models;

int worker_models_open(struct worker_models **out, const struct worker_models_options *options,
                       struct err *err);
void worker_models_free(struct worker_models *models);

/* The base at `path`, loaded where it is not there; its file should have this SHA-256. */
int worker_models_base(struct worker_models *models, const char *sha256, const char *path,
                       struct worker_base **out, struct err *err);
/* The delta, pinned until worker_models_unpin. Its file's SHA-256 is checked when it is loaded; an
 * artifact of another base is refused. */
int worker_models_pin(struct worker_models *models, struct worker_base *base, const char *tenant,
                      const char *sha256, const char *path, struct worker_delta **out,
                      struct err *err);
void worker_models_unpin(struct worker_delta *delta);
const struct engine_delta *worker_delta_engine(const struct worker_delta *delta);

/* A loaded base whose file has another SHA-256, for the step loop to drop; NULL: none that is known
 * by now. *why is for those who are answered from it. */
struct worker_base *worker_models_damaged(struct worker_models *models, struct err *why);

/* Unloads a base whose session has failed, with its deltas. No request may use it any more. */
void worker_models_drop(struct worker_models *models, struct worker_base *base);

/* All loaded bases, for the step loop. */
struct worker_base *worker_models_first(struct worker_models *models);

struct worker_models_stats {
    int32_t bases, deltas;
    int64_t base_bytes, delta_bytes;
    int64_t loads; /* begun so far, also those that failed: what nobody could be answered in */
};
void worker_models_stats(const struct worker_models *models, struct worker_models_stats *out);

#endif
