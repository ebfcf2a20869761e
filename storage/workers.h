/* workers.h: the processes that work on jobs, as rows: enough of each to tell, on its own machine,
 * whether it still lives, so that a dead one's jobs need not wait for their leases to run out.
 * All functions but workers_list need DB_ROLE_WORKER. */
#ifndef GRAFT_STORAGE_WORKERS_H
#define GRAFT_STORAGE_WORKERS_H

#include <stdbool.h>
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

/* What a worker tells of itself. */
struct worker_report {
    const char *role;                  /* "train" or "infer" */
    const char *device;                /* "cpu", "cuda:0" */
    const char *description;           /* of the device */
    int64_t memory_bytes, memory_free; /* of the device; 0: not known */
    double utilization;                /* share of the last minute in which it computed */
};

/* A row for this process; `id` is its name in leases. */
int workers_register(struct db *db, const struct worker_report *report, char id[ID_SIZE],
                     struct err *err);
/* Brings the row up to date, and makes it anew where it was taken for a dead worker's. */
int workers_tell(struct db *db, const char *id, const struct worker_report *report,
                 struct err *err);
/* The worker ended in order; it holds no leases any more. */
int workers_unregister(struct db *db, const char *id, struct err *err);
/* This worker's device is lost and its process about to end: row and leases go (see leases.h). */
int workers_device_lost(struct db *db, const char *id, int poison, struct err *err);
/* Ends every worker of this boot and pid namespace whose process is gone, and releases its leases
 * (crashes, unless poison is 0: see leases.h). For the start of a server and for the supervisor
 * when a child dies. *jobs: released. */
int workers_release_dead(struct db *db, int poison, int *jobs, struct err *err);
/* Rows of workers elsewhere that nobody has heard of for a day; their leases ran out long ago. */
int workers_forget(struct db *db, int *workers, struct err *err);

struct worker_row {
    char id[ID_SIZE], role[8], device[16];
    char description[128];
    int64_t memory_bytes, memory_free;
    double utilization;
    int64_t seen_at; /* seconds since 1970 */
    bool here;       /* a process of this machine and pid namespace: */
    pid_t pid;
    bool busy;         /* it has a job, whoever's */
    char job[ID_SIZE]; /* of `project`; "": none of that */
};
struct worker_rows {
    struct worker_row *items;
    int count;
};
/* All workers, as `project` may see them (NULL: no job at all). DB_ROLE_APP will do. */
int workers_list(struct db *db, const char *project, struct worker_rows *out, struct err *err);
void worker_rows_release(struct worker_rows *rows);

#endif
