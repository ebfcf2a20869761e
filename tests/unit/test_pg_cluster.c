/* The private cluster: made once, started once, adopted after a crash, stopped by the last user. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine/base/file_io.h"
#include "engine/base/log.h"
#include "storage/db.h"
#include "storage/pg_binaries.h"
#include "storage/pg_process.h"
#include "tests/unit/pg_fixture.h"

static char dir[32];
static char why_not[1024];

static int setup(void **state)
{
    struct pg_binaries binaries;
    struct err err = {0};

    log_setup("test", LOG_LEVEL_ERROR);
    if (pg_binaries_find(0, &binaries, &err) != 0) {
        snprintf(why_not, sizeof why_not, "%s", err.message);
        return 0;
    }
    snprintf(dir, sizeof dir, "/tmp/graft-test-XXXXXX");
    return mkdtemp(dir) == NULL ? -1 : 0;
}

static int teardown(void **state)
{
    return dir[0] == '\0' ? 0 : file_remove_tree(dir, NULL);
}

static void needs_postgresql(void)
{
    if (why_not[0] != '\0') {
        print_message("# SKIP %s\n", why_not);
        skip();
    }
}

static void check_answers(const char *url)
{
    struct db *db;

    assert_ok(db_open(&db, url, DB_ROLE_LOGIN, err));
    assert_ok(db_ping(db, err));
    db_close(db);
}

static bool running(pid_t pid)
{
    struct worker_identity identity;

    return worker_identity_read(pid, &identity, NULL) == 0; /* zombies do not count */
}

static void the_cluster_is_private(void **state)
{
    struct pg_cluster *cluster;
    struct db_result *res;
    struct stat st;
    char path[64];
    struct db *db;
    pid_t pid;

    needs_postgresql();
    assert_ok(pg_cluster_acquire(&cluster, dir, err));
    assert_true(pg_cluster_started(cluster));
    pid = pg_cluster_pid(cluster);
    assert_true(pid > 1 && running(pid));
    snprintf(path, sizeof path, "%s/pg", dir);
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0700);
    assert_int_not_equal(st.st_uid, 0); /* whoever runs this test */
    assert_ok(db_open(&db, pg_cluster_url(cluster), DB_ROLE_LOGIN, err));
    assert_ok(
        db_exec(db,
                "SELECT current_setting('listen_addresses'), current_setting('fsync'),"
                "       current_setting('data_checksums'), current_setting('server_encoding'),"
                "       current_setting('synchronous_commit'),"
                "       (SELECT rolsuper FROM pg_roles WHERE rolname = current_user)",
                DB_NO_ARGS, &res, err));
    assert_string_equal(db_text(res, 0, 0), "");
    assert_string_equal(db_text(res, 0, 1), "on");
    assert_string_equal(db_text(res, 0, 2), "on");
    assert_string_equal(db_text(res, 0, 3), "UTF8");
    assert_string_equal(db_text(res, 0, 4), "on");
    assert_false(db_bool(res, 0, 5));
    db_result_free(res);
    db_close(db);
    pg_cluster_release(cluster);
    assert_false(running(pid));
}

static void the_last_user_stops_it(void **state)
{
    struct pg_cluster *server, *visitor;
    pid_t pid;

    needs_postgresql();
    assert_ok(pg_cluster_acquire(&server, dir, err));
    pid = pg_cluster_pid(server);
    assert_ok(pg_cluster_acquire(&visitor, dir, err));
    assert_false(pg_cluster_started(visitor));
    assert_int_equal(pg_cluster_pid(visitor), pid);
    check_answers(pg_cluster_url(visitor));
    pg_cluster_release(visitor);
    assert_true(running(pid));
    check_answers(pg_cluster_url(server));
    pg_cluster_release(server);
    assert_false(running(pid));
    pg_cluster_release(NULL);
}

