/* leases.h: which worker may work on which job, and for how long.
 *
 * A claim gives a lease of 30 s (or what the holder asks for) on PostgreSQL's clock and a new
 * attempt number. The attempt is the fence: every later write names it, and a write of an older
 * attempt changes nothing (ERR_FENCED). The holder renews each 5 s; a worker whose renewals have
 * failed for 20 s must stop touching shared storage by itself: settings `lease`, `heartbeat` and
 * `fence` say how long in each case. A lease that ran out, or whose worker is
 * known to be dead, makes the job claimable again, after a back-off of 1, 5, 25 s ± 50 %.
 *
 * An attempt that ended without leave and without a recovery checkpoint further than the one it
 * began from counts as a crash; `poison` crashes in a row, and the job has failed with code
 * worker_crashed. With poison 0 the end is nobody's fault and does not count. An attempt whose
 * device was lost does not count the first time and its job is claimable at once; again without
 * progress, and it counts.
 *
 * Roles: all functions here need DB_ROLE_WORKER. */
#ifndef GRAFT_STORAGE_LEASES_H
#define GRAFT_STORAGE_LEASES_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "storage/db.h"
#include "storage/ids.h"
#include "storage/workers.h"

#define LEASE_SECONDS 30 /* unless another length is asked for */
#define LEASE_POISON_CRASHES 3

/* What a holder shows with every write: plain data, copy it freely (to the heartbeat's thread). */
struct lease {
    char project[UUID_SIZE];
    char job[ID_SIZE];
    char worker[ID_SIZE];
    int64_t attempt; /* 1, 2, … */
    int32_t seconds; /* length, from the claim and from each renewal */
};

/* The oldest job that waits, or found = false. Cheap enough to call each second. */
int leases_claim(struct db *db, const char *worker, int32_t seconds, struct lease *out, bool *found,
                 struct err *err);
/* For the modules that write in a worker's name: inside a transaction of the lease's project, locks
 * the job's lease row to the transaction's end. ERR_FENCED, ERR_CANCELLED as in leases_renew. */
int leases_lock(struct db *db, const struct lease *lease, struct err *err);
/* Inside a transaction: lets go of a dead worker's leases, or (worker NULL) of those that ran out.
 * device_lost: the worker's device is why. */
int leases_let_go(struct db *db, const char *worker, int poison, bool device_lost, int *jobs,
                  struct err *err);

/* `seconds` more, from now. ERR_FENCED: not ours any more, touch nothing. ERR_CANCELLED: the client
 * has cancelled the job (its state says so already): stop, remove staging, claim the next. Anything
 * else: try again, and mind the time since the last success. */
int leases_renew(struct db *db, const struct lease *lease, struct err *err);
/* Handed back in order (shutdown): claimable at once, not a crash. */
int leases_release(struct db *db, const struct lease *lease, struct err *err);
/* One round of the sweeper: lets go of leases that ran out. poison: LEASE_POISON_CRASHES, or
 * another limit in tests. *jobs: released. */
int leases_sweep(struct db *db, int poison, int *jobs, struct err *err);

#endif
