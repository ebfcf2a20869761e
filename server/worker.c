#include "server/worker.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "engine/base/file_io.h"
#include "engine/base/log.h"

#define OOM_SCORE \
    "500" /* of 1000: long before the server, which holds nothing that can be redone */

static volatile sig_atomic_t stopping;
static int stop_event = -1; /* eventfd: readable once SIGTERM has come */

static void on_terminate(int signo)
{
    uint64_t one = 1;
    int saved = errno;

    stopping = 1;
    if (write(stop_event, &one, sizeof one) < 0)
        stopping = 1; /* full: it is readable already */
    errno = saved;
}

bool worker_stopping(void)
{
    return stopping != 0;
}

void worker_sleep(double seconds)
{
    struct pollfd fd = {.fd = stop_event, .events = POLLIN};

    poll(&fd, 1, (int)(1000 * seconds));
}

/* Nobody writes to the lifeline: a read that returns means that the server has gone, however it
 * went. Nothing here is worth saving that is not on disk already. */
static void *watch_lifeline(void *context)
{
    int fd = (int)(intptr_t)context;
    char byte;
    ssize_t n;

    do
        n = read(fd, &byte, 1);
    while (n > 0 || (n < 0 && errno == EINTR));
    _exit(0);
}

static int set_signals(bool supervised, struct err *err)
{
    struct sigaction sa;

    stop_event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (stop_event < 0)
        return err_set_errno(err, errno, "worker: eventfd");
    memset(&sa, 0, sizeof sa);
    sigemptyset(&sa.sa_mask);
    sa.sa_flags = SA_RESTART; /* waiting is done in worker_sleep */
    sa.sa_handler = on_terminate;
    sigaction(SIGTERM, &sa, NULL);
    /* A Ctrl-C reaches the whole foreground group: the server decides what it means for us. */
    sa.sa_handler = supervised ? SIG_IGN : on_terminate;
    sigaction(SIGINT, &sa, NULL);
    sa.sa_handler = SIG_IGN;
    sigaction(SIGPIPE, &sa, NULL);
    return 0;
}

static void prefer_for_oom(void)
{
    int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);

    if (fd < 0)
        return; /* no such file, no such killer */
    file_write_full(fd, OOM_SCORE, strlen(OOM_SCORE), "oom_score_adj", NULL);
    close(fd);
}

int worker_setup(int lifeline_fd, struct err *err)
{
    pthread_t thread;

    if (set_signals(lifeline_fd >= 0, err) != 0)
        return -1;
    if (lifeline_fd < 0)
        return 0;
    prefer_for_oom();
    fcntl(lifeline_fd, F_SETFD, FD_CLOEXEC);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (pthread_create(&thread, NULL, watch_lifeline, (void *)(intptr_t)lifeline_fd) != 0)
        return err_set(err, ERR_NO_MEMORY, "worker: no thread");
    pthread_detach(thread);
    return 0;
}

int worker_hide_place(const char *what, const char *sha256, struct err *err)
{
    if ((err->kind != ERR_INVALID && err->kind != ERR_IO) || err->code[0] != '\0')
        return -1;
    log_error("%s %.12s: %s", what, sha256, err->message);
    err_clear(err);
    return err_set(err, ERR_INTERNAL, "%s %.12s can not be used", what, sha256);
}
