/* The door to the database: transactions, errors, restarts, a connection cut in the middle of
 * COMMIT; and migrations. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "engine/base/file_io.h"
#include "storage/migrate.h"
#include "storage/migrations_data.h"
#include "tests/unit/pg_fixture.h"

/* ------------------------------------------------------------------ statements */

static void values_travel_both_ways(void **state)
{
    struct fixture *f = fixture();
    struct db_result *res;

    assert_ok(db_exec(f->app,
                      "SELECT $1::text, $2::bigint, $3::double precision, $4::boolean, $5::text,"
                      "       $6::double precision, $7::text",
                      DB_ARGS(DB_TEXT("a'b\"c\\d ü"), DB_INT(INT64_MIN), DB_REAL(0.1),
                              DB_BOOL(true), DB_TEXT(NULL), DB_REAL(NAN), DB_NULL),
                      &res, err));
    assert_int_equal(db_rows(res), 1);
    assert_string_equal(db_text(res, 0, 0), "a'b\"c\\d ü");
    assert_true(db_int(res, 0, 1) == INT64_MIN);
    assert_true(db_real(res, 0, 2) == 0.1);
    assert_true(db_bool(res, 0, 3));
    assert_true(db_is_null(res, 0, 4));
    assert_null(db_text(res, 0, 4));
    assert_true(isnan(db_real(res, 0, 5)));
    assert_int_equal(db_int(res, 0, 6), 0);
    db_result_free(res);
}

static void a_text_that_can_not_be_stored_is_the_senders_fault(void **state)
{
    struct fixture *f = fixture();
    struct err why = {0};

    assert_int_equal(db_exec(f->app, "SELECT $1::text", DB_ARGS(DB_TEXT("\xff\xfe")), NULL, &why),
                     -1);
    assert_int_equal(why.kind, ERR_INVALID);
    assert_null(strstr(why.message, "database")); /* it may go to a client */
}

static void one_statement_at_a_time(void **state)
{
    struct fixture *f = fixture();

    assert_err(db_exec(f->app, "SELECT 1; SELECT 2", DB_NO_ARGS, NULL, err), ERR_INTERNAL);
}

static void the_session_has_its_limits(void **state)
{
    struct fixture *f = fixture();
    struct db_result *res;

    assert_ok(db_exec(f->app,
                      "SELECT current_setting('statement_timeout'),"
                      "       current_setting('idle_in_transaction_session_timeout'), current_user",
                      DB_NO_ARGS, &res, err));
    assert_string_equal(db_text(res, 0, 0), "5s");
    assert_string_equal(db_text(res, 0, 1), "10s");
    assert_string_equal(db_text(res, 0, 2), "graft_app");
    db_result_free(res);
    assert_ok(db_exec(f->app, "SET statement_timeout = '50ms'", DB_NO_ARGS, NULL, err));
    assert_err(db_exec(f->app, "SELECT pg_sleep(10)", DB_NO_ARGS, NULL, err), ERR_UNAVAILABLE);
    assert_ok(db_exec(f->app, "SET statement_timeout = '5s'", DB_NO_ARGS, NULL, err));
}

/* ------------------------------------------------------------------ transactions */

static int64_t keys_named(struct fixture *f, const char *key)
{
    char sql[128];

    snprintf(sql, sizeof sql, "SELECT count(*) FROM graft.idempotency_key WHERE key = '%s'", key);
    return fixture_number(f, sql);
}

static int insert_key(struct db *db, const char *project, const char *key, struct err *err)
{
    return db_exec(db,
                   "INSERT INTO idempotency_key (tenant, key, digest) VALUES ($1::uuid, $2, '')",
                   DB_ARGS(DB_TEXT(project), DB_TEXT(key)), NULL, err);
}

static void only_the_outer_commit_commits(void **state)
{
    struct fixture *f = fixture();

    assert_ok(db_begin(f->app, f->a.project, err));
    assert_ok(db_begin(f->app, f->a.project, err));
    assert_ok(insert_key(f->app, f->a.project, "nested", err));
    assert_ok(db_commit(f->app, err));
    assert_true(db_in_transaction(f->app));
    assert_int_equal(keys_named(f, "nested"), 0);
    assert_ok(db_commit(f->app, err));
    assert_false(db_in_transaction(f->app));
    assert_int_equal(keys_named(f, "nested"), 1);
}

