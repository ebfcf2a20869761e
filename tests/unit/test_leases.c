/* Who works on which job: one at a time, fenced, and given up when its worker dies. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "storage/events.h"
#include "tests/unit/pg_fixture.h"

struct claimer {
    const char *url;
    char name[24];
    char jobs[64][ID_SIZE];
    int count;
    bool failed;
};

static void *claim_all(void *context)
{
    struct claimer *c = context;
    struct db *db = NULL;
    struct lease lease;
    bool found = true;

    c->failed = db_open(&db, c->url, DB_ROLE_WORKER, NULL) != 0;
    while (!c->failed && found && c->count < 64) {
        c->failed = leases_claim(db, c->name, LEASE_SECONDS, &lease, &found, NULL) != 0;
        if (found)
            snprintf(c->jobs[c->count++], ID_SIZE, "%s", lease.job);
    }
    db_close(db);
    return NULL;
}

static void each_job_is_claimed_by_one(void **state)
{
    struct fixture *f = fixture();
    struct claimer claimers[4];
    pthread_t threads[4];
    char id[ID_SIZE];
    int total = 0;

    fixture_settle(f);
    for (int i = 0; i < 40; i++)
        fixture_job(f, i % 2 ? f->a.project : f->b.project, id);
    for (int i = 0; i < 4; i++) {
        claimers[i] = (struct claimer){.url = f->storage.url};
        snprintf(claimers[i].name, sizeof claimers[i].name, "worker-%d", i);
        assert_int_equal(pthread_create(&threads[i], NULL, claim_all, &claimers[i]), 0);
    }
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < 4; i++) {
        assert_false(claimers[i].failed);
        total += claimers[i].count;
        for (int k = 0; k < claimers[i].count; k++)
            for (int j = 0; j < i; j++)
                for (int l = 0; l < claimers[j].count; l++)
                    assert_string_not_equal(claimers[i].jobs[k], claimers[j].jobs[l]);
    }
    assert_int_equal(total, 40);
}

static void the_oldest_job_goes_first(void **state)
{
    struct fixture *f = fixture();
    char ids[3][ID_SIZE];
    struct lease lease;

    fixture_settle(f);
    for (int i = 0; i < 3; i++)
        fixture_job(f, i == 1 ? f->b.project : f->a.project, ids[i]);
    for (int i = 0; i < 3; i++) {
        fixture_claim(f, "worker-1", &lease);
        assert_string_equal(lease.job, ids[i]);
    }
}

static void a_stale_attempt_changes_nothing(void **state)
{
    struct fixture *f = fixture();
    char sha256[SHA256_HEX], newer_sha256[SHA256_HEX], old[96];
    struct lease stale, lease, forged;
    struct job_success success;
    struct err why = {0};
    int jobs;

    fixture_claimed_job(f, &stale);
    fixture_running(f, &stale);
    fixture_run_out(f, &stale);
    assert_ok(leases_sweep(f->worker, 100, &jobs, err));
    assert_int_equal(jobs, 1);
    fixture_end_backoff(f, &stale);
    fixture_claim(f, "worker-2", &lease);
    assert_string_equal(lease.job, stale.job);
    assert_int_equal(lease.attempt, 2);

    fixture_success(f, &stale, "stale\n", sha256, &success);
    assert_err(leases_renew(f->worker, &stale, err), ERR_FENCED);
    assert_err(leases_release(f->worker, &stale, err), ERR_FENCED);
    assert_err(events_append(f->worker, &stale, &(struct event_new){.message = "x"}, 1, err),
               ERR_FENCED);
    assert_err(jobs_progress(f->worker, &stale, 9, 0, err), ERR_FENCED);
    assert_err(jobs_set_recovery(f->worker, &stale, &(struct job_recovery){.name = "x"}, old, err),
               ERR_FENCED);
    assert_err(jobs_mark_compressing(f->worker, &stale, err), ERR_FENCED);
    assert_err(checkpoints_add(f->worker, &stale,
                               &(struct checkpoint_new){.step = 1, .artifact_sha256 = sha256}, err),
               ERR_FENCED);
    assert_err(jobs_commit_success(f->worker, &stale, &success, err), ERR_FENCED);
    err_set(&why, ERR_INVALID, "stale");
    assert_err(jobs_commit_failure(f->worker, &stale, &why, err), ERR_FENCED);
    /* The right attempt in another worker's name is no better. */
    forged = lease;
    snprintf(forged.worker, sizeof forged.worker, "worker-1");
    assert_err(jobs_commit_success(f->worker, &forged, &success, err), ERR_FENCED);

    /* The new owner goes the same way again and is not told off for it. */
    fixture_running(f, &lease);
    fixture_success(f, &lease, "fresh\n", newer_sha256, &success);
    assert_ok(jobs_commit_success(f->worker, &lease, &success, err));
    success.artifact_sha256 = sha256;
    assert_err(jobs_commit_success(f->worker, &stale, &success, err), ERR_FENCED);
    assert_int_equal(fixture_job_state(f, &lease), JOB_STATE_SUCCEEDED);
}

