#include "server/worker_watch.h"

#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "engine/base/clock.h"
#include "engine/base/file_io.h"
#include "engine/base/log.h"
#include "engine/base/progress.h"
#include "server/cmd.h"
#include "server/devices.h"
#include "storage/ids.h"

#define WINDOW 60.0     /* s that utilization looks back */
#define SAMPLES 128     /* of the time spent computing, at least WINDOW / SAMPLES apart */
#define LAST_SECONDS 5u /* for what remains to be done by a process with a stuck device */

static struct {
    pthread_mutex_t lock;
    struct worker_watch_options options;
    void (*stuck)(void *context);
    void *context;
    char job[ID_SIZE];
    const char *call; /* NULL: none under way */
    int64_t number;
    double begun, alive; /* clock_now() of begin, and of the last sign of life */
    uint64_t progress;
    double busy; /* s computed, without the call under way */
    struct {
        double at, busy;
    } sample[SAMPLES]; /* a ring; the oldest is the next to be overwritten */
    int samples, newest;
} watch = {.lock = PTHREAD_MUTEX_INITIALIZER, .options = {.device = "cpu", .words_fd = -1}};

/* ------------------------------------------------------------------ marks */

void worker_watch_job(const char *job)
{
    pthread_mutex_lock(&watch.lock);
    snprintf(watch.job, sizeof watch.job, "%s", job);
    pthread_mutex_unlock(&watch.lock);
}

void worker_watch_begin(const char *call, int64_t number)
{
    pthread_mutex_lock(&watch.lock);
    watch.call = call;
    watch.number = number;
    watch.begun = watch.alive = clock_now();
    watch.progress = progress_count();
    pthread_mutex_unlock(&watch.lock);
}

void worker_watch_end(void)
{
    pthread_mutex_lock(&watch.lock);
    if (watch.call != NULL)
        watch.busy += clock_now() - watch.begun;
    watch.call = NULL;
    pthread_mutex_unlock(&watch.lock);
}

/* ------------------------------------------------------------------ utilization */

static void add_sample(double now, double busy)
{
    if (watch.samples > 0 && now - watch.sample[watch.newest].at < WINDOW / SAMPLES)
        return;
    watch.newest = (watch.newest + 1) % SAMPLES;
    watch.sample[watch.newest].at = now;
    watch.sample[watch.newest].busy = busy;
    if (watch.samples < SAMPLES)
        watch.samples++;
}

double worker_watch_utilization(void)
{
    double now = clock_now(), busy, share = 0;

    pthread_mutex_lock(&watch.lock);
    busy = watch.busy + (watch.call != NULL ? now - watch.begun : 0);
    /* From the newest sample that is a whole window old; else from the oldest there is. */
    for (int i = 0; i < watch.samples; i++) {
        int at = (watch.newest - i + SAMPLES) % SAMPLES;
        double span = now - watch.sample[at].at;

        if (span > 0)
            share = (busy - watch.sample[at].busy) / span;
        if (span >= WINDOW)
            break;
    }
    add_sample(now, busy);
    pthread_mutex_unlock(&watch.lock);
    return share < 0 ? 0 : share > 1 ? 1 : share;
}

/* ------------------------------------------------------------------ the end */

static void last_words(const char *text)
{
    if (watch.options.words_fd >= 0)
        file_write_full(watch.options.words_fd, text, strlen(text), "last words", NULL);
}

void worker_watch_lost(const struct err *why)
{
    log_error("device %s is lost: %s: the process ends", watch.options.device, why->message);
    last_words(why->message);
    _exit(CMD_DEVICE_LOST);
}

static void on_alarm(int signo)
{
    _exit(CMD_DEVICE_STUCK);
}

/* Whoever asks after the device sees its last words: they name no job. */
static _Noreturn void end_stuck(double silent)
{
    char text[128], number[24] = "";

    if (watch.number > 0)
        snprintf(number, sizeof number, " %" PRId64, watch.number);
    snprintf(text, sizeof text, "no progress for %.0f s in %s%s", silent, watch.call, number);
    log_error("device %s made %s%s%s: the process ends", watch.options.device, text,
              watch.job[0] != '\0' ? " of " : "", watch.job);
    last_words(text);
    signal(SIGALRM, on_alarm);
    alarm(LAST_SECONDS);
    if (watch.stuck != NULL)
        watch.stuck(watch.context);
    _exit(CMD_DEVICE_STUCK);
}

static void *watchdog_thread(void *unused)
{
    double pause = watch.options.seconds / 4 < 1 ? watch.options.seconds / 4 : 1;
    const struct timespec wait = {.tv_sec = (time_t)pause,
                                  .tv_nsec = (long)(1e9 * (pause - (double)(time_t)pause))};

    for (;;) {
        double now = clock_now();
        uint64_t progress = progress_count();

        pthread_mutex_lock(&watch.lock);
        if (progress != watch.progress || progress_waits())
            watch.alive = now;
        watch.progress = progress;
        if (watch.call != NULL && now - watch.alive > watch.options.seconds)
            end_stuck(now - watch.alive); /* with the lock: what it says stays true */
        pthread_mutex_unlock(&watch.lock);
        nanosleep(&wait, NULL);
    }
    return NULL;
}

/* ------------------------------------------------------------------ the start */

int worker_watch_start(const struct worker_watch_options *options, struct err *err)
{
    pthread_t thread;

    watch.options = *options;
    worker_watch_utilization(); /* the first sample: what it counts from */
    if (options->seconds <= 0 || devices_is_cpu(options->device))
        return 0;
    if (pthread_create(&thread, NULL, watchdog_thread, NULL) != 0)
        return err_set(err, ERR_NO_MEMORY, "watchdog: no thread");
    pthread_detach(thread);
    return 0;
}

void worker_watch_on_stuck(void (*fn)(void *context), void *context)
{
    pthread_mutex_lock(&watch.lock);
    watch.stuck = fn;
    watch.context = context;
    pthread_mutex_unlock(&watch.lock);
}
