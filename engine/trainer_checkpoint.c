/* The recovery checkpoint: a header of one block, the weights, first and second moments as they lie
 * in memory, and a SHA-256 over all of that. It never leaves the machine that made it, and is
 * written in the host's byte order. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/base/file_io.h"
#include "engine/base/progress.h"
#include "engine/trainer_state.h"

#define MAGIC "GRAFTRC1"
#define PORTION (4 << 20) /* bytes moved at a time */

struct header {
    char magic[8];
    char identity[SHA256_HEX];
    char pad[7];
    int64_t parameters;
    int32_t step;
    char reserved[4096 - 8 - SHA256_HEX - 7 - 8 - 4];
};
_Static_assert(sizeof(struct header) == 4096, "the weights begin on a block");

int64_t trainer_checkpoint_bytes(int64_t parameters)
{
    return (int64_t)sizeof(struct header) + 3 * parameters * (int64_t)sizeof(float) + SHA256_HEX -
           1;
}

/* ------------------------------------------------------------------ save */

struct writer {
    int fd;
    const char *path;
    struct sha256 *hash;
    char *portion; /* PORTION bytes */
};

static int put(struct writer *w, const void *data, size_t len, struct err *err)
{
    sha256_update(w->hash, data, len);
    return file_write_full(w->fd, data, len, w->path, err);
}

static int put_block(struct writer *w, struct engine_trainer *t, const float *block,
                     struct err *err)
{
    struct backend *b = t->engine->backend;
    size_t left = (size_t)t->parameters * sizeof *block, at = 0;

    while (left > 0) {
        size_t n = left < PORTION ? left : PORTION;

        b->ops->download(b, w->portion, (const char *)block + at, n);
        if (backend_check(b, err) || put(w, w->portion, n, err))
            return -1;
        at += n;
        left -= n;
    }
    return 0;
}

static int put_all(struct writer *w, struct engine_trainer *t, struct err *err)
{
    struct header header = {.parameters = t->parameters, .step = t->step};
    char digest[SHA256_HEX];

    memcpy(header.magic, MAGIC, sizeof header.magic);
    memcpy(header.identity, t->identity, sizeof header.identity);
    if (put(w, &header, sizeof header, err) || put_block(w, t, t->w, err) ||
        put_block(w, t, t->m, err) || put_block(w, t, t->v, err))
        return -1;
    sha256_final_hex(w->hash, digest);
    if (file_write_full(w->fd, digest, SHA256_HEX - 1, w->path, err))
        return -1;
    return file_sync(w->fd, w->path, err);
}

int engine_trainer_save(struct engine_trainer *t, const char *path, struct err *err)
{
    size_t len = strlen(path) + sizeof ".partial";
    char *temporary = malloc(len);
    struct writer w = {.fd = -1, .path = path, .hash = sha256_new(), .portion = malloc(PORTION)};
    int rc = -1;

    if (!temporary || !w.hash || !w.portion) {
        err_set(err, ERR_NO_MEMORY, "no memory to write %s", path);
        goto out;
    }
    snprintf(temporary, len, "%s.partial", path);
    w.fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (w.fd < 0) {
        err_set_errno(err, errno, "create %s", temporary);
        goto out;
    }
    if (put_all(&w, t, err))
        goto out;
    rc = close(w.fd);
    w.fd = -1;
    if (rc == 0)
        rc = rename(temporary, path);
    if (rc != 0)
        rc = err_set_errno(err, errno, "write %s", path);
    else
        rc = file_sync_parent(path, err);
out:
    if (w.fd >= 0)
        close(w.fd);
    if (rc != 0 && temporary)
        unlink(temporary);
    free(w.portion);
    sha256_free(w.hash);
    free(temporary);
    return rc;
}

/* ------------------------------------------------------------------ load */

static int refuse(struct err *err, const char *path, const char *why)
{
    return err_set(err, ERR_INVALID, "recovery checkpoint %s %s: the job starts from its beginning",
                   path, why);
}