static void an_inner_rollback_dooms_the_whole(void **state)
{
    struct fixture *f = fixture();

    assert_ok(db_begin(f->app, f->a.project, err));
    assert_ok(insert_key(f->app, f->a.project, "doomed", err));
    assert_ok(db_begin(f->app, NULL, err));
    db_rollback(f->app);
    assert_err(db_exec(f->app, "SELECT 1", DB_NO_ARGS, NULL, err), ERR_INTERNAL);
    assert_err(db_commit(f->app, err), ERR_INTERNAL);
    assert_false(db_in_transaction(f->app));
    assert_int_equal(keys_named(f, "doomed"), 0);
    assert_ok(db_ping(f->app, err));
}

static void a_failed_statement_dooms_its_transaction(void **state)
{
    struct fixture *f = fixture();

    assert_ok(db_begin(f->app, f->a.project, err));
    assert_ok(insert_key(f->app, f->a.project, "unique", err));
    assert_err(insert_key(f->app, f->a.project, "unique", err), ERR_INTERNAL);
    assert_string_equal(db_sqlstate(f->app), "23505");
    assert_err(db_commit(f->app, err), ERR_INTERNAL);
    assert_int_equal(keys_named(f, "unique"), 0);
}

static void projects_do_not_mix_in_one_transaction(void **state)
{
    struct fixture *f = fixture();

    assert_ok(db_begin(f->app, f->a.project, err));
    assert_err(db_begin(f->app, f->b.project, err), ERR_INTERNAL);
    db_rollback(f->app);
    assert_err(db_begin(f->app, "'; DROP TABLE job; --", err), ERR_INTERNAL);
    assert_err(db_begin(f->app, "", err), ERR_INTERNAL);
}

static void a_tenant_does_not_outlive_its_transaction(void **state)
{
    struct fixture *f = fixture();
    struct db_result *res;

    assert_ok(db_begin(f->app, f->a.project, err));
    assert_ok(db_commit(f->app, err));
    assert_ok(db_exec(f->app, "SELECT count(*) FROM project", DB_NO_ARGS, &res, err));
    assert_int_equal(db_int(res, 0, 0), 0);
    db_result_free(res);
}

static void a_deadlock_is_try_again(void **state)
{
    struct fixture *f = fixture();
    struct db *other;

    assert_ok(db_open(&other, f->storage.url, DB_ROLE_APP, err));
    assert_ok(db_begin(f->app, f->a.project, err));
    assert_ok(insert_key(f->app, f->a.project, "contended", err));
    assert_ok(db_begin(other, f->a.project, err));
    assert_ok(db_exec(other, "SET LOCAL lock_timeout = '50ms'", DB_NO_ARGS, NULL, err));
    assert_err(insert_key(other, f->a.project, "contended", err), ERR_UNAVAILABLE);
    db_rollback(other);
    db_rollback(f->app);
    db_close(other);
}

static void a_session_left_in_a_transaction_is_replaced(void **state)
{
    struct fixture *f = fixture();

    assert_ok(db_exec(f->app, "BEGIN", DB_NO_ARGS, NULL, err)); /* as a BEGIN that timed out */
    assert_err(db_exec(f->app, "SELECT 1 / 0", DB_NO_ARGS, NULL, err), ERR_INTERNAL);
    assert_ok(db_begin(f->app, f->a.project, err));
    assert_ok(db_commit(f->app, err));
}

