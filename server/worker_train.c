/* The train worker: takes a job, holds its lease, and brings it to its end. What a job does between
 * is in worker_job.c. */
#include <stdlib.h>
#include <string.h>

#include "engine/base/clock.h"
#include "engine/base/log.h"
#include "server/worker.h"
#include "server/worker_job.h"
#include "server/worker_watch.h"
#include "storage/db.h"
#include "storage/leases.h"
#include "storage/storage.h"

/* With a URL the database is somebody else's to start; without one, a worker that was started by
 * hand shares the private database as any other command does. */
static int open_storage(struct storage *storage, const struct settings *settings, struct err *err)
{
    if (settings->database[0] != '\0')
        return storage_attach(storage, settings->data, settings->database, err);
    return storage_open(storage, settings->data, NULL, err);
}

/* One look for work. Trouble with the database is no reason to die: it is the same for the next
 * process. */
static void look_for_work(struct worker_job_context *cx, const char *worker)
{
    struct err err = {0};
    struct lease lease;
    bool found = false;

    if (leases_claim(cx->db, worker, (int32_t)cx->settings->lease, &lease, &found, &err) != 0) {
        log_warn("claim: %s", err.message);
        worker_sleep(cx->settings->poll);
        return;
    }
    if (found)
        worker_job_run(cx, &lease);
    else
        worker_sleep(cx->settings->poll);
}

static void tell_presence(struct worker_job_context *cx, struct worker_presence *presence)
{
    if (clock_now() < presence->told_at + cx->settings->heartbeat)
        return;
    presence->told_at = clock_now();
    worker_presence_tell(presence, cx->db);
}

/* The device is stuck, and the main thread with it: a connection of our own lets the job go, so
 * that another device has it at once. Where that fails, whoever finds us dead does it. */
static void let_go(void *context)
{
    const struct worker_job_context *cx = context;
    struct err err = {0};
    struct db *db = NULL;

    if (db_open(&db, cx->url, DB_ROLE_WORKER, &err) != 0 ||
        workers_device_lost(db, cx->presence->id, (int)cx->settings->max_attempts, &err) != 0)
        log_warn("the lease could not be let go: %s", err.message);
}

int worker_train_run(const struct settings *settings, const char *device, struct err *err)
{
    struct worker_presence presence = {0};
    struct worker_job_context cx = {.settings = settings, .device = device, .presence = &presence};
    struct storage storage = {0};
    int rc = -1;

    if (open_storage(&storage, settings, err) != 0 ||
        db_open(&cx.db, storage.url, DB_ROLE_WORKER, err) != 0 ||
        worker_presence_begin(&presence, cx.db, device, err) != 0)
        goto out;
    cx.blobs = storage.blobs;
    cx.url = storage.url;
    worker_watch_on_stuck(let_go, &cx);
    while (!worker_stopping()) {
        tell_presence(&cx, &presence);
        look_for_work(&cx, presence.id);
    }
    rc = worker_presence_end(&presence, cx.db, err);
out:
    db_close(cx.db);
    storage_release(&storage);
    return rc;
}
