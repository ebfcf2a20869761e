/* The collector removes what nobody owns, and nothing else. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/base/file_io.h"
#include "storage/collector.h"
#include "storage/migrate.h"
#include "storage/models.h"
#include "tests/unit/pg_fixture.h"

static const struct collector_options no_grace = {0, 0};

static bool there(struct fixture *f, const char *owner, const char *sha256)
{
    char *path = NULL;
    bool yes = blob_path(f->storage.blobs, owner, sha256, &path, NULL) == 0;

    free(path);
    return yes;
}

static void make_recovery(struct fixture *f, const struct lease *lease, int step,
                          struct job_recovery *out)
{
    char *path;

    *out = (struct job_recovery){.step = step, .bytes = 5};
    assert_ok(
        blob_recovery_name(lease->job, lease->attempt, step, out->name, sizeof out->name, err));
    assert_ok(blob_recovery_path(f->storage.blobs, out->name, &path, err));
    assert_ok(file_write_durable(path, "state", 5, err));
    free(path);
}

static bool recovery_there(struct fixture *f, const struct job_recovery *recovery)
{
    char *path;
    bool yes;

    assert_ok(blob_recovery_path(f->storage.blobs, recovery->name, &path, err));
    yes = access(path, F_OK) == 0;
    free(path);
    return yes;
}

static void claim(struct fixture *f, struct lease *lease)
{
    bool found;

    assert_ok(leases_claim(f->worker, "worker-1", LEASE_SECONDS, lease, &found, err));
    assert_true(found);
}

static void run(struct fixture *f, const struct collector_options *options,
                struct collector_report *report)
{
    assert_ok(collector_run(f->worker, f->storage.blobs, options, report, err));
}

static void a_blob_goes_with_its_last_row(void **state)
{
    struct fixture *f = fixture();
    char one[ID_SIZE], two[ID_SIZE], sha256[SHA256_HEX], orphan[SHA256_HEX];
    struct collector_report report;
    struct file file;

    fixture_file(f, f->a.project, "twice\n", one);
    fixture_file(f, f->a.project, "twice\n", two);
    fixture_blob(f, f->a.project, "orphan\n", orphan);
    assert_ok(files_get(f->app, f->a.project, one, &file, err));
    snprintf(sha256, sizeof sha256, "%s", file.sha256);
    file_release(&file);

    /* Within its grace a blob without a row stays: its upload may be about to write the row. */
    run(f, &(struct collector_options){3600, 3600}, &report);
    assert_int_equal(report.blobs, 0);
    assert_true(there(f, f->a.project, orphan));

    run(f, &no_grace, &report);
    assert_int_equal(report.blobs, 1);
    assert_int_equal(report.blob_bytes, 7);
    assert_false(there(f, f->a.project, orphan));
    assert_ok(files_delete(f->app, f->a.project, one, err));
    run(f, &no_grace, &report);
    assert_true(there(f, f->a.project, sha256));
    assert_ok(files_delete(f->app, f->a.project, two, err));
    run(f, &no_grace, &report);
    assert_int_equal(report.blobs, 1);
    assert_false(there(f, f->a.project, sha256));
}

static void a_job_keeps_its_bytes_until_it_ends(void **state)
{
    struct fixture *f = fixture();
    struct collector_report report;
    char id[ID_SIZE];
    struct job job;

    fixture_job(f, f->a.project, id);
    assert_ok(jobs_get(f->app, f->a.project, id, &job, err));
    assert_ok(files_delete(f->app, f->a.project, job.training_file, err));
    run(f, &no_grace, &report);
    assert_true(there(f, f->a.project, job.training_sha256));
    assert_true(there(f, BLOB_OWNER_BASE, job.base_sha256));
    job_release(&job);
    assert_ok(jobs_cancel(f->app, f->a.project, id, &job, err));
    run(f, &no_grace, &report);
    assert_false(there(f, f->a.project, job.training_sha256));
    assert_true(there(f, BLOB_OWNER_BASE, job.base_sha256)); /* the base has its own row */
    job_release(&job);
}

