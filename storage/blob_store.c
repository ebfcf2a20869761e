#include "storage/blob_store.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "engine/base/file_io.h"
#include "storage/blob_backend.h"
#include "storage/blob_sound.h"
#include "storage/ids.h"

struct blob_store {
    char *root;
    struct blob_backend backend;
    struct blob_sound *sound;
    int64_t keep_free; /* bytes */
};

struct blob_writer {
    struct blob_store *store;
    char owner[UUID_SIZE];
    char *path; /* in staging */
    int fd;
    struct sha256 *hash;
    int64_t bytes, looked_at; /* looked_at: `bytes` at the last look for room */
    bool failed;
};

/* ------------------------------------------------------------------ names */

bool blob_sha256_valid(const char *sha256)
{
    return strlen(sha256) == 64 && strspn(sha256, "0123456789abcdef") == 64;
}

/* "base", or a uuid in lower case. */
bool blob_owner_valid(const char *owner)
{
    return strcmp(owner, BLOB_OWNER_BASE) == 0 ||
           (strlen(owner) == 36 && strspn(owner, "0123456789abcdef-") == 36);
}

static int check_names(const char *owner, const char *sha256, struct err *err)
{
    if (!blob_owner_valid(owner) || (sha256 != NULL && !blob_sha256_valid(sha256)))
        return err_set(err, ERR_INTERNAL, "\"%.80s\" of \"%.80s\" can not be a blob",
                       sha256 != NULL ? sha256 : "", owner);
    return 0;
}

/* <root>/<folder>/<what>.<random> */
static char *fresh_path(const struct blob_store *store, const char *folder, const char *what,
                        struct err *err)
{
    char random[17], *path = NULL;

    if (id_random(16, random, err) != 0)
        return NULL;
    if (asprintf(&path, "%s/%s/%s.%s", store->root, folder, what, random) < 0) {
        err_set(err, ERR_NO_MEMORY, "out of memory");
        return NULL;
    }
    return path;
}

/* ------------------------------------------------------------------ the store */

int blob_store_open_local(struct blob_store **out, const char *root, struct err *err)
{
    static const char *const folders[] = {"staging", "recovery"};
    struct blob_store *store = calloc(1, sizeof *store);

    *out = NULL;
    if (store == NULL)
        return err_set(err, ERR_NO_MEMORY, "open the blob store: out of memory");
    store->sound = blob_sound_new();
    if (store->sound == NULL) {
        err_set(err, ERR_NO_MEMORY, "open the blob store: out of memory");
        goto fail;
    }
    if (file_make_dirs(root, 0700, err) != 0)
        goto fail;
    store->root = realpath(root, NULL);
    if (store->root == NULL) {
        err_set_errno(err, errno, "find %s", root);
        goto fail;
    }
    if (blob_local_open(&store->backend, store->root, err) != 0)
        goto fail;
    for (size_t i = 0; i < sizeof folders / sizeof *folders; i++) {
        char *path = NULL;
        int rc;

        if (asprintf(&path, "%s/%s", store->root, folders[i]) < 0) {
            err_set(err, ERR_NO_MEMORY, "open the blob store: out of memory");
            goto fail;
        }
        rc = file_make_dirs(path, 0700, err);
        free(path);
        if (rc != 0)
            goto fail;
    }
    if (file_sync_dir(store->root, err) != 0)
        goto fail;
    *out = store;
    return 0;
fail:
    blob_store_close(store);
    return -1;
}

void blob_store_close(struct blob_store *store)
{
    if (store == NULL)
        return;
    if (store->backend.ops != NULL)
        store->backend.ops->close(store->backend.self);
    blob_sound_free(store->sound);
    free(store->root);
    free(store);
}

const char *blob_store_root(const struct blob_store *store)
{
    return store->root;
}

void blob_store_keep_free(struct blob_store *store, int64_t bytes)
{
    store->keep_free = bytes;
}

/* ------------------------------------------------------------------ writing */

#define LOOK_BYTES (1 << 20)

static int check_room(struct blob_writer *w, struct err *err)
{
    const struct blob_store *store = w->store;
    struct statvfs st;

    w->looked_at = w->bytes;
    if (store->keep_free <= 0)
        return 0;
    if (fstatvfs(w->fd, &st) != 0)
        return err_set_errno(err, errno, "ask for the free space of %s", store->root);
    if (st.f_bavail >= (uint64_t)store->keep_free / st.f_frsize)
        return 0;
    return err_set(err, ERR_NO_SPACE, "%s has less than %lld bytes left, which are kept free",
                   store->root, (long long)store->keep_free);
}