static void a_lease_that_runs_out_is_swept_and_a_living_one_is_not(void **state)
{
    struct fixture *f = fixture();
    struct lease lease, again;
    bool found;
    int jobs;

    fixture_claimed_job(f, &lease);
    assert_ok(leases_sweep(f->worker, 3, &jobs, err));
    assert_int_equal(jobs, 0);
    fixture_run_out(f, &lease);
    assert_ok(leases_renew(f->worker, &lease, err)); /* late, but nobody took it */
    assert_ok(leases_sweep(f->worker, 3, &jobs, err));
    assert_int_equal(jobs, 0);
    fixture_run_out(f, &lease);
    assert_ok(leases_sweep(f->worker, 3, &jobs, err));
    assert_int_equal(jobs, 1);
    assert_ok(leases_claim(f->worker, "worker-2", LEASE_SECONDS, &again, &found, err));
    assert_false(found); /* backing off */
    fixture_end_backoff(f, &lease);
    fixture_claim(f, "worker-2", &again);
    assert_int_equal(again.attempt, 2);
}

static void a_released_job_is_claimable_at_once(void **state)
{
    struct fixture *f = fixture();
    struct lease lease, again;
    struct job job;

    fixture_claimed_job(f, &lease);
    assert_ok(leases_release(f->worker, &lease, err));
    fixture_claim(f, "worker-2", &again);
    assert_int_equal(again.attempt, 2);
    assert_ok(jobs_get(f->app, lease.project, lease.job, &job, err));
    assert_int_equal(job.crashes, 0);
    job_release(&job);
}

static void a_poison_job_fails_after_three_crashes(void **state)
{
    struct fixture *f = fixture();
    struct event_list events;
    struct lease lease;
    struct job job;
    bool found;
    int jobs;

    fixture_claimed_job(f, &lease);
    fixture_running(f, &lease);
    for (int crash = 1; crash <= 3; crash++) {
        if (crash > 1)
            fixture_claim(f, "worker-1", &lease);
        assert_int_equal(lease.attempt, crash);
        fixture_run_out(f, &lease);
        assert_ok(leases_sweep(f->worker, LEASE_POISON_CRASHES, &jobs, err));
        assert_int_equal(jobs, 1);
        fixture_end_backoff(f, &lease);
    }
    assert_ok(jobs_get(f->app, lease.project, lease.job, &job, err));
    assert_int_equal(job.state, JOB_STATE_FAILED);
    assert_string_equal(job.error_code, "worker_crashed");
    job_release(&job);
    assert_ok(events_list(f->app, lease.project, lease.job, NULL, 1, &events, err));
    assert_string_equal(events.items[0].level, "error");
    event_list_release(&events);
    assert_ok(leases_claim(f->worker, "worker-1", LEASE_SECONDS, &lease, &found, err));
    assert_false(found);
}

static void progress_forgives_crashes(void **state)
{
    struct fixture *f = fixture();
    struct lease lease;
    char old[96];
    int jobs;

    fixture_claimed_job(f, &lease);
    fixture_running(f, &lease);
    for (int i = 1; i <= 8; i++) {
        struct job_recovery recovery = {.step = i / 2};

        if (i > 1)
            fixture_claim(f, "worker-1", &lease);
        /* Every second attempt gets further than the one before. */
        snprintf(recovery.name, sizeof recovery.name, "r%d", i);
        assert_ok(jobs_set_recovery(f->worker, &lease, &recovery, old, err));
        fixture_run_out(f, &lease);
        assert_ok(leases_sweep(f->worker, 2, &jobs, err));
        fixture_end_backoff(f, &lease);
        assert_int_equal(fixture_job_state(f, &lease), JOB_STATE_RUNNING);
    }
}

static const struct worker_report train = {.role = "train", .device = "cpu", .description = ""};