/* The file goes while the job is being made: either the job finds it gone, or it keeps the bytes.
 */
static void a_job_in_the_making_keeps_its_bytes(void **state)
{
    struct fixture *f = fixture();
    struct collector_report report;
    struct job job, cancelled;
    char file[ID_SIZE];
    struct db *other;

    fixture_base(f);
    fixture_file(f, f->a.project, "in the making\n", file);
    assert_ok(db_open(&other, f->storage.url, DB_ROLE_APP, err));
    assert_ok(db_exec(other, "SET lock_timeout = '100ms'", DB_NO_ARGS, NULL, err));
    assert_ok(db_begin(f->app, f->a.project, err));
    assert_ok(jobs_create(f->app, f->a.project,
                          &(struct job_new){.model = "tiny", .training_file = file, .seed = 1},
                          &job, err));
    assert_err(files_delete(other, f->a.project, file, err), ERR_UNAVAILABLE); /* it would wait */
    run(f, &no_grace, &report);
    assert_ok(db_commit(f->app, err));
    assert_ok(files_delete(other, f->a.project, file, err));
    run(f, &no_grace, &report);
    assert_true(there(f, f->a.project, job.training_sha256));
    assert_ok(jobs_cancel(f->app, f->a.project, job.id, &cancelled, err));
    job_release(&cancelled);
    job_release(&job);
    db_close(other);
}

/* As above, of the file that an import makes a model of. */
static void an_import_in_the_making_keeps_its_bytes(void **state)
{
    struct fixture *f = fixture();
    const char *project = f->a.project;
    char sha256[SHA256_HEX];
    struct collector_report report;
    struct model_new new = {0};
    struct model model;
    struct base base;
    struct file file;
    struct db *other;

    fixture_base(f);
    assert_ok(bases_get(f->app, "tiny", &base, err));
    fixture_blob(f, project, "imported\n", sha256);
    assert_ok(files_create(
        f->app, project,
        &(struct file_new){
            .filename = "delta", .purpose = "graft-delta", .bytes = 9, .sha256 = sha256},
        &file, err));
    new.file = file.id;
    new.base = &base;
    assert_ok(db_open(&other, f->storage.url, DB_ROLE_APP, err));
    assert_ok(db_exec(other, "SET lock_timeout = '100ms'", DB_NO_ARGS, NULL, err));
    assert_ok(db_begin(f->app, project, err));
    assert_ok(models_import(f->app, project, &new, &model, err));
    assert_err(files_delete(other, project, file.id, err), ERR_UNAVAILABLE); /* it would wait */
    run(f, &no_grace, &report);
    assert_ok(db_commit(f->app, err));
    assert_ok(files_delete(other, project, file.id, err));
    run(f, &no_grace, &report);
    assert_true(there(f, project, sha256));
    assert_err(models_import(f->app, project, &new, &model, err), ERR_INVALID); /* too late */
    assert_ok(models_delete(f->app, project, model.name, err));
    run(f, &no_grace, &report);
    assert_false(there(f, project, sha256));
    file_release(&file);
    db_close(other);
}

