/* file_io.h: files, read whole, mapped, or written so that they survive a crash. */
#ifndef GRAFT_BASE_FILE_IO_H
#define GRAFT_BASE_FILE_IO_H

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
int file_sha256(const char *path, char hex[65], int64_t *bytes, struct err *err);

/* A file mapped read-only. A file that shrinks while mapped raises SIGBUS: map only files that are
 * immutable once named (blobs, imported bases). */
struct file_map {
    const unsigned char *data; /* NULL for an empty file */
    size_t len;
};
int file_map_open(struct file_map *map, const char *path, struct err *err);
void file_map_close(struct file_map *map);

#endif
