#include <stdio.h>

#include "storage/db.h"

/* Refuses a role that row-level security does not bind. */
static int check_role(struct db *db, struct err *err)
{
    struct db_result *res = NULL;
    int rc = -1;

    if (db_exec(db,
                "SELECT rolname, rolsuper, rolbypassrls FROM pg_roles WHERE rolname = current_user",
                DB_NO_ARGS, &res, err) != 0)
        return -1;
    if (db_rows(res) != 1)
        err_set(err, ERR_INTERNAL, "database: the session's role is not in pg_roles");
    else if (db_bool(res, 0, 1) || db_bool(res, 0, 2))
        err_set(err, ERR_INTERNAL,
                "database role %s is superuser or has BYPASSRLS, so tenants would not be isolated: "
                "ALTER ROLE %s NOSUPERUSER NOBYPASSRLS",
                db_text(res, 0, 0), db_text(res, 0, 0));
    else
        rc = 0;
    db_result_free(res);
    return rc;
}

/* One table: security forced, and nothing to see for a project that does not exist. */
static int check_table(struct db *db, const char *table, bool forced, bool readable,
                       struct err *err)
{
    struct db_result *res = NULL;
    char sql[256];
    int rc = -1;

    if (!forced)
        return err_set(err, ERR_INTERNAL,
                       "table %s has a tenant but no forced row-level security: run graft migrate, "
                       "and do not alter graft's tables",
                       table);
    if (!readable)
        return 0;
    snprintf(sql, sizeof sql, "SELECT 1 FROM %s LIMIT 1", table);
    if (db_exec(db, sql, DB_NO_ARGS, &res, err) != 0)
        return -1;
    if (db_rows(res) != 0)
        err_set(err, ERR_INTERNAL, "table %s shows rows to a project that does not exist", table);
    else
        rc = 0;
    db_result_free(res);
    return rc;
}

int db_self_test(struct db *db, struct err *err)
{
    struct db_result *tables = NULL, *nobody = NULL;
    int rc = -1;

    if (check_role(db, err) != 0)
        return -1;
    if (db_exec(db, "SELECT gen_random_uuid()::text", DB_NO_ARGS, &nobody, err) != 0)
        return -1;
    if (db_begin(db, db_text(nobody, 0, 0), err) != 0)
        goto out;
    if (db_exec(db,
                "SELECT format('%I.%I', n.nspname, c.relname),"
                "       c.relrowsecurity AND c.relforcerowsecurity,"
                "       has_table_privilege(c.oid, 'SELECT')"
                "  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
                " WHERE n.nspname = 'graft' AND c.relkind IN ('r', 'p')"
                "   AND (c.relname = 'organization' OR EXISTS ("
                "        SELECT 1 FROM pg_attribute a WHERE a.attrelid = c.oid"
                "           AND a.attname = 'tenant' AND NOT a.attisdropped))",
                DB_NO_ARGS, &tables, err) != 0)
        goto rollback;
    if (db_rows(tables) == 0) {
        err_set(err, ERR_UNAVAILABLE, "the database has no graft tables: run graft migrate");
        goto rollback;
    }
    for (int i = 0; i < db_rows(tables); i++)
        if (check_table(db, db_text(tables, i, 0), db_bool(tables, i, 1), db_bool(tables, i, 2),
                        err) != 0)
            goto rollback;
    rc = 0;
rollback:
    db_rollback(db);
out:
    db_result_free(tables);
    db_result_free(nobody);
    return rc;
}
