/* collector.h: removes what nobody owns: blobs without a row, staging of attempts that are over,
 * recovery checkpoints that are not the newest of a live job, files past their expiry, idempotency
 * keys past their day, outbox rows past their week.
 *
 * Order against a race: first the list of what lies in the store, then the rows, and only things
 * older than the grace time, looked at again under a lock that a commit takes too. So an upload
 * whose row is not there yet is safe as long as it takes less than the grace. With a grace of 0 run
 * it only when nothing is being written (tests, `graft doctor` on a stopped server). */
#ifndef GRAFT_STORAGE_COLLECTOR_H
#define GRAFT_STORAGE_COLLECTOR_H

#include <stdint.h>

#include "storage/blob_store.h"
#include "storage/db.h"

#define COLLECTOR_GRACE_SECONDS 86400        /* blobs without a row */
#define COLLECTOR_STAGING_GRACE_SECONDS 3600 /* staging without a live attempt */

struct collector_options {
    int64_t grace;         /* seconds; blobs */
    int64_t staging_grace; /* seconds; staging and recovery */
};

struct collector_report {
    int64_t blobs, blob_bytes; /* removed */
    int64_t staging, recovery; /* folders or files removed */
    int64_t files_expired, idempotency_keys, outbox_rows;
};

/* DB_ROLE_WORKER. One of many servers runs it at a time (an advisory lock); the others return 0
 * with an empty report. ERR_INVALID where the store is another database's (blob_database.h). */
int collector_run(struct db *db, struct blob_store *store, const struct collector_options *options,
                  struct collector_report *report, struct err *err);

#endif
