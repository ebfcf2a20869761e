/* worker_metrics.h: what a train worker tells about its steps: metrics events, the checkpoint's
 * numbers, and the result file.
 *
 * Events are gathered and written a few times a second, so that a small model is not slowed by the
 * database, and a database that is away for some seconds does not stop training. Each event has the
 * step as its key: steps that a resumed attempt makes again are told once. The result file is made
 * from the events in the database, so it is the same however often the job was resumed. */
#ifndef GRAFT_WORKER_METRICS_H
#define GRAFT_WORKER_METRICS_H

#include <stddef.h>

#include "engine/base/err.h"
#include "engine/engine.h"
#include "storage/blob_store.h"
#include "storage/checkpoints.h"
#include "storage/db.h"
#include "storage/events.h"
#include "storage/leases.h"

struct worker_metrics;

int worker_metrics_open(struct worker_metrics **out, struct db *db, const struct lease *lease,
                        struct err *err);
void worker_metrics_free(struct worker_metrics *metrics); /* drops what was not written */

/* One step. Writes when it is time to; ERR_UNAVAILABLE and ERR_NO_SPACE are not reported here, what
 * could not be written stays and is tried again, until a hundred thousand events wait: then they
 * are. */
int worker_metrics_step(struct worker_metrics *metrics, const struct engine_step *step,
                        struct err *err);
/* Another event, in its place among the steps; written at once where that is possible. Its strings
 * but for level and type are copied. */
int worker_metrics_tell(struct worker_metrics *metrics, const struct event_new *event,
                        struct err *err);
/* All of it is in the database when this returns 0. */
int worker_metrics_flush(struct worker_metrics *metrics, struct err *err);

/* "Step 3/300: training loss=0.22[, validation loss=…][, full validation loss=…]" and the event's
 * data as JSON text; malloc'ed. */
int worker_metrics_format(const struct engine_step *step, char **message, char **data,
                          struct err *err);
/* What an earlier attempt told of a step, as far as a checkpoint shows it; NAN: it was not
 * measured. ERR_NOT_FOUND: nothing was told. */
int worker_metrics_read_step(struct db *db, const struct lease *lease, int32_t step,
                             struct engine_step *out, struct err *err);
void worker_metrics_of_step(const struct engine_step *step, struct checkpoint_metrics *out);

/* step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy: a line for each step, as a
 * committed blob of the project. */
int worker_metrics_result_file(struct db *db, struct blob_store *blobs, const struct lease *lease,
                               char sha256[SHA256_HEX], int64_t *bytes, struct err *err);

#endif
