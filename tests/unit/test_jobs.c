/* Jobs from creation to their one end, and the models they leave. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "storage/events.h"
#include "storage/models.h"
#include "tests/unit/pg_fixture.h"

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

    fixture_settle(f);
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
                                      .chosen = {.n_epochs = 5, .learning_rate_multiplier = 0.1},
                                      .compression = {.codec = "graft", .ratio = 32.5}},
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
    assert_string_equal(job.compression.codec, "graft");
    assert_true(job.compression.ratio == 32.5 && job.compression.max_kl == 0);
    assert_int_equal(job.compression.distill_steps, 0);
    assert_null(job.delta_report);
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

static void what_was_not_asked_of_compression_is_the_engines_choice(void **state)
{
    struct fixture *f = fixture();
    char training[ID_SIZE];
    struct job job;

    fixture_base(f);
    fixture_settle(f);
    fixture_file(f, f->a.project, "x\n", training);
    assert_ok(jobs_create(f->app, f->a.project,
                          &(struct job_new){.model = "tiny",
                                            .training_file = training,
                                            .compression = {.max_kl = 0.02, .distill_steps = -1}},
                          &job, err));
    assert_string_equal(job.compression.codec, "");
    assert_true(job.compression.ratio == 0 && job.compression.max_kl == 0.02);
    assert_int_equal(job.compression.distill_steps, -1);
    job_release(&job);
    /* The database would not take both, whoever asked. */
    assert_err(jobs_create(f->app, f->a.project,
                           &(struct job_new){.model = "tiny",
                                             .training_file = training,
                                             .compression = {.ratio = 2, .max_kl = 0.02}},
                           &job, err),
               ERR_INTERNAL);
}

