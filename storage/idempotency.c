#include "storage/idempotency.h"

#include <assert.h>
#include <string.h>

static int replay(const struct db_result *res, const char *digest, enum idempotency *out,
                  int *status, char **body, struct err *err)
{
    if (db_rows(res) != 1)
        return err_set(err, ERR_UNAVAILABLE, "the idempotency key has just expired: try again");
    if (strcmp(db_text(res, 0, 0), digest) != 0)
        return err_set_code(err, ERR_INVALID, "idempotency_key_reused", "",
                            "this Idempotency-Key was used with another request: use a new key for "
                            "a new request");
    *body = db_text_copy(res, 0, 2);
    if (*body == NULL)
        return err_set(err, ERR_NO_MEMORY, "read a stored answer: out of memory");
    *status = (int)db_int(res, 0, 1);
    *out = IDEMPOTENCY_REPLAY;
    return 0;
}

int idempotency_take(struct db *db, const char *project, const char *key, const char *digest,
                     enum idempotency *out, int *status, char **body, struct err *err)
{
    struct db_result *res = NULL;
    int rc;

    assert(db_in_transaction(db));
    *out = IDEMPOTENCY_NEW;
    *status = 0;
    *body = NULL;
    if (key[0] == '\0' || strlen(key) > 255)
        return err_set_code(err, ERR_INVALID, "invalid_idempotency_key", "",
                            "an Idempotency-Key has 1 to 255 characters");
    /* Past its day it is as if it had never been. */
    if (db_exec(db,
                "DELETE FROM idempotency_key WHERE tenant = $1::uuid AND key = $2"
                " AND created_at < now() - interval '24 hours'",
                DB_ARGS(DB_TEXT(project), DB_TEXT(key)), NULL, err) != 0
        /* Waits while another transaction that has inserted this key is open. */
        || db_exec(db,
                   "INSERT INTO idempotency_key (tenant, key, digest) VALUES ($1::uuid, $2, $3)"
                   " ON CONFLICT (tenant, key) DO NOTHING",
                   DB_ARGS(DB_TEXT(project), DB_TEXT(key), DB_TEXT(digest)), &res, err) != 0)
        return -1;
    rc = (int)db_affected(res);
    db_result_free(res);
    if (rc == 1)
        return 0;
    if (db_exec(db,
                "SELECT digest, status, body FROM idempotency_key"
                " WHERE tenant = $1::uuid AND key = $2 AND status IS NOT NULL",
                DB_ARGS(DB_TEXT(project), DB_TEXT(key)), &res, err) != 0)
        return -1;
    rc = replay(res, digest, out, status, body, err);
    db_result_free(res);
    return rc;
}

int idempotency_find(struct db *db, const char *project, const char *key, const char *digest,
                     enum idempotency *out, int *status, char **body, struct err *err)
{
    struct db_result *res = NULL;
    int rc = 0;

    *out = IDEMPOTENCY_NEW;
    *status = 0;
    *body = NULL;
    if (db_begin(db, project, err) != 0)
        return -1;
    if (db_exec(db,
                "SELECT digest, status, body FROM idempotency_key"
                " WHERE tenant = $1::uuid AND key = $2 AND status IS NOT NULL"
                " AND created_at >= now() - interval '24 hours'",
                DB_ARGS(DB_TEXT(project), DB_TEXT(key)), &res, err) != 0) {
        db_rollback(db);
        return -1;
    }
    if (db_rows(res) > 0)
        rc = replay(res, digest, out, status, body, err);
    db_result_free(res);
    db_rollback(db); /* it only read */
    return rc;
}

int idempotency_store(struct db *db, const char *project, const char *key, int status,
                      const char *body, struct err *err)
{
    assert(db_in_transaction(db));
    return db_exec(db,
                   "UPDATE idempotency_key SET status = $3::integer, body = $4"
                   " WHERE tenant = $1::uuid AND key = $2",
                   DB_ARGS(DB_TEXT(project), DB_TEXT(key), DB_INT(status), DB_TEXT(body)), NULL,
                   err);
}
