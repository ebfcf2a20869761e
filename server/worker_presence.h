/* worker_presence.h: a train worker's row in the database: what it runs on and how busy that is,
 * for whoever asks the API, and the name under which it holds leases.
 *
 * Told at the start and with every heartbeat: by the main thread while there is no job, by the
 * heartbeat's thread while there is one, each with its own connection. */
#ifndef GRAFT_WORKER_PRESENCE_H
#define GRAFT_WORKER_PRESENCE_H

#include "engine/base/err.h"
#include "engine/engine.h"
#include "storage/db.h"
#include "storage/ids.h"

struct worker_presence {
    char id[ID_SIZE];
    struct engine_device device; /* as it was found at the start */
    double told_at;              /* clock_now(); of the main thread */
};

/* Finds the device and makes the row. ERR_DEVICE where it is not there or can not be used: a worker
 * without a device may not take jobs. */
int worker_presence_begin(struct worker_presence *presence, struct db *db, const char *device,
                          struct err *err);
/* Trouble is logged: what is told is for people. */
void worker_presence_tell(const struct worker_presence *presence, struct db *db);
int worker_presence_end(const struct worker_presence *presence, struct db *db, struct err *err);

#endif
