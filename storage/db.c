#include "storage/db.h"

#include <assert.h>
#include <libpq-fe.h>
#include <math.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#include "engine/base/clock.h"
#include "engine/base/log.h"
#include "storage/db_result.h"

#define COMMIT_RESOLVE_SECONDS 8 /* how long to ask what became of a COMMIT */
#define ANSWER_SECONDS 10        /* beyond the server's own limit of a statement */

struct db {
    char *url;
    enum db_role role;
    PGconn *conn; /* NULL: never connected, or given up */
    int depth;    /* of nested begins */
    char tenant[37];
    bool doomed; /* a statement failed, or an inner rollback: only rollback can end it */
    bool wrote;  /* rows were written: COMMIT's fate can and must be found out */
    char sqlstate[6];
};

/* ------------------------------------------------------------------ errors */

static bool connection_lost(const struct db *db)
{
    return db->conn == NULL || PQstatus(db->conn) != CONNECTION_OK;
}

static enum err_kind kind_of(const char *s)
{
    static const struct {
        const char *prefix;
        enum err_kind kind;
    } map[] = {
        {"08", ERR_UNAVAILABLE},    /* connection exception */
        {"40", ERR_UNAVAILABLE},    /* serialization failure, deadlock */
        {"55P03", ERR_UNAVAILABLE}, /* lock timeout */
        {"57", ERR_UNAVAILABLE},    /* shutdown, crash, statement timeout */
        {"25P03", ERR_UNAVAILABLE}, /* idle in transaction for too long */
        {"25006", ERR_UNAVAILABLE}, /* read only: a standby, during failover */
        {"53100", ERR_NO_SPACE},    {"53200", ERR_NO_MEMORY},
        {"53", ERR_UNAVAILABLE}, /* too many connections */
        {"22021", ERR_INVALID},  /* not UTF-8 */
        {"22P05", ERR_INVALID},  /* a character that text can not hold */
        {"28", ERR_UNAVAILABLE}, /* login refused */
        {"58030", ERR_IO},       /* the server's disk */
    };

    for (size_t i = 0; i < sizeof map / sizeof *map; i++)
        if (strncmp(s, map[i].prefix, strlen(map[i].prefix)) == 0)
            return map[i].kind;
    return ERR_INTERNAL; /* a broken constraint too: what clients send is checked before */
}

/* `text` up to its first line end, since libpq's messages have several lines. */
static int first_line(const char *text)
{
    return (int)strcspn(text, "\n");
}

static void disconnect(struct db *db)
{
    PQfinish(db->conn);
    db->conn = NULL;
}

/* The connection is over, though libpq may see it only at the next call: the server said good-bye
 * (FATAL, PANIC), or the error is libpq's own (no SQLSTATE). */
static bool farewell(const PGresult *res)
{
    const char *severity = PQresultErrorField(res, PG_DIAG_SEVERITY_NONLOCALIZED);

    return PQresultErrorField(res, PG_DIAG_SQLSTATE) == NULL ||
           (severity != NULL && (strcmp(severity, "FATAL") == 0 || strcmp(severity, "PANIC") == 0));
}

static int fail(struct db *db, const PGresult *res, struct err *err)
{
    const char *state = res != NULL ? PQresultErrorField(res, PG_DIAG_SQLSTATE) : NULL;
    const char *text = res != NULL ? PQresultErrorField(res, PG_DIAG_MESSAGE_PRIMARY) : NULL;
    enum err_kind kind;

    snprintf(db->sqlstate, sizeof db->sqlstate, "%s", state != NULL ? state : "08000");
    if (text == NULL)
        text = db->conn != NULL ? PQerrorMessage(db->conn) : "the server does not answer";
    kind = connection_lost(db) || farewell(res) ? ERR_UNAVAILABLE : kind_of(db->sqlstate);
    if (db->depth > 0)
        db->doomed = true;
    if (kind == ERR_INTERNAL)
        log_error("database: SQLSTATE %s: %.*s", db->sqlstate, first_line(text), text);
    if (kind == ERR_INVALID) /* goes to the client: no word of ours or PostgreSQL's in it */
        err_set(err, kind, "a text is not UTF-8, or holds a character that can not be stored");
    else
        err_set(err, kind, "database: %.*s (SQLSTATE %s)", first_line(text), text, db->sqlstate);
    if (farewell(res))
        disconnect(db);
    return -1;
}

