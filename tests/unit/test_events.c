/* Events and checkpoints of a job. */
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

#include "storage/checkpoints.h"
#include "storage/events.h"
#include "storage/models.h"
#include "tests/unit/pg_fixture.h"

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

    fixture_claimed_job(f, &lease);
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

    fixture_claimed_job(f, &lease);
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

    fixture_claimed_job(f, &lease);
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

    fixture_claimed_job(f, &lease);
    fixture_running(f, &lease);
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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(events_are_numbered_without_gaps),
        cmocka_unit_test(an_event_with_a_key_is_told_once),
        cmocka_unit_test(events_go_page_by_page),
        cmocka_unit_test(the_last_three_checkpoints_are_kept_and_are_models),
    };

    return cmocka_run_group_tests(tests, fixture_setup, fixture_teardown);
}