static void a_dead_workers_jobs_are_free_at_once(void **state)
{
    struct fixture *f = fixture();
    char mine[ID_SIZE], id[ID_SIZE], dead[ID_SIZE] = "";
    struct lease lease;
    struct job job;
    int pipes[2], jobs, status;
    pid_t child;
    bool found;

    fixture_settle(f);
    assert_ok(workers_register(f->worker, &train, mine, err));
    assert_int_equal(pipe(pipes), 0);
    child = fork();
    if (child == 0) {
        struct db *db;
        bool ok = db_open(&db, f->storage.url, DB_ROLE_WORKER, NULL) == 0 &&
                  workers_register(db, &train, dead, NULL) == 0 &&
                  write(pipes[1], dead, sizeof dead) == sizeof dead;

        if (ok)
            pause();
        _exit(1);
    }
    assert_int_equal(read(pipes[0], dead, sizeof dead), sizeof dead);
    fixture_job(f, f->a.project, id);
    fixture_claim(f, dead, &lease);
    assert_ok(workers_release_dead(f->worker, 3, &jobs, err));
    assert_int_equal(jobs, 0); /* both live */
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
    assert_ok(workers_release_dead(f->worker, 0, &jobs, err));
    assert_int_equal(jobs, 1);
    assert_err(leases_renew(f->worker, &lease, err), ERR_FENCED);
    assert_ok(leases_claim(f->worker, mine, LEASE_SECONDS, &lease, &found, err));
    assert_true(found);
    assert_string_equal(lease.job, id);
    assert_ok(jobs_get(f->app, lease.project, lease.job, &job, err));
    assert_int_equal(job.crashes, 0); /* poison 0: nobody's fault */
    job_release(&job);
    assert_ok(workers_unregister(f->worker, mine, err));
    assert_err(leases_renew(f->worker, &lease, err), ERR_FENCED);
    close(pipes[0]);
    close(pipes[1]);
}

static int64_t crashes_of(struct fixture *f, const struct lease *lease)
{
    struct job job;
    int64_t crashes;

    assert_ok(jobs_get(f->app, lease->project, lease->job, &job, err));
    crashes = job.crashes;
    job_release(&job);
    return crashes;
}

/* The claimed job's worker loses its device. true: the job may be claimed at once. */
static bool lose_device(struct fixture *f, const struct lease *lease)
{
    char sql[256];

    assert_ok(workers_device_lost(f->worker, lease->worker, 2, err));
    snprintf(sql, sizeof sql,
             "SELECT (run_after <= now())::integer FROM graft.job_lease WHERE job = '%s'",
             lease->job);
    return fixture_number(f, sql) == 1;
}

static void a_lost_device_is_nobodys_fault_the_first_time(void **state)
{
    struct job_recovery recovery = {.step = 5, .name = "r5"};
    struct fixture *f = fixture();
    struct lease lease;
    char old[96];

    fixture_claimed_job(f, &lease);
    fixture_running(f, &lease);
    assert_true(lose_device(f, &lease));
    assert_int_equal(crashes_of(f, &lease), 0);
    assert_err(leases_renew(f->worker, &lease, err), ERR_FENCED);
    fixture_claim(f, "worker-2", &lease);
    assert_false(lose_device(f, &lease)); /* again, and no further: counted, with a pause */
    assert_int_equal(crashes_of(f, &lease), 1);
    fixture_end_backoff(f, &lease);
    /* A checkpoint on the way, and the count begins anew. */
    fixture_claim(f, "worker-3", &lease);
    assert_ok(jobs_set_recovery(f->worker, &lease, &recovery, old, err));
    assert_true(lose_device(f, &lease));
    assert_int_equal(crashes_of(f, &lease), 0);
    fixture_claim(f, "worker-1", &lease);
    assert_false(lose_device(f, &lease));
    fixture_end_backoff(f, &lease);
    /* A job that kills one device after the other must end. */
    fixture_claim(f, "worker-2", &lease);
    assert_false(lose_device(f, &lease));
    assert_int_equal(fixture_job_state(f, &lease), JOB_STATE_FAILED);
}

static const struct worker_row *row_of(const struct worker_rows *rows, const char *id)
{
    for (int i = 0; i < rows->count; i++) {
        if (strcmp(rows->items[i].id, id) == 0)
            return &rows->items[i];
    }
    return NULL;
}