static void a_job_that_compresses_needs_no_training_file(void **state)
{
    struct fixture *f = fixture();
    struct base base;
    struct event_list events;
    struct job job;

    fixture_base(f);
    fixture_settle(f);
    assert_ok(bases_get(f->app, "tiny", &base, err));
    assert_ok(jobs_create(f->app, f->a.project,
                          &(struct job_new){.model = "tiny", .tuned = &base, .suffix = "two"}, &job,
                          err));
    assert_string_equal(job.tuned_model, "tiny");
    assert_string_equal(job.tuned_sha256, base.sha256);
    assert_string_equal(job.training_file, "");
    assert_string_equal(job.training_sha256, "");
    assert_ok(events_list(f->app, f->a.project, job.id, NULL, 10, &events, err));
    assert_int_equal(events.count, 1);
    assert_memory_equal(events.items[0].message, "Created compression job: ftjob-", 31);
    event_list_release(&events);
    job_release(&job);
    /* One that trains does. */
    assert_err(jobs_create(f->app, f->a.project, &(struct job_new){.model = "tiny"}, &job, err),
               ERR_INTERNAL);
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

    fixture_settle(f);
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

#define AT_ONCE 6
#define ROOM 3

struct creator {
    struct fixture *f;
    const char *training;
    pthread_barrier_t *start;
    int made, refused; /* jobs; ERR_RATE */
};

static void *create_at_once(void *context)
{
    struct creator *c = context;
    struct db *db = NULL;

    if (db_open(&db, c->f->storage.url, DB_ROLE_APP, NULL) != 0)
        db = NULL;
    for (int round = 0; round < 3; round++) {
        struct err err = {0};
        struct job job;

        pthread_barrier_wait(c->start);
        if (db != NULL &&
            jobs_create(db, c->f->b.project,
                        &(struct job_new){
                            .model = "tiny", .training_file = c->training, .max_unfinished = ROOM},
                        &job, &err) == 0) {
            c->made++;
            job_release(&job);
        } else if (err.kind == ERR_RATE) {
            c->refused++;
        }
    }
    db_close(db);
    return NULL;
}

static void the_limit_holds_for_jobs_made_at_once(void **state)
{
    struct fixture *f = fixture();
    struct creator creators[AT_ONCE];
    pthread_t threads[AT_ONCE];
    pthread_barrier_t start;
    char training[ID_SIZE];
    int made = 0, refused = 0;

    fixture_base(f);
    fixture_settle(f);
    fixture_file(f, f->b.project, "for jobs made at once\n", training);
    pthread_barrier_init(&start, NULL, AT_ONCE);
    for (int i = 0; i < AT_ONCE; i++) {
        creators[i] = (struct creator){.f = f, .training = training, .start = &start};
        assert_int_equal(pthread_create(&threads[i], NULL, create_at_once, &creators[i]), 0);
    }
    for (int i = 0; i < AT_ONCE; i++) {
        pthread_join(threads[i], NULL);
        made += creators[i].made;
        refused += creators[i].refused;
    }
    pthread_barrier_destroy(&start);
    assert_int_equal(made, ROOM);
    assert_int_equal(refused, 3 * AT_ONCE - ROOM);
}

static void lists_go_page_by_page(void **state)
{
    struct fixture *f = fixture();
    char first[ID_SIZE], after[ID_SIZE] = "", ids[7][ID_SIZE];
    struct job_list list;
    int seen = 0, want = 6;

    fixture_settle(f);
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

    fixture_claimed_job(f, &lease);
    assert_int_equal(lease.attempt, 1);
    fixture_running(f, &lease);
    assert_ok(jobs_get(f->app, lease.project, lease.job, &job, err));
    assert_int_equal(job.state, JOB_STATE_RUNNING);
    assert_int_equal(job.resolved.n_epochs, 3);
    assert_int_equal(job.resolved.batch_size, 4);
    assert_true(job.resolved.learning_rate_multiplier == 1.5);
    assert_int_equal(job.total_steps, 9);
    assert_int_equal(job.dataset.examples, 12);
    job_release(&job);

    assert_ok(jobs_progress(f->worker, &lease, 4, 30, err));
    assert_ok(jobs_get(f->app, lease.project, lease.job, &job, err));
    assert_true(job.estimated_finish >= job.started_at + 29);
    job_release(&job);
    assert_ok(jobs_set_recovery(
        f->worker, &lease, &(struct job_recovery){.name = "r1", .step = 4, .bytes = 10}, old, err));
    assert_string_equal(old, "");
    assert_ok(jobs_set_recovery(
        f->worker, &lease, &(struct job_recovery){.name = "r2", .step = 5, .bytes = 10}, old, err));
    assert_string_equal(old, "r1");
    assert_ok(jobs_mark_compressing(f->worker, &lease, err));
    fixture_success(f, &lease, "the delta\n", sha256, &success);
    success.delta_report = "{\"codec\":\"bitdelta\",\"measured_kl\":null}";
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
    assert_string_equal(job.delta_report, success.delta_report);
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

    fixture_claimed_job(f, &lease);
    err_set_code(&why, ERR_INVALID, "invalid_n_examples", "training_file", "too few");
    assert_ok(jobs_commit_failure(f->worker, &lease, &why, err));
    assert_ok(jobs_get(f->app, lease.project, lease.job, &job, err));
    assert_int_equal(job.state, JOB_STATE_FAILED);
    assert_string_equal(job.error_code, "invalid_n_examples");
    assert_string_equal(job.error_message, "too few");
    assert_string_equal(job.error_param, "training_file");
    job_release(&job);

    fixture_claimed_job(f, &lease);
    err_clear(&why);
    err_set(&why, ERR_IO, "read /secret/path: broken");
    assert_ok(jobs_commit_failure(f->worker, &lease, &why, err));
    assert_ok(jobs_get(f->app, lease.project, lease.job, &job, err));
    assert_string_equal(job.error_code, "server_error");
    assert_null(strstr(job.error_message, "secret")); /* ours stays with us */
    assert_string_equal(job.error_param, "");
    job_release(&job);

    /* What a job lacked is told by name; in the worker's words where they were meant for clients.
     */
    for (int worded = 0; worded < 2; worded++) {
        fixture_claimed_job(f, &lease);
        err_clear(&why);
        err_set_code(&why, ERR_NO_SPACE, worded ? "insufficient_storage" : "", NULL,
                     "write /secret/path: no space left");
        assert_ok(jobs_commit_failure(f->worker, &lease, &why, err));
        assert_ok(jobs_get(f->app, lease.project, lease.job, &job, err));
        assert_string_equal(job.error_code, "insufficient_storage");
        assert_int_equal(strstr(job.error_message, "secret") != NULL, worded);
        job_release(&job);
    }
}

static void a_cancelled_job_is_cancelled_at_once(void **state)
{
    struct fixture *f = fixture();
    char sha256[SHA256_HEX];
    struct job_success success;
    struct lease lease;
    struct job job;
    bool found;

    fixture_claimed_job(f, &lease);
    fixture_running(f, &lease);
    assert_ok(leases_renew(f->worker, &lease, err));
    assert_ok(jobs_cancel(f->app, lease.project, lease.job, &job, err));
    assert_int_equal(job.state, JOB_STATE_CANCELLED);
    job_release(&job);
    assert_err(leases_renew(f->worker, &lease, err), ERR_CANCELLED);
    fixture_success(f, &lease, "late\n", sha256, &success);
    assert_err(jobs_commit_success(f->worker, &lease, &success, err), ERR_CANCELLED);
    assert_err(events_append(f->worker, &lease, &(struct event_new){.message = "late"}, 1, err),
               ERR_CANCELLED);
    assert_int_equal(fixture_job_state(f, &lease), JOB_STATE_CANCELLED);
    assert_ok(jobs_cancel(f->app, lease.project, lease.job, &job, err)); /* again: the same */
    job_release(&job);
    assert_ok(leases_claim(f->worker, "worker-2", LEASE_SECONDS, &lease, &found, err));
    assert_false(found);
}

static void an_ended_job_can_not_be_cancelled(void **state)
{
    struct fixture *f = fixture();
    char sha256[SHA256_HEX];
    struct job_success success;
    struct lease lease;
    struct job job;

    fixture_claimed_job(f, &lease);
    fixture_running(f, &lease);
    fixture_success(f, &lease, "done\n", sha256, &success);
    assert_ok(jobs_commit_success(f->worker, &lease, &success, err));
    assert_err(jobs_cancel(f->app, lease.project, lease.job, &job, err), ERR_INVALID);
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

    fixture_claimed_job(f, &lease);
    fixture_running(f, &lease);
    fixture_success(f, &lease, "a model\n", sha256, &success);
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
        cmocka_unit_test(what_was_not_asked_of_compression_is_the_engines_choice),
        cmocka_unit_test(a_job_that_compresses_needs_no_training_file),
        cmocka_unit_test(a_job_is_refused_in_words),
        cmocka_unit_test(lists_go_page_by_page),
        cmocka_unit_test(lists_filter_by_metadata),
        cmocka_unit_test(a_job_succeeds_once_with_all_that_belongs_to_it),
        cmocka_unit_test(a_failed_job_tells_why),
        cmocka_unit_test(a_cancelled_job_is_cancelled_at_once),
        cmocka_unit_test(an_ended_job_can_not_be_cancelled),
        cmocka_unit_test(models_are_listed_resolved_and_deleted),
        cmocka_unit_test(states_are_counted_over_all_tenants),
        cmocka_unit_test(the_limit_holds_for_jobs_made_at_once),
    };

    return cmocka_run_group_tests(tests, fixture_setup, fixture_teardown);
}
