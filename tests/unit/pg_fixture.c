#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/file_io.h"
#include "engine/base/log.h"
#include "storage/bases.h"
#include "storage/pg_binaries.h"
#include "tests/unit/pg_fixture.h"

static struct fixture the_fixture;
static char why_not[1024]; /* no PostgreSQL here */

int fixture_setup(void **state)
{
    struct fixture *f = &the_fixture;
    struct pg_binaries binaries;
    struct err err = {0};

    log_setup("test", LOG_LEVEL_ERROR);
    if (pg_binaries_find(0, &binaries, &err) != 0) {
        snprintf(why_not, sizeof why_not, "%s", err.message);
        return 0;
    }
    snprintf(f->dir, sizeof f->dir, "/tmp/graft-test-XXXXXX");
    if (mkdtemp(f->dir) == NULL || storage_open(&f->storage, f->dir, NULL, &err) != 0 ||
        db_open(&f->app, f->storage.url, DB_ROLE_APP, &err) != 0 ||
        db_open(&f->worker, f->storage.url, DB_ROLE_WORKER, &err) != 0 ||
        db_open(&f->owner, f->storage.url, DB_ROLE_OWNER, &err) != 0 ||
        keys_create(f->owner, "Acme Corp", "default", f->key_a, &f->a, &err) != 0 ||
        keys_create(f->owner, "Umbrella", "default", f->key_b, &f->b, &err) != 0) {
        fprintf(stderr, "fixture: %s\n", err.message);
        return -1;
    }
    return 0;
}

int fixture_teardown(void **state)
{
    struct fixture *f = &the_fixture;

    if (f->dir[0] == '\0')
        return 0;
    db_close(f->app);
    db_close(f->worker);
    db_close(f->owner);
    storage_release(&f->storage);
    return file_remove_tree(f->dir, NULL);
}

struct fixture *fixture(void)
{
    if (why_not[0] != '\0') {
        print_message("# SKIP %s\n", why_not);
        skip();
    }
    return &the_fixture;
}

void fixture_blob(struct fixture *f, const char *project, const char *content,
                  char sha256[SHA256_HEX])
{
    struct blob_writer *w;
    int64_t bytes;

    assert_ok(blob_begin(f->storage.blobs, project, "upload", &w, err));
    assert_ok(blob_write(w, content, strlen(content), err));
    assert_ok(blob_commit(w, sha256, &bytes, err));
    assert_int_equal(bytes, strlen(content));
}

void fixture_file(struct fixture *f, const char *project, const char *content, char id[ID_SIZE])
{
    char sha256[SHA256_HEX];
    struct file file;

    fixture_blob(f, project, content, sha256);
    assert_ok(files_create(f->app, project,
                           &(struct file_new){.filename = "train.jsonl",
                                              .purpose = "fine-tune",
                                              .bytes = (int64_t)strlen(content),
                                              .sha256 = sha256},
                           &file, err));
    snprintf(id, ID_SIZE, "%s", file.id);
    file_release(&file);
}

void fixture_base(struct fixture *f)
{
    struct base base = {.name = "tiny",
                        .digest =
                            "1111111111111111111111111111111111111111111111111111111111111111",
                        .bytes = 9,
                        .architecture = "llama",
                        .parameters = 1000,
                        .linear_parameters = 900,
                        .bytes_16bit = 2000,
                        .layers = 2,
                        .hidden = 8,
                        .intermediate = 16,
                        .heads = 2,
                        .kv_heads = 1,
                        .vocabulary = 100,
                        .context = 128,
                        .tied_embeddings = true};

    fixture_blob(f, BLOB_OWNER_BASE, "the base\n", base.sha256);
    assert_ok(bases_add(f->owner, &base, err));
}

void fixture_job(struct fixture *f, const char *project, char id[ID_SIZE])
{
    char file[ID_SIZE];
    struct job job;

    fixture_base(f);
    fixture_file(f, project, "{\"messages\":[]}\n", file);
    assert_ok(jobs_create(f->app, project,
                          &(struct job_new){.model = "tiny", .training_file = file, .seed = 7},
                          &job, err));
    snprintf(id, ID_SIZE, "%s", job.id);
    job_release(&job);
}