static void a_model_and_its_checkpoints_keep_theirs(void **state)
{
    struct fixture *f = fixture();
    char id[ID_SIZE], artifact[SHA256_HEX], checkpoint[SHA256_HEX];
    struct collector_report report;
    struct lease lease;
    struct job job;

    fixture_job(f, f->a.project, id);
    claim(f, &lease);
    assert_ok(jobs_mark_validated(f->worker, &lease, &(struct job_dataset){.examples = 10}, err));
    assert_ok(jobs_mark_running(f->worker, &lease, &(struct job_plan){.total_steps = 1}, err));
    fixture_blob(f, f->a.project, "artifact\n", artifact);
    fixture_blob(f, f->a.project, "checkpoint\n", checkpoint);
    assert_ok(checkpoints_add(
        f->worker, &lease,
        &(struct checkpoint_new){.step = 1, .artifact_sha256 = checkpoint, .artifact_bytes = 11},
        err));
    assert_ok(jobs_commit_success(f->worker, &lease,
                                  &(struct job_success){.artifact_sha256 = artifact,
                                                        .delta = {.codec = "bitdelta", .bytes = 9}},
                                  err));
    run(f, &no_grace, &report);
    assert_true(there(f, f->a.project, artifact));
    assert_true(there(f, f->a.project, checkpoint));
    assert_ok(jobs_get(f->app, f->a.project, id, &job, err));
    assert_ok(models_delete(f->app, f->a.project, job.model_name, err));
    job_release(&job);
    run(f, &no_grace, &report);
    assert_false(there(f, f->a.project, artifact));
    assert_true(there(f, f->a.project, checkpoint));
}

static void finish_with_checkpoints(struct fixture *f, char id[ID_SIZE], char step[2][SHA256_HEX])
{
    struct lease lease;

    fixture_job(f, f->a.project, id);
    claim(f, &lease);
    assert_ok(jobs_mark_validated(f->worker, &lease, &(struct job_dataset){.examples = 10}, err));
    assert_ok(jobs_mark_running(f->worker, &lease, &(struct job_plan){.total_steps = 2}, err));
    for (int i = 0; i < 2; i++)
        assert_ok(checkpoints_add(f->worker, &lease,
                                  &(struct checkpoint_new){.step = i + 1,
                                                           .artifact_sha256 = step[i],
                                                           .artifact_bytes = 11},
                                  err));
    assert_ok(
        jobs_commit_success(f->worker, &lease,
                            &(struct job_success){.artifact_sha256 = step[1],
                                                  .delta = {.codec = "bitdelta", .bytes = 10}},
                            err));
}

static int checkpoints_of(struct fixture *f, const char *job)
{
    struct checkpoint_list list;
    int count;

    assert_ok(checkpoints_list(f->app, f->a.project, job, NULL, 10, &list, err));
    count = list.count;
    checkpoint_list_release(&list);
    return count;
}

/* Two jobs of the same bytes, each with them in the last of its two steps. */
static void a_last_checkpoint_goes_with_its_own_model_alone(void **state)
{
    struct fixture *f = fixture();
    char id[2][ID_SIZE], step[2][SHA256_HEX];
    struct collector_report report;
    struct job job;

    fixture_blob(f, f->a.project, "first step\n", step[0]);
    fixture_blob(f, f->a.project, "last step\n", step[1]);
    for (int i = 0; i < 2; i++)
        finish_with_checkpoints(f, id[i], step);
    for (int i = 0; i < 2; i++) {
        run(f, &no_grace, &report);
        assert_true(there(f, f->a.project, step[1]));
        assert_int_equal(checkpoints_of(f, id[i]), 2);
        assert_ok(jobs_get(f->app, f->a.project, id[i], &job, err));
        assert_ok(models_delete(f->app, f->a.project, job.model_name, err));
        job_release(&job);
        assert_int_equal(checkpoints_of(f, id[i]), 1);
    }
    run(f, &no_grace, &report);
    assert_true(there(f, f->a.project, step[0]));
    assert_false(there(f, f->a.project, step[1]));
}