/* ------------------------------------------------------------------ talking to the server */

static int statement_seconds(enum db_role role)
{
    return role == DB_ROLE_LOGIN ? 120 : 5;
}

/* Moves bytes until a result is there, or the connection is broken, which the result then tells.
 * false: the deadline has passed. */
static bool wait_for_result(PGconn *conn, double deadline)
{
    bool encrypted = PQsslInUse(conn) || PQgssEncInUse(conn);

    for (;;) {
        int unsent = PQflush(conn);
        struct pollfd fd = {.fd = PQsocket(conn), .events = POLLIN | (unsent > 0 ? POLLOUT : 0)};
        double left = deadline - clock_now();

        if (unsent < 0 || (unsent == 0 && !PQisBusy(conn)))
            return true;
        if (left <= 0)
            return false;
        if (encrypted && left > 0.02) /* bytes may have come that no look at the socket shows */
            left = 0.02;
        poll(&fd, 1, (int)ceil(left * 1000));
        if (!PQconsumeInput(conn))
            return true;
    }
}

/* The last result of what was sent, as PQexec has it. The server ends a statement at its limit, but
 * not one that waits for a disk, nor while it is frozen: then NULL, and the connection is gone. */
static PGresult *take_result(struct db *db, int sent)
{
    double deadline = clock_now() + statement_seconds(db->role) + ANSWER_SECONDS;
    PGresult *last = NULL, *next;

    if (!sent)
        return NULL;
    for (;;) {
        if (!wait_for_result(db->conn, deadline)) {
            PQclear(last);
            shutdown(PQsocket(db->conn), SHUT_RDWR); /* or its farewell could wait for ever */
            disconnect(db);
            return NULL;
        }
        next = PQgetResult(db->conn);
        if (next == NULL)
            return last;
        PQclear(last);
        last = next;
        if (PQstatus(db->conn) != CONNECTION_OK)
            return last;
    }
}

static PGresult *send_text(struct db *db, const char *sql)
{
    return take_result(db, PQsendQuery(db->conn, sql));
}

static PGresult *send_params(struct db *db, const char *sql, int count, const char *const *values)
{
    return take_result(db, PQsendQueryParams(db->conn, sql, count, NULL, values, NULL, NULL, 0));
}

/* ------------------------------------------------------------------ connection */

static void on_notice(void *context, const PGresult *res)
{
    const char *text = PQresultErrorField(res, PG_DIAG_MESSAGE_PRIMARY);

    log_debug("database: %s", text != NULL ? text : "notice");
}

static const char *role_name(enum db_role role)
{
    switch (role) {
    case DB_ROLE_APP:
        return "graft_app";
    case DB_ROLE_WORKER:
        return "graft_worker";
    case DB_ROLE_OWNER:
        return "graft_owner";
    case DB_ROLE_LOGIN:
        return "none";
    }
    return "none";
}

static int connect_now(struct db *db, struct err *err)
{
    /* What stands before `dbname` is a default that the URL may change. */
    const char *keys[] = {"connect_timeout",  "keepalives_idle",  "keepalives_interval",
                          "keepalives_count", "tcp_user_timeout", "application_name",
                          "dbname",           "client_encoding",  NULL};
    const char *values[] = {"5", "10", "5", "3", "15000", "graft", db->url, "UTF8", NULL};
    char setup[640];
    PGresult *res;

    disconnect(db);
    db->conn = PQconnectdbParams(keys, values, 1);
    if (db->conn == NULL)
        return err_set(err, ERR_NO_MEMORY, "database: out of memory");
    if (PQstatus(db->conn) != CONNECTION_OK) {
        const char *text = PQerrorMessage(db->conn);

        err_set(err, ERR_UNAVAILABLE, "the database can not be reached: %.*s", first_line(text),
                text);
        disconnect(db);
        return -1;
    }
    PQsetNoticeReceiver(db->conn, on_notice, NULL);
    PQsetnonblocking(db->conn, 1);
    snprintf(setup, sizeof setup,
             "SET ROLE %s; SET search_path = graft, pg_temp; SET timezone = 'UTC';"
             "SET statement_timeout = '%ds'; SET lock_timeout = '4s';"
             "SET idle_in_transaction_session_timeout = '10s';"
             "SET default_transaction_isolation = 'read committed'; SET row_security = on;"
             "SET client_min_messages = warning",
             role_name(db->role), statement_seconds(db->role));
    res = send_text(db, setup);
    if (PQresultStatus(res) != PGRES_COMMAND_OK) {
        fail(db, res, err);
        err_prefix(err, "set up the session as %s (is the database migrated? graft migrate)",
                   role_name(db->role));
        PQclear(res);
        disconnect(db);
        return -1;
    }
    PQclear(res);
    return 0;
}