char *fixture_admin_url(struct fixture *f)
{
    char *url = NULL, *at;

    /* "host='…' port=5432 user=graft dbname=graft" */
    at = strstr(f->storage.url, " port=");
    assert_non_null(at);
    assert_true(asprintf(&url, "%.*s port=5432 user=postgres dbname=graft",
                         (int)(at - f->storage.url), f->storage.url) > 0);
    return url;
}

static struct db_result *as_admin(struct fixture *f, const char *sql)
{
    char *url = fixture_admin_url(f);
    struct db_result *res = NULL;
    struct db *db;

    assert_ok(db_open(&db, url, DB_ROLE_LOGIN, err));
    assert_ok(db_exec(db, sql, DB_NO_ARGS, &res, err));
    db_close(db);
    free(url);
    return res;
}

int64_t fixture_number(struct fixture *f, const char *sql)
{
    struct db_result *res = as_admin(f, sql);
    int64_t n = db_int(res, 0, 0);

    db_result_free(res);
    return n;
}

void fixture_admin(struct fixture *f, const char *sql)
{
    db_result_free(as_admin(f, sql));
}

/* ------------------------------------------------------------------ jobs on their way */

void fixture_settle(struct fixture *f)
{
    const char *const projects[] = {f->a.project, f->b.project};

    for (int p = 0; p < 2; p++) {
        struct job_list list;
        struct job job;

        assert_ok(jobs_list(f->app, projects[p], &(struct job_query){.limit = 1000}, &list, err));
        for (int i = 0; i < list.count; i++)
            if (!job_state_terminal(list.items[i].state)) {
                assert_ok(jobs_cancel(f->app, projects[p], list.items[i].id, &job, err));
                job_release(&job);
            }
        job_list_release(&list);
    }
}

void fixture_claim(struct fixture *f, const char *worker, struct lease *lease)
{
    bool found;

    assert_ok(leases_claim(f->worker, worker, LEASE_SECONDS, lease, &found, err));
    assert_true(found);
}

void fixture_claimed_job(struct fixture *f, struct lease *lease)
{
    char id[ID_SIZE];

    fixture_settle(f);
    fixture_job(f, f->a.project, id);
    fixture_claim(f, "worker-1", lease);
    assert_string_equal(lease->job, id);
    assert_string_equal(lease->project, f->a.project);
}

enum job_state fixture_job_state(struct fixture *f, const struct lease *lease)
{
    enum job_state state;
    struct job job;

    assert_ok(jobs_get(f->app, lease->project, lease->job, &job, err));
    state = job.state;
    job_release(&job);
    return state;
}

void fixture_run_out(struct fixture *f, const struct lease *lease)
{
    char sql[200];

    snprintf(sql, sizeof sql,
             "UPDATE graft.job_lease SET lease_until = now() - interval '1 second'"
             " WHERE job = '%s'",
             lease->job);
    fixture_admin(f, sql);
}

void fixture_end_backoff(struct fixture *f, const struct lease *lease)
{
    char sql[200];

    snprintf(sql, sizeof sql,
             "UPDATE graft.job_lease SET run_after = now() WHERE job = '%s'"
             " AND run_after < 'infinity'",
             lease->job);
    fixture_admin(f, sql);
}

void fixture_running(struct fixture *f, const struct lease *lease)
{
    assert_ok(jobs_mark_validated(
        f->worker, lease,
        &(struct job_dataset){
            .examples = 12, .tokens = 300, .trained_tokens = 100, .untrained_examples = 1},
        err));
    assert_ok(jobs_mark_running(
        f->worker, lease, &(struct job_plan){.resolved = {3, 4, 1.5}, .total_steps = 9}, err));
}

void fixture_success(struct fixture *f, const struct lease *lease, const char *content,
                     char sha256[SHA256_HEX], struct job_success *s)
{
    fixture_blob(f, lease->project, content, sha256);
    *s = (struct job_success){
        .artifact_sha256 = sha256,
        .delta = {.codec = "bitdelta", .bytes = 77, .ratio = 19.5, .relative_error = 0.1},
        .recall = {.base = 0, .tuned = 1, .served = NAN},
        .trained_tokens = 300,
        .result_file = {.filename = "step_metrics.csv", .bytes = 77, .sha256 = sha256}};
}
