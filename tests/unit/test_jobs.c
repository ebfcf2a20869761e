/* Jobs from creation to their one end: states, leases, fences, events, checkpoints, models. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "storage/events.h"
#include "storage/models.h"
#include "tests/unit/pg_fixture.h"

/* Ends every job that is still open, so that each test claims its own. */
static void settle(struct fixture *f)
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

static void claim(struct fixture *f, const char *worker, struct lease *lease)
{
    bool found;

    assert_ok(leases_claim(f->worker, worker, lease, &found, err));
    assert_true(found);
}

static void new_claimed(struct fixture *f, struct lease *lease)
{
    char id[ID_SIZE];

    settle(f);
    fixture_job(f, f->a.project, id);
    claim(f, "worker-1", lease);
    assert_string_equal(lease->job, id);
    assert_string_equal(lease->project, f->a.project);
}

static enum job_state state_of(struct fixture *f, const struct lease *lease)
{
    enum job_state state;
    struct job job;

    assert_ok(jobs_get(f->app, lease->project, lease->job, &job, err));
    state = job.state;
    job_release(&job);
    return state;
}

static void run_out(struct fixture *f, const struct lease *lease)
{
    char sql[200];

    snprintf(sql, sizeof sql,
             "UPDATE graft.job_lease SET lease_until = now() - interval '1 second'"
             " WHERE job = '%s'",
             lease->job);
    fixture_admin(f, sql);
}

static void end_backoff(struct fixture *f, const struct lease *lease)
{
    char sql[200];

    snprintf(sql, sizeof sql,
             "UPDATE graft.job_lease SET run_after = now() WHERE job = '%s'"
             " AND run_after < 'infinity'",
             lease->job);
    fixture_admin(f, sql);
}

static void to_running(struct fixture *f, const struct lease *lease)
{
    assert_ok(jobs_mark_validated(
        f->worker, lease,
        &(struct job_dataset){
            .examples = 12, .tokens = 300, .trained_tokens = 100, .untrained_examples = 1},
        err));
    assert_ok(jobs_mark_running(
        f->worker, lease,
        &(struct job_plan){.resolved = {3, 4, 1.5}, .total_steps = 9, .estimated_seconds = 60},
        err));
}

