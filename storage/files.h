/* files.h: uploaded and produced files: rows; their bytes are blobs of the project. */
#ifndef GRAFT_STORAGE_FILES_H
#define GRAFT_STORAGE_FILES_H

#include <stdbool.h>
#include <stdint.h>

#include "engine/base/sha256.h"
#include "storage/db.h"
#include "storage/ids.h"

struct file {
    char id[ID_SIZE];
    char *filename; /* as the client called it, ≤ 512 bytes; never a path here */
    char *purpose;
    char *status; /* uploaded, processed, error */
    int64_t bytes;
    char sha256[SHA256_HEX];
    int64_t created_at;
    int64_t expires_at; /* 0: never */
};
void file_release(struct file *file); /* zeroes; twice is fine */

struct file_new {
    const char *filename, *purpose;
    int64_t bytes;
    const char *sha256;    /* of a committed blob of the project */
    int64_t expires_after; /* seconds from now; 0: never */
};

struct file_list {
    struct file *items;
    int count;
    bool has_more;
};
void file_list_release(struct file_list *list);

struct file_query {
    const char *after;   /* id; NULL: from the start. Unknown: ERR_INVALID, param after */
    const char *purpose; /* NULL: any */
    int limit;           /* 1..10000 */
    bool ascending;      /* by creation; else newest first */
};

int files_create(struct db *db, const char *project, const struct file_new *file, struct file *out,
                 struct err *err);
/* ERR_NOT_FOUND (param id, "No such File object: …") where it is absent, expired, deleted or
 * another project's. */
int files_get(struct db *db, const char *project, const char *id, struct file *out,
              struct err *err);
int files_list(struct db *db, const char *project, const struct file_query *query,
               struct file_list *out, struct err *err);
/* The bytes go with the next collection, unless a job that has not ended trains on them. */
int files_delete(struct db *db, const char *project, const char *id, struct err *err);

#endif
