#include "storage/blob_database.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/base/file_io.h"
#include "engine/base/log.h"

#define NOTE_MAX 64 /* bytes: a moment, to the microsecond */

static int moment_of(struct db *db, char out[NOTE_MAX], struct err *err)
{
    struct db_result *res = NULL;
    int rc = 0;

    if (db_exec(db,
                "SELECT to_char(applied_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US')"
                "  FROM migration WHERE number = 1",
                DB_NO_ARGS, &res, err) != 0)
        return -1;
    if (db_rows(res) == 1)
        db_text_into(res, 0, 0, out, NOTE_MAX);
    else
        rc = err_set(err, ERR_UNAVAILABLE, "the database is not migrated: graft migrate");
    db_result_free(res);
    return rc;
}

/* "" where none is noted. */
static int read_note(const char *path, char out[NOTE_MAX], struct err *err)
{
    char *text = NULL;
    size_t len;

    out[0] = '\0';
    if (access(path, F_OK) != 0 && errno == ENOENT)
        return 0;
    if (file_read_all(path, NOTE_MAX - 1, &text, &len, err) != 0)
        return -1;
    snprintf(out, NOTE_MAX, "%s", text);
    free(text);
    return 0;
}

static int found_one(void *context, const char *owner, const char *sha256, int64_t bytes,
                     int64_t mtime)
{
    return 1;
}

/* A disk that is full is no reason to keep a server down, or to keep from making room. */
static void write_note(const char *path, const char *moment)
{
    struct err why = {0};

    if (file_write_durable(path, moment, strlen(moment), &why) != 0)
        log_warn("which database the blobs belong to could not be noted: %s", why.message);
}

int blob_database_check(struct blob_store *store, struct db *db, struct err *err)
{
    char noted[NOTE_MAX], moment[NOTE_MAX], *path = NULL;
    int rc = -1;

    if (asprintf(&path, "%s/blobs/.database", blob_store_root(store)) < 0)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    if (moment_of(db, moment, err) != 0 || read_note(path, noted, err) != 0)
        goto out;
    rc =
        strcmp(noted, moment) == 0 || noted[0] == '\0' ? 0 : blob_list(store, found_one, NULL, err);
    if (rc == 1)
        rc = err_set(err, ERR_INVALID,
                     "%s/blobs has files of the database made %s, and this one was made %s: give "
                     "that one's URL (--database; without it the private one is used), or another "
                     "--data. To give them up, remove %s: what this database does not name is then "
                     "removed at its next collection",
                     blob_store_root(store), noted, moment, path);
    else if (rc == 0 && strcmp(noted, moment) != 0)
        write_note(path, moment);
out:
    free(path);
    return rc;
}
