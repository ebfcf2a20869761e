/* storage.h: everything durable in one call: the database (a private cluster in the data directory,
 * or the one at a URL), migrated, and the blob store.
 *
 * storage_open() is for `serve`, `migrate`, `key` and `model`. A worker process is given url and
 * data directory by its parent and calls storage_attach(), which neither starts nor migrates. */
#ifndef GRAFT_STORAGE_STORAGE_H
#define GRAFT_STORAGE_STORAGE_H

#include "engine/base/err.h"
#include "storage/blob_store.h"
#include "storage/pg_cluster.h"

struct storage {
    struct pg_cluster *cluster; /* NULL with a database URL */
    char *url;                  /* for db_open(); may hold a password */
    struct blob_store *blobs;
};

/* Makes data_dir where it is absent (mode 0700). database_url NULL: the private cluster. Refuses a
 * database that is not that of the blobs there (blob_database.h). */
int storage_open(struct storage *storage, const char *data_dir, const char *database_url,
                 struct err *err);
/* The same for a user that may open this many connections to the database at once. */
int storage_open_for(struct storage *storage, const char *data_dir, const char *database_url,
                     int connections, struct err *err);
int storage_attach(struct storage *storage, const char *data_dir, const char *url, struct err *err);
void storage_release(struct storage *storage); /* last user stops the cluster; twice is fine */

#endif
