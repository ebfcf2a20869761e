#include "server/worker_check.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "engine/base/file_io.h"
#include "engine/base/log.h"
#include "engine/base/sha256.h"

struct worker_check {
    pthread_t thread;
    int fd;
    char sha256[SHA256_HEX];
    atomic_bool stop;
    atomic_int state;
};

static int go_on(void *context, struct err *err)
{
    struct worker_check *check = context;

    return atomic_load(&check->stop) ? err_set(err, ERR_CANCELLED, "nobody waits for it") : 0;
}

/* A shortage of memory says nothing about the file: it is hashed again, until there is some. */
static int digest(struct worker_check *check, char found[SHA256_HEX], struct err *err)
{
    const struct timespec pause = {.tv_nsec = 100000000};

    while (file_sha256_fd(check->fd, check->sha256, go_on, check, found, NULL, err) != 0) {
        if (err->kind != ERR_NO_MEMORY)
            return -1;
        err_clear(err);
        nanosleep(&pause, NULL);
        if (go_on(check, err) != 0)
            return -1;
        if (lseek(check->fd, 0, SEEK_SET) != 0)
            return err_set_errno(err, errno, "read %.12s", check->sha256);
    }
    return 0;
}

static void *hash(void *context)
{
    struct worker_check *check = context;
    char found[SHA256_HEX];
    struct err err = {0};
    int rc = digest(check, found, &err);
    bool sound = rc == 0 && strcmp(found, check->sha256) == 0;

    if (rc != 0 && err.kind == ERR_CANCELLED)
        return NULL;
    if (!sound)
        log_error("%.12s is damaged on disk: %s", check->sha256, rc == 0 ? found : err.message);
    atomic_store(&check->state, sound ? WORKER_CHECK_SOUND : WORKER_CHECK_DAMAGED);
    return NULL;
}

int worker_check_start(struct worker_check **out, const char *path, const char *sha256,
                       struct err *err)
{
    struct worker_check *check = calloc(1, sizeof *check);
    int rc;

    *out = NULL;
    if (check == NULL)
        return err_set(err, ERR_NO_MEMORY, "check %.12s: out of memory", sha256);
    memcpy(check->sha256, sha256, strnlen(sha256, sizeof check->sha256 - 1));
    check->fd = open(path, O_RDONLY | O_CLOEXEC);
    if (check->fd < 0) {
        rc = err_set_errno(err, errno, "open %.12s", sha256);
        free(check);
        return rc;
    }
    rc = pthread_create(&check->thread, NULL, hash, check);
    if (rc != 0) {
        close(check->fd);
        free(check);
        return err_set_errno(err, rc, "check %.12s", sha256);
    }
    *out = check;
    return 0;
}

enum worker_check_state worker_check_state(const struct worker_check *check)
{
    return (enum worker_check_state)atomic_load(&check->state);
}

void worker_check_free(struct worker_check *check)
{
    if (check == NULL)
        return;
    atomic_store(&check->stop, true);
    pthread_join(check->thread, NULL);
    close(check->fd);
    free(check);
}
