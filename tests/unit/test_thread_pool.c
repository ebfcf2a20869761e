/* Every task runs once, what it wrote is seen, and jobs may follow one another quickly. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "engine/base/thread_pool.h"

#define TASKS 1000

struct job {
    int times[TASKS]; /* plain: the pool must order these */
    atomic_int worst_worker;
};

static void count(void *context, int64_t task, int worker)
{
    struct job *job = context;

    job->times[task]++;
    if (worker > atomic_load(&job->worst_worker))
        atomic_store(&job->worst_worker, worker);
}

static void test_each_task_runs_once(void **state)
{
    for (int threads = 1; threads <= 5; threads++) {
        struct thread_pool *pool;
        struct err err = {0};

        assert_int_equal(thread_pool_open(&pool, threads, &err), 0);
        assert_int_equal(thread_pool_threads(pool), threads);
        for (int64_t tasks = 0; tasks <= TASKS; tasks += tasks < 4 ? 1 : 332) {
            struct job job = {0};

            thread_pool_run(pool, tasks, count, &job);
            for (int64_t t = 0; t < TASKS; t++)
                assert_int_equal(job.times[t], t < tasks);
            assert_true(atomic_load(&job.worst_worker) < threads);
        }
        thread_pool_free(pool);
    }
}

static void test_many_small_jobs(void **state)
{
    struct thread_pool *pool;
    struct err err = {0};
    struct job job = {0};

    assert_int_equal(thread_pool_open(&pool, 3, &err), 0);
    for (int i = 0; i < 3000; i++) {
        thread_pool_run(pool, 1 + i % 5, count, &job);
        if (i % 500 == 0)
            usleep(2000); /* long enough for the workers to fall asleep */
    }
    assert_int_equal(job.times[0], 3000);
    assert_int_equal(job.times[4], 600);
    thread_pool_free(pool);
}

struct slow_job {
    atomic_int begun; /* by workers that are not the caller */
    int done[3];
};

/* The caller is through with its own task long before the worker is with its. */
static void be_slow(void *context, int64_t task, int worker)
{
    struct slow_job *job = context;

    if (worker) {
        atomic_fetch_add(&job->begun, 1);
        usleep(2000);
    } else {
        for (int i = 0; i < 10000 && !atomic_load(&job->begun); i++)
            usleep(10);
    }
    job->done[task]++;
}

/* Longer than anyone spins: the caller sleeps until the last worker wakes it, and they until there
 * is a job. */
static void test_long_tasks(void **state)
{
    struct thread_pool *pool;
    struct err err = {0};
    int waited = 0;

    assert_int_equal(thread_pool_open(&pool, 3, &err), 0);
    for (int i = 0; i < 50; i++) {
        struct slow_job job = {0};

        thread_pool_run(pool, 3, be_slow, &job);
        for (int t = 0; t < 3; t++)
            assert_int_equal(job.done[t], 1);
        waited += atomic_load(&job.begun) > 0;
        if (i % 2)
            usleep(2000); /* the workers fall asleep */
    }
    assert_true(waited > 40);
    thread_pool_free(pool);
}

static void test_numbers_of_threads(void **state)
{
    struct thread_pool *pool;
    struct err err = {0};

    assert_true(thread_pool_cores() >= 1);
    assert_int_equal(thread_pool_open(&pool, 0, &err), 0);
    assert_int_equal(thread_pool_threads(pool), thread_pool_cores());
    thread_pool_free(pool);
    assert_int_equal(thread_pool_open(&pool, -1, &err), -1);
    assert_int_equal(err.kind, ERR_INVALID);
    assert_null(pool);
    thread_pool_free(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_each_task_runs_once),
        cmocka_unit_test(test_many_small_jobs),
        cmocka_unit_test(test_long_tasks),
        cmocka_unit_test(test_numbers_of_threads),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
