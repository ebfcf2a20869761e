/* blob_backend.h: what a place for blobs must be able to do; blob_store.c does the rest (staging,
 * hashing, verification) the same for all of them. Only blob_store.c and the backends include it.
 *
 * Owners and digests were checked by the caller: no byte of them needs quoting in a path or URL. */
#ifndef GRAFT_STORAGE_BLOB_BACKEND_H
#define GRAFT_STORAGE_BLOB_BACKEND_H

#include <stdbool.h>

#include "storage/blob_store.h"

struct blob_backend_ops {
    /* The complete, synced, verified file at `path` becomes the blob, durably; the same content may
     * be there already, then its age begins anew. `path` is consumed on success. */
    int (*put)(void *self, const char *owner, const char *sha256, const char *path,
               struct err *err);
    /* A local path that can be read and mapped, malloc'ed. */
    int (*get)(void *self, const char *owner, const char *sha256, char **path, struct err *err);
    int (*remove)(void *self, const char *owner, const char *sha256, struct err *err);
    /* As blob_delete_old: look and removal are one step against put(). */
    int (*remove_old)(void *self, const char *owner, const char *sha256, int64_t unless_since,
                      int *removed, struct err *err);
    int (*list)(void *self, blob_each_fn *each, void *context, struct err *err);
    void (*close)(void *self);
};

struct blob_backend {
    const struct blob_backend_ops *ops;
    void *self;
};

bool blob_owner_valid(const char *owner);
bool blob_sha256_valid(const char *sha256);

int blob_local_open(struct blob_backend *out, const char *root, struct err *err);

#endif
