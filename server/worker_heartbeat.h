/* worker_heartbeat.h: keeps a train worker's lease alive while its main thread computes.
 *
 * A thread with a database connection of its own renews the lease each `interval` seconds. When
 * that has not succeeded for `fence` seconds (the database is away, or we were frozen), the attempt
 * is over: another worker may have the job by then. The main thread asks before it touches anything
 * that others see. */
#ifndef GRAFT_WORKER_HEARTBEAT_H
#define GRAFT_WORKER_HEARTBEAT_H

#include "engine/base/err.h"
#include "server/worker_presence.h"
#include "storage/leases.h"

struct worker_heartbeat;

struct worker_heartbeat_options {
    const char *url;
    double interval, fence;                 /* s */
    const struct worker_presence *presence; /* told with each renewal; NULL: nothing to tell */
};

/* The lease was claimed just now. */
int worker_heartbeat_start(struct worker_heartbeat **out, const struct lease *lease,
                           const struct worker_heartbeat_options *options, struct err *err);
/* 0: the job is ours. ERR_CANCELLED: its client cancelled it. ERR_FENCED: it is not ours any more.
 */
int worker_heartbeat_check(struct worker_heartbeat *heartbeat, struct err *err);
/* A write found the lease gone: asks the database why, and makes `err` ERR_CANCELLED where the
 * client has cancelled the job. */
void worker_heartbeat_explain(struct worker_heartbeat *heartbeat, struct err *err);
void worker_heartbeat_stop(struct worker_heartbeat *heartbeat); /* NULL is fine */

#endif
