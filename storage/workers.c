#include "storage/workers.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/base/log.h"
#include "storage/leases.h"

static int read_small(const char *path, char *out, size_t size)
{
    FILE *f = fopen(path, "re");
    size_t n;

    if (f == NULL)
        return -1;
    n = fread(out, 1, size - 1, f);
    fclose(f);
    out[n] = '\0';
    return n > 0 ? 0 : -1;
}

/* State (field 3) and start time (field 22) of /proc/PID/stat; the name in field 2 may hold blanks
 * and parentheses, so count from the last one. */
static int read_stat(pid_t pid, char *state, int64_t *start_time)
{
    char path[64], text[1024], *at;

    snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
    if (read_small(path, text, sizeof text) != 0)
        return -1;
    at = strrchr(text, ')');
    if (at == NULL || at[1] != ' ')
        return -1;
    at += 2;
    *state = *at;
    for (int field = 3; field < 22; field++) {
        at = strchr(at, ' ');
        if (at == NULL)
            return -1;
        at++;
    }
    *start_time = strtoll(at, NULL, 10);
    return 0;
}

int worker_identity_read(pid_t pid, struct worker_identity *out, struct err *err)
{
    char state = '?';
    ssize_t n;

    *out = (struct worker_identity){.pid = pid};
    if (read_small("/proc/sys/kernel/random/boot_id", out->boot_id, sizeof out->boot_id) != 0)
        return err_set(err, ERR_IO, "read the boot id: is /proc mounted?");
    out->boot_id[strcspn(out->boot_id, "\n")] = '\0';
    n = readlink("/proc/self/ns/pid", out->pid_namespace, sizeof out->pid_namespace - 1);
    if (n < 0)
        return err_set_errno(err, errno, "read the pid namespace");
    out->pid_namespace[n] = '\0';
    if (read_stat(pid, &state, &out->start_time) != 0 || state == 'Z' || state == 'X')
        return err_set(err, ERR_NOT_FOUND, "there is no process %d", (int)pid);
    return 0;
}

int workers_tell(struct db *db, const char *id, const struct worker_report *r, struct err *err)
{
    struct worker_identity me;

    if (worker_identity_read(getpid(), &me, err) != 0 || db_begin(db, NULL, err) != 0)
        return -1;
    if (db_exec(db,
                "INSERT INTO worker (id, role, boot_id, pid_namespace, pid, start_time, device,"
                "                    description, memory_bytes, memory_free, utilization, seen_at)"
                " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11::double precision, now())"
                " ON CONFLICT (id) DO UPDATE SET device = excluded.device,"
                "       description = excluded.description, memory_bytes = excluded.memory_bytes,"
                "       memory_free = excluded.memory_free, utilization = excluded.utilization,"
                "       seen_at = excluded.seen_at",
                DB_ARGS(DB_TEXT(id), DB_TEXT(r->role), DB_TEXT(me.boot_id),
                        DB_TEXT(me.pid_namespace), DB_INT(me.pid), DB_INT(me.start_time),
                        DB_TEXT(r->device), DB_TEXT(r->description), DB_INT(r->memory_bytes),
                        DB_INT(r->memory_free), DB_REAL(r->utilization)),
                NULL, err) != 0) {
        db_rollback(db);
        return -1;
    }
    return db_commit(db, err);
}

int workers_register(struct db *db, const struct worker_report *report, char id[ID_SIZE],
                     struct err *err)
{
    return id_new(ID_WORKER, id, err) != 0 ? -1 : workers_tell(db, id, report, err);
}

/* Its leases are let go and its row is gone, together. */
static int end_worker(struct db *db, const char *id, int poison, bool device_lost, int *jobs,
                      struct err *err)
{
    int released = 0;

    if (db_begin(db, NULL, err) != 0)
        return -1;
    if (leases_let_go(db, id, poison, device_lost, &released, err) != 0 ||
        db_exec(db, "DELETE FROM worker WHERE id = $1", DB_ARGS(DB_TEXT(id)), NULL, err) != 0) {
        db_rollback(db);
        return -1;
    }
    if (db_commit(db, err) != 0)
        return -1;
    *jobs += released;
    return 0;
}

