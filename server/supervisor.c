#include "server/supervisor.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine/base/clock.h"
#include "engine/base/log.h"
#include "engine/base/utf8.h"
#include "server/cmd.h"
#include "server/infer_client.h"

#define YOUNG 5.0             /* s: a worker that dies younger waits before its next start */
#define BACKOFF_FIRST 0.25    /* s */
#define BACKOFF_MAX 2.0       /* s */
#define BACKOFF_LOST_MAX 30.0 /* s, of a device that is lost again and again */
#define HEALTHY 600.0         /* s: a worker that lived this long had its device for good */

enum role { ROLE_TRAIN, ROLE_INFER };
static const char *const role_names[] = {"train", "infer"};

struct worker {
    enum role role;
    double started, start_at, backoff;
    int losses;                    /* of the device, in a row */
    int words;                     /* where it leaves the reason of its death; -1 */
    struct supervisor_worker seen; /* changes under the lock only */
};

struct supervisor {
    struct supervisor_options options;
    char **environment;
    int signals; /* signalfd */
    int lifeline[2];
    struct worker *workers;
    int count;
    bool stopping;
    struct device_list devices;
    pthread_mutex_t lock; /* of stats, and of each worker's `seen` */
    struct supervisor_stats stats;
};

static void signal_set(sigset_t *set)
{
    sigemptyset(set);
    sigaddset(set, SIGTERM);
    sigaddset(set, SIGINT);
    sigaddset(set, SIGHUP);
    sigaddset(set, SIGCHLD);
}

void supervisor_block_signals(void)
{
    sigset_t set;

    signal_set(&set);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    signal(SIGPIPE, SIG_IGN);
}

void supervisor_unblock_interrupt(void)
{
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
}

/* ------------------------------------------------------------------ starting */

/* The worker's environment is the settings, with the database that was really opened. */
static int make_environment(struct supervisor *sv, struct err *err)
{
    struct settings settings = *sv->options.settings;

    if (sv->options.database != NULL)
        settings.database = sv->options.database;
    sv->environment = settings_environment(&settings);
    if (sv->environment == NULL)
        return err_set(err, ERR_NO_MEMORY, "supervisor: out of memory");
    return 0;
}

static void add_worker(struct supervisor *sv, enum role role, const char *device)
{
    struct worker *w = &sv->workers[sv->count++];

    w->role = role;
    w->words = -1;
    w->seen.train = role == ROLE_TRAIN;
    snprintf(w->seen.device, sizeof w->seen.device, "%s", device);
    if (role == ROLE_TRAIN)
        sv->stats.train_wanted++;
}

/* Which workers there are to be, for as long as the server runs. */
static int plan_workers(struct supervisor *sv, struct err *err)
{
    int on_cpu = (int)sv->options.settings->workers;

    sv->workers = calloc((size_t)(1 + sv->devices.count + on_cpu), sizeof *sv->workers);
    if (sv->workers == NULL)
        return err_set(err, ERR_NO_MEMORY, "supervisor: out of memory");
    add_worker(sv, ROLE_INFER, sv->options.infer_device);
    for (int i = 0; on_cpu > 0 && i < sv->devices.count; i++) {
        const char *device = sv->devices.name[i];

        for (int k = 0; k < (devices_is_cpu(device) ? on_cpu : 1); k++)
            add_worker(sv, ROLE_TRAIN, device);
    }
    return 0;
}

int supervisor_open(struct supervisor **out, const struct supervisor_options *options,
                    struct err *err)
{
    struct supervisor *sv = calloc(1, sizeof *sv);
    sigset_t set;

    if (sv == NULL)
        return err_set(err, ERR_NO_MEMORY, "supervisor: out of memory");
    sv->options = *options;
    sv->devices = *options->devices;
    sv->signals = sv->lifeline[0] = sv->lifeline[1] = -1;
    pthread_mutex_init(&sv->lock, NULL);
    if (plan_workers(sv, err) != 0)
        goto fail;
    if (make_environment(sv, err) != 0)
        goto fail;
    if (pipe2(sv->lifeline, O_CLOEXEC) != 0) {
        err_set_errno(err, errno, "supervisor: pipe");
        goto fail;
    }
    signal_set(&set);
    sv->signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    if (sv->signals < 0) {
        err_set_errno(err, errno, "supervisor: signalfd");
        goto fail;
    }
    *out = sv;
    return 0;
fail:
    supervisor_free(sv);
    return -1;
}

