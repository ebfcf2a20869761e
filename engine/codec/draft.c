#include "engine/codec/draft.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/base/file_io.h"
#include "engine/codec/artifact.h"

/* Else a folder that is missing would show when hours of work are to be written. */
static int try_place(const struct draft *d, struct err *err)
{
    struct stat st;
    int fd;

    if (stat(d->place, &st) == 0 && S_ISDIR(st.st_mode))
        return err_set(err, ERR_INVALID, "%s is a folder: name the file to be made in it",
                       d->place);
    fd = open(d->path, O_WRONLY | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0)
        return err_set_errno(err, errno, "no file can be made at %s", d->place);
    close(fd);
    unlink(d->path);
    return 0;
}

int draft_open(struct draft *d, const char *place, struct err *err)
{
    *d = (struct draft){.place = place};
    if (asprintf(&d->path, "%s.%ld.draft", place, (long)getpid()) < 0)
        d->path = NULL;
    if (asprintf(&d->kept, "%s.%ld.kept.draft", place, (long)getpid()) < 0)
        d->kept = NULL;
    if (!d->path || !d->kept)
        return err_set(err, ERR_NO_MEMORY, "no memory for the name of a file");
    return try_place(d, err);
}

void draft_close(struct draft *d)
{
    if (d->path)
        unlink(d->path);
    if (d->kept)
        unlink(d->kept);
    free(d->path);
    free(d->kept);
    *d = (struct draft){0};
}

int draft_keep(struct draft *d, const char *report, struct err *err)
{
    if (artifact_set_report(d->path, report, err))
        return -1;
    if (rename(d->path, d->kept))
        return err_set_errno(err, errno, "rename to %s", d->kept);
    return 0;
}

int draft_place(struct draft *d, struct err *err)
{
    /* Its bytes are on the disk: the writer and the patch of its report have seen to that. */
    if (rename(d->kept, d->place))
        return err_set_errno(err, errno, "rename to %s", d->place);
    return file_sync_parent(d->place, err);
}
