#include "engine/base/file_io.h"

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/base/progress.h"
#include "engine/base/sha256.h"

#define PORTION (1 << 16)             /* bytes that are read at once */
#define ASK_BYTES (INT64_C(16) << 20) /* some hundredths of a second */

int file_read_all(const char *path, size_t max, char **data, size_t *len, struct err *err)
{
    struct stat st;
    char *buf = NULL;
    size_t got = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    int rc = -1;

    if (fd < 0)
        return err_set_errno(err, errno, "open %s", path);
    if (fstat(fd, &st) != 0) {
        err_set_errno(err, errno, "stat %s", path);
        goto out;
    }
    if (!S_ISREG(st.st_mode)) {
        err_set(err, ERR_INVALID, "%s is not a regular file", path);
        goto out;
    }
    if ((uint64_t)st.st_size > max) {
        err_set(err, ERR_TOO_LARGE, "%s has %lld bytes, more than the %zu allowed", path,
                (long long)st.st_size, max);
        goto out;
    }
    buf = malloc((size_t)st.st_size + 1);
    if (buf == NULL) {
        err_set(err, ERR_NO_MEMORY, "read %s: out of memory", path);
        goto out;
    }
    while (got < (size_t)st.st_size) {
        ssize_t n = read(fd, buf + got, (size_t)st.st_size - got);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0) {
            err_set_errno(err, errno, "read %s", path);
            goto out;
        }
        if (n == 0)
            break;
        got += (size_t)n;
    }
    buf[got] = '\0';
    *data = buf;
    *len = got;
    buf = NULL;
    rc = 0;
out:
    free(buf);
    close(fd);
    return rc;
}

int file_write_full(int fd, const void *data, size_t len, const char *name, struct err *err)
{
    const char *p = data;

    while (len > 0) {
        ssize_t n = write(fd, p, len);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return err_set_errno(err, errno, "write %s", name);
        p += n;
        len -= (size_t)n;
    }
    return 0;
}

int file_sync(int fd, const char *name, struct err *err)
{
    int failed;

    progress_wait_begin();
    failed = fsync(fd) != 0 ? errno : 0;
    progress_wait_end();
    return failed != 0 ? err_set_errno(err, failed, "fsync %s", name) : 0;
}

int file_sync_dir(const char *dir, struct err *err)
{
    int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int rc;

    if (fd < 0)
        return err_set_errno(err, errno, "open %s", dir);
    rc = file_sync(fd, dir, err);
    close(fd);
    return rc;
}

int file_sync_parent(const char *path, struct err *err)
{
    char *dir = strdup(path);
    char *slash;
    int rc;

    if (dir == NULL)
        return err_set(err, ERR_NO_MEMORY, "sync the folder of %s: out of memory", path);
    slash = strrchr(dir, '/');
    if (slash == NULL)
        rc = file_sync_dir(".", err);
    else if (slash == dir)
        rc = file_sync_dir("/", err);
    else {
        *slash = '\0';
        rc = file_sync_dir(dir, err);
    }
    free(dir);
    return rc;
}

int file_write_durable(const char *path, const void *data, size_t len, struct err *err)
{
    char *temp = NULL;
    int fd = -1, rc = -1;

    if (asprintf(&temp, "%s.XXXXXX", path) < 0)
        return err_set(err, ERR_NO_MEMORY, "write %s: out of memory", path);
    fd = mkostemp(temp, O_CLOEXEC);
    if (fd < 0) {
        err_set_errno(err, errno, "create a file beside %s", path);
        free(temp);
        return -1;
    }
    if (file_write_full(fd, data, len, temp, err) != 0 || file_sync(fd, temp, err) != 0)
        goto out;
    if (rename(temp, path) != 0) {
        err_set_errno(err, errno, "rename to %s", path);
        goto out;
    }
    rc = file_sync_parent(path, err);
out:
    close(fd);
    if (rc != 0)
        unlink(temp);
    free(temp);
    return rc;
}