/* The descriptors that a worker inherits, beside the lifeline. */
struct handed {
    int socket[2]; /* infer: ours, its */
    int words[2];  /* ours to read, its to write */
};

static void close_pair(int pair[2])
{
    for (int i = 0; i < 2; i++) {
        if (pair[i] >= 0)
            close(pair[i]);
        pair[i] = -1;
    }
}

static int make_handed(struct handed *h, enum role role, struct err *err)
{
    *h = (struct handed){{-1, -1}, {-1, -1}};
    if (role == ROLE_INFER && socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, h->socket) != 0)
        return err_set_errno(err, errno, "supervisor: socketpair");
    if (pipe2(h->words, O_CLOEXEC | O_NONBLOCK) != 0) {
        err_set_errno(err, errno, "supervisor: pipe");
        close_pair(h->socket);
        return -1;
    }
    return 0;
}

/* Between fork and exec only async-signal-safe calls are allowed: other threads may have held any
 * lock at the fork. */
static _Noreturn void become_worker(struct supervisor *sv, char *const argv[],
                                    const struct handed *h)
{
    sigset_t none;

    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    fcntl(sv->lifeline[0], F_SETFD, 0);
    fcntl(h->words[1], F_SETFD, 0);
    if (h->socket[1] >= 0)
        fcntl(h->socket[1], F_SETFD, 0);
    execve("/proc/self/exe", argv, sv->environment);
    _exit(127);
}

static pid_t spawn(struct supervisor *sv, const struct worker *w, const struct handed *h)
{
    char lifeline[16], words[16], socket_text[16];
    char *argv[] = {"graft",
                    "work",
                    "--role",
                    (char *)role_names[w->role],
                    "--device",
                    (char *)w->seen.device,
                    "--lifeline-fd",
                    lifeline,
                    "--words-fd",
                    words,
                    w->role == ROLE_INFER ? "--socket-fd" : NULL,
                    socket_text,
                    NULL};
    pid_t pid;

    snprintf(lifeline, sizeof lifeline, "%d", sv->lifeline[0]);
    snprintf(words, sizeof words, "%d", h->words[1]);
    snprintf(socket_text, sizeof socket_text, "%d", h->socket[1]);
    pid = fork();
    if (pid == 0)
        become_worker(sv, argv, h);
    return pid;
}

static int start(struct supervisor *sv, struct worker *w, struct err *err)
{
    struct handed h;
    pid_t pid;

    if (make_handed(&h, w->role, err) != 0)
        return -1;
    pid = spawn(sv, w, &h);
    if (pid < 0) {
        err_set_errno(err, errno, "supervisor: fork");
        close_pair(h.socket);
        close_pair(h.words);
        return -1;
    }
    close(h.words[1]);
    w->words = h.words[0];
    if (w->role == ROLE_INFER) {
        close(h.socket[1]);
        infer_client_attach(sv->options.infer, h.socket[0]);
    }
    pthread_mutex_lock(&sv->lock);
    w->seen.pid = pid;
    pthread_mutex_unlock(&sv->lock);
    w->started = clock_now();
    log_info("started %s worker on %s, process %d", role_names[w->role], w->seen.device, (int)pid);
    return 0;
}

static void count_alive(struct supervisor *sv, struct worker *restarted)
{
    pthread_mutex_lock(&sv->lock);
    sv->stats.train_workers = sv->stats.infer_workers = 0;
    for (int i = 0; i < sv->count; i++) {
        if (sv->workers[i].seen.pid != 0 && sv->workers[i].role == ROLE_TRAIN)
            sv->stats.train_workers++;
        if (sv->workers[i].seen.pid != 0 && sv->workers[i].role == ROLE_INFER)
            sv->stats.infer_workers++;
    }
    if (restarted != NULL && restarted->role == ROLE_TRAIN)
        sv->stats.train_restarts++;
    if (restarted != NULL && restarted->role == ROLE_INFER)
        sv->stats.infer_restarts++;
    if (restarted != NULL)
        restarted->seen.restarts++;
    pthread_mutex_unlock(&sv->lock);
}

