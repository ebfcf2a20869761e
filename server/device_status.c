#include "server/device_status.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "server/infer_client.h"
#include "server/supervisor.h"
#include "storage/workers.h"

static const char *role_name(bool train)
{
    return train ? "train" : "infer";
}

static void describe(const struct api_context *api, struct device_status *s)
{
    int at = api->devices != NULL ? devices_index(api->devices, s->device) : -1;

    if (at >= 0 && s->description[0] == '\0')
        snprintf(s->description, sizeof s->description, "%s", api->devices->description[at]);
}

static void from_row(struct device_status *s, const struct worker_row *row)
{
    memcpy(s->device, row->device, sizeof s->device);
    memcpy(s->description, row->description, sizeof s->description);
    memcpy(s->job, row->job, sizeof s->job);
    s->role = role_name(strcmp(row->role, "train") == 0);
    s->state = row->busy ? "busy" : "idle";
    s->memory_bytes = row->memory_bytes;
    s->memory_free = row->memory_free;
    s->utilization = row->utilization;
    s->seen_at = row->seen_at;
}

static void from_infer(struct device_status *s, struct infer_client *infer)
{
    struct infer_client_stats stats;

    infer_client_stats(infer, &stats);
    if (!stats.ready)
        return;
    s->state = stats.open > 0 ? "busy" : "idle";
    s->memory_bytes = stats.worker.memory_bytes;
    s->memory_free = stats.worker.memory_free;
    s->utilization = stats.worker.utilization;
}

static void from_supervisor(struct device_status *s, const struct supervisor_worker *w, int number)
{
    *s = (struct device_status){.role = role_name(w->train),
                                .state = w->pid == 0 ? "restarting" : "starting",
                                .ours = true,
                                .worker = number,
                                .restarts = w->restarts,
                                .lost = w->lost};
    memcpy(s->device, w->device, sizeof s->device);
    memcpy(s->reason, w->reason, sizeof s->reason);
}

/* The row of this process, which then belongs to nobody else. */
static struct worker_row *take_row(struct worker_rows *rows, pid_t pid)
{
    for (int i = 0; pid != 0 && i < rows->count; i++) {
        struct worker_row *row = &rows->items[i];

        if (row->here && row->pid == pid) {
            row->here = false;
            row->pid = 0;
            return row;
        }
    }
    return NULL;
}

static void add_ours(struct device_status_list *out, struct api_context *api,
                     const struct supervisor_worker *workers, int count, struct worker_rows *rows)
{
    for (int i = 0; i < count; i++) {
        struct device_status *s = &out->items[out->count++];
        const struct worker_row *row = take_row(rows, workers[i].pid);

        from_supervisor(s, &workers[i], i);
        if (row != NULL)
            from_row(s, row);
        else if (!workers[i].train && workers[i].pid != 0)
            from_infer(s, api->infer);
        describe(api, s);
    }
}

/* A process that is gone; its row goes with the sweeper's next round. */
static bool is_dead(const struct worker_row *row)
{
    return row->here && kill(row->pid, 0) != 0 && errno == ESRCH;
}

/* Workers of other machines, and those started by hand. */
static void add_others(struct device_status_list *out, const struct worker_rows *rows)
{
    time_t now = time(NULL);

    for (int i = 0; i < rows->count; i++) {
        struct device_status *s = &out->items[out->count];

        if (rows->items[i].pid == 0 || is_dead(&rows->items[i]))
            continue;
        *s = (struct device_status){0};
        from_row(s, &rows->items[i]);
        if (s->seen_at < (int64_t)now - DEVICE_STATUS_SILENT)
            s->state = "silent";
        out->count++;
    }
}

int device_status_collect(struct device_status_list *out, struct api_context *api, struct db *db,
                          const char *project, struct err *err)
{
    struct supervisor_worker *workers = NULL;
    struct worker_rows rows = {0};
    int count = 0, rc = -1;

    *out = (struct device_status_list){0};
    if (db != NULL && workers_list(db, project, &rows, err) != 0)
        return -1;
    if (api->supervisor != NULL)
        count = supervisor_workers(api->supervisor, NULL, 0);
    workers = calloc((size_t)count + 1, sizeof *workers);
    out->items = calloc((size_t)count + (size_t)rows.count + 1, sizeof *out->items);
    if (workers == NULL || out->items == NULL) {
        err_set(err, ERR_NO_MEMORY, "devices: out of memory");
        goto out;
    }
    if (count > 0)
        supervisor_workers(api->supervisor, workers, count);
    add_ours(out, api, workers, count, &rows);
    add_others(out, &rows);
    rc = 0;
out:
    if (rc != 0)
        device_status_list_release(out);
    worker_rows_release(&rows);
    free(workers);
    return rc;
}

void device_status_list_release(struct device_status_list *list)
{
    free(list->items);
    *list = (struct device_status_list){0};
}
