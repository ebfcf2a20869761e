/* workers.h: the processes that work on jobs, as rows: enough of each to tell, on its own machine,
 * whether it still lives, so that a dead one's jobs need not wait for their leases to run out.
 * All functions need DB_ROLE_WORKER. */
#ifndef GRAFT_STORAGE_WORKERS_H
#define GRAFT_STORAGE_WORKERS_H

#include <stdint.h>
#include <sys/types.h>

#include "storage/db.h"
#include "storage/ids.h"

struct worker_identity {
    char boot_id[UUID_SIZE]; /* /proc/sys/kernel/random/boot_id */
    char pid_namespace[32];  /* /proc/self/ns/pid */
    pid_t pid;
    int64_t start_time; /* field 22 of /proc/PID/stat */
};
/* Of a process of this machine; ERR_NOT_FOUND where there is none (or only a zombie). */
int worker_identity_read(pid_t pid, struct worker_identity *out, struct err *err);

/* A row for this process; `id` is its name in leases. role: "train" or "infer". */
int workers_register(struct db *db, const char *role, char id[ID_SIZE], struct err *err);
/* The worker ended in order; it holds no leases any more. */
int workers_unregister(struct db *db, const char *id, struct err *err);
/* Ends every worker of this boot and pid namespace whose process is gone, and releases its leases
 * (crashes, unless poison is 0: see leases.h). For the start of a server and for the supervisor
 * when a child dies. *jobs: released. */
int workers_release_dead(struct db *db, int poison, int *jobs, struct err *err);

#endif
