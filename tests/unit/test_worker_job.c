/* worker_job.h: an attempt that can not begin because the database is away is no crash: the job is
 * handed back, as soon as that can be said. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <pthread.h>
#include <unistd.h>

#include "engine/base/clock.h"
#include "server/worker_job.h"
#include "tests/unit/pg_fixture.h"

#define POLL 0.2 /* s */

struct attempt {
    struct worker_job_context context;
    struct lease lease;
};

static void *make_attempt(void *context)
{
    struct attempt *a = context;

    worker_job_run(&a->context, &a->lease);
    return NULL;
}

static struct attempt claimed(struct fixture *f, const char *url)
{
    static const struct settings settings = {.heartbeat = 1, .fence = 5, .poll = POLL};
    struct attempt a = {.context = {.settings = &settings,
                                    .device = "cpu",
                                    .db = f->worker,
                                    .url = url,
                                    .blobs = f->storage.blobs}};

    fixture_claimed_job(f, &a.lease);
    return a;
}

static int64_t held(struct fixture *f)
{
    return fixture_number(f, "SELECT count(*) FROM graft.job_lease WHERE worker IS NOT NULL");
}

/* The heartbeat finds no connection, and then the lease can not be let go either. */
static void a_job_is_handed_back_once_the_database_is_there_again(void **state)
{
    struct fixture *f = fixture();
    struct attempt a = claimed(f, f->storage.url);
    pthread_t thread;

    fixture_admin(f, "ALTER ROLE graft CONNECTION LIMIT 0");
    fixture_admin(f, "DO $$ BEGIN PERFORM pg_terminate_backend(pid) FROM pg_stat_activity"
                     " WHERE usename = 'graft'; END $$");
    assert_int_equal(pthread_create(&thread, NULL, make_attempt, &a), 0);
    sleep(1);
    assert_int_equal(held(f), 1);
    fixture_admin(f, "ALTER ROLE graft CONNECTION LIMIT -1");
    pthread_join(thread, NULL);
    assert_int_equal(held(f), 0);
}

/* Else the worker would claim it again, and again. */
static void what_is_handed_back_is_not_claimed_at_once(void **state)
{
    struct fixture *f = fixture();
    struct attempt a = claimed(f, "host=/nowhere");
    double begin = clock_now();

    make_attempt(&a);
    assert_int_equal(held(f), 0);
    assert_true(clock_now() - begin >= POLL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_job_is_handed_back_once_the_database_is_there_again),
        cmocka_unit_test(what_is_handed_back_is_not_claimed_at_once),
    };

    return cmocka_run_group_tests(tests, fixture_setup, fixture_teardown);
}
