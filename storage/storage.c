#include "storage/storage.h"

#include <stdlib.h>
#include <string.h>

#include "engine/base/file_io.h"
#include "storage/blob_database.h"
#include "storage/migrate.h"

int storage_attach(struct storage *storage, const char *data_dir, const char *url, struct err *err)
{
    *storage = (struct storage){0};
    storage->url = strdup(url);
    if (storage->url == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    if (blob_store_open_local(&storage->blobs, data_dir, err) != 0) {
        storage_release(storage);
        return -1;
    }
    return 0;
}

static int check_database(struct storage *storage, struct err *err)
{
    struct db *db = NULL;
    int rc = db_open(&db, storage->url, DB_ROLE_WORKER, err);

    if (rc == 0)
        rc = blob_database_check(storage->blobs, db, err);
    db_close(db);
    return rc;
}

int storage_open(struct storage *storage, const char *data_dir, const char *database_url,
                 struct err *err)
{
    return storage_open_for(storage, data_dir, database_url, PG_CLUSTER_CONNECTIONS, err);
}

int storage_open_for(struct storage *storage, const char *data_dir, const char *database_url,
                     int connections, struct err *err)
{
    struct migrate_report report;
    struct pg_cluster *cluster = NULL;

    *storage = (struct storage){0};
    if (file_make_dirs(data_dir, 0700, err) != 0)
        return -1;
    if (database_url == NULL) {
        if (pg_cluster_acquire_for(&cluster, data_dir, connections, err) != 0)
            return -1;
        database_url = pg_cluster_url(cluster);
    }
    if (storage_attach(storage, data_dir, database_url, err) != 0) {
        pg_cluster_release(cluster);
        return -1;
    }
    storage->cluster = cluster;
    if (migrate_run(storage->url, &report, err) != 0 || check_database(storage, err) != 0) {
        storage_release(storage);
        return -1;
    }
    return 0;
}

void storage_release(struct storage *storage)
{
    blob_store_close(storage->blobs);
    free(storage->url);
    pg_cluster_release(storage->cluster);
    *storage = (struct storage){0};
}
