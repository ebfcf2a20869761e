/* Blobs in a local directory: <root>/blobs/<owner>/ab/cd/<sha256>. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/base/file_io.h"
#include "storage/blob_backend.h"

struct blob_local {
    char *root; /* <root>/blobs */
};

/* Held shared by put, exclusive by the removal of old blobs, so that a commit never slips between
 * the collector's look at a file's age and its unlink. A new descriptor each time: flock belongs to
 * the open file, and threads must exclude one another too. */
static int lock_store(const struct blob_local *local, int how, struct err *err)
{
    char *path = NULL;
    int fd;

    if (asprintf(&path, "%s/.lock", local->root) < 0)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0)
        err_set_errno(err, errno, "open %s", path);
    while (fd >= 0 && flock(fd, how) != 0) {
        if (errno == EINTR)
            continue;
        err_set_errno(err, errno, "lock %s", path);
        close(fd);
        fd = -1;
    }
    free(path);
    return fd;
}

static char *blob_file(const struct blob_local *local, const char *owner, const char *sha256)
{
    char *path = NULL;

    if (asprintf(&path, "%s/%s/%.2s/%.2s/%s", local->root, owner, sha256, sha256 + 2, sha256) < 0)
        return NULL;
    return path;
}

/* Makes <root>/<owner>/ab/cd, each durable in its parent: one that is there already may be another
 * process's of this moment, which has not come to its fsync yet. */
static int make_folders(const struct blob_local *local, const char *owner, const char *sha256,
                        char **leaf, struct err *err)
{
    char part[3][96], *dir = strdup(local->root), *next;
    int rc;

    snprintf(part[0], sizeof part[0], "%s", owner);
    snprintf(part[1], sizeof part[1], "%.2s", sha256);
    snprintf(part[2], sizeof part[2], "%.2s", sha256 + 2);
    for (int i = 0; dir != NULL && i < 3; i++) {
        if (asprintf(&next, "%s/%s", dir, part[i]) < 0) {
            free(dir);
            dir = NULL;
            break;
        }
        if (mkdir(next, 0700) != 0 && errno != EEXIST)
            rc = err_set_errno(err, errno, "make %s", next);
        else
            rc = file_sync_dir(dir, err);
        if (rc != 0) {
            free(next);
            free(dir);
            return -1;
        }
        free(dir);
        dir = next;
    }
    *leaf = dir;
    return dir != NULL ? 0 : err_set(err, ERR_NO_MEMORY, "out of memory");
}

static int local_put(void *self, const char *owner, const char *sha256, const char *path,
                     struct err *err)
{
    struct blob_local *local = self;
    char *leaf = NULL, *target = NULL;
    int lock = -1, rc = -1;

    if (make_folders(local, owner, sha256, &leaf, err) != 0)
        return -1;
    target = blob_file(local, owner, sha256);
    if (target == NULL) {
        err_set(err, ERR_NO_MEMORY, "out of memory");
        goto out;
    }
    lock = lock_store(local, LOCK_SH, err);
    if (lock < 0)
        goto out;
    /* Its age counts from now, and it never changes again. */
    if (chmod(path, 0400) != 0 || utimensat(AT_FDCWD, path, NULL, 0) != 0 ||
        rename(path, target) != 0) {
        err_set_errno(err, errno, "move %s to %s", path, target);
        goto out;
    }
    rc = file_sync_dir(leaf, err);
out:
    if (lock >= 0)
        close(lock);
    free(target);
    free(leaf);
    return rc;
}

static int local_get(void *self, const char *owner, const char *sha256, char **path,
                     struct err *err)
{
    char *file = blob_file(self, owner, sha256);