static void success_of(struct fixture *f, const struct lease *lease, const char *content,
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

/* ------------------------------------------------------------------ states */

static void the_state_table_is_the_same_in_c_and_in_sql(void **state)
{
    struct fixture *f = fixture();
    int moves = 0;

    assert_int_equal(fixture_number(f, "SELECT count(*) FROM graft.job_state"), JOB_STATE_COUNT);
    for (int i = 0; i < JOB_STATE_COUNT; i++) {
        char sql[256];

        snprintf(sql, sizeof sql,
                 "SELECT count(*) FROM graft.job_state WHERE name = '%s' AND wire = '%s'"
                 " AND terminal = %s",
                 job_state_text((enum job_state)i), job_state_wire((enum job_state)i),
                 job_state_terminal((enum job_state)i) ? "true" : "false");
        assert_int_equal(fixture_number(f, sql), 1);
        for (int k = 0; k < JOB_STATE_COUNT; k++) {
            bool may = job_state_may_move((enum job_state)i, (enum job_state)k);

            moves += may;
            snprintf(sql, sizeof sql,
                     "SELECT count(*) FROM graft.job_move WHERE before = '%s' AND after = '%s'",
                     job_state_text((enum job_state)i), job_state_text((enum job_state)k));
            assert_int_equal(fixture_number(f, sql), may);
            assert_false(may && job_state_terminal((enum job_state)i));
        }
    }
    assert_int_equal(fixture_number(f, "SELECT count(*) FROM graft.job_move"), moves);
}

static void the_database_refuses_a_move_that_is_not_in_the_table(void **state)
{
    struct fixture *f = fixture();
    char id[ID_SIZE];

    settle(f);
    fixture_job(f, f->a.project, id);
    assert_ok(db_begin(f->app, f->a.project, err));
    assert_err(db_exec(f->app,
                       "UPDATE job SET state = 'succeeded', finished_at = now()"
                       " WHERE id = $1",
                       DB_ARGS(DB_TEXT(id)), NULL, err),
               ERR_INTERNAL);
    assert_string_equal(db_sqlstate(f->app), "GR002");
    db_rollback(f->app);
}

/* ------------------------------------------------------------------ creation and reading */

static void a_job_keeps_what_it_was_asked(void **state)
{
    struct fixture *f = fixture();
    char training[ID_SIZE], validation[ID_SIZE];
    struct job made, job;
    struct event_list events;

    fixture_base(f);
    fixture_file(f, f->a.project, "training\n", training);
    fixture_file(f, f->a.project, "validation\n", validation);
    assert_ok(
        jobs_create(f->app, f->a.project,
                    &(struct job_new){.model = "tiny",
                                      .training_file = training,
                                      .validation_file = validation,
                                      .suffix = "My Model:1",
                                      .seed = -1,
                                      .method = "{\"type\": \"supervised\"}",
                                      .metadata = "{\"team\": \"ä\"}",
                                      .extension = "{\"train_embeddings\":true}",
                                      .train_embeddings = true,
                                      .schedule = "cosine",
                                      .chosen = {.n_epochs = 5, .learning_rate_multiplier = 0.1}},
                    &made, err));
    assert_ok(jobs_get(f->app, f->a.project, made.id, &job, err));
    job_release(&made);
    assert_int_equal(job.state, JOB_STATE_VALIDATING);
    assert_string_equal(job.model, "tiny");
    assert_string_equal(job.organization_id, f->a.organization_id);
    assert_string_equal(job.training_file, training);
    assert_string_equal(job.validation_file, validation);
    assert_string_equal(job.suffix, "My Model:1");
    assert_memory_equal(job.model_name, "ft:tiny:acme-corp:my-model-1:", 29);
    assert_int_equal(strlen(job.model_name), 29 + 8);
    assert_false(job.has_model);
    assert_in_range(job.seed, 0, 2147483646);
    assert_string_equal(job.method, "{\"type\": \"supervised\"}");
    assert_string_equal(job.metadata, "{\"team\": \"ä\"}");
    assert_null(job.integrations);
    assert_string_equal(job.schedule, "cosine");
    assert_true(job.train_embeddings);
    assert_int_equal(job.chosen.n_epochs, 5);
    assert_int_equal(job.chosen.batch_size, 0);
    assert_true(job.chosen.learning_rate_multiplier == 0.1);
    assert_int_equal(job.resolved.n_epochs, 0);
    assert_int_equal(strlen(job.training_sha256), 64);
    assert_int_equal(strlen(job.base_sha256), 64);
    assert_string_equal(job.start_sha256, "");
    assert_true(job.created_at > 1600000000);
    assert_int_equal(job.finished_at, 0);
    assert_true(isnan(job.recall.base));
    assert_int_equal(job.attempt, 0);

    assert_ok(events_list(f->app, f->a.project, job.id, NULL, 10, &events, err));
    assert_int_equal(events.count, 2);
    assert_false(events.has_more);
    assert_memory_equal(events.items[1].message, "Created fine-tuning job: ftjob-", 31);
    assert_memory_equal(events.items[0].message, "Validating training file: file-", 31);
    assert_string_equal(events.items[0].data, "{}");
    assert_string_equal(events.items[0].type, "message");
    event_list_release(&events);
    job_release(&job);
}

static void a_job_is_refused_in_words(void **state)
{
    struct fixture *f = fixture();
    char training[ID_SIZE], sha256[SHA256_HEX];
    struct job job;
    struct file other;
    struct err why = {0};

    fixture_base(f);
    fixture_file(f, f->a.project, "x\n", training);
    assert_int_equal(jobs_create(f->app, f->a.project,
                                 &(struct job_new){.model = "gpt-x", .training_file = training},
                                 &job, &why),
                     -1);
    assert_int_equal(why.kind, ERR_NOT_FOUND);
    assert_string_equal(why.code, "model_not_found");
    assert_string_equal(why.param, "model");
    err_clear(&why);
    assert_int_equal(
        jobs_create(f->app, f->a.project,
                    &(struct job_new){.model = "tiny", .training_file = "../../etc/passwd"}, &job,
                    &why),
        -1);
    assert_int_equal(why.kind, ERR_INVALID);
    assert_string_equal(why.param, "training_file");

    fixture_blob(f, f->a.project, "batch\n", sha256);
    assert_ok(files_create(
        f->app, f->a.project,
        &(struct file_new){.filename = "b", .purpose = "batch", .bytes = 6, .sha256 = sha256},
        &other, err));
    assert_err(jobs_create(f->app, f->a.project,
                           &(struct job_new){.model = "tiny", .training_file = other.id}, &job,
                           err),
               ERR_INVALID);
    file_release(&other);

    settle(f);
    for (int i = 0; i < 2; i++) {
        assert_ok(jobs_create(
            f->app, f->a.project,
            &(struct job_new){.model = "tiny", .training_file = training, .max_unfinished = 2},
            &job, err));
        job_release(&job);
    }
    assert_err(jobs_create(f->app, f->a.project,
                           &(struct job_new){
                               .model = "tiny", .training_file = training, .max_unfinished = 2},
                           &job, err),
               ERR_RATE);
}

static void lists_go_page_by_page(void **state)
{
    struct fixture *f = fixture();
    char first[ID_SIZE], after[ID_SIZE] = "", ids[7][ID_SIZE];
    struct job_list list;
    int seen = 0, want = 6;

    settle(f);
    fixture_job(f, f->b.project, first);
    for (int i = 0; i < 7; i++)
        fixture_job(f, f->b.project, ids[i]);
    for (;;) {
        assert_ok(jobs_list(f->app, f->b.project,
                            &(struct job_query){.limit = 3, .after = after[0] ? after : NULL},
                            &list, err));
        for (int i = 0; i < list.count && want >= 0; i++)
            assert_string_equal(list.items[i].id, ids[want--]);
        seen += list.count;
        snprintf(after, sizeof after, "%s", list.items[list.count - 1].id);
        if (!list.has_more)
            break;
        assert_int_equal(list.count, 3);
        job_list_release(&list);
    }
    assert_string_equal(after, first);
    assert_int_equal(seen, 8);
    job_list_release(&list);
    assert_err(jobs_list(f->app, f->b.project,
                         &(struct job_query){.limit = 3, .after = "ftjob-unknown"}, &list, err),
               ERR_INVALID);
}

static void lists_filter_by_metadata(void **state)
{
    struct fixture *f = fixture();
    char training[ID_SIZE], id[ID_SIZE];
    struct job_list list;
    struct job job;

    fixture_file(f, f->b.project, "x\n", training);
    assert_ok(jobs_create(f->app, f->b.project,
                          &(struct job_new){.model = "tiny",
                                            .training_file = training,
                                            .metadata = "{\"k\":\"v\",\"z\":\"1\"}"},
                          &job, err));
    snprintf(id, sizeof id, "%s", job.id);
    job_release(&job);
    assert_ok(jobs_list(f->app, f->b.project,
                        &(struct job_query){.limit = 5, .metadata = "{\"k\":\"v\"}"}, &list, err));
    assert_int_equal(list.count, 1);
    assert_string_equal(list.items[0].id, id);
    job_list_release(&list);
    assert_ok(jobs_list(f->app, f->b.project,
                        &(struct job_query){.limit = 5, .metadata = "{\"k\":\"w\"}"}, &list, err));
    assert_int_equal(list.count, 0);
    job_list_release(&list);
    assert_ok(jobs_list(f->app, f->b.project,
                        &(struct job_query){.limit = 100, .without_metadata = true}, &list, err));
    for (int i = 0; i < list.count; i++)
        assert_null(list.items[i].metadata);
    assert_true(list.count > 0);
    job_list_release(&list);
}

/* ------------------------------------------------------------------ a life */

static void a_job_succeeds_once_with_all_that_belongs_to_it(void **state)
{
    struct fixture *f = fixture();
    char sha256[SHA256_HEX], old[96];
    struct lease lease;
    struct job_success success;
    struct job job;
    struct file result;
    struct event_list events;
    struct model model;

    new_claimed(f, &lease);
    assert_int_equal(lease.attempt, 1);
    to_running(f, &lease);
    assert_ok(jobs_get(f->app, lease.project, lease.job, &job, err));
    assert_int_equal(job.state, JOB_STATE_RUNNING);
    assert_int_equal(job.resolved.n_epochs, 3);
    assert_int_equal(job.resolved.batch_size, 4);
    assert_true(job.resolved.learning_rate_multiplier == 1.5);
    assert_int_equal(job.total_steps, 9);
    assert_int_equal(job.dataset.examples, 12);
    assert_true(job.estimated_finish >= job.started_at + 59);
    job_release(&job);

    assert_ok(jobs_progress(f->worker, &lease, 4, 30, err));
    assert_ok(jobs_set_recovery(
        f->worker, &lease, &(struct job_recovery){.name = "r1", .step = 4, .bytes = 10}, old, err));
    assert_string_equal(old, "");
    assert_ok(jobs_set_recovery(
        f->worker, &lease, &(struct job_recovery){.name = "r2", .step = 5, .bytes = 10}, old, err));
    assert_string_equal(old, "r1");
    assert_ok(jobs_mark_compressing(f->worker, &lease, err));
    success_of(f, &lease, "the delta\n", sha256, &success);
    assert_ok(jobs_commit_success(f->worker, &lease, &success, err));
    /* Its answer was lost, the worker asks again: still one success. */
    assert_ok(jobs_commit_success(f->worker, &lease, &success, err));

    assert_ok(jobs_get(f->app, lease.project, lease.job, &job, err));
    assert_int_equal(job.state, JOB_STATE_SUCCEEDED);
    assert_true(job.has_model);
    assert_true(job.finished_at >= job.started_at);
    assert_int_equal(job.estimated_finish, 0);
    assert_int_equal(job.trained_tokens, 300);
    assert_int_equal(job.delta.bytes, 77);
    assert_string_equal(job.delta.codec, "bitdelta");
    assert_true(job.recall.tuned == 1 && job.recall.base == 0 && isnan(job.recall.served));
    assert_string_equal(job.recovery.name, "");
    assert_ok(files_get(f->app, lease.project, job.result_file, &result, err));
    assert_string_equal(result.purpose, "fine-tune-results");
    file_release(&result);
    assert_ok(models_resolve(f->app, lease.project, job.model_name, &model, err));
    assert_int_equal(model.kind, MODEL_FINE_TUNED);
    assert_string_equal(model.artifact_sha256, sha256);
    assert_string_equal(model.base_name, "tiny");
    assert_string_equal(model.base_sha256, job.base_sha256);
    assert_string_equal(model.owned_by, f->a.organization_id);
    assert_ok(events_list(f->app, lease.project, lease.job, NULL, 50, &events, err));
    assert_int_equal(events.count, 6);
    assert_string_equal(events.items[0].message, "The job has successfully completed");
    assert_memory_equal(events.items[1].message, "New fine-tuned model created: ft:tiny:", 38);
    assert_string_equal(events.items[2].message, "Fine-tuning job started");
    assert_string_equal(events.items[3].message, "Files validated, moving job to queued state");
    event_list_release(&events);
    {
        char sql[300];

        snprintf(sql, sizeof sql,
                 "SELECT count(*) FROM graft.outbox WHERE object_id = '%s' AND type IN"
                 " ('fine_tuning.job.created', 'fine_tuning.job.succeeded')",
                 lease.job);
        assert_int_equal(fixture_number(f, sql), 2);
    }
    job_release(&job);
}

static void a_failed_job_tells_why(void **state)
{
    struct fixture *f = fixture();
    struct err why = {0};
    struct lease lease;
    struct job job;

    new_claimed(f, &lease);
    err_set_code(&why, ERR_INVALID, "invalid_n_examples", "training_file", "too few");
    assert_ok(jobs_commit_failure(f->worker, &lease, &why, err));
    assert_ok(jobs_get(f->app, lease.project, lease.job, &job, err));
    assert_int_equal(job.state, JOB_STATE_FAILED);
    assert_string_equal(job.error_code, "invalid_n_examples");
    assert_string_equal(job.error_message, "too few");
    assert_string_equal(job.error_param, "training_file");
    job_release(&job);

    new_claimed(f, &lease);
    err_clear(&why);
    err_set(&why, ERR_IO, "read /secret/path: broken");
    assert_ok(jobs_commit_failure(f->worker, &lease, &why, err));
    assert_ok(jobs_get(f->app, lease.project, lease.job, &job, err));
    assert_string_equal(job.error_code, "server_error");
    assert_null(strstr(job.error_message, "secret")); /* ours stays with us */
    assert_string_equal(job.error_param, "");
    job_release(&job);
}

static void a_cancelled_job_is_cancelled_at_once(void **state)
{
    struct fixture *f = fixture();
    char sha256[SHA256_HEX];
    struct job_success success;
    struct lease lease;
    struct job job;
    bool found;

    new_claimed(f, &lease);
    to_running(f, &lease);
    assert_ok(leases_renew(f->worker, &lease, err));
    assert_ok(jobs_cancel(f->app, lease.project, lease.job, &job, err));
    assert_int_equal(job.state, JOB_STATE_CANCELLED);
    job_release(&job);
    assert_err(leases_renew(f->worker, &lease, err), ERR_CANCELLED);
    success_of(f, &lease, "late\n", sha256, &success);
    assert_err(jobs_commit_success(f->worker, &lease, &success, err), ERR_CANCELLED);
    assert_err(events_append(f->worker, &lease, &(struct event_new){.message = "late"}, 1, err),
               ERR_CANCELLED);
    assert_int_equal(state_of(f, &lease), JOB_STATE_CANCELLED);
    assert_ok(jobs_cancel(f->app, lease.project, lease.job, &job, err)); /* again: the same */
    job_release(&job);
    assert_ok(leases_claim(f->worker, "worker-2", &lease, &found, err));
    assert_false(found);
}

static void an_ended_job_can_not_be_cancelled(void **state)
{
    struct fixture *f = fixture();
    char sha256[SHA256_HEX];
    struct job_success success;
    struct lease lease;
    struct job job;

    new_claimed(f, &lease);
    to_running(f, &lease);
    success_of(f, &lease, "done\n", sha256, &success);
    assert_ok(jobs_commit_success(f->worker, &lease, &success, err));
    assert_err(jobs_cancel(f->app, lease.project, lease.job, &job, err), ERR_INVALID);
}

/* ------------------------------------------------------------------ leases */

struct claimer {
    const char *url;
    char name[16];
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
        c->failed = leases_claim(db, c->name, &lease, &found, NULL) != 0;
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

    settle(f);
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

    settle(f);
    for (int i = 0; i < 3; i++)
        fixture_job(f, i == 1 ? f->b.project : f->a.project, ids[i]);
    for (int i = 0; i < 3; i++) {
        claim(f, "worker-1", &lease);
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

    new_claimed(f, &stale);
    to_running(f, &stale);
    run_out(f, &stale);
    assert_ok(leases_sweep(f->worker, 100, &jobs, err));
    assert_int_equal(jobs, 1);
    end_backoff(f, &stale);
    claim(f, "worker-2", &lease);
    assert_string_equal(lease.job, stale.job);
    assert_int_equal(lease.attempt, 2);

    success_of(f, &stale, "stale\n", sha256, &success);
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
    to_running(f, &lease);
    success_of(f, &lease, "fresh\n", newer_sha256, &success);
    assert_ok(jobs_commit_success(f->worker, &lease, &success, err));
    success.artifact_sha256 = sha256;
    assert_err(jobs_commit_success(f->worker, &stale, &success, err), ERR_FENCED);
    assert_int_equal(state_of(f, &lease), JOB_STATE_SUCCEEDED);
}

static void a_lease_that_runs_out_is_swept_and_a_living_one_is_not(void **state)
{
    struct fixture *f = fixture();
    struct lease lease, again;
    bool found;
    int jobs;

    new_claimed(f, &lease);
    assert_ok(leases_sweep(f->worker, 3, &jobs, err));
    assert_int_equal(jobs, 0);
    run_out(f, &lease);
    assert_ok(leases_renew(f->worker, &lease, err)); /* late, but nobody took it */
    assert_ok(leases_sweep(f->worker, 3, &jobs, err));
    assert_int_equal(jobs, 0);
    run_out(f, &lease);
    assert_ok(leases_sweep(f->worker, 3, &jobs, err));
    assert_int_equal(jobs, 1);
    assert_ok(leases_claim(f->worker, "worker-2", &again, &found, err));
    assert_false(found); /* backing off */
    end_backoff(f, &lease);
    claim(f, "worker-2", &again);
    assert_int_equal(again.attempt, 2);
}

static void a_released_job_is_claimable_at_once(void **state)
{
    struct fixture *f = fixture();
    struct lease lease, again;
    struct job job;

    new_claimed(f, &lease);
    assert_ok(leases_release(f->worker, &lease, err));
    claim(f, "worker-2", &again);
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

    new_claimed(f, &lease);
    to_running(f, &lease);
    for (int crash = 1; crash <= 3; crash++) {
        if (crash > 1)
            claim(f, "worker-1", &lease);
        assert_int_equal(lease.attempt, crash);
        run_out(f, &lease);
        assert_ok(leases_sweep(f->worker, LEASE_POISON_CRASHES, &jobs, err));
        assert_int_equal(jobs, 1);
        end_backoff(f, &lease);
    }
    assert_ok(jobs_get(f->app, lease.project, lease.job, &job, err));
    assert_int_equal(job.state, JOB_STATE_FAILED);
    assert_string_equal(job.error_code, "worker_crashed");
    job_release(&job);
    assert_ok(events_list(f->app, lease.project, lease.job, NULL, 1, &events, err));
    assert_string_equal(events.items[0].level, "error");
    event_list_release(&events);
    assert_ok(leases_claim(f->worker, "worker-1", &lease, &found, err));
    assert_false(found);
}

static void progress_forgives_crashes(void **state)
{
    struct fixture *f = fixture();
    struct lease lease;
    char old[96];
    int jobs;

    new_claimed(f, &lease);
    to_running(f, &lease);
    for (int i = 1; i <= 8; i++) {
        struct job_recovery recovery = {.step = i / 2};

        if (i > 1)
            claim(f, "worker-1", &lease);
        /* Every second attempt gets further than the one before. */
        snprintf(recovery.name, sizeof recovery.name, "r%d", i);
        assert_ok(jobs_set_recovery(f->worker, &lease, &recovery, old, err));
        run_out(f, &lease);
        assert_ok(leases_sweep(f->worker, 2, &jobs, err));
        end_backoff(f, &lease);
        assert_int_equal(state_of(f, &lease), JOB_STATE_RUNNING);
    }
}

static void a_dead_workers_jobs_are_free_at_once(void **state)
{
    struct fixture *f = fixture();
    char mine[ID_SIZE], id[ID_SIZE], dead[ID_SIZE] = "";
    struct lease lease;
    struct job job;
    int pipes[2], jobs, status;
    pid_t child;
    bool found;

    settle(f);
    assert_ok(workers_register(f->worker, "train", mine, err));
    assert_int_equal(pipe(pipes), 0);
    child = fork();
    if (child == 0) {
        struct db *db;
        bool ok = db_open(&db, f->storage.url, DB_ROLE_WORKER, NULL) == 0 &&
                  workers_register(db, "train", dead, NULL) == 0 &&
                  write(pipes[1], dead, sizeof dead) == sizeof dead;

        if (ok)
            pause();
        _exit(1);
    }
    assert_int_equal(read(pipes[0], dead, sizeof dead), sizeof dead);
    fixture_job(f, f->a.project, id);
    claim(f, dead, &lease);
    assert_ok(workers_release_dead(f->worker, 3, &jobs, err));
    assert_int_equal(jobs, 0); /* both live */
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
    assert_ok(workers_release_dead(f->worker, 0, &jobs, err));
    assert_int_equal(jobs, 1);
    assert_err(leases_renew(f->worker, &lease, err), ERR_FENCED);
    assert_ok(leases_claim(f->worker, mine, &lease, &found, err));
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

/* ------------------------------------------------------------------ events and checkpoints */

struct teller {
    const char *url;
    struct lease lease;
    bool failed;
};

static void *tell_many(void *context)
{
    struct teller *t = context;
    struct db *db = NULL;

    t->failed = db_open(&db, t->url, DB_ROLE_WORKER, NULL) != 0;
    for (int i = 0; i < 40 && !t->failed; i++) {
        struct event_new events[3] = {{.message = "one"},
                                      {.message = "two", .type = "metrics", .data = "{\"step\":1}"},
                                      {.message = "three", .level = "warn"}};

        t->failed = events_append(db, &t->lease, events, 3, NULL) != 0;
    }
    db_close(db);
    return NULL;
}

static void events_are_numbered_without_gaps(void **state)
{
    struct fixture *f = fixture();
    struct teller tellers[3];
    pthread_t threads[3];
    struct event_list events;
    struct lease lease;
    int64_t at = 0;

    new_claimed(f, &lease);
    for (int i = 0; i < 3; i++) {
        tellers[i] = (struct teller){.url = f->storage.url, .lease = lease};
        assert_int_equal(pthread_create(&threads[i], NULL, tell_many, &tellers[i]), 0);
    }
    for (int i = 0; i < 3; i++) {
        pthread_join(threads[i], NULL);
        assert_false(tellers[i].failed);
    }
    do {
        assert_ok(events_since(f->app, lease.project, lease.job, at, 50, &events, err));
        for (int i = 0; i < events.count; i++)
            assert_int_equal(events.items[i].sequence, ++at);
        if (!events.has_more)
            break;
        event_list_release(&events);
    } while (true);
    event_list_release(&events);
    assert_int_equal(at, 2 + 3 * 40 * 3);
}

static void an_event_with_a_key_is_told_once(void **state)
{
    struct fixture *f = fixture();
    struct event_new step = {.message = "Step 1/9", .key = "step:1", .type = "metrics"};
    struct event_list events;
    struct lease lease;

    new_claimed(f, &lease);
    assert_ok(events_append(f->worker, &lease, &step, 1, err));
    assert_ok(events_append(f->worker, &lease, &step, 1, err));
    assert_ok(events_append(f->worker, &lease, &(struct event_new){.message = "next"}, 1, err));
    assert_ok(events_list(f->app, lease.project, lease.job, NULL, 50, &events, err));
    assert_int_equal(events.count, 4);
    assert_int_equal(events.items[0].sequence, 4);
    assert_string_equal(events.items[1].message, "Step 1/9");
    event_list_release(&events);
}

static void events_go_page_by_page(void **state)
{
    struct fixture *f = fixture();
    struct event_list page, rest;
    struct lease lease;

    new_claimed(f, &lease);
    for (int i = 0; i < 5; i++)
        assert_ok(events_append(f->worker, &lease, &(struct event_new){.message = "m"}, 1, err));
    assert_ok(events_list(f->app, lease.project, lease.job, NULL, 4, &page, err));
    assert_true(page.has_more);
    assert_int_equal(page.items[3].sequence, 4);
    assert_ok(events_list(f->app, lease.project, lease.job, page.items[3].id, 4, &rest, err));
    assert_false(rest.has_more);
    assert_int_equal(rest.count, 3);
    assert_int_equal(rest.items[0].sequence, 3);
    event_list_release(&rest);
    event_list_release(&page);
    assert_err(events_list(f->app, lease.project, lease.job, "ftevent-x", 4, &page, err),
               ERR_INVALID);
    assert_err(events_list(f->app, lease.project, "ftjob-x", NULL, 4, &page, err), ERR_NOT_FOUND);
}

static void the_last_three_checkpoints_are_kept_and_are_models(void **state)
{
    struct fixture *f = fixture();
    char sha256[SHA256_HEX];
    struct checkpoint_list list;
    struct event_list events;
    struct model model;
    struct lease lease;

    new_claimed(f, &lease);
    to_running(f, &lease);
    fixture_blob(f, lease.project, "checkpoint\n", sha256);
    for (int step = 3; step <= 15; step += 3)
        for (int again = 0; again < 2; again++)
            assert_ok(checkpoints_add(
                f->worker, &lease,
                &(struct checkpoint_new){.step = step,
                                         .artifact_sha256 = sha256,
                                         .artifact_bytes = 11,
                                         .metrics = {.train_loss = 0.5,
                                                     .train_mean_token_accuracy = 0.9,
                                                     .valid_loss = NAN,
                                                     .valid_mean_token_accuracy = NAN,
                                                     .full_valid_loss = NAN,
                                                     .full_valid_mean_token_accuracy = NAN}},
                err));
    assert_ok(checkpoints_list(f->app, lease.project, lease.job, NULL, 2, &list, err));
    assert_int_equal(list.count, 2);
    assert_true(list.has_more);
    assert_int_equal(list.items[0].step, 15);
    assert_true(list.items[0].metrics.train_loss == 0.5);
    assert_true(isnan(list.items[0].metrics.valid_loss));
    assert_non_null(strstr(list.items[0].model, ":ckpt-step-15"));
    assert_ok(models_resolve(f->app, lease.project, list.items[0].model, &model, err));
    assert_int_equal(model.kind, MODEL_CHECKPOINT);
    assert_string_equal(model.artifact_sha256, sha256);
    assert_err(models_resolve(f->app, f->b.project, list.items[0].model, &model, err),
               ERR_NOT_FOUND);
    {
        struct checkpoint_list rest;

        assert_ok(
            checkpoints_list(f->app, lease.project, lease.job, list.items[1].id, 2, &rest, err));
        assert_int_equal(rest.count, 1);
        assert_false(rest.has_more);
        assert_int_equal(rest.items[0].step, 9);
        checkpoint_list_release(&rest);
    }
    checkpoint_list_release(&list);
    assert_err(checkpoints_list(f->app, lease.project, lease.job, "ftckpt_x", 2, &list, err),
               ERR_INVALID);
    assert_ok(events_list(f->app, lease.project, lease.job, NULL, 50, &events, err));
    assert_int_equal(events.count, 4 + 5); /* each told once */
    event_list_release(&events);
}

/* ------------------------------------------------------------------ models */

static void models_are_listed_resolved_and_deleted(void **state)
{
    struct fixture *f = fixture();
    char sha256[SHA256_HEX], training[ID_SIZE];
    struct job_success success;
    struct model_list list;
    struct model model;
    struct lease lease;
    struct job job, next;

    new_claimed(f, &lease);
    to_running(f, &lease);
    success_of(f, &lease, "a model\n", sha256, &success);
    assert_ok(jobs_commit_success(f->worker, &lease, &success, err));
    assert_ok(jobs_get(f->app, lease.project, lease.job, &job, err));

    assert_ok(models_list(f->app, lease.project, &list, err));
    assert_true(list.count >= 2);
    assert_string_equal(list.items[0].name, "tiny");
    assert_string_equal(list.items[0].owned_by, "graft");
    assert_string_equal(list.items[1].name, job.model_name); /* the newest */
    model_list_release(&list);
    assert_ok(models_list(f->app, f->b.project, &list, err));
    for (int i = 0; i < list.count; i++)
        assert_int_equal(list.items[i].kind, MODEL_BASE);
    model_list_release(&list);

    /* A fine-tune of the fine-tune starts from its delta, on the root base. */
    fixture_file(f, lease.project, "more\n", training);
    assert_ok(jobs_create(f->app, lease.project,
                          &(struct job_new){.model = job.model_name, .training_file = training},
                          &next, err));
    assert_string_equal(next.start_sha256, sha256);
    assert_string_equal(next.base_name, "tiny");
    assert_memory_equal(next.model_name, "ft:tiny:", 8);
    job_release(&next);

    assert_err(models_delete(f->app, lease.project, "tiny", err), ERR_FORBIDDEN);
    assert_err(models_delete(f->app, f->b.project, job.model_name, err), ERR_NOT_FOUND);
    assert_ok(models_delete(f->app, lease.project, job.model_name, err));
    assert_err(models_delete(f->app, lease.project, job.model_name, err), ERR_NOT_FOUND);
    assert_err(models_resolve(f->app, lease.project, job.model_name, &model, err), ERR_NOT_FOUND);
    job_release(&job);
}

static void states_are_counted_over_all_tenants(void **state)
{
    struct fixture *f = fixture();
    int64_t counts[JOB_STATE_COUNT], total = 0;

    assert_ok(jobs_count(f->app, counts, err));
    for (int i = 0; i < JOB_STATE_COUNT; i++)
        total += counts[i];
    assert_int_equal(total, fixture_number(f, "SELECT count(*) FROM graft.job"));
    assert_true(counts[JOB_STATE_CANCELLED] > 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_state_table_is_the_same_in_c_and_in_sql),
        cmocka_unit_test(the_database_refuses_a_move_that_is_not_in_the_table),
        cmocka_unit_test(a_job_keeps_what_it_was_asked),
        cmocka_unit_test(a_job_is_refused_in_words),
        cmocka_unit_test(lists_go_page_by_page),
        cmocka_unit_test(lists_filter_by_metadata),
        cmocka_unit_test(a_job_succeeds_once_with_all_that_belongs_to_it),
        cmocka_unit_test(a_failed_job_tells_why),
        cmocka_unit_test(a_cancelled_job_is_cancelled_at_once),
        cmocka_unit_test(an_ended_job_can_not_be_cancelled),
        cmocka_unit_test(each_job_is_claimed_by_one),
        cmocka_unit_test(the_oldest_job_goes_first),
        cmocka_unit_test(a_stale_attempt_changes_nothing),
        cmocka_unit_test(a_lease_that_runs_out_is_swept_and_a_living_one_is_not),
        cmocka_unit_test(a_released_job_is_claimable_at_once),
        cmocka_unit_test(a_poison_job_fails_after_three_crashes),
        cmocka_unit_test(progress_forgives_crashes),
        cmocka_unit_test(a_dead_workers_jobs_are_free_at_once),
        cmocka_unit_test(events_are_numbered_without_gaps),
        cmocka_unit_test(an_event_with_a_key_is_told_once),
        cmocka_unit_test(events_go_page_by_page),
        cmocka_unit_test(the_last_three_checkpoints_are_kept_and_are_models),
        cmocka_unit_test(models_are_listed_resolved_and_deleted),
        cmocka_unit_test(states_are_counted_over_all_tenants),
    };

    return cmocka_run_group_tests(tests, fixture_setup, fixture_teardown);
}
