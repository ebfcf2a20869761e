#include "server/sweeper.h"

#include <pthread.h>
#include <stdlib.h>
#include <time.h>

#include "engine/base/clock.h"
#include "engine/base/log.h"
#include "storage/collector.h"
#include "storage/db.h"
#include "storage/leases.h"

struct sweeper {
    const struct settings *settings;
    struct storage *storage;
    struct db *db;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool started, stop, death;
    double next_collect;
};

/* The private cluster is this server's to keep alive; one at a URL is somebody else's. */
static void check_database(struct sweeper *s, struct err *err)
{
    struct err down = {0};

    if (db_ping(s->db, &down) == 0)
        return;
    if (s->storage->cluster == NULL || pg_cluster_revive(s->storage->cluster, err) != 0)
        err_set(err, down.kind, "%s", down.message);
    else
        log_warn("the private database was down (%s) and has been started again", down.message);
}

static void collect(struct sweeper *s, struct err *err)
{
    struct collector_options options = {.grace = (int64_t)s->settings->grace,
                                        .staging_grace = COLLECTOR_STAGING_GRACE_SECONDS};
    struct collector_report r = {0};

    if (s->settings->collect <= 0 || clock_now() < s->next_collect)
        return;
    s->next_collect = clock_now() + s->settings->collect;
    if (options.staging_grace > options.grace)
        options.staging_grace = options.grace;
    if (collector_run(s->db, s->storage->blobs, &options, &r, err) != 0)
        return;
    if (r.blobs + r.staging + r.recovery + r.files_expired > 0)
        log_info("collected %lld blobs (%lld bytes), %lld staging folders, %lld checkpoints, %lld "
                 "expired files",
                 (long long)r.blobs, (long long)r.blob_bytes, (long long)r.staging,
                 (long long)r.recovery, (long long)r.files_expired);
}

static void round_of_work(struct sweeper *s)
{
    int poison = (int)s->settings->max_attempts;
    struct err err = {0};
    int dead = 0, expired = 0, silent = 0;

    check_database(s, &err);
    if (!err_is_set(&err))
        workers_release_dead(s->db, poison, &dead, &err);
    if (!err_is_set(&err))
        leases_sweep(s->db, poison, &expired, &err);
    if (!err_is_set(&err))
        workers_forget(s->db, &silent, &err);
    if (dead + expired > 0)
        log_warn("released %d jobs of dead workers, %d whose lease ran out", dead, expired);
    if (silent > 0)
        log_info("forgot %d workers that were silent for a day", silent);
    if (!err_is_set(&err))
        collect(s, &err);
    if (err_is_set(&err))
        log_warn("sweeper: %s", err.message);
}

static void *sweeper_thread(void *context)
{
    struct sweeper *s = context;

    pthread_mutex_lock(&s->lock);
    while (!s->stop) {
        struct timespec until;

        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_sec += (time_t)s->settings->sweep;
        until.tv_nsec += (long)(1e9 * (s->settings->sweep - (double)(time_t)s->settings->sweep));
        if (until.tv_nsec >= 1000000000) {
            until.tv_sec++;
            until.tv_nsec -= 1000000000;
        }
        s->death = false;
        pthread_mutex_unlock(&s->lock);
        round_of_work(s);
        pthread_mutex_lock(&s->lock);
        while (!s->stop && !s->death && pthread_cond_timedwait(&s->changed, &s->lock, &until) == 0)
            continue;
    }
    pthread_mutex_unlock(&s->lock);
    return NULL;
}

int sweeper_open(struct sweeper **out, const struct settings *settings, struct storage *storage,
                 struct err *err)
{
    struct sweeper *s = calloc(1, sizeof *s);
    pthread_condattr_t attr;

    if (s == NULL)
        return err_set(err, ERR_NO_MEMORY, "sweeper: out of memory");
    s->settings = settings;
    s->storage = storage;
    s->next_collect = clock_now() + settings->collect;
    pthread_mutex_init(&s->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&s->changed, &attr);
    pthread_condattr_destroy(&attr);
    if (db_open(&s->db, storage->url, DB_ROLE_WORKER, err) != 0)
        goto fail;
    if (pthread_create(&s->thread, NULL, sweeper_thread, s) != 0) {
        err_set(err, ERR_NO_MEMORY, "sweeper: no thread");
        goto fail;
    }
    s->started = true;
    *out = s;
    return 0;
fail:
    sweeper_free(s);
    return -1;
}

void sweeper_free(struct sweeper *sweeper)
{
    if (sweeper == NULL)
        return;
    if (sweeper->started) {
        pthread_mutex_lock(&sweeper->lock);
        sweeper->stop = true;
        pthread_cond_signal(&sweeper->changed);
        pthread_mutex_unlock(&sweeper->lock);
        pthread_join(sweeper->thread, NULL);
    }
    db_close(sweeper->db);
    pthread_cond_destroy(&sweeper->changed);
    pthread_mutex_destroy(&sweeper->lock);
    free(sweeper);
}

void sweeper_worker_died(struct sweeper *sweeper)
{
    pthread_mutex_lock(&sweeper->lock);
    sweeper->death = true;
    pthread_cond_signal(&sweeper->changed);
    pthread_mutex_unlock(&sweeper->lock);
}
