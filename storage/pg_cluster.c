#include "storage/pg_cluster.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <libpq-fe.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "engine/base/file_io.h"
#include "engine/base/log.h"
#include "engine/base/strbuf.h"
#include "storage/db.h"
#include "storage/migrate.h"
#include "storage/pg_binaries.h"
#include "storage/pg_process.h"

#define START_SECONDS 60 /* crash recovery included */
#define LOCK_SECONDS 90  /* for another graft's start or stop */
#define FAST_STOP_SECONDS 20
#define KILL_STOP_SECONDS 10
#define LOG_MAX_BYTES (16 << 20) /* then the log begins anew, one old one is kept */
#define PID_IMPOSSIBLE 99999999  /* Linux's largest is 2^22 */
#define SOCKET_NAME "/.s.PGSQL.5432"

struct pg_cluster {
    char *root;    /* DATA, absolute */
    char *pgdata;  /* DATA/pg */
    char *sockets; /* folder of the socket */
    char *url;     /* for graft's own login */
    char *admin;   /* superuser, database postgres: only here */
    struct pg_user user;
    int users;       /* shared lock on DATA/pg.users for as long as we use it; -1 */
    int connections; /* max_connections of one that we start */
    bool started;
    pid_t pid;
};

/* ------------------------------------------------------------------ small things */

static double now_seconds(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec * 1e-9;
}

static void nap(void)
{
    nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
}

static char *path_in(const char *dir, const char *name)
{
    char *path = NULL;

    return asprintf(&path, "%s/%s", dir, name) < 0 ? NULL : path;
}

/* Opens (and makes) DATA/`name` and takes the lock; waits up to LOCK_SECONDS. */
static int lock_file(const struct pg_cluster *c, const char *name, int how, struct err *err)
{
    double deadline = now_seconds() + LOCK_SECONDS;
    char *path = path_in(c->root, name);
    int fd = path != NULL ? open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600) : -1;

    if (fd < 0) {
        err_set_errno(err, path != NULL ? errno : ENOMEM, "open %s/%s", c->root, name);
        free(path);
        return -1;
    }
    while (flock(fd, how | LOCK_NB) != 0) {
        if ((errno != EWOULDBLOCK && errno != EINTR) || now_seconds() > deadline) {
            err_set(err, ERR_UNAVAILABLE, "%s is locked: another graft starts or stops there",
                    path);
            close(fd);
            free(path);
            return -1;
        }
        nap();
    }
    free(path);
    return fd;
}

/* First number of a small file; 0 where there is none. */
static long number_in(const char *dir, const char *name)
{
    char *path = path_in(dir, name), *text = NULL;
    size_t len;
    long n = 0;

    if (path != NULL && file_read_all(path, 65536, &text, &len, NULL) == 0)
        n = strtol(text, NULL, 10);
    free(text);
    free(path);
    return n;
}

/* A connection string's value in quotes. */
static void add_quoted(struct strbuf *sb, const char *value)
{
    strbuf_addch(sb, '\'');
    for (; *value != '\0'; value++) {
        if (*value == '\'' || *value == '\\')
            strbuf_addch(sb, '\\');
        strbuf_addch(sb, *value);
    }
    strbuf_addch(sb, '\'');
}

static char *make_url(const char *sockets, const char *user, const char *database)
{
    struct strbuf sb;

    strbuf_init(&sb, 4096);
    strbuf_addstr(&sb, "host=");
    add_quoted(&sb, sockets);
    strbuf_addf(&sb, " port=5432 user=%s dbname=%s connect_timeout=5", user, database);
    return strbuf_detach(&sb, NULL);
}

/* ------------------------------------------------------------------ the socket's folder */

static bool fits(const char *dir)
{
    return strlen(dir) + strlen(SOCKET_NAME) < sizeof((struct sockaddr_un *)0)->sun_path;
}

/* Ours: a folder, no link, of the cluster's user, closed to others. */
static bool socket_dir_good(const struct pg_cluster *c, const char *dir)
{
    struct stat st;

    return lstat(dir, &st) == 0 && S_ISDIR(st.st_mode) && st.st_uid == c->user.uid &&
           (st.st_mode & 077) == 0;
}

