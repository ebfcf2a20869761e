/* worker_presence.h: a train worker's row in the database: what it runs on and how busy that is,
 * for whoever asks the API, and the name under which it holds leases.
 *
 * Told at the start and with every heartbeat: by the main thread while there is no job, by the
 * heartbeat's thread while there is one, each with its own connection. */
#ifndef GRAFT_WORKER_PRESENCE_H
#define GRAFT_WORKER_PRESENCE_H

#include <stdatomic.h>

#include "engine/base/err.h"
#include "engine/engine.h"
#include "storage/db.h"
#include "storage/ids.h"

struct worker_presence {
    char id[ID_SIZE];
    struct engine_device device;               /* as it was found at the start */
    double told_at, sampled_at;                /* clock_now(); of the main thread */
    _Atomic int64_t memory_bytes, memory_free; /* of the device; the cpu's are asked for anew */
};

/* Finds the device and makes the row. ERR_DEVICE where it is not there or can not be used: a worker
 * without a device may not take jobs. */
int worker_presence_begin(struct worker_presence *presence, struct db *db, const char *device,
                          struct err *err);
/* Looks at the device's memory, once a second at most: by the thread that owns the engine, since a
 * driver may be asked by none other. */
void worker_presence_sample(struct worker_presence *presence, const struct engine *engine);
/* Trouble is logged: what is told is for people. */
void worker_presence_tell(const struct worker_presence *presence, struct db *db);
int worker_presence_end(const struct worker_presence *presence, struct db *db, struct err *err);

#endif
