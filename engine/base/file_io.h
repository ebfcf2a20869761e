/* file_io.h: files, read whole, mapped, or written so that they survive a crash. */
#ifndef GRAFT_BASE_FILE_IO_H
#define GRAFT_BASE_FILE_IO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/err.h"

/* The whole file, malloc'ed, NUL-terminated; larger than max is ERR_TOO_LARGE. */
int file_read_all(const char *path, size_t max, char **data, size_t *len, struct err *err);

/* Write all of it, whatever write(2) does in between. */
int file_write_full(int fd, const void *data, size_t len, const char *name, struct err *err);

/* `data` at `path`, or the old content, never between: temporary file beside it, fsync, rename,
 * fsync of the folder. */
int file_write_durable(const char *path, const void *data, size_t len, struct err *err);

/* fsync; a watcher of devices is told that this waits for a disk (progress.h). */
int file_sync(int fd, const char *name, struct err *err);
int file_sync_dir(const char *dir, struct err *err);
int file_sync_parent(const char *path, struct err *err); /* the folder that holds path */
int file_make_dirs(const char *dir, unsigned mode, struct err *err); /* like mkdir -p */
int file_remove_tree(const char *dir, struct err *err); /* like rm -rf; absent is fine */

/* bytes may be NULL. */
int file_sha256(const char *path, char hex[65], int64_t *bytes, struct err *err);
/* From where fd is to its end; `name` is for errors. go_on, unless NULL, is asked after every few
 * MiB: what it returns other than 0 ends the reading with the error that it has set. */
typedef int file_go_on_fn(void *context, struct err *err);
int file_sha256_fd(int fd, const char *name, file_go_on_fn *go_on, void *context, char hex[65],
                   int64_t *bytes, struct err *err);

/* Which file it is, and whether it is still as it was: another content at the same place has
 * another identity, if the clock of the file system has ticked between. */
struct file_identity {
    uint64_t device, inode;
    int64_t bytes, modified, changed; /* ns since 1970 */
};
bool file_identify(const char *path, struct file_identity *out); /* false: it is not there */
bool file_identify_fd(int fd, struct file_identity *out);
bool file_identity_equal(const struct file_identity *a, const struct file_identity *b);

/* A file mapped read-only. A file that shrinks while mapped raises SIGBUS: map only files that are
 * immutable once named (blobs, imported bases). */
struct file_map {
    const unsigned char *data; /* NULL for an empty file */
    size_t len;
};
int file_map_open(struct file_map *map, const char *path, struct err *err);
void file_map_close(struct file_map *map);

#endif