static int read_exactly(int fd, void *data, size_t len, const char *path, struct err *err)
{
    char *to = data;

    while (len > 0) {
        ssize_t n = read(fd, to, len);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return err_set_errno(err, errno, "read %s", path);
        if (n == 0)
            return refuse(err, path, "is cut short");
        to += n;
        len -= (size_t)n;
    }
    return 0;
}

/* Reads all of the file once, before anything of the trainer is overwritten. That may take minutes
 * in which the device is not asked: each portion is a sign of life. */
static int verify(int fd, const char *path, int64_t bytes, char *portion, struct err *err)
{
    struct sha256 *hash = sha256_new();
    char digest[SHA256_HEX], found[SHA256_HEX] = "";
    int rc = -1;

    if (!hash)
        return err_set(err, ERR_NO_MEMORY, "no memory to read %s", path);
    for (int64_t left = bytes - (SHA256_HEX - 1); left > 0;) {
        size_t n = left < PORTION ? (size_t)left : PORTION;

        if (read_exactly(fd, portion, n, path, err))
            goto out;
        sha256_update(hash, portion, n);
        progress_tick();
        left -= (int64_t)n;
    }
    if (read_exactly(fd, found, SHA256_HEX - 1, path, err))
        goto out;
    sha256_final_hex(hash, digest);
    rc = memcmp(digest, found, SHA256_HEX - 1) == 0 ? 0 : refuse(err, path, "is damaged");
out:
    sha256_free(hash);
    return rc;
}

static int check_header(const struct engine_trainer *t, const struct header *h, const char *path,
                        struct err *err)
{
    if (memcmp(h->magic, MAGIC, sizeof h->magic) != 0)
        return refuse(err, path, "is no recovery checkpoint of this version");
    if (memcmp(h->identity, t->identity, sizeof h->identity) != 0)
        return refuse(err, path, "belongs to another job, base, dataset or setting");
    if (h->parameters != t->parameters || h->step < 0 || h->step > t->plan.total_steps)
        return refuse(err, path, "does not fit this job");
    return 0;
}

static int get_block(int fd, struct engine_trainer *t, float *block, char *portion,
                     const char *path, struct err *err)
{
    struct backend *b = t->engine->backend;
    size_t left = (size_t)t->parameters * sizeof *block, at = 0;

    while (left > 0) {
        size_t n = left < PORTION ? left : PORTION;

        if (read_exactly(fd, portion, n, path, err))
            return -1;
        b->ops->upload(b, (char *)block + at, portion, n);
        if (backend_check(b, err))
            return -1;
        at += n;
        left -= n;
    }
    return 0;
}

int engine_trainer_load(struct engine_trainer *t, const char *path, struct err *err)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC), rc = -1;
    char *portion = malloc(PORTION);
    struct header header;
    struct stat st;

    if (fd < 0) {
        err_set_errno(err, errno, "open %s", path);
        goto out;
    }
    if (!portion) {
        err_set(err, ERR_NO_MEMORY, "no memory to read %s", path);
        goto out;
    }
    if (fstat(fd, &st) != 0) {
        err_set_errno(err, errno, "read %s", path);
        goto out;
    }
    if (st.st_size != trainer_checkpoint_bytes(t->parameters)) {
        refuse(err, path, "does not have the size that this job's would have");
        goto out;
    }
    if (read_exactly(fd, &header, sizeof header, path, err) || check_header(t, &header, path, err))
        goto out;
    if (lseek(fd, 0, SEEK_SET) != 0 || verify(fd, path, st.st_size, portion, err))
        goto out;
    if (lseek(fd, sizeof header, SEEK_SET) < 0 || get_block(fd, t, t->w, portion, path, err) ||
        get_block(fd, t, t->m, portion, path, err) || get_block(fd, t, t->v, portion, path, err) ||
        trainer_weights_refresh(t, err))
        goto out;
    t->step = header.step;
    t->order_epoch = -1;
    rc = 0;
out:
    if (rc != 0 && !err_is_set(err))
        err_set_errno(err, errno, "read %s", path);
    if (fd >= 0)
        close(fd);
    free(portion);
    return rc;
}