int file_make_dirs(const char *dir, unsigned mode, struct err *err)
{
    char *path = strdup(dir);
    int rc = 0;

    if (path == NULL)
        return err_set(err, ERR_NO_MEMORY, "make %s: out of memory", dir);
    for (char *p = path + 1; rc == 0 && p[-1] != '\0'; p++) {
        char c = *p;

        if (c != '/' && c != '\0')
            continue;
        *p = '\0';
        if (mkdir(path, (mode_t)mode) != 0 && errno != EEXIST)
            rc = err_set_errno(err, errno, "make folder %s", path);
        *p = c;
    }
    free(path);
    return rc;
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
    return remove(path);
}

int file_remove_tree(const char *dir, struct err *err)
{
    if (nftw(dir, remove_one, 16, FTW_DEPTH | FTW_PHYS) != 0 && errno != ENOENT)
        return err_set_errno(err, errno, "remove %s", dir);
    return 0;
}

int file_sha256_fd(int fd, const char *name, file_go_on_fn *go_on, void *context, char hex[65],
                   int64_t *bytes, struct err *err)
{
    struct sha256 *h = sha256_new();
    char *buf = malloc(PORTION);
    int64_t total = 0, asked = 0;
    ssize_t n = 1;
    int rc = -1;

    if (h == NULL || buf == NULL) {
        err_set(err, ERR_NO_MEMORY, "hash %s: out of memory", name);
        goto out;
    }
    while (n > 0) {
        do
            n = read(fd, buf, PORTION);
        while (n < 0 && errno == EINTR);
        if (n < 0) {
            err_set_errno(err, errno, "read %s", name);
            goto out;
        }
        sha256_update(h, buf, (size_t)n);
        total += n;
        if (go_on != NULL && total - asked >= ASK_BYTES) {
            asked = total;
            if (go_on(context, err) != 0)
                goto out;
        }
    }
    sha256_final_hex(h, hex);
    if (bytes != NULL)
        *bytes = total;
    rc = 0;
out:
    sha256_free(h);
    free(buf);
    return rc;
}

int file_sha256(const char *path, char hex[65], int64_t *bytes, struct err *err)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC), rc;

    if (fd < 0)
        return err_set_errno(err, errno, "open %s", path);
    rc = file_sha256_fd(fd, path, NULL, NULL, hex, bytes, err);
    close(fd);
    return rc;
}

/* ------------------------------------------------------------------ identity */

static int64_t nanoseconds(const struct timespec *t)
{
    return (int64_t)t->tv_sec * 1000000000 + t->tv_nsec;
}

static struct file_identity identity_of(const struct stat *st)
{
    return (struct file_identity){.device = (uint64_t)st->st_dev,
                                  .inode = (uint64_t)st->st_ino,
                                  .bytes = st->st_size,
                                  .modified = nanoseconds(&st->st_mtim),
                                  .changed = nanoseconds(&st->st_ctim)};
}

bool file_identify(const char *path, struct file_identity *out)
{
    struct stat st;

    if (stat(path, &st) != 0)
        return false;
    *out = identity_of(&st);
    return true;
}

bool file_identify_fd(int fd, struct file_identity *out)
{
    struct stat st;

    if (fstat(fd, &st) != 0)
        return false;
    *out = identity_of(&st);
    return true;
}

bool file_identity_equal(const struct file_identity *a, const struct file_identity *b)
{
    return a->device == b->device && a->inode == b->inode && a->bytes == b->bytes &&
           a->modified == b->modified && a->changed == b->changed;
}

int file_map_open(struct file_map *map, const char *path, struct err *err)
{
    struct stat st;
    void *p = NULL;
    int fd = open(path, O_RDONLY | O_CLOEXEC);

    *map = (struct file_map){0};
    if (fd < 0)
        return err_set_errno(err, errno, "open %s", path);
    if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) {
        close(fd);
        return err_set(err, ERR_INVALID, "%s is not a regular file", path);
    }
    if (st.st_size > 0) {
        p = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, fd, 0);
        if (p == MAP_FAILED) {
            err_set_errno(err, errno, "map %s", path);
            close(fd);
            return -1;
        }
    }
    close(fd);
    map->data = p;
    map->len = (size_t)st.st_size;
    return 0;
}

void file_map_close(struct file_map *map)
{
    if (map->data != NULL)
        munmap((void *)map->data, map->len);
    *map = (struct file_map){0};
}