static void start_due(struct supervisor *sv)
{
    for (int i = 0; i < sv->count; i++) {
        struct worker *w = &sv->workers[i];
        bool again = w->started > 0;
        struct err err = {0};

        if (w->seen.pid != 0 || clock_now() < w->start_at)
            continue;
        if (start(sv, w, &err) != 0) { /* out of processes or descriptors: keep trying */
            log_error("%s", err.message);
            w->start_at = clock_now() + BACKOFF_MAX;
            continue;
        }
        count_alive(sv, again ? w : NULL);
    }
}

/* ------------------------------------------------------------------ deaths */

/* true: the worker says that its device is to blame. */
static bool device_died(int status)
{
    return WIFEXITED(status) &&
           (WEXITSTATUS(status) == CMD_DEVICE_LOST || WEXITSTATUS(status) == CMD_DEVICE_STUCK);
}

static void tell_death(const struct supervisor *sv, const struct worker *w, int status)
{
    const char *role = role_names[w->role];
    int pid = (int)w->seen.pid;

    if (sv->stopping)
        log_info("%s worker %d has stopped", role, pid);
    else if (WIFSIGNALED(status))
        log_warn("%s worker %d was killed by signal %d", role, pid, WTERMSIG(status));
    else if (device_died(status))
        log_warn("%s worker %d has lost %s (status %d)", role, pid, w->seen.device,
                 WEXITSTATUS(status));
    else
        log_warn("%s worker %d exited with status %d", role, pid, WEXITSTATUS(status));
}

/* How often has the device died in a row, up to now? */
static int losses_of(const struct supervisor *sv, const char *device)
{
    int most = 0;

    for (int i = 0; i < sv->count; i++) {
        const struct worker *w = &sv->workers[i];

        if (w->seen.pid != 0 && clock_now() - w->started >= HEALTHY)
            continue;
        if (strcmp(w->seen.device, device) == 0 && w->losses > most)
            most = w->losses;
    }
    return most;
}

/* Chat goes to the next device of the list that is not dying too; with none it stays. */
static void move_infer(struct supervisor *sv, struct worker *w)
{
    int from = devices_index(&sv->devices, w->seen.device);

    for (int i = 1; i <= sv->devices.count; i++) {
        const char *next = sv->devices.name[(from + i) % sv->devices.count];

        if (strcmp(next, w->seen.device) == 0 || losses_of(sv, next) >= SUPERVISOR_LOSSES_MOVE)
            continue;
        log_warn("%s was lost %d times in a row: the infer worker goes to %s", w->seen.device,
                 w->losses, next);
        snprintf(w->seen.device, sizeof w->seen.device, "%s", next);
        w->losses = 0;
        w->backoff = 0;
        return;
    }
}

static void note_loss(struct supervisor *sv, struct worker *w, double age)
{
    ssize_t n;

    pthread_mutex_lock(&sv->lock);
    w->seen.lost++;
    n = read(w->words, w->seen.reason, sizeof w->seen.reason - 1);
    w->seen.reason[n > 0 ? n : 0] = '\0';
    utf8_scrub(w->seen.reason);
    w->losses = age >= HEALTHY ? 1 : w->losses + 1;
    if (w->role == ROLE_INFER && w->losses >= SUPERVISOR_LOSSES_MOVE)
        move_infer(sv, w);
    pthread_mutex_unlock(&sv->lock);
}

static void set_backoff(struct worker *w, double age)
{
    double most = w->losses > 1 ? BACKOFF_LOST_MAX : BACKOFF_MAX;

    if (age >= YOUNG && w->losses <= 1) {
        w->backoff = 0;
    } else {
        w->backoff = w->backoff == 0 ? BACKOFF_FIRST : 2 * w->backoff;
        if (w->backoff > most)
            w->backoff = most;
    }
    /* The first restart of a young one is at once too: only a second death in a row waits. */
    w->start_at = clock_now() + (w->backoff > BACKOFF_FIRST ? w->backoff : 0);
}

