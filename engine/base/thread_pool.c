#include "engine/base/thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

#define MAX_THREADS 256
#define SPINS                                                                           \
    4000 /* of a pause instruction each: 40 to 100 µs, more than a stage's serial part \
          */

#define OPEN (1 << 30) /* in `inside`: who comes late may still join */

struct worker {
    struct thread_pool *pool;
    pthread_t thread;
    int index;
    bool started;
};

/* A stage of a decoded token takes microseconds, so a job is begun, joined and ended without a
 * lock, which is for those who fell asleep. */
struct thread_pool {
    int threads;
    atomic_uint generation; /* of jobs: what workers watch */
    atomic_int inside;      /* workers inside the job, and OPEN */
    atomic_llong next;      /* task to take */
    thread_pool_fn *fn;     /* these three: only while nobody is inside */
    void *context;
    int64_t tasks;
    pthread_mutex_t lock;
    pthread_cond_t work, done;
    atomic_int sleepers; /* workers that wait for `work`; changed under the lock */
    atomic_bool waiting; /* the caller waits for `done`; the same */
    bool stop;           /* under the lock */
    struct worker worker[];
};

static void pause_cpu(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static void take_tasks(struct thread_pool *pool, int worker)
{
    for (;;) {
        int64_t task = atomic_fetch_add_explicit(&pool->next, 1, memory_order_relaxed);

        if (task >= pool->tasks)
            return;
        pool->fn(pool->context, task, worker);
    }
}

/* Until there is another job than the one seen; false: there will be none. */
static bool wait_for_job(struct thread_pool *pool, unsigned seen)
{
    bool stop;

    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&pool->generation, memory_order_acquire) != seen)
            return true;
        pause_cpu();
    }
    pthread_mutex_lock(&pool->lock);
    /* Before the look at the jobs: the caller looks the other way round. */
    atomic_fetch_add(&pool->sleepers, 1);
    while (atomic_load(&pool->generation) == seen && !pool->stop)
        pthread_cond_wait(&pool->work, &pool->lock);
    atomic_fetch_sub(&pool->sleepers, 1);
    stop = pool->stop;
    pthread_mutex_unlock(&pool->lock);
    return !stop;
}

/* It may be the next job already that is joined: then it is found once more, or over. */
static bool join(struct thread_pool *pool)
{
    int inside = atomic_load(&pool->inside);

    while (inside & OPEN)
        if (atomic_compare_exchange_weak(&pool->inside, &inside, inside + 1))
            return true;
    return false;
}

static void leave(struct thread_pool *pool)
{
    if (atomic_fetch_sub(&pool->inside, 1) != 1 || !atomic_load(&pool->waiting))
        return;
    pthread_mutex_lock(&pool->lock);
    pthread_cond_signal(&pool->done);
    pthread_mutex_unlock(&pool->lock);
}

static void *worker_main(void *arg)
{
    struct worker *self = arg;
    struct thread_pool *pool = self->pool;
    unsigned seen = 0;

    while (wait_for_job(pool, seen)) {
        seen = atomic_load(&pool->generation);
        if (!join(pool))
            continue;
        take_tasks(pool, self->index);
        leave(pool);
    }
    return NULL;
}

static void wait_for_workers(struct thread_pool *pool)
{
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load(&pool->inside) == 0)
            return;
        pause_cpu();
    }
    pthread_mutex_lock(&pool->lock);
    atomic_store(&pool->waiting, true);
    while (atomic_load(&pool->inside) != 0)
        pthread_cond_wait(&pool->done, &pool->lock);
    atomic_store(&pool->waiting, false);
    pthread_mutex_unlock(&pool->lock);
}

void thread_pool_run(struct thread_pool *pool, int64_t tasks, thread_pool_fn *fn, void *context)
{
    if (pool->threads == 1 || tasks <= 1) {
        for (int64_t t = 0; t < tasks; t++)
            fn(context, t, 0);
        return;
    }
    pool->fn = fn;
    pool->context = context;
    pool->tasks = tasks;
    atomic_store(&pool->next, 0);
    atomic_store(&pool->inside, OPEN);
    atomic_fetch_add(&pool->generation, 1);
    if (atomic_load(&pool->sleepers) > 0) {
        pthread_mutex_lock(&pool->lock);
        pthread_cond_broadcast(&pool->work);
        pthread_mutex_unlock(&pool->lock);
    }

    take_tasks(pool, 0);

    /* All tasks are taken: who has not joined by now need not. */
    atomic_fetch_and(&pool->inside, ~OPEN);
    wait_for_workers(pool);
}

static int quota_cores(void)
{
    FILE *f = fopen("/sys/fs/cgroup/cpu.max", "r");
    long long quota = 0, period = 0;
    int cores = MAX_THREADS;

    if (!f)
        return cores;
    if (fscanf(f, "%lld %lld", &quota, &period) == 2 && quota > 0 && period > 0) {
        long long n = (quota + period - 1) / period;

        cores = n < cores ? (int)n : cores;
    }
    fclose(f);
    return cores;
}

int thread_pool_cores(void)
{
    cpu_set_t set;
    int cores = 1, quota = quota_cores();

    if (sched_getaffinity(0, sizeof set, &set) == 0)
        cores = CPU_COUNT(&set);
    if (cores > quota)
        cores = quota;
    return cores < 1 ? 1 : cores;
}

int thread_pool_threads(const struct thread_pool *pool)
{
    return pool->threads;
}

int thread_pool_open(struct thread_pool **out, int threads, struct err *err)
{
    struct thread_pool *pool = NULL;

    *out = NULL;
    if (threads == 0)
        threads = thread_pool_cores();
    if (threads < 1 || threads > MAX_THREADS)
        return err_set(err, ERR_INVALID, "threads: %d is not between 1 and %d", threads,
                       MAX_THREADS);
    pool = calloc(1, sizeof *pool + (size_t)threads * sizeof pool->worker[0]);
    if (!pool)
        return err_set(err, ERR_NO_MEMORY, "no memory for a thread pool");
    pool->threads = threads;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->done, NULL);
    for (int i = 1; i < threads; i++) {
        struct worker *w = &pool->worker[i];

        w->pool = pool;
        w->index = i;
        int rc = pthread_create(&w->thread, NULL, worker_main, w);
        if (rc != 0) {
            thread_pool_free(pool);
            return err_set_errno(err, rc, "thread %d of the pool", i);
        }
        w->started = true;
    }
    *out = pool;
    return 0;
}

void thread_pool_free(struct thread_pool *pool)
{
    if (!pool)
        return;
    pthread_mutex_lock(&pool->lock);
    pool->stop = true;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 1; i < pool->threads; i++)
        if (pool->worker[i].started)
            pthread_join(pool->worker[i].thread, NULL);
    pthread_cond_destroy(&pool->done);
    pthread_cond_destroy(&pool->work);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}