/* DATA/pg itself, which is closed to others; where its path is too long for a socket's address, a
 * private folder in /tmp whose name DATA/pg.socket keeps. */
static int choose_socket_dir(struct pg_cluster *c, struct err *err)
{
    char made[] = "/tmp/graft-XXXXXX";
    char *note = NULL, *text = NULL;
    size_t len;
    int rc = -1;

    if (fits(c->pgdata)) {
        c->sockets = strdup(c->pgdata);
        return c->sockets != NULL ? 0 : err_set(err, ERR_NO_MEMORY, "out of memory");
    }
    note = path_in(c->root, "pg.socket");
    if (note == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    if (file_read_all(note, 256, &text, &len, NULL) == 0 && socket_dir_good(c, text)) {
        c->sockets = strdup(text);
        rc = c->sockets != NULL ? 0 : err_set(err, ERR_NO_MEMORY, "out of memory");
        goto out;
    }
    if (mkdtemp(made) == NULL || (c->user.change && chown(made, c->user.uid, c->user.gid) != 0)) {
        err_set_errno(err, errno, "make a folder for the database socket in /tmp");
        goto out;
    }
    if (file_write_durable(note, made, strlen(made), err) != 0) {
        rmdir(made);
        goto out;
    }
    c->sockets = strdup(made);
    rc = c->sockets != NULL ? 0 : err_set(err, ERR_NO_MEMORY, "out of memory");
out:
    free(text);
    free(note);
    return rc;
}

/* ------------------------------------------------------------------ creation */

static int open_log(const struct pg_cluster *c, const char *dir, struct err *err)
{
    char *path = path_in(dir, "log"), *old = path_in(dir, "log.old");
    struct stat st;
    int fd = -1;

    if (path == NULL || old == NULL) {
        err_set(err, ERR_NO_MEMORY, "out of memory");
        goto out;
    }
    if (lstat(path, &st) == 0 && S_ISREG(st.st_mode) && st.st_size > LOG_MAX_BYTES)
        rename(path, old);
    fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0)
        err_set_errno(err, errno, "open %s", path);
    else if (c->user.change && fchown(fd, c->user.uid, c->user.gid) != 0) {
        err_set_errno(err, errno, "chown %s", path);
        close(fd);
        fd = -1;
    }
out:
    free(path);
    free(old);
    return fd;
}

/* The last lines of what initdb or postgres said, for our own message. */
static void add_tail(struct err *err, const char *path)
{
    char *text = NULL;
    size_t len;

    if (file_read_all(path, LOG_MAX_BYTES + (1 << 20), &text, &len, NULL) != 0)
        return;
    while (len > 0 && text[len - 1] == '\n')
        text[--len] = '\0';
    err_prefix(err, "%.300s", len > 300 ? text + len - 300 : text);
    free(text);
}

static int run_initdb(struct pg_cluster *c, const struct pg_binaries *bin, const char *fresh,
                      struct err *err)
{
    char program[600];
    const char *argv[] = {"initdb",
                          "-D",
                          PG_PROCESS_DATA,
                          "-U",
                          "postgres",
                          "--auth=trust",
                          "--encoding=UTF8",
                          "--locale=C",
                          "--data-checksums",
                          "--no-instructions",
                          NULL};
    char *said = path_in(c->root, "pg.initdb");
    struct pg_process process = {.user = &c->user, .program = program, .argv = argv, .data = fresh};
    int status = 0, rc = -1;

    snprintf(program, sizeof program, "%s/initdb", bin->dir);
    process.output = said != NULL ? open(said, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600) : -1;
    if (process.output < 0) {
        err_set_errno(err, errno, "open %s/pg.initdb", c->root);
        goto out;
    }
    if (pg_process_run(&process, &status, err) != 0)
        goto out;
    if (status != 0) {
        err_set(err, ERR_IO, "initdb failed (status %d)", WEXITSTATUS(status));
        add_tail(err, said);
        goto out;
    }
    rc = 0;
out:
    if (process.output >= 0)
        close(process.output);
    if (said != NULL)
        unlink(said);
    free(said);
    return rc;
}

