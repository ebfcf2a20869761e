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

#include "engine/base/log.h"
#include "server/clock.h"
#include "server/infer_client.h"

#define YOUNG 5.0          /* s: a worker that dies younger waits before its next start */
#define BACKOFF_FIRST 0.25 /* s */
#define BACKOFF_MAX 2.0    /* s */

enum role { ROLE_TRAIN, ROLE_INFER };
static const char *const role_names[] = {"train", "infer"};

struct worker {
    enum role role;
    pid_t pid; /* 0: not running */
    double started, start_at, backoff;
};

struct supervisor {
    struct supervisor_options options;
    char **environment;
    int signals; /* signalfd */
    int lifeline[2];
    struct worker *workers;
    int count;
    bool stopping;
    pthread_mutex_t lock; /* of stats */
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

int supervisor_open(struct supervisor **out, const struct supervisor_options *options,
                    struct err *err)
{
    struct supervisor *sv = calloc(1, sizeof *sv);
    sigset_t set;

    if (sv == NULL)
        return err_set(err, ERR_NO_MEMORY, "supervisor: out of memory");
    sv->options = *options;
    sv->signals = sv->lifeline[0] = sv->lifeline[1] = -1;
    pthread_mutex_init(&sv->lock, NULL);
    sv->stats.train_wanted = (int)options->settings->workers;
    sv->count = sv->stats.train_wanted + 1;
    sv->workers = calloc((size_t)sv->count, sizeof *sv->workers);
    if (sv->workers == NULL) {
        err_set(err, ERR_NO_MEMORY, "supervisor: out of memory");
        goto fail;
    }
    for (int i = 0; i < sv->count; i++)
        sv->workers[i].role = i == 0 ? ROLE_INFER : ROLE_TRAIN;
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

/* Between fork and exec only async-signal-safe calls are allowed: other threads may have held any
 * lock at the fork. */
static _Noreturn void become_worker(struct supervisor *sv, char *const argv[], int socket_fd)
{
    sigset_t none;

    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    fcntl(sv->lifeline[0], F_SETFD, 0);
    if (socket_fd >= 0)
        fcntl(socket_fd, F_SETFD, 0);
    execve("/proc/self/exe", argv, sv->environment);
    _exit(127);
}

static int start(struct supervisor *sv, struct worker *w, struct err *err)
{
    char lifeline[16], socket_text[16];
    char *argv[] = {"graft",
                    "work",
                    "--role",
                    (char *)role_names[w->role],
                    "--lifeline-fd",
                    lifeline,
                    w->role == ROLE_INFER ? "--socket-fd" : NULL,
                    socket_text,
                    NULL};
    int pair[2] = {-1, -1};
    pid_t pid;

    if (w->role == ROLE_INFER && socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0)
        return err_set_errno(err, errno, "supervisor: socketpair");
    snprintf(lifeline, sizeof lifeline, "%d", sv->lifeline[0]);
    snprintf(socket_text, sizeof socket_text, "%d", pair[1]);
    pid = fork();
    if (pid == 0)
        become_worker(sv, argv, pair[1]);
    if (pair[1] >= 0)
        close(pair[1]);
    if (pid < 0) {
        err_set_errno(err, errno, "supervisor: fork");
        if (pair[0] >= 0)
            close(pair[0]);
        return -1;
    }
    if (pair[0] >= 0)
        infer_client_attach(sv->options.infer, pair[0]);
    w->pid = pid;
    w->started = clock_now();
    log_info("started %s worker, process %d", role_names[w->role], (int)pid);
    return 0;
}

static void count_alive(struct supervisor *sv, const struct worker *restarted)
{
    pthread_mutex_lock(&sv->lock);
    sv->stats.train_workers = sv->stats.infer_workers = 0;
    for (int i = 0; i < sv->count; i++) {
        if (sv->workers[i].pid != 0 && sv->workers[i].role == ROLE_TRAIN)
            sv->stats.train_workers++;
        if (sv->workers[i].pid != 0 && sv->workers[i].role == ROLE_INFER)
            sv->stats.infer_workers++;
    }
    if (restarted != NULL && restarted->role == ROLE_TRAIN)
        sv->stats.train_restarts++;
    if (restarted != NULL && restarted->role == ROLE_INFER)
        sv->stats.infer_restarts++;
    pthread_mutex_unlock(&sv->lock);
}

static void start_due(struct supervisor *sv)
{
    for (int i = 0; i < sv->count; i++) {
        struct worker *w = &sv->workers[i];
        bool again = w->started > 0;
        struct err err = {0};

        if (w->pid != 0 || clock_now() < w->start_at)
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

static void bury(struct supervisor *sv, struct worker *w, int status)
{
    double age = clock_now() - w->started;

    if (sv->stopping)
        log_info("%s worker %d has stopped", role_names[w->role], (int)w->pid);
    else if (WIFSIGNALED(status))
        log_warn("%s worker %d was killed by signal %d", role_names[w->role], (int)w->pid,
                 WTERMSIG(status));
    else
        log_warn("%s worker %d exited with status %d", role_names[w->role], (int)w->pid,
                 WEXITSTATUS(status));
    if (sv->options.died != NULL)
        sv->options.died(sv->options.context, w->pid);
    if (age >= YOUNG) {
        w->backoff = 0;
    } else {
        w->backoff = w->backoff == 0 ? BACKOFF_FIRST : 2 * w->backoff;
        if (w->backoff > BACKOFF_MAX)
            w->backoff = BACKOFF_MAX;
    }
    /* The first restart of a young one is at once too: only a second death in a row waits. */
    w->start_at = clock_now() + (w->backoff > BACKOFF_FIRST ? w->backoff : 0);
    w->pid = 0;
    count_alive(sv, NULL);
}

static void reap(struct supervisor *sv)
{
    for (int i = 0; i < sv->count; i++) {
        struct worker *w = &sv->workers[i];
        int status;

        /* By pid, never -1: the database's children belong to another module. */
        if (w->pid != 0 && waitpid(w->pid, &status, WNOHANG) == w->pid)
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
            if (sv->workers[i].pid == 0 && sv->workers[i].start_at < next)
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

        if (w->pid == 0 || (train_only && w->role != ROLE_TRAIN))
            continue;
        kill(w->pid, signo);
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

        if (sv->workers[i].pid != 0 &&
            waitpid(sv->workers[i].pid, &status, 0) == sv->workers[i].pid)
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