static void staging_goes_with_its_attempt(void **state)
{
    struct fixture *f = fixture();
    char id[ID_SIZE], *old, *live, *import, *file;
    struct collector_report report;
    struct blob_writer *w;
    struct lease first, second;
    struct job job;

    fixture_job(f, f->a.project, id);
    claim(f, &first);
    assert_ok(blob_staging_dir(f->storage.blobs, id, first.attempt, &old, err));
    assert_ok(leases_release(f->worker, &first, err));
    claim(f, &second);
    assert_ok(blob_staging_dir(f->storage.blobs, id, second.attempt, &live, err));
    assert_ok(blob_staging_dir(f->storage.blobs, NULL, 0, &import, err));
    assert_ok(blob_begin(f->storage.blobs, f->a.project, "upload", &w, err));
    assert_true(asprintf(&file, "%s/delta", old) > 0);
    assert_ok(file_write_durable(file, "x", 1, err));

    run(f, &(struct collector_options){0, 3600}, &report);
    assert_int_equal(report.staging, 0);
    run(f, &no_grace, &report);
    assert_int_equal(report.staging, 3);
    assert_int_equal(access(old, F_OK), -1);
    assert_int_equal(access(import, F_OK), -1);
    assert_int_equal(access(live, F_OK), 0);
    assert_ok(jobs_cancel(f->app, f->a.project, id, &job, err));
    job_release(&job);
    run(f, &no_grace, &report);
    assert_int_equal(access(live, F_OK), -1);
    blob_abort(w);
    free(old);
    free(live);
    free(import);
    free(file);
}

static void only_the_newest_recovery_of_a_live_job_stays(void **state)
{
    struct fixture *f = fixture();
    struct job_recovery one, two, unborn;
    struct collector_report report;
    char id[ID_SIZE], old[96];
    struct lease lease;
    struct job job;

    fixture_job(f, f->a.project, id);
    claim(f, &lease);
    make_recovery(f, &lease, 1, &one);
    assert_ok(jobs_set_recovery(f->worker, &lease, &one, old, err));
    make_recovery(f, &lease, 2, &two);
    assert_ok(jobs_set_recovery(f->worker, &lease, &two, old, err));
    assert_string_equal(old, one.name);
    make_recovery(f, &lease, 3, &unborn); /* written, its row was not: killed in between */
    run(f, &no_grace, &report);
    assert_int_equal(report.recovery, 2);
    assert_false(recovery_there(f, &one));
    assert_true(recovery_there(f, &two));
    assert_false(recovery_there(f, &unborn));
    assert_ok(leases_release(f->worker, &lease, err));
    run(f, &no_grace, &report);
    assert_true(recovery_there(f, &two)); /* a job that waits will resume from it */
    assert_ok(jobs_cancel(f->app, f->a.project, id, &job, err));
    job_release(&job);
    run(f, &no_grace, &report);
    assert_false(recovery_there(f, &two));
}

static void expired_files_and_keys_go(void **state)
{
    struct fixture *f = fixture();
    struct collector_report report;
    char id[ID_SIZE], sql[200];

    fixture_file(f, f->b.project, "expiring\n", id);
    snprintf(sql, sizeof sql, "UPDATE graft.file SET expires_at = now() WHERE id = '%s'", id);
    fixture_admin(f, sql);
    snprintf(sql, sizeof sql,
             "INSERT INTO graft.idempotency_key (tenant, key, digest, created_at)"
             " VALUES ('%s', 'old', 'd', now() - interval '2 days')",
             f->b.project);
    fixture_admin(f, sql);
    run(f, &no_grace, &report);
    assert_int_equal(report.files_expired, 1);
    assert_int_equal(report.idempotency_keys, 1);
    assert_int_equal(report.blobs, 1); /* its bytes in the same round */
}

static void outbox_rows_go_after_a_week(void **state)
{
    struct fixture *f = fixture();
    char old[ID_SIZE], young[ID_SIZE];
    struct collector_report report;
    char sql[200];

    fixture_base(f);
    fixture_job(f, f->a.project, old);
    fixture_job(f, f->a.project, young);
    run(f, &no_grace, &report);
    assert_int_equal(report.outbox_rows, 0);
    snprintf(sql, sizeof sql,
             "UPDATE graft.outbox SET created_at = now() - interval '8 days'"
             " WHERE object_id = '%s'",
             old);
    fixture_admin(f, sql);
    run(f, &no_grace, &report);
    assert_int_equal(report.outbox_rows, 1);
    snprintf(sql, sizeof sql, "SELECT count(*) FROM graft.outbox WHERE object_id = '%s'", old);
    assert_int_equal(fixture_number(f, sql), 0);
    snprintf(sql, sizeof sql, "SELECT count(*) FROM graft.outbox WHERE object_id = '%s'", young);
    assert_int_equal(fixture_number(f, sql), 1);
}