/* A caller that waits for the end of a pipe waits for us, not for the database. */
static void it_inherits_no_descriptor(void **state)
{
    struct pg_cluster *cluster;
    int pipes[2];
    char byte;

    needs_postgresql();
    assert_int_equal(pipe(pipes), 0);
    assert_ok(pg_cluster_acquire(&cluster, dir, err));
    assert_true(pg_cluster_started(cluster));
    close(pipes[1]);
    assert_int_equal(fcntl(pipes[0], F_SETFL, O_NONBLOCK), 0);
    assert_int_equal(read(pipes[0], &byte, 1), 0); /* the end, not EAGAIN */
    close(pipes[0]);
    pg_cluster_release(cluster);
}

/* Starts it in a child, which says the postmaster's pid and waits. */
static pid_t start_in_child(pid_t *postmaster)
{
    int pipes[2];
    pid_t child;

    assert_int_equal(pipe(pipes), 0);
    child = fork();
    if (child == 0) {
        struct pg_cluster *cluster;

        if (pg_cluster_acquire(&cluster, dir, NULL) == 0) {
            *postmaster = pg_cluster_pid(cluster);
            if (write(pipes[1], postmaster, sizeof *postmaster) > 0)
                pause();
        }
        _exit(1);
    }
    close(pipes[1]);
    assert_int_equal(read(pipes[0], postmaster, sizeof *postmaster), sizeof *postmaster);
    close(pipes[0]);
    return child;
}

static void a_killed_servers_postmaster_is_adopted(void **state)
{
    struct pg_cluster *cluster;
    pid_t postmaster, child;
    int status;

    needs_postgresql();
    child = start_in_child(&postmaster);
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
    assert_true(running(postmaster));
    assert_ok(pg_cluster_acquire(&cluster, dir, err));
    assert_false(pg_cluster_started(cluster));
    assert_int_equal(pg_cluster_pid(cluster), postmaster);
    check_answers(pg_cluster_url(cluster));
    pg_cluster_release(cluster);
    assert_false(running(postmaster));
}

static void a_killed_postmaster_recovers(void **state)
{
    struct pg_cluster *cluster;
    pid_t first;

    needs_postgresql();
    assert_ok(pg_cluster_acquire(&cluster, dir, err));
    first = pg_cluster_pid(cluster);
    kill(first, SIGKILL); /* leaves its pid file, and children that see it gone */
    for (int i = 0; i < 200 && running(first); i++)
        usleep(20000);
    assert_ok(pg_cluster_revive(cluster, err));
    assert_true(pg_cluster_started(cluster));
    assert_int_not_equal(pg_cluster_pid(cluster), first);
    check_answers(pg_cluster_url(cluster));
    pg_cluster_release(cluster);
}

static void a_foreign_process_with_the_old_pid_is_not_taken_for_it(void **state)
{
    struct pg_cluster *cluster;
    char path[64], text[64];

    needs_postgresql();
    snprintf(path, sizeof path, "%s/pg/postmaster.pid", dir);
    snprintf(text, sizeof text, "%d\n/nowhere\n", (int)getpid());
    assert_ok(file_write_durable(path, text, strlen(text), err));
    if (geteuid() == 0) {
        struct pg_user user;
        char folder[64];

        snprintf(folder, sizeof folder, "%s/pg", dir);
        assert_ok(pg_user_of(folder, &user, err));
        assert_int_equal(chown(path, user.uid, user.gid), 0);
    }
    assert_int_equal(pg_process_look(getpid(), dir), PG_PROCESS_OTHER);
    assert_ok(pg_cluster_acquire(&cluster, dir, err));
    assert_true(pg_cluster_started(cluster));
    pg_cluster_release(cluster);
}

