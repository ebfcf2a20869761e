#include "server/worker_heartbeat.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

#include "engine/base/clock.h"
#include "engine/base/log.h"

struct worker_heartbeat {
    struct lease lease;
    double interval, fence;
    const struct worker_presence *presence;
    struct db *db;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool started, stop;
    double renewed;     /* clock_now() before the last renewal that succeeded was sent */
    enum err_kind over; /* ERR_NONE while the job is ours */
};

static void renew(struct worker_heartbeat *h)
{
    /* The lease runs from when PostgreSQL saw the renewal, which is not before we sent it. */
    double sent = clock_now();
    struct err err = {0};
    int rc = leases_renew(h->db, &h->lease, &err);

    pthread_mutex_lock(&h->lock);
    if (rc == 0)
        h->renewed = sent;
    else if (err.kind == ERR_FENCED || err.kind == ERR_CANCELLED)
        h->over = err.kind;
    else
        log_warn("heartbeat of %s: %s", h->lease.job, err.message);
    pthread_mutex_unlock(&h->lock);
}

static void *heartbeat_thread(void *context)
{
    struct worker_heartbeat *h = context;

    pthread_mutex_lock(&h->lock);
    while (!h->stop && h->over == ERR_NONE) {
        struct timespec until;

        pthread_mutex_unlock(&h->lock);
        renew(h);
        if (h->presence != NULL)
            worker_presence_tell(h->presence, h->db);
        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_sec += (time_t)h->interval;
        until.tv_nsec += (long)(1e9 * (h->interval - (double)(time_t)h->interval));
        if (until.tv_nsec >= 1000000000) {
            until.tv_sec++;
            until.tv_nsec -= 1000000000;
        }
        pthread_mutex_lock(&h->lock);
        while (!h->stop && pthread_cond_timedwait(&h->changed, &h->lock, &until) == 0)
            continue;
    }
    pthread_mutex_unlock(&h->lock);
    return NULL;
}

int worker_heartbeat_start(struct worker_heartbeat **out, const struct lease *lease,
                           const struct worker_heartbeat_options *options, struct err *err)
{
    struct worker_heartbeat *h = calloc(1, sizeof *h);
    pthread_condattr_t attr;

    if (h == NULL)
        return err_set(err, ERR_NO_MEMORY, "heartbeat: out of memory");
    h->lease = *lease;
    h->interval = options->interval;
    h->fence = options->fence;
    h->presence = options->presence;
    h->renewed = clock_now();
    pthread_mutex_init(&h->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&h->changed, &attr);
    pthread_condattr_destroy(&attr);
    if (db_open(&h->db, options->url, DB_ROLE_WORKER, err) != 0)
        goto fail;
    if (pthread_create(&h->thread, NULL, heartbeat_thread, h) != 0) {
        err_set(err, ERR_NO_MEMORY, "heartbeat: no thread");
        goto fail;
    }
    h->started = true;
    *out = h;
    return 0;
fail:
    worker_heartbeat_stop(h);
    return -1;
}

static void end_thread(struct worker_heartbeat *h)
{
    if (!h->started)
        return;
    pthread_mutex_lock(&h->lock);
    h->stop = true;
    pthread_cond_signal(&h->changed);
    pthread_mutex_unlock(&h->lock);
    pthread_join(h->thread, NULL);
    h->started = false;
}

int worker_heartbeat_check(struct worker_heartbeat *heartbeat, struct err *err)
{
    enum err_kind over;
    double silent;

    pthread_mutex_lock(&heartbeat->lock);
    silent = clock_now() - heartbeat->renewed;
    if (heartbeat->over == ERR_NONE && silent > heartbeat->fence)
        heartbeat->over = ERR_FENCED;
    over = heartbeat->over;
    pthread_mutex_unlock(&heartbeat->lock);
    if (over == ERR_CANCELLED)
        return err_set(err, ERR_CANCELLED, "the job was cancelled");
    if (over == ERR_FENCED)
        return err_set(err, ERR_FENCED,
                       "the lease is not ours any more (last renewed %.0f s ago): leaving the job",
                       silent);
    return 0;
}

void worker_heartbeat_explain(struct worker_heartbeat *heartbeat, struct err *err)
{
    struct err why = {0};

    end_thread(heartbeat); /* its connection is ours now */
    if (heartbeat->over == ERR_NONE)
        renew(heartbeat);
    if (heartbeat->over == ERR_CANCELLED && worker_heartbeat_check(heartbeat, &why) != 0)
        *err = why;
}

void worker_heartbeat_stop(struct worker_heartbeat *heartbeat)
{
    if (heartbeat == NULL)
        return;
    end_thread(heartbeat);
    db_close(heartbeat->db);
    pthread_cond_destroy(&heartbeat->changed);
    pthread_mutex_destroy(&heartbeat->lock);
    free(heartbeat);
}