/* Each as somebody writes it who did not escape a password, or mistyped what is before it. */
static void a_url_that_can_not_be_read_is_not_quoted(void **state)
{
    static const char *const urls[] = {
        "postgresql://u:pa/canary@localhost:1/d",  "postgresql://u:canary/x@localhost:1/d",
        "postgresql://u:pa@canary@localhost:1/d",  "postgresql://u:1/canary@localhost:1/d",
        "postgresql://u:pa?@canary@localhost:1/d", "postgresql://u:canary%zz@localhost:1/d",
        "postgres//u:canary@localhost:1/d",        "mysql://u:canary@localhost:1/d?x=y",
        "host=localhost password=two canary"};
    struct db *db;

    for (size_t i = 0; i < sizeof urls / sizeof *urls; i++) {
        struct err why = {0};

        assert_int_equal(db_open(&db, urls[i], DB_ROLE_LOGIN, &why), -1);
        if (strstr(why.message, "canary") != NULL || why.kind != ERR_INVALID)
            fail_msg("%s: %s", urls[i], why.message);
        assert_non_null(strstr(why.message, "%2F for /"));
    }
    /* These are read, and nobody listens there. */
    assert_err(
        db_open(&db, "postgresql://u:pa%2Fss%40@127.0.0.1:1/d?sslmode=disable", DB_ROLE_LOGIN, err),
        ERR_UNAVAILABLE);
    assert_err(db_open(&db, "postgres://u@127.0.0.1:1,127.0.0.2:2/d", DB_ROLE_LOGIN, err),
               ERR_UNAVAILABLE);
}

/* ------------------------------------------------------------------ a lost server */

static void a_restart_is_503_and_then_fine(void **state)
{
    struct fixture *f = fixture();
    pid_t before = pg_cluster_pid(f->storage.cluster);
    struct worker_identity gone;
    struct file_list list;

    assert_ok(db_begin(f->app, f->a.project, err));
    assert_ok(insert_key(f->app, f->a.project, "restart", err));
    assert_int_equal(kill(before, SIGQUIT), 0); /* immediate: no farewell */
    for (int i = 0; i < 200 && worker_identity_read(before, &gone, NULL) == 0; i++)
        usleep(20000);
    assert_err(insert_key(f->app, f->a.project, "restart 2", err), ERR_UNAVAILABLE);
    assert_err(db_exec(f->app, "SELECT 1", DB_NO_ARGS, NULL, err), ERR_UNAVAILABLE);
    db_rollback(f->app);
    assert_err(db_begin(f->app, f->a.project, err), ERR_UNAVAILABLE);
    assert_err(db_ping(f->worker, err), ERR_UNAVAILABLE);
    assert_err(files_list(f->app, f->a.project, &(struct file_query){.limit = 1}, &list, err),
               ERR_UNAVAILABLE);

    assert_ok(pg_cluster_revive(f->storage.cluster, err));
    assert_int_not_equal(pg_cluster_pid(f->storage.cluster), before);
    assert_ok(files_list(f->app, f->a.project, &(struct file_query){.limit = 1}, &list, err));
    file_list_release(&list);
    assert_ok(db_ping(f->worker, err));
    assert_int_equal(keys_named(f, "restart"), 0);
}

static void a_server_that_is_frozen_does_not_hold_who_asks(void **state)
{
    struct fixture *f = fixture();
    char *text = calloc(1, 4000001); /* more than a socket takes that nobody reads */
    struct db_result *res;
    pid_t server;

    assert_non_null(text);
    memset(text, 'x', 4000000);
    assert_ok(db_exec(f->app, "SELECT pg_backend_pid()", DB_NO_ARGS, &res, err));
    server = (pid_t)db_int(res, 0, 0);
    db_result_free(res);
    assert_int_equal(kill(server, SIGSTOP), 0);
    alarm(60); /* ends a test that waits for ever */
    assert_err(db_exec(f->app, "SELECT length($1)", DB_ARGS(DB_TEXT(text)), NULL, err),
               ERR_UNAVAILABLE);
    alarm(0);
    assert_int_equal(kill(server, SIGCONT), 0);
    assert_ok(db_exec(f->app, "SELECT length($1), $1", DB_ARGS(DB_TEXT(text)), &res, err));
    assert_int_equal(db_int(res, 0, 0), 4000000);
    assert_string_equal(db_text(res, 0, 1), text);
    db_result_free(res);
    free(text);
}

static void an_idle_connection_that_died_is_replaced_unseen(void **state)
{
    struct fixture *f = fixture();

    assert_ok(db_ping(f->app, err));
    fixture_admin(f, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                     " WHERE usename = 'graft' AND pid <> pg_backend_pid()");
    assert_ok(db_begin(f->app, f->a.project, err));
    assert_ok(db_commit(f->app, err));
    assert_ok(db_ping(f->worker, err)); /* its own died as well */
}