static void starters_at_the_same_time_share_one(void **state)
{
    pid_t children[4], first = 0;
    int pipes[2], go[2], status;
    char byte;

    needs_postgresql();
    assert_int_equal(pipe(pipes), 0);
    assert_int_equal(pipe(go), 0);
    for (int i = 0; i < 4; i++) {
        children[i] = fork();
        if (children[i] == 0) {
            struct pg_cluster *cluster;
            pid_t pid = 0;

            close(go[1]);
            if (pg_cluster_acquire(&cluster, dir, NULL) == 0)
                pid = pg_cluster_pid(cluster);
            if (write(pipes[1], &pid, sizeof pid) < 0 || read(go[0], &byte, 1) < 0)
                _exit(2);
            if (pid != 0)
                pg_cluster_release(cluster);
            _exit(pid != 0 ? 0 : 1);
        }
    }
    for (int i = 0; i < 4; i++) {
        pid_t pid;

        assert_int_equal(read(pipes[0], &pid, sizeof pid), sizeof pid);
        assert_true(pid > 0);
        assert_true(i == 0 || pid == first);
        first = pid;
    }
    close(go[1]); /* all have it: let go */
    for (int i = 0; i < 4; i++) {
        waitpid(children[i], &status, 0);
        assert_int_equal(status, 0);
    }
    assert_false(running(first));
    close(go[0]);
    close(pipes[0]);
    close(pipes[1]);
}

static void another_major_version_is_refused_with_the_remedy(void **state)
{
    struct pg_cluster *cluster;
    char path[64], *was;
    struct err why = {0};
    size_t len;

    needs_postgresql();
    snprintf(path, sizeof path, "%s/pg/PG_VERSION", dir);
    assert_ok(file_read_all(path, 16, &was, &len, err));
    assert_ok(file_write_durable(path, "9\n", 2, err));
    assert_int_equal(pg_cluster_acquire(&cluster, dir, &why), -1);
    assert_int_equal(why.kind, ERR_INVALID);
    assert_non_null(strstr(why.message, "made by PostgreSQL 9"));
    assert_non_null(strstr(why.message, "apt install postgresql-9"));
    assert_ok(file_write_durable(path, was, len, err));
    free(was);
    if (geteuid() == 0) { /* written by root just now */
        struct pg_user user;
        char folder[64];

        snprintf(folder, sizeof folder, "%s/pg", dir);
        assert_ok(pg_user_of(folder, &user, err));
        assert_int_equal(chown(path, user.uid, user.gid), 0);
    }
    assert_ok(pg_cluster_acquire(&cluster, dir, err));
    pg_cluster_release(cluster);
}

static void a_path_too_long_for_a_socket_works(void **state)
{
    struct pg_cluster *cluster;
    char path[256], name[121];
    pid_t pid;

    needs_postgresql();
    memset(name, 'x', sizeof name - 1);
    name[sizeof name - 1] = '\0';
    name[10] = ' '; /* and one that needs quoting */
    name[11] = '\'';
    snprintf(path, sizeof path, "%s/%s", dir, name);
    assert_ok(pg_cluster_acquire(&cluster, path, err));
    pid = pg_cluster_pid(cluster);
    assert_non_null(strstr(pg_cluster_url(cluster), "host='/tmp/graft-"));
    check_answers(pg_cluster_url(cluster));
    pg_cluster_release(cluster);
    assert_false(running(pid));
    assert_ok(pg_cluster_acquire(&cluster, path, err)); /* finds its folder again */
    check_answers(pg_cluster_url(cluster));
    {
        char note[300], *socket_dir;
        size_t len;

        snprintf(note, sizeof note, "%s/pg.socket", path);
        assert_ok(file_read_all(note, 100, &socket_dir, &len, err));
        pg_cluster_release(cluster);
        file_remove_tree(socket_dir, NULL);
        free(socket_dir);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_cluster_is_private),
        cmocka_unit_test(the_last_user_stops_it),
        cmocka_unit_test(it_inherits_no_descriptor),
        cmocka_unit_test(a_killed_servers_postmaster_is_adopted),
        cmocka_unit_test(a_killed_postmaster_recovers),
        cmocka_unit_test(a_foreign_process_with_the_old_pid_is_not_taken_for_it),
        cmocka_unit_test(starters_at_the_same_time_share_one),
        cmocka_unit_test(another_major_version_is_refused_with_the_remedy),
        cmocka_unit_test(a_path_too_long_for_a_socket_works),
    };

    return cmocka_run_group_tests(tests, setup, teardown);
}