static void two_collectors_do_not_meet(void **state)
{
    struct fixture *f = fixture();
    struct collector_report report;
    char orphan[SHA256_HEX];
    struct db *other;

    fixture_blob(f, f->a.project, "orphan\n", orphan);
    assert_ok(db_open(&other, f->storage.url, DB_ROLE_WORKER, err));
    assert_ok(
        db_exec(other, "SELECT pg_advisory_lock(4702111234474983746)", DB_NO_ARGS, NULL, err));
    run(f, &no_grace, &report);
    assert_true(there(f, f->a.project, orphan));
    db_close(other);
    /* The lock goes with the session, a moment after it has closed. */
    for (int i = 0; i < 100 && there(f, f->a.project, orphan); i++) {
        run(f, &no_grace, &report);
        usleep(20000);
    }
    assert_false(there(f, f->a.project, orphan));
}

/* As when the URL of the database was forgotten: no row there names what the store has. */
static void the_blobs_of_another_database_stay(void **state)
{
    struct fixture *f = fixture();
    char sha256[SHA256_HEX], dir[64], *url = NULL, *note = NULL;
    struct migrate_report migrated;
    struct collector_report report;
    struct storage storage;
    struct db *other;

    assert_true(asprintf(&url, "host=%s/pg port=5432 user=graft dbname=other", f->dir) > 0);
    fixture_admin(f, "CREATE DATABASE other OWNER graft");
    assert_ok(migrate_run(url, &migrated, err));
    assert_ok(db_open(&other, url, DB_ROLE_WORKER, err));
    fixture_blob(f, f->a.project, "theirs\n", sha256);
    assert_err(collector_run(other, f->storage.blobs, &no_grace, &report, err), ERR_INVALID);
    assert_err(storage_open(&storage, f->dir, url, err), ERR_INVALID);
    assert_true(there(f, f->a.project, sha256));

    /* A store without blobs is anybody's, until it has some. */
    snprintf(dir, sizeof dir, "%s/fresh", f->dir);
    assert_ok(storage_open(&storage, dir, url, err));
    storage_release(&storage);
    assert_ok(storage_open(&storage, dir, f->storage.url, err));
    storage_release(&storage);

    /* Whoever takes the note away gives them up. */
    assert_true(asprintf(&note, "%s/blobs/.database", f->dir) > 0);
    assert_int_equal(unlink(note), 0);
    assert_ok(collector_run(other, f->storage.blobs, &no_grace, &report, err));
    assert_false(there(f, f->a.project, sha256));
    assert_int_equal(unlink(note), 0);
    db_close(other);
    free(note);
    free(url);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_blob_goes_with_its_last_row),
        cmocka_unit_test(a_job_keeps_its_bytes_until_it_ends),
        cmocka_unit_test(a_job_in_the_making_keeps_its_bytes),
        cmocka_unit_test(an_import_in_the_making_keeps_its_bytes),
        cmocka_unit_test(a_model_and_its_checkpoints_keep_theirs),
        cmocka_unit_test(a_last_checkpoint_goes_with_its_own_model_alone),
        cmocka_unit_test(staging_goes_with_its_attempt),
        cmocka_unit_test(only_the_newest_recovery_of_a_live_job_stays),
        cmocka_unit_test(expired_files_and_keys_go),
        cmocka_unit_test(outbox_rows_go_after_a_week),
        cmocka_unit_test(two_collectors_do_not_meet),
        cmocka_unit_test(the_blobs_of_another_database_stay),
    };

    return cmocka_run_group_tests(tests, fixture_setup, fixture_teardown);
}
