#include "storage/blob_sound.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "engine/base/clock.h"
#include "engine/base/log.h"

#define BELIEVED 64            /* files */
#define BELIEVED_SECONDS 600   /* a disk does not rot faster than that */
#define SETTLED_NS 2000000000L /* from then on a change would show in the file's times */

struct belief {
    struct file_identity file;
    double until; /* clock_now() */
};

struct blob_sound {
    pthread_mutex_t lock;
    struct belief belief[BELIEVED];
    int next;
};

struct blob_sound *blob_sound_new(void)
{
    struct blob_sound *sound = calloc(1, sizeof *sound);

    if (sound != NULL)
        pthread_mutex_init(&sound->lock, NULL);
    return sound;
}

void blob_sound_free(struct blob_sound *sound)
{
    if (sound == NULL)
        return;
    pthread_mutex_destroy(&sound->lock);
    free(sound);
}

static bool believed(struct blob_sound *sound, const struct file_identity *file)
{
    double now = clock_now();
    bool found = false;

    pthread_mutex_lock(&sound->lock);
    for (int i = 0; i < BELIEVED && !found; i++)
        found = now < sound->belief[i].until && file_identity_equal(&sound->belief[i].file, file);
    pthread_mutex_unlock(&sound->lock);
    return found;
}

static void believe(struct blob_sound *sound, const struct file_identity *file)
{
    struct timespec now;

    clock_gettime(CLOCK_REALTIME, &now);
    if ((int64_t)now.tv_sec * 1000000000 + now.tv_nsec - file->changed < SETTLED_NS)
        return;
    pthread_mutex_lock(&sound->lock);
    sound->belief[sound->next] = (struct belief){*file, clock_now() + BELIEVED_SECONDS};
    sound->next = (sound->next + 1) % BELIEVED;
    pthread_mutex_unlock(&sound->lock);
}

static int damaged(const struct blob_wanted *want, const char *how, struct err *err)
{
    log_error("%s: blob %s of %s is damaged on disk: %s", want->name, want->sha256, want->owner,
              how);
    err_clear(err);
    return err_set_code(err, ERR_IO, "damaged_file", want->param,
                        "The bytes of `%.200s` on the server's disk are no longer those that were "
                        "stored, so they are not used. The same bytes stored again heal it.",
                        want->name);
}

/* By another description of the same file, so that fd stays at its beginning. */
static int hash_open(int fd, const struct blob_wanted *want, char found[SHA256_HEX],
                     struct err *err)
{
    char opened[32];
    int again, rc;

    snprintf(opened, sizeof opened, "/proc/self/fd/%d", fd);
    again = open(opened, O_RDONLY | O_CLOEXEC);
    if (again < 0)
        return err_set_errno(err, errno, "open blob %s again", want->sha256);
    rc = file_sha256_fd(again, want->sha256, want->go_on, want->context, found, NULL, err);
    close(again);
    return rc;
}

int blob_sound_check(struct blob_sound *sound, int fd, const struct blob_wanted *want,
                     struct err *err)
{
    struct file_identity before, after;
    char found[SHA256_HEX];
    bool known = file_identify_fd(fd, &before);

    if (known && believed(sound, &before))
        return 0;
    if (hash_open(fd, want, found, err) != 0)
        return err->kind == ERR_IO ? damaged(want, err->message, err) : -1;
    if (strcmp(found, want->sha256) != 0)
        return damaged(want, found, err);
    if (known && file_identify_fd(fd, &after) && file_identity_equal(&before, &after))
        believe(sound, &before);
    return 0;
}