/* Of a URI, behind the user and the password that libpq finds in it: an '@' there is the one that
 * was meant, and what stands before it is of the password. */
static bool has_second_at(const char *url)
{
    const char *p = strstr(url, "://"), *at;

    if (strncmp(url, "postgresql://", 13) != 0 && strncmp(url, "postgres://", 11) != 0)
        return false;
    p += 3;
    p += strcspn(p, "@/");
    if (*p == '@')
        p++;
    at = strchr(p, '@');
    return at != NULL && at < p + strcspn(p, "?");
}

/* What libpq says of a URL that it can not read quotes it, and a sign that should have been escaped
 * makes a part of the password the host, the port or the database, which errors name. */
static int check_url(const char *url, struct err *err)
{
    PQconninfoOption *options = PQconninfoParse(url, NULL);
    bool good = options != NULL && !has_second_at(url);

    for (const PQconninfoOption *o = options; good && o->keyword != NULL; o++)
        if (strcmp(o->keyword, "port") == 0 && o->val != NULL)
            good = o->val[strspn(o->val, "0123456789,")] == '\0';
    PQconninfoFree(options);
    return good
               ? 0
               : err_set(err, ERR_INVALID,
                         "the database URL can not be read: write it as "
                         "postgresql://USER:PASSWORD@HOST:PORT/DATABASE, and in the password every "
                         "sign but letters, digits and -._~ as %%XX (%%2F for /, %%40 for @)");
}

int db_open(struct db **out, const char *url, enum db_role role, struct err *err)
{
    struct db *db;

    *out = NULL;
    if (check_url(url, err) != 0)
        return -1;
    db = calloc(1, sizeof *db);
    if (db == NULL || (db->url = strdup(url)) == NULL) {
        free(db);
        return err_set(err, ERR_NO_MEMORY, "open the database: out of memory");
    }
    db->role = role;
    if (connect_now(db, err) != 0) {
        db_close(db);
        return -1;
    }
    *out = db;
    return 0;
}

void db_close(struct db *db)
{
    if (db == NULL)
        return;
    disconnect(db); /* the server rolls an open transaction back */
    free(db->url);
    free(db);
}

int db_ping(struct db *db, struct err *err)
{
    bool had = !connection_lost(db);
    struct err first = {0};

    if (db_exec(db, "SELECT 1", DB_NO_ARGS, NULL, &first) == 0)
        return 0;
    /* A connection that died while idle, as in db_begin: it says nothing of the database. */
    if (had && db->depth == 0 && connection_lost(db))
        return db_exec(db, "SELECT 1", DB_NO_ARGS, NULL, err);
    if (err != NULL && !err_is_set(err))
        *err = first;
    return -1;
}

const char *db_sqlstate(const struct db *db)
{
    return db->sqlstate;
}

/* ------------------------------------------------------------------ transactions */

bool db_project_valid(const char *project)
{
    static const char shape[] = "xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx";

    for (size_t i = 0; i < sizeof shape; i++) {
        char c = project[i];

        if (shape[i] == 'x' ? !((c >= '0' && c <= '9') || (c >= 'a' && c <= 'f')) : c != shape[i])
            return false;
    }
    return true;
}

static int begin_once(struct db *db, const char *project, struct err *err)
{
    char sql[128];
    PGresult *res;
    int rc = 0;

    /* One round trip. The project is hex digits and dashes, checked. */
    snprintf(sql, sizeof sql, "BEGIN; SELECT set_config('app.tenant', '%s', true)", project);
    res = send_text(db, sql);
    if (PQresultStatus(res) != PGRES_TUPLES_OK)
        rc = fail(db, res, err);
    PQclear(res);
    return rc;
}

/* A session that was left inside a transaction (its BEGIN or ROLLBACK ran into a timeout) would
 * refuse every later one: it is not ours to mend, so it goes. */
