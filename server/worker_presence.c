#include "server/worker_presence.h"

#include <stdio.h>
#include <string.h>

#include "engine/base/clock.h"
#include "engine/base/log.h"
#include "server/capacity.h"
#include "server/devices.h"
#include "server/worker_watch.h"
#include "storage/workers.h"

/* A child looks: the driver's first start is where it hangs, if it does. */
static int find_device(struct engine_device *out, const char *name, struct err *err)
{
    struct device_list list = {.count = 1};
    struct err why = {0};
    int count = 0;

    if (devices_is_cpu(name))
        return engine_device_find(name, out, err);
    snprintf(list.name[0], sizeof list.name[0], "%s", name);
    if (devices_probe(&list, out, 1, &count, &why) != 0 || count != 1)
        return err_set(err, ERR_DEVICE, "%s",
                       err_is_set(&why) ? why.message : "nothing is known of it");
    if (!out->usable)
        return err_set(err, ERR_DEVICE, "it can not be used: %s", out->reason);
    return 0;
}

static void make_report(const struct worker_presence *p, struct worker_report *out)
{
    *out = (struct worker_report){.role = "train",
                                  .device = p->device.name,
                                  .description = p->device.description,
                                  .memory_bytes = atomic_load(&p->memory_bytes),
                                  .memory_free = atomic_load(&p->memory_free),
                                  .utilization = worker_watch_utilization()};
    if (devices_is_cpu(p->device.name))
        capacity_machine(&out->memory_bytes, &out->memory_free);
}

int worker_presence_begin(struct worker_presence *presence, struct db *db, const char *device,
                          struct err *err)
{
    struct worker_report report;

    if (find_device(&presence->device, device, err) != 0)
        return -1;
    atomic_store(&presence->memory_bytes, presence->device.memory_bytes);
    atomic_store(&presence->memory_free, presence->device.memory_free);
    make_report(presence, &report);
    return workers_register(db, &report, presence->id, err);
}

void worker_presence_sample(struct worker_presence *presence, const struct engine *engine)
{
    int64_t bytes, bytes_free;

    if (clock_now() < presence->sampled_at + 1 || !engine_memory(engine, &bytes, &bytes_free))
        return;
    presence->sampled_at = clock_now();
    atomic_store(&presence->memory_bytes, bytes);
    atomic_store(&presence->memory_free, bytes_free);
}

void worker_presence_tell(const struct worker_presence *presence, struct db *db)
{
    struct worker_report report;
    struct err err = {0};

    make_report(presence, &report);
    if (workers_tell(db, presence->id, &report, &err) != 0)
        log_warn("the worker's row: %s", err.message);
}

int worker_presence_end(const struct worker_presence *presence, struct db *db, struct err *err)
{
    return workers_unregister(db, presence->id, err);
}
