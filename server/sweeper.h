/* sweeper.h: the server's periodic work, on one thread with its own database connection: leases
 * that ran out, workers that died, the blob collector, and the private database's own life.
 *
 * A failure is logged and tried again at the next round; nothing here can stop the server. */
#ifndef GRAFT_SWEEPER_H
#define GRAFT_SWEEPER_H

#include <stdbool.h>

#include "engine/base/err.h"
#include "server/settings.h"
#include "storage/storage.h"

struct sweeper;

int sweeper_open(struct sweeper **out, const struct settings *settings, struct storage *storage,
                 struct err *err);
/* Ends the round that is under way and the thread. */
void sweeper_free(struct sweeper *sweeper);
/* A worker process of this server is gone: release its leases now. Does not block. */
void sweeper_worker_died(struct sweeper *sweeper);

#endif
