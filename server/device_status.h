/* device_status.h: what every worker's device is and does, put together from those who know it: the
 * supervisor (is there a process, how often was the device lost), the infer worker's own word over
 * its line, and the rows that train workers keep in the database, those of other machines too.
 *
 * For GET /v1/graft/devices and /metrics. Any thread. */
#ifndef GRAFT_DEVICE_STATUS_H
#define GRAFT_DEVICE_STATUS_H

#include <stdbool.h>
#include <stdint.h>

#include "engine/base/err.h"
#include "server/api_context.h"
#include "server/devices.h"
#include "storage/db.h"
#include "storage/ids.h"

#define DEVICE_STATUS_SILENT 60 /* s without a word from a worker elsewhere */

struct device_status {
    char device[DEVICE_NAME_SIZE];
    const char *role; /* "train" or "infer" */
    /* "busy", "idle"; "starting": a process without a word yet; "restarting": no process at the
     * moment; "silent": a worker elsewhere of which nothing was heard for a while. */
    const char *state;
    char description[128];             /* "": not known */
    int64_t memory_bytes, memory_free; /* 0: not known */
    double utilization;                /* share of the last minute in which it computed */
    char job[ID_SIZE];                 /* of the project that asks; "": none of that */
    int64_t seen_at;                   /* seconds since 1970; 0: now */
    /* Of this server's workers: */
    bool ours;
    int worker;             /* number, from 0 */
    int64_t restarts, lost; /* deaths answered with a new process; those that the device caused */
    char reason[256];       /* of the last of these; "" */
};

struct device_status_list {
    struct device_status *items;
    int count;
};

/* db: DB_ROLE_APP, NULL where it is away (what the database knows is left out). project: whose jobs
 * may be named; NULL: nobody's. */
int device_status_collect(struct device_status_list *out, struct api_context *api, struct db *db,
                          const char *project, struct err *err);
void device_status_list_release(struct device_status_list *list);

#endif