static void drop_unclean(struct db *db)
{
    if (db->conn != NULL && PQtransactionStatus(db->conn) != PQTRANS_IDLE)
        disconnect(db);
}

int db_begin(struct db *db, const char *project, struct err *err)
{
    struct err first = {0};

    if (project != NULL && !db_project_valid(project))
        return err_set(err, ERR_INTERNAL, "\"%s\" is not a project", project);
    if (db->depth > 0) {
        if (project != NULL && strcmp(project, db->tenant) != 0)
            return err_set(err, ERR_INTERNAL, "a transaction of another project is open");
        db->depth++;
        return 0;
    }
    db->doomed = db->wrote = false;
    if (project == NULL)
        project = "";
    drop_unclean(db);
    /* A connection that died while idle shows it here, where nothing is lost yet: once more. */
    if (connection_lost(db) || begin_once(db, project, &first) != 0) {
        if (!connection_lost(db)) {
            if (err != NULL && !err_is_set(err))
                *err = first;
            return -1;
        }
        if (connect_now(db, err) != 0 || begin_once(db, project, err) != 0)
            return -1;
    }
    snprintf(db->tenant, sizeof db->tenant, "%s", project);
    db->depth = 1;
    return 0;
}

int db_switch_tenant(struct db *db, const char *project, struct err *err)
{
    assert(db->depth > 0);
    if (!db_project_valid(project))
        return err_set(err, ERR_INTERNAL, "\"%s\" is not a project", project);
    if (db_exec(db, "SELECT set_config('app.tenant', $1, true)", DB_ARGS(DB_TEXT(project)), NULL,
                err) != 0)
        return -1;
    snprintf(db->tenant, sizeof db->tenant, "%s", project);
    return 0;
}

static void end_transaction(struct db *db)
{
    db->depth = 0;
    db->doomed = db->wrote = false;
    db->tenant[0] = '\0';
}

void db_rollback(struct db *db)
{
    if (db->depth > 1) {
        db->depth--;
        db->doomed = true;
        return;
    }
    if (db->depth == 1 && !connection_lost(db))
        PQclear(send_text(db, "ROLLBACK"));
    end_transaction(db);
}

bool db_in_transaction(const struct db *db)
{
    return db->depth > 0;
}

/* The transaction's number, "" where it has none because it wrote nothing. */
static int transaction_number(struct db *db, char out[32], struct err *err)
{
    PGresult *res = send_text(db, "SELECT pg_current_xact_id_if_assigned()::text");
    int rc = 0;

    out[0] = '\0';
    if (PQresultStatus(res) != PGRES_TUPLES_OK)
        rc = fail(db, res, err);
    else if (!PQgetisnull(res, 0, 0))
        snprintf(out, 32, "%s", PQgetvalue(res, 0, 0));
    PQclear(res);
    return rc;
}

/* The connection was lost in COMMIT: ask over a new one. 0: it did commit. */
static int resolve_commit(struct db *db, const char *number, struct err *err)
{
    double deadline = clock_now() + COMMIT_RESOLVE_SECONDS;
    char status[32] = "";

    disconnect(db);
    do {
        const char *values[] = {number};
        PGresult *res;

        if (connection_lost(db) && connect_now(db, NULL) != 0) {
            nanosleep(&(struct timespec){.tv_nsec = 200000000}, NULL);
            continue;
        }
        res = send_params(db, "SELECT pg_xact_status($1::text::xid8)", 1, values);
        if (PQresultStatus(res) == PGRES_TUPLES_OK)
            snprintf(status, sizeof status, "%s",
                     PQgetisnull(res, 0, 0) ? "unknown" : PQgetvalue(res, 0, 0));
        PQclear(res);
        if (strcmp(status, "in progress") != 0 && status[0] != '\0')
            break;
        nanosleep(&(struct timespec){.tv_nsec = 100000000}, NULL);
    } while (clock_now() < deadline);
    if (strcmp(status, "committed") == 0) {
        log_warn("database: the connection was lost in COMMIT; transaction %s did commit", number);
        return 0;
    }
    return err_set(err, ERR_UNAVAILABLE, "the database connection was lost in COMMIT (%s)",
                   status[0] != '\0' ? status : "its outcome is not known");
}

