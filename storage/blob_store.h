/* blob_store.h: where bytes live: content-addressed, per project.
 *
 * A blob is named by its owner (a project's uuid, or BLOB_OWNER_BASE for base models) and the
 * SHA-256 of its content. Nothing is shared across projects: a shared digest would tell one tenant
 * what another has. The database row that names a blob is written after blob_commit() or
 * blob_adopt() has returned 0, never before, so a row never points at bytes that are not durable.
 *
 *   commit: fsync the staging file, re-read and compare its SHA-256, rename to
 *           blobs/<owner>/ab/cd/<sha256>, fsync each folder
 *
 * fsync that fails is final for that file: it is removed, and a retry writes a new one. Disk full
 * (ENOSPC, EDQUOT, EFBIG) is ERR_NO_SPACE, and nothing of the file is left.
 *
 * Beside the blobs: staging/ holds what is being written (an upload, or all work of one attempt of
 * a job), recovery/ the recovery checkpoints. storage/collector.h removes what nobody owns.
 * Threads: a store may be used by many threads and processes at once; a writer by one thread. */
#ifndef GRAFT_STORAGE_BLOB_STORE_H
#define GRAFT_STORAGE_BLOB_STORE_H

#include <stddef.h>
#include <stdint.h>

#include "engine/base/err.h"
#include "engine/base/file_io.h"
#include "engine/base/sha256.h"

#define BLOB_OWNER_BASE "base"

struct blob_store;
struct blob_writer;

/* A local directory; makes blobs/, staging/ and recovery/ in it. ERR_INVALID where another user
 * (whose server runs there) could not read what this process would write. */
int blob_store_open_local(struct blob_store **out, const char *root, struct err *err);
void blob_store_close(struct blob_store *store);
/* New blobs leave this much of the disk free (ERR_NO_SPACE) from now on: for a process whose
 * clients decide what is written. Looked at each MiB. Before any other thread uses the store. */
void blob_store_keep_free(struct blob_store *store, int64_t bytes);

/* A new blob, piece by piece. `what` names the staging file: "upload". */
int blob_begin(struct blob_store *store, const char *owner, const char *what,
               struct blob_writer **out, struct err *err);
/* After a failure only blob_abort() is allowed. */
int blob_write(struct blob_writer *writer, const void *data, size_t len, struct err *err);
/* Ends the writer, whatever it returns. The same content again is fine. */
int blob_commit(struct blob_writer *writer, char sha256[SHA256_HEX], int64_t *bytes,
                struct err *err);
void blob_abort(struct blob_writer *writer); /* removes the staging file; NULL is fine */

/* A file that was written below a staging folder becomes a blob: same protocol; `path` is gone
 * afterwards, also on failure. */
int blob_adopt(struct blob_store *store, const char *owner, const char *path,
               char sha256[SHA256_HEX], int64_t *bytes, struct err *err);

/* A readable path of the blob, malloc'ed; the file is immutable and may be mapped. ERR_IO
 * where it is absent: the row that names it had promised that it is there. */
int blob_path(struct blob_store *store, const char *owner, const char *sha256, char **path,
              struct err *err);
struct blob_wanted {
    const char *owner, *sha256;
    const char *name;     /* what a client calls it, for messages: a file's id, a model's name */
    const char *param;    /* of the request that names it: "file", "model"; NULL: none */
    file_go_on_fn *go_on; /* asked while it is hashed; NULL: nobody */
    void *context;
};

/* The blob, open for reading, after all of it has been hashed (blob_sound.h). ERR_IO, code
 * damaged_file and worded for a client, where the disk gives back other bytes or none; the same
 * content committed again heals it, also while it is read here. */
int blob_open_sound(struct blob_store *store, const struct blob_wanted *want, int *fd,
                    struct err *err);
int blob_delete(struct blob_store *store, const char *owner, const char *sha256,
                struct err *err); /* absent is fine */

/* Calls `each` for every blob; its non-zero return ends the walk and is returned. mtime: seconds
 * since 1970 of the last commit of this content. */
typedef int blob_each_fn(void *context, const char *owner, const char *sha256, int64_t bytes,
                         int64_t mtime);
int blob_list(struct blob_store *store, blob_each_fn *each, void *context, struct err *err);
/* blob_delete, unless it was committed (again) at or after `unless_since`: no commit slips between
 * the look and the removal. *removed tells. */
int blob_delete_old(struct blob_store *store, const char *owner, const char *sha256,
                    int64_t unless_since, int *removed, struct err *err);

/* ------------------------------------------------------------------ working space */

/* A fresh folder staging/<job>.<attempt>.<random> for all files of one attempt of a job; job NULL:
 * staging/import.<random>. malloc'ed path. The caller removes it (file_remove_tree) when done. */
int blob_staging_dir(struct blob_store *store, const char *job, int64_t attempt, char **path,
                     struct err *err);
/* Paths of recovery checkpoints: recovery/<name>; for a new one, name it with blob_recovery_name().
 * Not content-addressed: the engine's own format tells a damaged one. */
int blob_recovery_name(const char *job, int64_t attempt, int64_t step, char *out, size_t size,
                       struct err *err);
int blob_recovery_path(struct blob_store *store, const char *name, char **path, struct err *err);
const char *blob_store_root(const struct blob_store *store);

#endif
