#include "storage/leases.h"

#include <assert.h>
#include <stdio.h>
#include <string.h>

#include "engine/base/log.h"
#include "storage/jobs.h"

int leases_claim(struct db *db, const char *worker, int32_t seconds, struct lease *out, bool *found,
                 struct err *err)
{
    struct db_result *res = NULL;

    *found = false;
    *out = (struct lease){0};
    if (db_begin(db, NULL, err) != 0)
        return -1;
    if (db_exec(db, "SELECT * FROM lease_claim($1, $2::integer)",
                DB_ARGS(DB_TEXT(worker), DB_INT(seconds)), &res, err) != 0) {
        db_rollback(db);
        return -1;
    }
    if (db_rows(res) == 1) {
        db_text_into(res, 0, 0, out->project, sizeof out->project);
        db_text_into(res, 0, 1, out->job, sizeof out->job);
        out->attempt = db_int(res, 0, 2);
        out->seconds = seconds;
        snprintf(out->worker, sizeof out->worker, "%s", worker);
        *found = true;
    }
    db_result_free(res);
    if (db_commit(db, err) != 0) {
        *found = false; /* if it was claimed after all, the lease runs out */
        return -1;
    }
    return 0;
}

/* Why a lease is not ours any more: the client cancelled the job under our hands, or another
 * attempt has it (or may have). */
static int lost(struct db *db, const struct lease *lease, bool same_attempt, struct err *err)
{
    struct db_result *res = NULL;
    bool cancelled;

    if (db_exec(db, "SELECT state FROM job WHERE tenant = $1::uuid AND id = $2",
                DB_ARGS(DB_TEXT(lease->project), DB_TEXT(lease->job)), &res, err) != 0)
        return -1;
    cancelled = db_rows(res) == 1 && strcmp(db_text(res, 0, 0), "cancelled") == 0;
    db_result_free(res);
    if (cancelled && same_attempt)
        return err_set(err, ERR_CANCELLED, "job %s was cancelled", lease->job);
    return err_set(err, ERR_FENCED, "attempt %lld of job %s is not its owner any more",
                   (long long)lease->attempt, lease->job);
}

int leases_lock(struct db *db, const struct lease *lease, struct err *err)
{
    struct db_result *res = NULL;
    bool same_attempt, ours;

    assert(db_in_transaction(db));
    if (db_exec(db,
                "SELECT attempt, worker FROM job_lease"
                " WHERE tenant = $1::uuid AND job = $2 FOR UPDATE",
                DB_ARGS(DB_TEXT(lease->project), DB_TEXT(lease->job)), &res, err) != 0)
        return -1;
    same_attempt = db_rows(res) == 1 && db_int(res, 0, 0) == lease->attempt;
    ours = same_attempt && db_text(res, 0, 1) != NULL &&
           strcmp(db_text(res, 0, 1), lease->worker) == 0;
    db_result_free(res);
    return ours ? 0 : lost(db, lease, same_attempt, err);
}

int leases_renew(struct db *db, const struct lease *lease, struct err *err)
{
    if (db_begin(db, lease->project, err) != 0)
        return -1;
    if (leases_lock(db, lease, err) != 0 ||
        db_exec(db,
                "UPDATE job_lease SET lease_until = clock_timestamp() + make_interval(secs => $3)"
                " WHERE tenant = $1::uuid AND job = $2",
                DB_ARGS(DB_TEXT(lease->project), DB_TEXT(lease->job), DB_INT(lease->seconds)), NULL,
                err) != 0) {
        db_rollback(db);
        return -1;
    }
    return db_commit(db, err);
}

int leases_release(struct db *db, const struct lease *lease, struct err *err)
{
    if (db_begin(db, lease->project, err) != 0)
        return -1;
    if (leases_lock(db, lease, err) != 0 ||
        db_exec(db,
                "UPDATE job_lease SET worker = NULL, lease_until = NULL, run_after = now()"
                " WHERE tenant = $1::uuid AND job = $2",
                DB_ARGS(DB_TEXT(lease->project), DB_TEXT(lease->job)), NULL, err) != 0) {
        db_rollback(db);
        return -1;
    }
    return db_commit(db, err);
}

int leases_let_go(struct db *db, const char *worker, int poison, bool device_lost, int *jobs,
                  struct err *err)
{
    struct db_result *res = NULL;
    int rc = 0;

    assert(db_in_transaction(db));
    *jobs = 0;
    if (db_exec(db, "SELECT * FROM lease_let_go($1, $2::integer, $3::boolean)",
                DB_ARGS(DB_TEXT(worker), DB_INT(poison), DB_BOOL(device_lost)), &res, err) != 0)
        return -1;
    for (int i = 0; rc == 0 && i < db_rows(res); i++) {
        const char *project = db_text(res, i, 0), *job = db_text(res, i, 1);

        log_warn("job %s: attempt %lld ended without leave", job, (long long)db_int(res, i, 2));
        (*jobs)++;
        if (!db_bool(res, i, 3))
            continue;
        rc = db_switch_tenant(db, project, err);
        if (rc == 0)
            rc = jobs_end_poisoned(db, project, job, poison, err);
    }
    db_result_free(res);
    return rc;
}

int leases_sweep(struct db *db, int poison, int *jobs, struct err *err)
{
    *jobs = 0;
    if (db_begin(db, NULL, err) != 0)
        return -1;
    if (leases_let_go(db, NULL, poison, false, jobs, err) != 0) {
        db_rollback(db);
        return -1;
    }
    return db_commit(db, err);
}