int db_commit(struct db *db, struct err *err)
{
    char number[32] = "";
    PGresult *res;
    int rc = 0;

    assert(db->depth > 0);
    if (db->doomed) {
        db_rollback(db);
        return err_set(err, ERR_INTERNAL, "commit of a transaction that has failed");
    }
    if (db->depth > 1) {
        db->depth--;
        return 0;
    }
    if (db->wrote && transaction_number(db, number, err) != 0) {
        db_rollback(db);
        return -1;
    }
    res = send_text(db, "COMMIT");
    if (PQresultStatus(res) == PGRES_COMMAND_OK) {
        if (strcmp(PQcmdStatus(res), "COMMIT") != 0)
            rc = err_set(err, ERR_INTERNAL, "the database rolled the transaction back");
    } else if (!connection_lost(db) && !farewell(res)) {
        rc = fail(db, res, err);
    } else if (number[0] != '\0') {
        rc = resolve_commit(db, number, err);
    } else { /* it wrote nothing, or only inside functions, which a SELECT does not tell of */
        rc = err_set(err, ERR_UNAVAILABLE, "the database connection was lost in COMMIT");
    }
    PQclear(res);
    end_transaction(db);
    return rc;
}

/* ------------------------------------------------------------------ statements */

static bool writes(const PGresult *res)
{
    static const char *const tags[] = {"INSERT", "UPDATE", "DELETE"};
    const char *tag = PQcmdStatus((PGresult *)res);

    for (size_t i = 0; i < sizeof tags / sizeof *tags; i++)
        if (strncmp(tag, tags[i], strlen(tags[i])) == 0)
            return true;
    return false;
}

/* Only outside a transaction may a lost connection be replaced: inside, what was done is gone. */
static int ready(struct db *db, struct err *err)
{
    if (db->depth > 0 && (db->doomed || connection_lost(db))) {
        db->doomed = true;
        return connection_lost(db)
                   ? err_set(err, ERR_UNAVAILABLE, "the database connection was lost")
                   : err_set(err, ERR_INTERNAL, "a statement in a transaction that has failed");
    }
    if (db->depth == 0)
        drop_unclean(db);
    return connection_lost(db) ? connect_now(db, err) : 0;
}

int db_exec(struct db *db, const char *sql, const struct db_value *args, int count,
            struct db_result **result, struct err *err)
{
    const char *values[DB_ARGS_MAX];
    char numbers[DB_ARGS_MAX][32];
    PGresult *res;

    assert(count <= DB_ARGS_MAX);
    if (result != NULL)
        *result = NULL;
    if (ready(db, err) != 0)
        return -1;
    for (int i = 0; i < count; i++) {
        values[i] = numbers[i];
        switch (args[i].kind) {
        case DB_VALUE_NULL:
            values[i] = NULL;
            break;
        case DB_VALUE_TEXT:
            values[i] = args[i].text;
            break;
        case DB_VALUE_INT:
            snprintf(numbers[i], sizeof numbers[i], "%lld", (long long)args[i].integer);
            break;
        case DB_VALUE_REAL:
            if (isnan(args[i].real))
                values[i] = NULL;
            else
                snprintf(numbers[i], sizeof numbers[i], "%.17g", args[i].real);
            break;
        case DB_VALUE_BOOL:
            snprintf(numbers[i], sizeof numbers[i], "%s", args[i].integer ? "t" : "f");
            break;
        }
    }
    res = send_params(db, sql, count, values);
    if (PQresultStatus(res) != PGRES_TUPLES_OK && PQresultStatus(res) != PGRES_COMMAND_OK) {
        fail(db, res, err);
        PQclear(res);
        return -1;
    }
    db->sqlstate[0] = '\0';
    if (writes(res))
        db->wrote = true;
    if (result == NULL) {
        PQclear(res);
        return 0;
    }
    return db_result_wrap(res, result, err);
}

int db_script(struct db *db, const char *sql, struct err *err)
{
    PGresult *res;
    int rc = 0;

    if (ready(db, err) != 0)
        return -1;
    db->wrote = true;
    res = send_text(db, sql);
    if (PQresultStatus(res) != PGRES_TUPLES_OK && PQresultStatus(res) != PGRES_COMMAND_OK)
        rc = fail(db, res, err);
    PQclear(res);
    return rc;
}
