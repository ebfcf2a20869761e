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

int workers_register(struct db *db, const char *role, char id[ID_SIZE], struct err *err)
{
    struct worker_identity me;

    if (worker_identity_read(getpid(), &me, err) != 0 || id_new(ID_WORKER, id, err) != 0 ||
        db_begin(db, NULL, err) != 0)
        return -1;
    if (db_exec(db,
                "INSERT INTO worker (id, role, boot_id, pid_namespace, pid, start_time)"
                " VALUES ($1, $2, $3, $4, $5, $6)",
                DB_ARGS(DB_TEXT(id), DB_TEXT(role), DB_TEXT(me.boot_id), DB_TEXT(me.pid_namespace),
                        DB_INT(me.pid), DB_INT(me.start_time)),
                NULL, err) != 0) {
        db_rollback(db);
        return -1;
    }
    return db_commit(db, err);
}

/* Its leases are let go and its row is gone, together. */
static int end_worker(struct db *db, const char *id, int poison, int *jobs, struct err *err)
{
    int released = 0;

    if (db_begin(db, NULL, err) != 0)
        return -1;
    if (leases_let_go(db, id, poison, &released, err) != 0 ||
        db_exec(db, "DELETE FROM worker WHERE id = $1", DB_ARGS(DB_TEXT(id)), NULL, err) != 0) {
        db_rollback(db);
        return -1;
    }
    if (db_commit(db, err) != 0)
        return -1;
    *jobs += released;
    return 0;
}

int workers_unregister(struct db *db, const char *id, struct err *err)
{
    int jobs = 0;

    return end_worker(db, id, 0, &jobs, err);
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
        rc = end_worker(db, db_text(res, i, 0), poison, jobs, err);
    }
    db_result_free(res);
    return rc;
}
