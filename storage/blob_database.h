/* blob_database.h: which database has the rows that name a store's blobs.
 *
 * The collector removes what no row names. With another database than theirs, an empty one say that
 * was made because a URL was forgotten, that would be every blob. So a store remembers its
 * database, in blobs/.database, by the moment of the first migration there, which stays with the
 * rows when they are dumped and restored. A store without blobs is anybody's. */
#ifndef GRAFT_STORAGE_BLOB_DATABASE_H
#define GRAFT_STORAGE_BLOB_DATABASE_H

#include "storage/blob_store.h"
#include "storage/db.h"

/* ERR_INVALID where the store has the blobs of another database. One that has none yet, or that no
 * database was noted for, is this one's from now on. DB_ROLE_WORKER. */
int blob_database_check(struct blob_store *store, struct db *db, struct err *err);

#endif