int workers_device_lost(struct db *db, const char *id, int poison, struct err *err)
{
    int jobs = 0;

    return end_worker(db, id, poison, true, &jobs, err);
}

int workers_unregister(struct db *db, const char *id, struct err *err)
{
    int jobs = 0;

    return end_worker(db, id, 0, false, &jobs, err);
}

int workers_release_dead(struct db *db, int poison, int *jobs, struct err *err)
{
    struct worker_identity me, there;
    struct db_result *res = NULL;
    int rc = 0;

    *jobs = 0;
    if (worker_identity_read(getpid(), &me, err) != 0 || db_begin(db, NULL, err) != 0)
        return -1;
    if (db_exec(db,
                "SELECT id, pid, start_time FROM worker WHERE boot_id = $1 AND pid_namespace = $2",
                DB_ARGS(DB_TEXT(me.boot_id), DB_TEXT(me.pid_namespace)), &res, err) != 0) {
        db_rollback(db);
        return -1;
    }
    rc = db_commit(db, err);
    for (int i = 0; rc == 0 && i < db_rows(res); i++) {
        struct err why = {0};

        if (worker_identity_read((pid_t)db_int(res, i, 1), &there, &why) == 0) {
            if (there.start_time == db_int(res, i, 2))
                continue; /* it lives */
        } else if (why.kind != ERR_NOT_FOUND) {
            continue;
        }
        log_info("worker %s (process %lld) is gone", db_text(res, i, 0),
                 (long long)db_int(res, i, 1));
        rc = end_worker(db, db_text(res, i, 0), poison, false, jobs, err);
    }
    db_result_free(res);
    return rc;
}

int workers_forget(struct db *db, int *workers, struct err *err)
{
    struct db_result *res = NULL;

    *workers = 0;
    if (db_begin(db, NULL, err) != 0)
        return -1;
    if (db_exec(db, "DELETE FROM worker WHERE seen_at < now() - interval '1 day' RETURNING id",
                DB_NO_ARGS, &res, err) != 0) {
        db_rollback(db);
        return -1;
    }
    *workers = db_rows(res);
    db_result_free(res);
    return db_commit(db, err);
}

/* ------------------------------------------------------------------ the list */

static void read_row(const struct db_result *res, int i, const struct worker_identity *me,
                     struct worker_row *out)
{
    db_text_into(res, i, 0, out->id, sizeof out->id);
    db_text_into(res, i, 1, out->role, sizeof out->role);
    db_text_into(res, i, 2, out->device, sizeof out->device);
    db_text_into(res, i, 3, out->description, sizeof out->description);
    out->memory_bytes = db_int(res, i, 4);
    out->memory_free = db_int(res, i, 5);
    out->utilization = db_real(res, i, 6);
    out->seen_at = db_int(res, i, 7);
    out->here = strcmp(db_text(res, i, 8), me->boot_id) == 0 &&
                strcmp(db_text(res, i, 9), me->pid_namespace) == 0;
    out->pid = (pid_t)db_int(res, i, 10);
    out->busy = db_bool(res, i, 11);
    if (!db_is_null(res, i, 12))
        db_text_into(res, i, 12, out->job, sizeof out->job);
}

int workers_list(struct db *db, const char *project, struct worker_rows *out, struct err *err)
{
    struct db_result *res = NULL;
    struct worker_identity me;

    *out = (struct worker_rows){0};
    if (worker_identity_read(getpid(), &me, err) != 0 || db_begin(db, project, err) != 0)
        return -1;
    if (db_exec(db, "SELECT * FROM worker_list()", DB_NO_ARGS, &res, err) != 0) {
        db_rollback(db);
        return -1;
    }
    if (db_rows(res) > 0) {
        out->items = calloc((size_t)db_rows(res), sizeof *out->items);
        if (out->items == NULL) {
            db_result_free(res);
            db_rollback(db);
            return err_set(err, ERR_NO_MEMORY, "workers: out of memory");
        }
    }
    for (; out->count < db_rows(res); out->count++)
        read_row(res, out->count, &me, &out->items[out->count]);
    db_result_free(res);
    if (db_commit(db, err) == 0)
        return 0;
    worker_rows_release(out);
    return -1;
}

void worker_rows_release(struct worker_rows *rows)
{
    free(rows->items);
    *rows = (struct worker_rows){0};
}