static void a_job_that_lost_its_device_goes_to_another(void **state)
{
    const struct worker_report first = {.role = "train", .device = "shim:0", .description = ""},
                               second = {.role = "train", .device = "shim:1", .description = ""};
    struct fixture *f = fixture();
    struct lease lease;
    char here[ID_SIZE], elsewhere[ID_SIZE], id[ID_SIZE];
    bool found;

    fixture_settle(f);
    fixture_job(f, f->a.project, id);
    assert_ok(workers_register(f->worker, &first, here, err));
    assert_ok(leases_claim(f->worker, here, 30, &lease, &found, err));
    assert_true(found);
    assert_true(lose_device(f, &lease));
    /* The device is back, and there is no other: it may be the device's last chance to be well. */
    assert_ok(workers_register(f->worker, &first, here, err));
    assert_ok(leases_claim(f->worker, here, 30, &lease, &found, err));
    assert_true(found);
    assert_false(lose_device(f, &lease));
    fixture_end_backoff(f, &lease);
    assert_ok(workers_register(f->worker, &first, here, err));
    assert_ok(workers_register(f->worker, &second, elsewhere, err));
    assert_ok(leases_claim(f->worker, here, 30, &lease, &found, err));
    assert_false(found);
    assert_ok(leases_claim(f->worker, elsewhere, 30, &lease, &found, err));
    assert_true(found);
    /* Not for ever: the other may be busy for hours. */
    assert_ok(leases_release(f->worker, &lease, err));
    fixture_admin(f, "UPDATE graft.job_lease SET lost_at = now() - interval '1 day'");
    assert_ok(leases_claim(f->worker, here, 30, &lease, &found, err));
    assert_true(found);
    assert_ok(workers_unregister(f->worker, here, err));
    assert_ok(workers_unregister(f->worker, elsewhere, err));
}

static void workers_tell_what_they_do(void **state)
{
    struct worker_report report = {.role = "train",
                                   .device = "cuda:1",
                                   .description = "a card",
                                   .memory_bytes = 1000,
                                   .memory_free = 900};
    struct fixture *f = fixture();
    const struct worker_row *row;
    struct worker_rows rows;
    char id[ID_SIZE], job[ID_SIZE];
    struct lease lease;
    int gone;

    fixture_settle(f);
    assert_ok(workers_register(f->worker, &report, id, err));
    report.memory_free = 100;
    report.utilization = 0.75;
    assert_ok(workers_tell(f->worker, id, &report, err));
    assert_ok(workers_list(f->app, f->a.project, &rows, err));
    row = row_of(&rows, id);
    assert_non_null(row);
    assert_string_equal(row->role, "train");
    assert_string_equal(row->device, "cuda:1");
    assert_string_equal(row->description, "a card");
    assert_int_equal(row->memory_free, 100);
    assert_true(row->utilization == 0.75);
    assert_true(row->here && row->pid == getpid());
    assert_false(row->busy);
    worker_rows_release(&rows);

    /* Its job is its project's alone; others see that it is busy. */
    fixture_job(f, f->a.project, job);
    fixture_claim(f, id, &lease);
    assert_ok(workers_list(f->app, f->a.project, &rows, err));
    assert_string_equal(row_of(&rows, id)->job, job);
    worker_rows_release(&rows);
    assert_ok(workers_list(f->app, f->b.project, &rows, err));
    assert_true(row_of(&rows, id)->busy);
    assert_string_equal(row_of(&rows, id)->job, "");
    worker_rows_release(&rows);
    assert_ok(workers_list(f->app, NULL, &rows, err));
    assert_string_equal(row_of(&rows, id)->job, "");
    worker_rows_release(&rows);

    /* Silent for a day: forgotten. Telling brings the row back. */
    assert_ok(workers_forget(f->worker, &gone, err));
    assert_int_equal(gone, 0);
    fixture_admin(f, "UPDATE graft.worker SET seen_at = now() - interval '25 hours'");
    assert_ok(workers_forget(f->worker, &gone, err));
    assert_int_equal(gone, 1);
    assert_ok(workers_tell(f->worker, id, &report, err));
    assert_ok(workers_list(f->app, NULL, &rows, err));
    assert_non_null(row_of(&rows, id));
    worker_rows_release(&rows);
    assert_ok(workers_unregister(f->worker, id, err));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_job_is_claimed_by_one),
        cmocka_unit_test(the_oldest_job_goes_first),
        cmocka_unit_test(a_stale_attempt_changes_nothing),
        cmocka_unit_test(a_lease_that_runs_out_is_swept_and_a_living_one_is_not),
        cmocka_unit_test(a_released_job_is_claimable_at_once),
        cmocka_unit_test(a_poison_job_fails_after_three_crashes),
        cmocka_unit_test(progress_forgives_crashes),
        cmocka_unit_test(a_dead_workers_jobs_are_free_at_once),
        cmocka_unit_test(a_lost_device_is_nobodys_fault_the_first_time),
        cmocka_unit_test(a_job_that_lost_its_device_goes_to_another),
        cmocka_unit_test(workers_tell_what_they_do),
    };

    return cmocka_run_group_tests(tests, fixture_setup, fixture_teardown);
}