static void writer_free(struct blob_writer *w)
{
    if (w->fd >= 0)
        close(w->fd);
    sha256_free(w->hash);
    free(w->path);
    free(w);
}

int blob_begin(struct blob_store *store, const char *owner, const char *what,
               struct blob_writer **out, struct err *err)
{
    struct blob_writer *w;

    *out = NULL;
    if (check_names(owner, NULL, err) != 0)
        return -1;
    w = calloc(1, sizeof *w);
    if (w == NULL)
        return err_set(err, ERR_NO_MEMORY, "begin a blob: out of memory");
    w->store = store;
    w->fd = -1;
    snprintf(w->owner, sizeof w->owner, "%s", owner);
    w->hash = sha256_new();
    w->path = fresh_path(store, "staging", what, err);
    if (w->hash == NULL || w->path == NULL) {
        err_set(err, ERR_NO_MEMORY, "begin a blob: out of memory");
        writer_free(w);
        return -1;
    }
    w->fd = open(w->path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (w->fd < 0) {
        err_set_errno(err, errno, "create %s", w->path);
        writer_free(w);
        return -1;
    }
    if (check_room(w, err) != 0) {
        blob_abort(w);
        return -1;
    }
    *out = w;
    return 0;
}

int blob_write(struct blob_writer *w, const void *data, size_t len, struct err *err)
{
    if (w->failed)
        return err_set(err, ERR_INTERNAL, "write to a blob that has failed");
    if ((w->bytes - w->looked_at >= LOOK_BYTES && check_room(w, err) != 0) ||
        file_write_full(w->fd, data, len, w->path, err) != 0) {
        w->failed = true;
        return -1;
    }
    sha256_update(w->hash, data, len);
    w->bytes += (int64_t)len;
    return 0;
}

void blob_abort(struct blob_writer *w)
{
    if (w == NULL)
        return;
    unlink(w->path);
    writer_free(w);
}

/* The synced file at `path` holds what it should: read again, and hand over to the backend. Removes
 * `path` on failure. */
static int verify_and_put(struct blob_store *store, const char *owner, const char *path,
                          const char *sha256, int64_t bytes, struct err *err)
{
    char again[SHA256_HEX];
    int64_t size = 0;

    if (file_sha256(path, again, &size, err) != 0)
        goto fail;
    if (strcmp(again, sha256) != 0 || size != bytes) {
        err_set(err, ERR_IO, "%s reads back differently from what was written: check the disk",
                path);
        goto fail;
    }
    if (store->backend.ops->put(store->backend.self, owner, sha256, path, err) != 0)
        goto fail;
    return 0;
fail:
    unlink(path);
    return -1;
}

int blob_commit(struct blob_writer *w, char sha256[SHA256_HEX], int64_t *bytes, struct err *err)
{
    int rc = -1;

    if (w->failed) {
        err_set(err, ERR_INTERNAL, "commit of a blob that has failed");
        goto out;
    }
    /* Never fsync again after a failure: Linux has marked the lost pages clean. */
    if (fsync(w->fd) != 0) {
        err_set_errno(err, errno, "fsync %s", w->path);
        goto out;
    }
    sha256_final_hex(w->hash, sha256);
    *bytes = w->bytes;
    rc = verify_and_put(w->store, w->owner, w->path, sha256, w->bytes, err);
out:
    if (rc != 0)
        unlink(w->path);
    writer_free(w);
    return rc;
}

int blob_adopt(struct blob_store *store, const char *owner, const char *path,
               char sha256[SHA256_HEX], int64_t *bytes, struct err *err)
{
    int fd = -1;

    if (check_names(owner, NULL, err) != 0 || file_sha256(path, sha256, bytes, err) != 0)
        goto fail;
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fsync(fd) != 0) {
        err_set_errno(err, errno, "fsync %s", path);
        goto fail;
    }
    close(fd);
    fd = -1;
    return verify_and_put(store, owner, path, sha256, *bytes, err);
fail:
    if (fd >= 0)
        close(fd);
    unlink(path);
    return -1;
}