static void bury(struct supervisor *sv, struct worker *w, int status)
{
    double age = clock_now() - w->started;
    pid_t pid = w->seen.pid;

    tell_death(sv, w, status);
    if (device_died(status) && !sv->stopping)
        note_loss(sv, w, age);
    else if (age >= HEALTHY)
        w->losses = 0;
    if (w->words >= 0)
        close(w->words);
    w->words = -1;
    if (sv->options.died != NULL)
        sv->options.died(sv->options.context, pid);
    set_backoff(w, age);
    pthread_mutex_lock(&sv->lock);
    w->seen.pid = 0;
    pthread_mutex_unlock(&sv->lock);
    count_alive(sv, NULL);
}

static void reap(struct supervisor *sv)
{
    for (int i = 0; i < sv->count; i++) {
        struct worker *w = &sv->workers[i];
        int status;

        /* By pid, never -1: the database's children belong to another module. */
        if (w->seen.pid != 0 && waitpid(w->seen.pid, &status, WNOHANG) == w->seen.pid)
            bury(sv, w, status);
    }
}

/* Waits up to `seconds` for signals. true: one of them asks to stop. */
static bool wait_for_signals(struct supervisor *sv, double seconds)
{
    struct pollfd fd = {.fd = sv->signals, .events = POLLIN};
    struct signalfd_siginfo info;
    bool stop = false;

    if (seconds < 0)
        seconds = 0;
    poll(&fd, 1, seconds > 3600 ? 3600000 : (int)(seconds * 1000) + 1);
    while (read(sv->signals, &info, sizeof info) == (ssize_t)sizeof info) {
        if (info.ssi_signo == SIGTERM || info.ssi_signo == SIGINT)
            stop = true;
    }
    reap(sv);
    return stop;
}

int supervisor_run(struct supervisor *sv, struct err *err)
{
    for (;;) {
        double next = clock_now() + 3600;

        start_due(sv);
        for (int i = 0; i < sv->count; i++) {
            if (sv->workers[i].seen.pid == 0 && sv->workers[i].start_at < next)
                next = sv->workers[i].start_at;
        }
        if (wait_for_signals(sv, next - clock_now()))
            return 0;
    }
}

/* ------------------------------------------------------------------ stopping */

static bool signal_role(struct supervisor *sv, int train_only, int signo)
{
    bool any = false;

    for (int i = 0; i < sv->count; i++) {
        struct worker *w = &sv->workers[i];

        if (w->seen.pid == 0 || (train_only && w->role != ROLE_TRAIN))
            continue;
        kill(w->seen.pid, signo);
        any = true;
    }
    return any;
}

void supervisor_stop_training(struct supervisor *sv)
{
    sv->stopping = true;
    signal_role(sv, true, SIGTERM);
}

void supervisor_stop(struct supervisor *sv, double seconds)
{
    double deadline = clock_now() + seconds;

    sv->stopping = true;
    signal_role(sv, false, SIGTERM);
    reap(sv);
    while (signal_role(sv, false, 0) && clock_now() < deadline)
        wait_for_signals(sv, deadline - clock_now());
    if (signal_role(sv, false, SIGKILL))
        log_warn("workers did not stop in time: killed; their jobs go on from the last checkpoint");
    for (int i = 0; i < sv->count; i++) {
        int status;

        if (sv->workers[i].seen.pid != 0 &&
            waitpid(sv->workers[i].seen.pid, &status, 0) == sv->workers[i].seen.pid)
            bury(sv, &sv->workers[i], status);
    }
}

void supervisor_free(struct supervisor *sv)
{
    if (sv == NULL)
        return;
    if (sv->workers != NULL)
        supervisor_stop(sv, 0);
    for (int i = 0; i < 2; i++) {
        if (sv->lifeline[i] >= 0)
            close(sv->lifeline[i]);
    }
    if (sv->signals >= 0)
        close(sv->signals);
    settings_environment_free(sv->environment);
    pthread_mutex_destroy(&sv->lock);
    free(sv->workers);
    free(sv);
}

void supervisor_stats(struct supervisor *sv, struct supervisor_stats *out)
{
    pthread_mutex_lock(&sv->lock);
    *out = sv->stats;
    pthread_mutex_unlock(&sv->lock);
}

int supervisor_workers(struct supervisor *sv, struct supervisor_worker *out, int max)
{
    pthread_mutex_lock(&sv->lock);
    for (int i = 0; i < sv->count && i < max; i++)
        out[i] = sv->workers[i].seen;
    pthread_mutex_unlock(&sv->lock);
    return sv->count;
}