/* ------------------------------------------------------------------ a connection cut in COMMIT */

/* A proxy on a socket of its own that cuts one connection at its COMMIT: before the server has it,
 * or after the server has answered. Later connections pass. */
struct proxy {
    char dir[32];
    char server[64]; /* the real socket */
    int listener;
    _Atomic int cut; /* 0: pass, 1: before, 2: after */
    _Atomic bool stop;
    pthread_t thread;
};

static int connect_to(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);

    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) != 0) {
        close(fd);
        return -1;
    }
    return fd;
}

static bool holds(const char *data, ssize_t len, const char *word)
{
    return memmem(data, (size_t)len, word, strlen(word)) != NULL;
}

/* One connection to its end. */
static void relay(struct proxy *p, int client)
{
    int server = connect_to(p->server);
    struct pollfd fds[2] = {{client, POLLIN, 0}, {server, POLLIN, 0}};
    char data[65536];

    while (server >= 0 && !p->stop) {
        ssize_t n;

        if (poll(fds, 2, 50) < 0)
            break;
        if (fds[0].revents != 0) {
            n = recv(client, data, sizeof data, 0);
            if (n <= 0)
                break;
            if (p->cut == 1 && holds(data, n, "COMMIT")) {
                p->cut = 0;
                break;
            }
            if (send(server, data, (size_t)n, MSG_NOSIGNAL) != n)
                break;
            if (p->cut == 2 && holds(data, n, "COMMIT")) {
                p->cut = 0;
                recv(server, data, sizeof data, 0); /* the answer that nobody will hear */
                break;
            }
        }
        if (fds[1].revents != 0) {
            n = recv(server, data, sizeof data, 0);
            if (n <= 0 || send(client, data, (size_t)n, MSG_NOSIGNAL) != n)
                break;
        }
    }
    if (server >= 0)
        close(server);
    close(client);
}

static void *proxy_run(void *context)
{
    struct proxy *p = context;

    while (!p->stop) {
        struct pollfd fd = {p->listener, POLLIN, 0};

        if (poll(&fd, 1, 50) == 1) {
            int client = accept(p->listener, NULL, NULL);

            if (client >= 0)
                relay(p, client);
        }
    }
    return NULL;
}

static void proxy_start(struct proxy *p, struct fixture *f, char *url, size_t url_size)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};

    *p = (struct proxy){.dir = "/tmp/graft-test-XXXXXX"};
    assert_non_null(mkdtemp(p->dir));
    snprintf(p->server, sizeof p->server, "%s/pg/.s.PGSQL.5432", f->dir);
    snprintf(address.sun_path, sizeof address.sun_path, "%s/.s.PGSQL.5432", p->dir);
    p->listener = socket(AF_UNIX, SOCK_STREAM, 0);
    assert_int_equal(bind(p->listener, (struct sockaddr *)&address, sizeof address), 0);
    assert_int_equal(listen(p->listener, 8), 0);
    assert_int_equal(pthread_create(&p->thread, NULL, proxy_run, p), 0);
    snprintf(url, url_size, "host=%s port=5432 user=graft dbname=graft gssencmode=disable", p->dir);
}

static void proxy_stop(struct proxy *p)
{
    p->stop = true;
    pthread_join(p->thread, NULL);
    close(p->listener);
    file_remove_tree(p->dir, NULL);
}

static void a_commit_whose_answer_was_lost_is_known_to_have_happened(void **state)
{
    struct fixture *f = fixture();
    struct proxy proxy;
    struct db *db;
    char url[128];

    proxy_start(&proxy, f, url, sizeof url);
    assert_ok(db_open(&db, url, DB_ROLE_APP, err));
    assert_ok(db_begin(db, f->a.project, err));
    assert_ok(insert_key(db, f->a.project, "answer lost", err));
    proxy.cut = 2;
    assert_ok(db_commit(db, err));
    assert_int_equal(proxy.cut, 0);
    assert_int_equal(keys_named(f, "answer lost"), 1);
    assert_ok(db_ping(db, err));
    db_close(db);
    proxy_stop(&proxy);
}