/* ------------------------------------------------------------------ reading and removing */

int blob_path(struct blob_store *store, const char *owner, const char *sha256, char **path,
              struct err *err)
{
    *path = NULL;
    if (check_names(owner, sha256, err) != 0)
        return -1;
    return store->backend.ops->get(store->backend.self, owner, sha256, path, err);
}

static int open_path(struct blob_store *store, const char *path, const struct blob_wanted *want,
                     int *fd, struct err *err)
{
    *fd = open(path, O_RDONLY | O_CLOEXEC);
    if (*fd < 0)
        return err_set_errno(err, errno, "open blob %s of %s", want->sha256, want->owner);
    return blob_sound_check(store->sound, *fd, want, err);
}

/* The same content was committed after it had been opened. */
static bool was_replaced(const char *path, int fd)
{
    struct file_identity there, opened;

    return file_identify(path, &there) && file_identify_fd(fd, &opened) &&
           there.inode != opened.inode;
}

int blob_open_sound(struct blob_store *store, const struct blob_wanted *want, int *fd,
                    struct err *err)
{
    char *path = NULL;
    int rc;

    *fd = -1;
    if (blob_path(store, want->owner, want->sha256, &path, err) != 0)
        return -1;
    rc = open_path(store, path, want, fd, err);
    if (rc != 0 && err->kind == ERR_IO && *fd >= 0 && was_replaced(path, *fd)) {
        close(*fd);
        err_clear(err);
        rc = open_path(store, path, want, fd, err);
    }
    if (rc != 0 && *fd >= 0) {
        close(*fd);
        *fd = -1;
    }
    free(path);
    return rc;
}

int blob_delete(struct blob_store *store, const char *owner, const char *sha256, struct err *err)
{
    if (check_names(owner, sha256, err) != 0)
        return -1;
    return store->backend.ops->remove(store->backend.self, owner, sha256, err);
}

int blob_delete_old(struct blob_store *store, const char *owner, const char *sha256,
                    int64_t unless_since, int *removed, struct err *err)
{
    *removed = 0;
    if (check_names(owner, sha256, err) != 0)
        return -1;
    return store->backend.ops->remove_old(store->backend.self, owner, sha256, unless_since, removed,
                                          err);
}

int blob_list(struct blob_store *store, blob_each_fn *each, void *context, struct err *err)
{
    return store->backend.ops->list(store->backend.self, each, context, err);
}

/* ------------------------------------------------------------------ working space */

int blob_staging_dir(struct blob_store *store, const char *job, int64_t attempt, char **path,
                     struct err *err)
{
    char what[ID_SIZE + 24] = "import";

    *path = NULL;
    if (job != NULL && !id_has_shape(ID_JOB, job))
        return err_set(err, ERR_INTERNAL, "\"%.80s\" is not a job", job);
    if (job != NULL)
        snprintf(what, sizeof what, "%s.%lld", job, (long long)attempt);
    *path = fresh_path(store, "staging", what, err);
    if (*path == NULL)
        return -1;
    if (mkdir(*path, 0700) != 0) {
        err_set_errno(err, errno, "make %s", *path);
        free(*path);
        *path = NULL;
        return -1;
    }
    return 0;
}

int blob_recovery_name(const char *job, int64_t attempt, int64_t step, char *out, size_t size,
                       struct err *err)
{
    char random[9];
    int n;

    if (!id_has_shape(ID_JOB, job))
        return err_set(err, ERR_INTERNAL, "\"%.80s\" is not a job", job);
    if (id_random(8, random, err) != 0)
        return -1;
    n = snprintf(out, size, "%s.%lld.%lld.%s", job, (long long)attempt, (long long)step, random);
    return n > 0 && (size_t)n < size ? 0 : err_set(err, ERR_INTERNAL, "a recovery name too long");
}

int blob_recovery_path(struct blob_store *store, const char *name, char **path, struct err *err)
{
    *path = NULL;
    if (strncmp(name, ID_JOB, strlen(ID_JOB)) != 0 || strchr(name, '/') != NULL)
        return err_set(err, ERR_INTERNAL, "\"%.80s\" is not a recovery checkpoint", name);
    if (asprintf(path, "%s/recovery/%s", store->root, name) < 0) {
        *path = NULL;
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    }
    return 0;
}