/* Complete or absent: made under another name, then renamed. */
static int create(struct pg_cluster *c, const struct pg_binaries *bin, struct err *err)
{
    char *fresh = path_in(c->root, "pg.new");
    int rc = -1;

    if (fresh == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    if (c->user.change)
        log_info("database: PostgreSQL refuses root, so it runs as user %s, who owns %s",
                 c->user.name, c->pgdata);
    log_info("database: making a private PostgreSQL %d cluster in %s", bin->major, c->pgdata);
    if (file_remove_tree(fresh, err) != 0)
        goto out;
    if (mkdir(fresh, 0700) != 0 ||
        (c->user.change && chown(fresh, c->user.uid, c->user.gid) != 0)) {
        err_set_errno(err, errno, "make %s", fresh);
        goto out;
    }
    if (run_initdb(c, bin, fresh, err) != 0)
        goto out;
    if (rename(fresh, c->pgdata) != 0) {
        err_set_errno(err, errno, "rename %s", fresh);
        goto out;
    }
    rc = file_sync_dir(c->root, err);
out:
    if (rc != 0)
        file_remove_tree(fresh, NULL);
    free(fresh);
    return rc;
}

/* ------------------------------------------------------------------ start, attach, stop */

static bool answers(const struct pg_cluster *c)
{
    PGPing ping = PQping(c->admin);

    return ping == PQPING_OK || ping == PQPING_REJECT; /* REJECT: starting up or recovering */
}

static pid_t running_pid(const struct pg_cluster *c)
{
    pid_t pid = (pid_t)number_in(c->pgdata, "postmaster.pid");

    return pg_process_look(pid, c->pgdata) == PG_PROCESS_OURS ? pid : 0;
}

/* postmaster.pid of a killed postmaster, whose pid is now a zombie's (nobody reaps where graft is a
 * container's first process) or another program's. PostgreSQL would take that for a running one and
 * refuse. Put a pid there that can not exist, and leave it the rest of the file, by which it makes
 * sure that no backend of the old cluster is left. */
static int disarm_stale_pid(const struct pg_cluster *c, struct err *err)
{
    pid_t pid = (pid_t)number_in(c->pgdata, "postmaster.pid");
    char *path = NULL, *text = NULL, *rest, *fresh = NULL, *socket_lock = NULL;
    size_t len;
    int rc = -1;

    if (pg_process_look(pid, c->pgdata) != PG_PROCESS_OTHER)
        return 0;
    path = path_in(c->pgdata, "postmaster.pid");
    if (path == NULL || file_read_all(path, 65536, &text, &len, err) != 0)
        goto out;
    rest = strchr(text, '\n');
    if (asprintf(&fresh, "%d%s", PID_IMPOSSIBLE, rest != NULL ? rest : "\n") < 0) {
        fresh = NULL;
        err_set(err, ERR_NO_MEMORY, "out of memory");
        goto out;
    }
    if (file_write_durable(path, fresh, strlen(fresh), err) != 0)
        goto out;
    if (c->user.change && chown(path, c->user.uid, c->user.gid) != 0) {
        err_set_errno(err, errno, "chown %s", path);
        goto out;
    }
    socket_lock = path_in(c->sockets, &SOCKET_NAME ".lock"[1]); /* holds the same pid */
    if (socket_lock == NULL || (unlink(socket_lock) != 0 && errno != ENOENT)) {
        err_set_errno(err, socket_lock != NULL ? errno : ENOMEM, "remove the old socket's lock");
        goto out;
    }
    rc = 0;
out:
    free(socket_lock);
    free(fresh);
    free(text);
    free(path);
    return rc;
}

static int start(struct pg_cluster *c, const struct pg_binaries *bin, struct err *err)
{
    char program[600], sockets[128], connections[40];
    const char *argv[] = {"postgres", "-D", PG_PROCESS_DATA, "-c", "listen_addresses=", "-c",
                          sockets, "-c", "unix_socket_permissions=0700", "-c", "port=5432", "-c",
                          "cluster_name=graft", "-c", "fsync=on", "-c", "synchronous_commit=on",
                          "-c", "full_page_writes=on", "-c",
                          /* Modest: our tables are small, the model needs the memory. */
                          "shared_buffers=32MB", "-c", connections, "-c", "max_wal_size=256MB",
                          "-c", "min_wal_size=32MB", "-c", "max_parallel_workers=0", "-c",
                          "jit=off", "-c", "huge_pages=off", "-c", "logging_collector=off", "-c",
                          "log_timezone=UTC", "-c", "log_checkpoints=off", NULL};
    struct pg_process process = {
        .user = &c->user, .program = program, .argv = argv, .data = c->pgdata};
    int rc;

    snprintf(program, sizeof program, "%s/postgres", bin->dir);
    snprintf(connections, sizeof connections, "max_connections=%d", c->connections);
    /* Relative to the data folder, so that it holds where the path to that is closed to the user.
     */
    snprintf(sockets, sizeof sockets, "unix_socket_directories=%s",
             strcmp(c->sockets, c->pgdata) == 0 ? "." : c->sockets);
    process.output = open_log(c, c->pgdata, err);
    if (process.output < 0)
        return -1;
    rc = pg_process_start(&process, err);
    close(process.output);
    return rc;
}

static int wait_until_up(struct pg_cluster *c, struct err *err)
{
    double begin = now_seconds();
    char *log;

    while (now_seconds() - begin < START_SECONDS) {
        if (PQping(c->admin) == PQPING_OK) {
            c->pid = running_pid(c);
            return 0;
        }
        /* postmaster.pid appears in the first moments; later its absence means that it gave up. */
        if (now_seconds() - begin > 5 && running_pid(c) == 0)
            break;
        nap();
    }
    err_set(err, ERR_UNAVAILABLE, "the private PostgreSQL in %s did not start", c->pgdata);
    log = path_in(c->pgdata, "log");
    if (log != NULL)
        add_tail(err, log);
    free(log);
    return -1;
}

/* The login `graft`, no superuser, the three roles, and the database. Each step may be there. */
static int prepare(struct pg_cluster *c, struct err *err)
{
    struct db *db = NULL;
    struct db_result *res = NULL;
    int rc = -1;

    if (db_open(&db, c->admin, DB_ROLE_LOGIN, err) != 0)
        return -1;
    if (db_exec(db,
                "SELECT EXISTS (SELECT 1 FROM pg_database WHERE datname = 'graft'),"
                "       EXISTS (SELECT 1 FROM pg_roles WHERE rolname = 'graft')",
                DB_NO_ARGS, &res, err) != 0)
        goto out;
    if (db_bool(res, 0, 0)) {
        rc = 0;
        goto out;
    }
    if (!db_bool(res, 0, 1) &&
        db_script(db, "CREATE ROLE graft LOGIN NOSUPERUSER NOCREATEROLE NOBYPASSRLS", err) != 0)
        goto out;
    if (db_script(db, migrate_roles_sql, err) != 0 ||
        db_script(db, "GRANT graft_owner, graft_app, graft_worker TO graft", err) != 0 ||
        db_script(db, "CREATE DATABASE graft OWNER graft TEMPLATE template0", err) != 0)
        goto out;
    rc = 0;
out:
    db_result_free(res);
    db_close(db);
    return rc;
}

/* With DATA/pg.lock held. */
static int bring_up(struct pg_cluster *c, struct err *err)
{
    struct pg_binaries bin;
    int major = (int)number_in(c->pgdata, "PG_VERSION");

    c->started = false;
    if (major != 0 ? pg_user_of(c->pgdata, &c->user, err) != 0 : pg_user_choose(&c->user, err) != 0)
        return -1;
    if (c->sockets == NULL) {
        if (choose_socket_dir(c, err) != 0)
            return -1;
        c->url = make_url(c->sockets, "graft", "graft");
        c->admin = make_url(c->sockets, "postgres", "postgres");
        if (c->url == NULL || c->admin == NULL)
            return err_set(err, ERR_NO_MEMORY, "out of memory");
    }
    if (major != 0 && (running_pid(c) != 0 || answers(c))) {
        struct err why = {0};

        if (wait_until_up(c, &why) == 0) {
            log_info("database: attached to the private PostgreSQL that runs in %s", c->pgdata);
            return prepare(c, err);
        }
        if (running_pid(c) != 0 || answers(c))
            return err_set(err, why.kind, "%s", why.message);
        /* It was on its way down; now start it. */
    }
    if (pg_binaries_find(major, &bin, err) != 0)
        return -1;
    if (major == 0 && create(c, &bin, err) != 0)
        return -1;
    if (disarm_stale_pid(c, err) != 0 || start(c, &bin, err) != 0 || wait_until_up(c, err) != 0)
        return -1;
    c->started = true;
    return prepare(c, err);
}

static void cluster_free(struct pg_cluster *c)
{
    if (c->users >= 0)
        close(c->users);
    free(c->root);
    free(c->pgdata);
    free(c->sockets);
    free(c->url);
    free(c->admin);
    free(c);
}

static bool wait_gone(const struct pg_cluster *c, pid_t pid, double seconds)
{
    double deadline = now_seconds() + seconds;

    while (pg_process_look(pid, c->pgdata) == PG_PROCESS_OURS) {
        if (now_seconds() > deadline)
            return false;
        nap();
    }
    return true;
}

static void stop(const struct pg_cluster *c)
{
    pid_t pid = running_pid(c);

    if (pid == 0)
        return;
    kill(pid, SIGINT); /* "fast": disconnects everyone, checkpoints, exits */
    if (wait_gone(c, pid, FAST_STOP_SECONDS))
        return;
    log_warn("database: PostgreSQL did not stop within %d s, stopping it at once (it recovers)",
             FAST_STOP_SECONDS);
    kill(pid, SIGQUIT);
    if (!wait_gone(c, pid, KILL_STOP_SECONDS))
        log_error("database: PostgreSQL (process %d) does not stop", (int)pid);
}

int pg_cluster_acquire(struct pg_cluster **out, const char *data_dir, struct err *err)
{
    return pg_cluster_acquire_for(out, data_dir, PG_CLUSTER_CONNECTIONS, err);
}

int pg_cluster_acquire_for(struct pg_cluster **out, const char *data_dir, int connections,
                           struct err *err)
{
    struct pg_cluster *c = calloc(1, sizeof *c);
    int lock = -1, rc = -1;

    *out = NULL;
    if (c == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    c->users = -1;
    c->connections = connections > PG_CLUSTER_CONNECTIONS ? connections : PG_CLUSTER_CONNECTIONS;
    if (file_make_dirs(data_dir, 0700, err) != 0)
        goto out;
    c->root = realpath(data_dir, NULL);
    if (c->root == NULL) {
        err_set_errno(err, errno, "find %s", data_dir);
        goto out;
    }
    c->pgdata = path_in(c->root, "pg");
    if (c->pgdata == NULL) {
        err_set(err, ERR_NO_MEMORY, "out of memory");
        goto out;
    }
    lock = lock_file(c, "pg.lock", LOCK_EX, err);
    if (lock < 0)
        goto out;
    c->users = lock_file(c, "pg.users", LOCK_SH, err);
    if (c->users < 0)
        goto out;
    rc = bring_up(c, err);
out:
    if (rc == 0) {
        *out = c;
    } else if (lock >= 0 && c->users >= 0 && c->admin != NULL &&
               flock(c->users, LOCK_EX | LOCK_NB) == 0) {
        stop(c);
    }
    if (rc != 0)
        cluster_free(c);
    if (lock >= 0)
        close(lock);
    return rc;
}

void pg_cluster_release(struct pg_cluster *cluster)
{
    struct err why = {0};
    int lock;

    if (cluster == NULL)
        return;
    lock = lock_file(cluster, "pg.lock", LOCK_EX, &why);
    if (lock < 0)
        log_warn("database: left running: %s", why.message);
    else if (flock(cluster->users, LOCK_EX | LOCK_NB) == 0) /* nobody else uses it */
        stop(cluster);
    cluster_free(cluster);
    if (lock >= 0)
        close(lock);
}

int pg_cluster_revive(struct pg_cluster *cluster, struct err *err)
{
    int lock = lock_file(cluster, "pg.lock", LOCK_EX, err);
    int rc;

    if (lock < 0)
        return -1;
    rc = bring_up(cluster, err);
    close(lock);
    return rc;
}

const char *pg_cluster_url(const struct pg_cluster *cluster)
{
    return cluster->url;
}

bool pg_cluster_started(const struct pg_cluster *cluster)
{
    return cluster->started;
}

pid_t pg_cluster_pid(const struct pg_cluster *cluster)
{
    return cluster->pid;
}