    *path = NULL;
    if (file == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    if (access(file, R_OK) != 0) {
        if (errno == ENOENT)
            err_set(err, ERR_IO, "blob %s of %s is not in the store", sha256, owner);
        else
            err_set_errno(err, errno, "read %s", file);
        free(file);
        return -1;
    }
    *path = file;
    return 0;
}

static int local_remove(void *self, const char *owner, const char *sha256, struct err *err)
{
    char *file = blob_file(self, owner, sha256);
    int rc = 0;

    if (file == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    if (unlink(file) != 0 && errno != ENOENT)
        rc = err_set_errno(err, errno, "remove %s", file);
    free(file);
    return rc;
}

static int local_remove_old(void *self, const char *owner, const char *sha256, int64_t unless_since,
                            int *removed, struct err *err)
{
    struct blob_local *local = self;
    char *file = blob_file(local, owner, sha256);
    struct stat st;
    int lock = -1, rc = -1;

    *removed = 0;
    if (file == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    lock = lock_store(local, LOCK_EX, err);
    if (lock < 0)
        goto out;
    rc = 0;
    if (lstat(file, &st) == 0 && st.st_mtime < unless_since) {
        if (unlink(file) == 0)
            *removed = 1;
        else if (errno != ENOENT)
            rc = err_set_errno(err, errno, "remove %s", file);
    }
    close(lock);
out:
    free(file);
    return rc;
}

/* ------------------------------------------------------------------ walking */

struct walk {
    blob_each_fn *each;
    void *context;
    const char *owner;
};

/* level 0: owners, 1 and 2: the two halves of the prefix, 3: the blobs. */
static int walk_level(const char *dir, int level, struct walk *walk, struct err *err)
{
    DIR *stream = opendir(dir);
    struct dirent *entry;
    int rc = 0;

    if (stream == NULL)
        return errno == ENOENT ? 0 : err_set_errno(err, errno, "read %s", dir);
    while (rc == 0 && (entry = readdir(stream)) != NULL) {
        char *path = NULL;
        struct stat st;

        if (entry->d_name[0] == '.')
            continue;
        if (asprintf(&path, "%s/%s", dir, entry->d_name) < 0) {
            rc = err_set(err, ERR_NO_MEMORY, "out of memory");
            break;
        }
        if (level < 3) {
            if (level == 0)
                walk->owner = entry->d_name;
            if (level > 0 || blob_owner_valid(entry->d_name))
                rc = walk_level(path, level + 1, walk, err);
        } else if (blob_sha256_valid(entry->d_name) && lstat(path, &st) == 0 &&
                   S_ISREG(st.st_mode)) {
            rc = walk->each(walk->context, walk->owner, entry->d_name, st.st_size, st.st_mtime);
        }
        free(path);
    }
    closedir(stream);
    return rc;
}

static int local_list(void *self, blob_each_fn *each, void *context, struct err *err)
{
    struct blob_local *local = self;
    struct walk walk = {.each = each, .context = context};

    return walk_level(local->root, 0, &walk, err);
}

static void local_close(void *self)
{
    struct blob_local *local = self;

    free(local->root);
    free(local);
}

static const struct blob_backend_ops local_ops = {
    .put = local_put,
    .get = local_get,
    .remove = local_remove,
    .remove_old = local_remove_old,
    .list = local_list,
    .close = local_close,
};

/* What this process writes must belong to the store's user, or that user's server could not read
 * it: root would leave such files behind. Asked of the file system, since only it knows what it
 * makes of a user. */
static int check_owner(const struct blob_local *local, struct err *err)
{
    struct stat folder, file;
    char *probe = NULL;
    int fd, rc = 0;

    if (asprintf(&probe, "%s/.probe.XXXXXX", local->root) < 0)
        return err_set(err, ERR_NO_MEMORY, "open the blob store: out of memory");
    fd = mkostemp(probe, O_CLOEXEC);
    if (fd < 0)
        rc = err_set_errno(err, errno, "write to the blob store %s", local->root);
    else if (fstat(fd, &file) != 0 || stat(local->root, &folder) != 0)
        rc = err_set_errno(err, errno, "look at %s", local->root);
    else if (file.st_uid != folder.st_uid)
        rc =
            err_set(err, ERR_INVALID, "%s belongs to another user (uid %u): run graft as that user",
                    local->root, (unsigned)folder.st_uid);
    if (fd >= 0) {
        close(fd);
        unlink(probe);
    }
    free(probe);
    return rc;
}

int blob_local_open(struct blob_backend *out, const char *root, struct err *err)
{
    struct blob_local *local = calloc(1, sizeof *local);

    if (local == NULL || asprintf(&local->root, "%s/blobs", root) < 0) {
        free(local);
        return err_set(err, ERR_NO_MEMORY, "open the blob store: out of memory");
    }
    if (file_make_dirs(local->root, 0700, err) != 0 || check_owner(local, err) != 0) {
        local_close(local);
        return -1;
    }
    *out = (struct blob_backend){&local_ops, local};
    return 0;
}
