#include "storage/migrate.h"

#include <stdio.h>
#include <string.h>

#include "engine/base/log.h"
#include "engine/base/sha256.h"
#include "storage/db.h"
#include "storage/migrations_data.h"

#define MIGRATE_LOCK "4702111234474983745" /* any number, the same in every version */

/* What a session needs of its roles is SET ROLE. From PostgreSQL 16 on a login that makes a role is
 * its member, but may grant it only, itself included, and not set it. */
#define MAY_SET                                                          \
    "CASE WHEN current_setting('server_version_num')::integer >= 160000" \
    "     THEN 'SET' ELSE 'MEMBER' END"

/* Roles are the cluster's, not the database's: another graft database may have made them. */
const char migrate_roles_sql[] =
    "DO $$ DECLARE r text; BEGIN"
    "  FOREACH r IN ARRAY ARRAY['graft_owner', 'graft_app', 'graft_worker'] LOOP"
    "    IF NOT EXISTS (SELECT 1 FROM pg_roles WHERE rolname = r) THEN"
    "      EXECUTE format('CREATE ROLE %I NOLOGIN NOSUPERUSER NOBYPASSRLS', r);"
    "    END IF;"
    "    IF NOT pg_has_role(current_user, r, " MAY_SET ") THEN"
    "      EXECUTE format('GRANT %I TO %I', r, current_user);"
    "    END IF;"
    "  END LOOP;"
    "END $$";

static int have_roles(struct db *db, bool *out, struct err *err)
{
    struct db_result *res = NULL;

    if (db_exec(db,
                "SELECT count(*) = 3 AND bool_and(pg_has_role(current_user, oid, " MAY_SET "))"
                "  FROM pg_roles WHERE rolname IN ('graft_owner', 'graft_app', 'graft_worker')",
                DB_NO_ARGS, &res, err) != 0)
        return -1;
    *out = db_bool(res, 0, 0);
    db_result_free(res);
    return 0;
}

static int make_roles(struct db *db, struct err *err)
{
    struct err why = {0};
    bool have;

    if (have_roles(db, &have, err) != 0)
        return -1;
    if (have || db_script(db, migrate_roles_sql, &why) == 0)
        return 0;
    if (strcmp(db_sqlstate(db), "42501") != 0)
        return err_set(err, why.kind, "%s", why.message);
    return err_set(err, ERR_INVALID,
                   "this database login may not make roles. Let an administrator run: "
                   "CREATE ROLE graft_owner NOLOGIN; CREATE ROLE graft_app NOLOGIN; "
                   "CREATE ROLE graft_worker NOLOGIN; "
                   "GRANT graft_owner, graft_app, graft_worker TO <login>;");
}

static int make_schema(struct db *db, struct err *err)
{
    struct db_result *res = NULL;
    bool have;

    if (db_exec(db, "SELECT 1 FROM pg_namespace WHERE nspname = 'graft'", DB_NO_ARGS, &res, err) !=
        0)
        return -1;
    have = db_rows(res) > 0;
    db_result_free(res);
    if (!have && db_script(db, "CREATE SCHEMA graft AUTHORIZATION graft_owner", err) != 0) {
        err_prefix(err, "make the schema graft (the login needs CREATE on the database)");
        return -1;
    }
    return db_script(db,
                     "SET ROLE graft_owner;"
                     "REVOKE ALL ON SCHEMA graft FROM PUBLIC;"
                     "GRANT USAGE ON SCHEMA graft TO graft_app, graft_worker;"
                     "CREATE TABLE IF NOT EXISTS migration ("
                     "  number integer PRIMARY KEY, name text NOT NULL, sha256 text NOT NULL,"
                     "  applied_at timestamptz NOT NULL DEFAULT now());"
                     "GRANT SELECT ON migration TO graft_worker", /* blob_database.h */
                     err);
}

/* Every recorded migration is one of ours, unchanged. *version: the newest recorded. */
static int check_recorded(struct db *db, int *version, struct err *err)
{
    struct db_result *res = NULL;
    char sha256[SHA256_HEX];
    int rc = -1;

    *version = 0;
    if (db_exec(db, "SELECT number, name, sha256 FROM migration ORDER BY number", DB_NO_ARGS, &res,
                err) != 0)
        return -1;
    if (db_rows(res) > migrations_data_count) {
        err_set(err, ERR_INVALID,
                "the database was migrated by a newer graft (migration %s is not known here): use "
                "that version or a later one",
                db_text(res, migrations_data_count, 1));
        goto out;
    }
    for (int i = 0; i < db_rows(res); i++) {
        const struct migration_data *m = &migrations_data[i];

        sha256_hex(m->sql, m->len, sha256);
        if (db_int(res, i, 0) != m->number || strcmp(db_text(res, i, 2), sha256) != 0) {
            err_set(err, ERR_INVALID,
                    "migration %s was applied with other content than this graft's %s: restore the "
                    "file, or use the version that applied it",
                    db_text(res, i, 1), m->name);
            goto out;
        }
        *version = m->number;
    }
    rc = 0;
out:
    db_result_free(res);
    return rc;
}

static int apply(struct db *db, const struct migration_data *m, struct err *err)
{
    char sha256[SHA256_HEX];

    sha256_hex(m->sql, m->len, sha256);
    if (db_begin(db, NULL, err) != 0)
        return -1;
    if (db_script(db, m->sql, err) != 0 ||
        db_exec(db, "INSERT INTO migration (number, name, sha256) VALUES ($1, $2, $3)",
                DB_ARGS(DB_INT(m->number), DB_TEXT(m->name), DB_TEXT(sha256)), NULL, err) != 0) {
        db_rollback(db);
        err_prefix(err, "migration %s", m->name);
        return -1;
    }
    return db_commit(db, err);
}

int migrate_run(const char *url, struct migrate_report *report, struct err *err)
{
    struct db *db = NULL;
    int rc = -1;

    *report = (struct migrate_report){0};
    if (db_open(&db, url, DB_ROLE_LOGIN, err) != 0)
        return -1;
    /* Held by the session to its end; a second migrating server waits here, then finds all done. */
    if (db_script(db, "SET lock_timeout = '120s'; SELECT pg_advisory_lock(" MIGRATE_LOCK ")",
                  err) != 0 ||
        make_roles(db, err) != 0 || make_schema(db, err) != 0 ||
        check_recorded(db, &report->version, err) != 0)
        goto out;
    for (int i = 0; i < migrations_data_count; i++) {
        if (migrations_data[i].number <= report->version)
            continue;
        if (apply(db, &migrations_data[i], err) != 0)
            goto out;
        report->version = migrations_data[i].number;
        report->applied++;
        log_info("database: applied migration %s", migrations_data[i].name);
    }
    rc = 0;
out:
    db_close(db);
    return rc;
}
