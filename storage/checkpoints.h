/* checkpoints.h: a user's checkpoints: a compressed delta per epoch, the last three kept, each
 * usable as a model. (Recovery checkpoints are jobs_set_recovery's.) */
#ifndef GRAFT_STORAGE_CHECKPOINTS_H
#define GRAFT_STORAGE_CHECKPOINTS_H

#include <stdbool.h>
#include <stdint.h>

#include "engine/base/sha256.h"
#include "storage/db.h"
#include "storage/leases.h"

#define CHECKPOINTS_KEPT 3

struct checkpoint_metrics { /* NAN: not measured */
    double train_loss, train_mean_token_accuracy;
    double valid_loss, valid_mean_token_accuracy;
    double full_valid_loss, full_valid_mean_token_accuracy;
};

struct checkpoint {
    char id[ID_SIZE];
    char job[ID_SIZE];
    int64_t created_at;
    int32_t step;
    char *model; /* "ft:…:ckpt-step-N" */
    char artifact_sha256[SHA256_HEX];
    int64_t artifact_bytes;
    struct checkpoint_metrics metrics;
};
void checkpoint_release(struct checkpoint *checkpoint);

struct checkpoint_new {
    int32_t step;
    const char *artifact_sha256; /* a committed blob of the project */
    int64_t artifact_bytes;
    struct checkpoint_metrics metrics;
};

struct checkpoint_list {
    struct checkpoint *items;
    int count;
    bool has_more;
};
void checkpoint_list_release(struct checkpoint_list *list);

/* Row, event ("Checkpoint created at step N with Snapshot ID: …") and the removal of the fourth
 * newest, in one transaction, fenced. The same step again (a resumed attempt) replaces artifact and
 * metrics and tells nothing. */
int checkpoints_add(struct db *db, const struct lease *lease,
                    const struct checkpoint_new *checkpoint, struct err *err);
/* Newest (highest step) first; `after` and errors as in events_list. */
int checkpoints_list(struct db *db, const char *project, const char *job, const char *after,
                     int limit, struct checkpoint_list *out, struct err *err);

#endif
