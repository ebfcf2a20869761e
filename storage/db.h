/* db.h: the one door to PostgreSQL. Every statement of the product goes through db_exec().
 *
 * A `struct db` is one connection. It belongs to one thread at a time; each thread that needs the
 * database opens its own. After the connection is made the session takes one of three roles, none
 * of which can see past row-level security:
 *
 *   DB_ROLE_APP     what the API needs
 *   DB_ROLE_WORKER  what the train worker, the sweeper and the collector need
 *   DB_ROLE_OWNER   migrations and the operator's commands (key create, model import)
 *
 * Everything of a tenant is read and written inside db_begin(db, project) … db_commit(db), which
 * tells PostgreSQL whose rows the transaction may see. The functions of the other modules open
 * their own transaction; inside one that the caller has begun for the same project they join it, so
 * that several of them commit together:
 *
 *   db_begin(db, project, err); idempotency_take(…); jobs_create(…); idempotency_store(…);
 *   db_commit(db, err);
 *
 * Errors: a lost or refused connection, a timeout, a deadlock or a serialization failure is
 * ERR_UNAVAILABLE (503, try again) and the transaction is gone. The connection is opened again by
 * the next statement outside a transaction. Limits: a statement 5 s, and 10 s more until a server
 * that does not answer counts as gone; a transaction idle 10 s, a connect 5 s. A text that can not
 * be stored is ERR_INVALID; a broken constraint is our bug, and ERR_INTERNAL. Messages of
 * ERR_UNAVAILABLE and ERR_INTERNAL are for the log, not for a client: they may name hosts and
 * statements. */
#ifndef GRAFT_STORAGE_DB_H
#define GRAFT_STORAGE_DB_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/err.h"

struct db;
struct db_result;

enum db_role {
    DB_ROLE_APP,
    DB_ROLE_WORKER,
    DB_ROLE_OWNER,
    DB_ROLE_LOGIN /* the login itself: for migrate.c and pg_cluster.c, before the roles exist */
};

/* `url`: a libpq connection string or URI; may hold a password, and is never logged. Copied. */
int db_open(struct db **out, const char *url, enum db_role role, struct err *err);
void db_close(struct db *db); /* NULL is fine; an open transaction is rolled back */

/* Is the database there? One round trip; reconnects where the connection was lost. */
int db_ping(struct db *db, struct err *err);

/* Refuses to go on where the role could see past row-level security: superuser, BYPASSRLS, or any
 * row of any tenant table visible to a random project. Run once at start for each role in use. */
int db_self_test(struct db *db, struct err *err);

/* ------------------------------------------------------------------ transactions */

/* `project` NULL: no tenant, so no tenant's rows. Calls nest: an inner begin joins (same project or
 * NULL, else ERR_INTERNAL), only the outermost commit commits; an inner rollback dooms the whole.
 */
int db_begin(struct db *db, const char *project, struct err *err);
/* On 0 it is durable. A connection lost in the middle of COMMIT is resolved by asking PostgreSQL
 * what became of the transaction; ERR_UNAVAILABLE says that it did not commit or that nobody could
 * tell (then a retry needs its idempotency key or its fence). */
int db_commit(struct db *db, struct err *err);
void db_rollback(struct db *db); /* fine without a transaction */
bool db_in_transaction(const struct db *db);
/* The rest of the transaction sees another project's rows: for the sweeper, which ends jobs of
 * several tenants in one transaction. */
int db_switch_tenant(struct db *db, const char *project, struct err *err);
bool db_project_valid(const char *project); /* the shape of a uuid, lower case */

/* ------------------------------------------------------------------ statements */

enum db_value_kind { DB_VALUE_NULL, DB_VALUE_TEXT, DB_VALUE_INT, DB_VALUE_REAL, DB_VALUE_BOOL };
struct db_value {
    enum db_value_kind kind;
    const char *text;
    int64_t integer;
    double real;
};

/* Parameters $1, $2, …. A NULL text is SQL's NULL; so is a real that is NAN. */
#define DB_TEXT(s) ((struct db_value){.kind = DB_VALUE_TEXT, .text = (s)})
#define DB_INT(i) ((struct db_value){.kind = DB_VALUE_INT, .integer = (i)})
#define DB_REAL(d) ((struct db_value){.kind = DB_VALUE_REAL, .real = (d)})
#define DB_BOOL(b) ((struct db_value){.kind = DB_VALUE_BOOL, .integer = (b)})
#define DB_NULL ((struct db_value){.kind = DB_VALUE_NULL})
/* The list of parameters of db_exec: DB_ARGS(DB_TEXT(id), DB_INT(3)), or DB_NO_ARGS. */
#define DB_ARGS(...)                        \
    (const struct db_value[]){__VA_ARGS__}, \
        (int)(sizeof((const struct db_value[]){__VA_ARGS__}) / sizeof(struct db_value))
#define DB_NO_ARGS NULL, 0
#define DB_ARGS_MAX 48

/* One statement, parameters apart from the text. `result` may be NULL. Inside a transaction a
 * failure dooms it: the caller rolls back. */
int db_exec(struct db *db, const char *sql, const struct db_value *args, int count,
            struct db_result **result, struct err *err);
/* Several statements without parameters (migrations only). */
int db_script(struct db *db, const char *sql, struct err *err);
/* The five characters of the last statement's SQLSTATE, "" after success. */
const char *db_sqlstate(const struct db *db);

void db_result_free(struct db_result *result); /* NULL is fine */
int db_rows(const struct db_result *result);
int64_t db_affected(const struct db_result *result); /* rows written */
bool db_is_null(const struct db_result *result, int row, int column);
const char *db_text(const struct db_result *result, int row, int column); /* NULL for SQL's NULL */
char *db_text_copy(const struct db_result *result, int row, int column);  /* malloc'ed or NULL */
int64_t db_int(const struct db_result *result, int row, int column);      /* 0 for NULL */
double db_real(const struct db_result *result, int row, int column);      /* NAN for NULL */
bool db_bool(const struct db_result *result, int row, int column);        /* false for NULL */
/* Into a fixed field; "" for NULL. Longer than the field is our bug and asserted. */
void db_text_into(const struct db_result *result, int row, int column, char *out, size_t size);

#endif