static void a_commit_that_never_arrived_is_known_not_to_have(void **state)
{
    struct fixture *f = fixture();
    struct proxy proxy;
    struct db *db;
    char url[128];

    proxy_start(&proxy, f, url, sizeof url);
    assert_ok(db_open(&db, url, DB_ROLE_APP, err));
    assert_ok(db_begin(db, f->a.project, err));
    assert_ok(insert_key(db, f->a.project, "never arrived", err));
    proxy.cut = 1;
    assert_err(db_commit(db, err), ERR_UNAVAILABLE);
    assert_false(db_in_transaction(db));
    assert_int_equal(keys_named(f, "never arrived"), 0);
    /* The caller sends it again. */
    assert_ok(db_begin(db, f->a.project, err));
    assert_ok(insert_key(db, f->a.project, "never arrived", err));
    assert_ok(db_commit(db, err));
    assert_int_equal(keys_named(f, "never arrived"), 1);
    db_close(db);
    proxy_stop(&proxy);
}

/* A function writes behind a SELECT, which does not say so: an unknown fate is no success. */
static void a_function_whose_commit_was_lost_has_not_succeeded(void **state)
{
    struct fixture *f = fixture();
    struct key_identity who;
    char key[KEY_TEXT_SIZE];
    struct proxy proxy;
    struct db *db;
    char url[128];

    proxy_start(&proxy, f, url, sizeof url);
    assert_ok(db_open(&db, url, DB_ROLE_OWNER, err));
    proxy.cut = 1;
    assert_err(keys_create(db, "Lost", "default", key, &who, err), ERR_UNAVAILABLE);
    assert_int_equal(proxy.cut, 0);
    assert_err(keys_lookup(f->app, key, &who, err), ERR_AUTH);
    db_close(db);
    proxy_stop(&proxy);
}

/* ------------------------------------------------------------------ migrations */

static void migrations_run_once(void **state)
{
    struct fixture *f = fixture();
    struct migrate_report report;

    assert_true(migrations_data_count > 0);
    for (int i = 1; i < migrations_data_count; i++)
        assert_true(migrations_data[i].number > migrations_data[i - 1].number);
    assert_ok(migrate_run(f->storage.url, &report, err));
    assert_int_equal(report.applied, 0);
    assert_int_equal(report.version, migrations_data[migrations_data_count - 1].number);
}

static void a_changed_migration_is_refused(void **state)
{
    struct fixture *f = fixture();
    struct migrate_report report;

    fixture_admin(f, "UPDATE graft.migration SET sha256 = reverse(sha256) WHERE number = 2");
    assert_err(migrate_run(f->storage.url, &report, err), ERR_INVALID);
    fixture_admin(f, "UPDATE graft.migration SET sha256 = reverse(sha256) WHERE number = 2");
    assert_ok(migrate_run(f->storage.url, &report, err));
}

static void a_newer_database_is_refused(void **state)
{
    struct fixture *f = fixture();
    struct migrate_report report;

    fixture_admin(f, "INSERT INTO graft.migration VALUES (9999, '9999_future', 'x')");
    assert_err(migrate_run(f->storage.url, &report, err), ERR_INVALID);
    fixture_admin(f, "DELETE FROM graft.migration WHERE number = 9999");
}

static char *url_of(struct fixture *f, const char *user, const char *database)
{
    char *url = NULL;

    assert_true(asprintf(&url, "host=%s/pg port=5432 user=%s dbname=%s", f->dir, user, database) >
                0);
    return url;
}

static void a_login_without_rights_is_told_what_to_ask_for(void **state)
{
    struct fixture *f = fixture();
    struct migrate_report report;
    char *url = url_of(f, "visitor", "postgres");
    struct err why = {0};

    fixture_admin(f, "CREATE ROLE visitor LOGIN");
    assert_int_equal(migrate_run(url, &report, &why), -1);
    assert_int_equal(why.kind, ERR_INVALID);
    assert_non_null(strstr(why.message, "CREATE ROLE graft_owner"));
    free(url);
}

/* The cluster's own roles stand aside, so that it has to make them. */
static void a_login_that_may_make_roles_needs_no_administrator(void **state)
{
    static const char *const roles[] = {"graft_owner", "graft_app", "graft_worker"};
    struct fixture *f = fixture();
    char *url = url_of(f, "maker", "made"), sql[100];
    struct migrate_report report;
    struct db *db;

    for (int i = 0; i < 3; i++) {
        snprintf(sql, sizeof sql, "ALTER ROLE %s RENAME TO aside_%d", roles[i], i);
        fixture_admin(f, sql);
    }
    fixture_admin(f, "CREATE ROLE maker LOGIN CREATEROLE");
    fixture_admin(f, "CREATE DATABASE made OWNER maker");
    assert_ok(migrate_run(url, &report, err));
    assert_int_equal(report.applied, migrations_data_count);
    assert_ok(migrate_run(url, &report, err));
    assert_ok(db_open(&db, url, DB_ROLE_APP, err));
    assert_ok(db_self_test(db, err));
    db_close(db);
    fixture_admin(f, "DROP DATABASE made WITH (FORCE)");
    for (int i = 0; i < 3; i++) {
        snprintf(sql, sizeof sql, "DROP ROLE %s", roles[i]);
        fixture_admin(f, sql);
        snprintf(sql, sizeof sql, "ALTER ROLE aside_%d RENAME TO %s", i, roles[i]);
        fixture_admin(f, sql);
    }
    free(url);
}

struct migrator {
    const char *url;
    struct migrate_report report;
    struct err err;
    int rc;
};

static void *migrate_thread(void *context)
{
    struct migrator *m = context;

    m->rc = migrate_run(m->url, &m->report, &m->err);
    return NULL;
}

static void servers_that_migrate_at_once_do_not_collide(void **state)
{
    struct fixture *f = fixture();
    char *url = url_of(f, "graft", "second");
    struct migrator m[3];
    pthread_t threads[3];
    int applied = 0;

    fixture_admin(f, "CREATE DATABASE second OWNER graft");
    for (int i = 0; i < 3; i++) {
        m[i] = (struct migrator){.url = url};
        assert_int_equal(pthread_create(&threads[i], NULL, migrate_thread, &m[i]), 0);
    }
    for (int i = 0; i < 3; i++) {
        pthread_join(threads[i], NULL);
        if (m[i].rc != 0)
            fail_msg("%s", m[i].err.message);
        applied += m[i].report.applied;
    }
    assert_int_equal(applied, migrations_data_count);
    free(url);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(values_travel_both_ways),
        cmocka_unit_test(a_text_that_can_not_be_stored_is_the_senders_fault),
        cmocka_unit_test(one_statement_at_a_time),
        cmocka_unit_test(the_session_has_its_limits),
        cmocka_unit_test(only_the_outer_commit_commits),
        cmocka_unit_test(an_inner_rollback_dooms_the_whole),
        cmocka_unit_test(a_failed_statement_dooms_its_transaction),
        cmocka_unit_test(projects_do_not_mix_in_one_transaction),
        cmocka_unit_test(a_tenant_does_not_outlive_its_transaction),
        cmocka_unit_test(a_deadlock_is_try_again),
        cmocka_unit_test(a_session_left_in_a_transaction_is_replaced),
        cmocka_unit_test(a_url_that_can_not_be_read_is_not_quoted),
        cmocka_unit_test(a_restart_is_503_and_then_fine),
        cmocka_unit_test(a_server_that_is_frozen_does_not_hold_who_asks),
        cmocka_unit_test(an_idle_connection_that_died_is_replaced_unseen),
        cmocka_unit_test(a_commit_whose_answer_was_lost_is_known_to_have_happened),
        cmocka_unit_test(a_commit_that_never_arrived_is_known_not_to_have),
        cmocka_unit_test(a_function_whose_commit_was_lost_has_not_succeeded),
        cmocka_unit_test(migrations_run_once),
        cmocka_unit_test(a_changed_migration_is_refused),
        cmocka_unit_test(a_newer_database_is_refused),
        cmocka_unit_test(a_login_without_rights_is_told_what_to_ask_for),
        cmocka_unit_test(a_login_that_may_make_roles_needs_no_administrator),
        cmocka_unit_test(servers_that_migrate_at_once_do_not_collide),
    };

    return cmocka_run_group_tests(tests, fixture_setup, fixture_teardown);
}
