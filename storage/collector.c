#include "storage/collector.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include "engine/base/file_io.h"
#include "engine/base/log.h"
#include "engine/base/strbuf.h"
#include "storage/blob_database.h"
#include "storage/ids.h"

#define COLLECTOR_LOCK "4702111234474983746"
#define BATCH 500 /* things asked about in one statement */

struct run {
    struct db *db;
    struct blob_store *store;
    const struct collector_options *options;
    struct collector_report *report;
    int64_t now; /* seconds since 1970 */
    struct err *err;
};

/* PostgreSQL array literals. What goes in are ids, digests and numbers: nothing needs quoting. */
static void array_begin(struct strbuf *sb)
{
    strbuf_init(sb, 1 << 20);
    strbuf_addch(sb, '{');
}

static void array_add(struct strbuf *sb, const char *text)
{
    if (sb->len > 1)
        strbuf_addch(sb, ',');
    strbuf_addstr(sb, text);
}

static void array_clear(struct strbuf *sb)
{
    strbuf_reset(sb);
    strbuf_addch(sb, '{');
}

/* What can not be removed now is left to a later round, so that one bad entry does not keep the
 * rest. */
static void left(const struct err *why)
{
    log_warn("collector: %s", why->message);
}

/* ------------------------------------------------------------------ blobs */

struct blob_batch {
    struct run *run;
    struct strbuf owners, digests;
    int count;
};

static void remove_blob(struct run *run, const char *owner, const char *sha256)
{
    struct err why = {0};
    struct stat st = {0};
    char *path = NULL;
    int removed = 0;

    if (blob_path(run->store, owner, sha256, &path, NULL) == 0)
        stat(path, &st);
    free(path);
    /* Looked at again under the lock: a commit of the same content since then keeps it. */
    if (blob_delete_old(run->store, owner, sha256,
                        run->options->grace > 0 ? run->now - run->options->grace : INT64_MAX,
                        &removed, &why) != 0)
        left(&why);
    run->report->blobs += removed;
    run->report->blob_bytes += removed ? st.st_size : 0;
}

static int blobs_flush(struct blob_batch *b)
{
    struct db_result *res = NULL;
    int rc = 0;

    if (b->count == 0)
        return 0;
    strbuf_addch(&b->owners, '}');
    strbuf_addch(&b->digests, '}');
    if (strbuf_failed(&b->owners) || strbuf_failed(&b->digests))
        return err_set(b->run->err, ERR_NO_MEMORY, "collect blobs: out of memory");
    if (db_begin(b->run->db, NULL, b->run->err) != 0)
        return -1;
    rc = db_exec(b->run->db, "SELECT * FROM collect_blobs($1::text[], $2::text[])",
                 DB_ARGS(DB_TEXT(b->owners.data), DB_TEXT(b->digests.data)), &res, b->run->err);
    db_rollback(b->run->db); /* it only read; no transaction stays open while files go */
    for (int i = 0; rc == 0 && i < db_rows(res); i++)
        remove_blob(b->run, db_text(res, i, 0), db_text(res, i, 1));
    db_result_free(res);
    array_clear(&b->owners);
    array_clear(&b->digests);
    b->count = 0;
    return rc;
}

static int on_blob(void *context, const char *owner, const char *sha256, int64_t bytes,
                   int64_t mtime)
{
    struct blob_batch *b = context;

    if (b->run->options->grace > 0 && mtime >= b->run->now - b->run->options->grace)
        return 0;
    array_add(&b->owners, owner);
    array_add(&b->digests, sha256);
    return ++b->count < BATCH ? 0 : blobs_flush(b);
}

static int collect_blobs(struct run *run)
{
    struct blob_batch b = {.run = run};
    int rc;

    array_begin(&b.owners);
    array_begin(&b.digests);
    rc = blob_list(run->store, on_blob, &b, run->err);
    if (rc == 0)
        rc = blobs_flush(&b);
    strbuf_release(&b.owners);
    strbuf_release(&b.digests);
    return rc;
}

/* ------------------------------------------------------------------ staging and recovery */

static bool old_enough(const struct run *run, int64_t mtime)
{
    return run->options->staging_grace <= 0 || mtime < run->now - run->options->staging_grace;
}

/* The newest change of a folder or of a file in it: a long write changes only the file's time. */
static int64_t newest_change(const char *path)
{
    struct stat st;
    struct dirent *entry;
    int64_t newest;
    DIR *dir;

    if (lstat(path, &st) != 0)
        return INT64_MAX;
    newest = st.st_mtime;
    dir = S_ISDIR(st.st_mode) ? opendir(path) : NULL;
    while (dir != NULL && (entry = readdir(dir)) != NULL)
        if (fstatat(dirfd(dir), entry->d_name, &st, AT_SYMLINK_NOFOLLOW) == 0 &&
            strcmp(entry->d_name, "..") != 0 && st.st_mtime > newest)
            newest = st.st_mtime;
    if (dir != NULL)
        closedir(dir);
    return newest;
}

/* "ftjob-….7.random" → the job and 7. */
static bool parse_attempt(const char *name, char job[ID_SIZE], int64_t *attempt)
{
    const char *dot = strchr(name, '.');
    char *end;

    if (dot == NULL || (size_t)(dot - name) >= ID_SIZE)
        return false;
    snprintf(job, ID_SIZE, "%.*s", (int)(dot - name), name);
    if (!id_has_shape(ID_JOB, job))
        return false;
    *attempt = strtoll(dot + 1, &end, 10);
    return end != dot + 1 && *end == '.';
}

static int is_over(struct run *run, const char *sql, const struct db_value *args, int count,
                   bool *over)
{
    struct db_result *res = NULL;
    int rc;

    if (db_begin(run->db, NULL, run->err) != 0)
        return -1;
    rc = db_exec(run->db, sql, args, count, &res, run->err);
    db_rollback(run->db);
    *over = rc == 0 && db_rows(res) > 0;
    db_result_free(res);
    return rc;
}

/* Nobody will come back to it: an attempt that is not held, or an upload or import left behind. */
static int staging_is_over(struct run *run, const char *name, bool *over)
{
    char job[ID_SIZE], array[2][ID_SIZE + 24];
    int64_t attempt;

    *over = true;
    if (!parse_attempt(name, job, &attempt))
        return 0;
    snprintf(array[0], sizeof array[0], "{%s}", job);
    snprintf(array[1], sizeof array[1], "{%lld}", (long long)attempt);
    return is_over(run, "SELECT * FROM collect_attempts($1::text[], $2::bigint[])",
                   DB_ARGS(DB_TEXT(array[0]), DB_TEXT(array[1])), over);
}

static int recovery_is_over(struct run *run, const char *name, bool *over)
{
    char array[160], job[ID_SIZE];
    int64_t attempt;

    *over = false;
    if (strlen(name) > sizeof array - 3)
        return 0;
    /* A temporary file beside it, from a save that was cut short, has a job's name as well. */
    if (!parse_attempt(name, job, &attempt) || strpbrk(name, "{},\"\\ ") != NULL)
        return 0;
    snprintf(array, sizeof array, "{%s}", name);
    return is_over(run, "SELECT * FROM collect_recovery($1::text[])", DB_ARGS(DB_TEXT(array)),
                   over);
}

typedef int is_over_fn(struct run *run, const char *name, bool *over);

static int collect_folder(struct run *run, const char *folder, is_over_fn *over_fn, int64_t *count)
{
    char *dir_path = NULL;
    struct dirent *entry;
    DIR *dir = NULL;
    int rc = 0;

    if (asprintf(&dir_path, "%s/%s", blob_store_root(run->store), folder) < 0)
        return err_set(run->err, ERR_NO_MEMORY, "collect %s: out of memory", folder);
    dir = opendir(dir_path);
    if (dir == NULL)
        rc = err_set_errno(run->err, errno, "read %s", dir_path);
    while (rc == 0 && (entry = readdir(dir)) != NULL) {
        struct err why = {0};
        char *path = NULL;
        bool over = false;

        if (entry->d_name[0] == '.')
            continue;
        if (asprintf(&path, "%s/%s", dir_path, entry->d_name) < 0) {
            rc = err_set(run->err, ERR_NO_MEMORY, "collect %s: out of memory", folder);
            break;
        }
        if (old_enough(run, newest_change(path))) {
            rc = over_fn(run, entry->d_name, &over);
            if (rc == 0 && over && file_remove_tree(path, &why) != 0)
                left(&why);
            else if (rc == 0 && over)
                (*count)++;
        }
        free(path);
    }
    if (dir != NULL)
        closedir(dir);
    free(dir_path);
    return rc;
}

/* ------------------------------------------------------------------ rows */

static int collect_rows(struct run *run)
{
    struct db_result *res = NULL;

    if (db_begin(run->db, NULL, run->err) != 0)
        return -1;
    if (db_exec(run->db, "SELECT * FROM collect_expired()", DB_NO_ARGS, &res, run->err) != 0) {
        db_rollback(run->db);
        return -1;
    }
    run->report->files_expired = db_int(res, 0, 0);
    run->report->idempotency_keys = db_int(res, 0, 1);
    run->report->outbox_rows = db_int(res, 0, 2);
    db_result_free(res);
    return db_commit(run->db, run->err);
}

static int take_turn(struct db *db, bool *ours, struct err *err)
{
    struct db_result *res = NULL;

    if (db_exec(db, "SELECT pg_try_advisory_lock(" COLLECTOR_LOCK ")", DB_NO_ARGS, &res, err) != 0)
        return -1;
    *ours = db_bool(res, 0, 0);
    db_result_free(res);
    return 0;
}

int collector_run(struct db *db, struct blob_store *store, const struct collector_options *options,
                  struct collector_report *report, struct err *err)
{
    struct run run = {db, store, options, report, (int64_t)time(NULL), err};
    bool ours = false;
    int rc;

    *report = (struct collector_report){0};
    if (blob_database_check(store, db, err) != 0)
        return -1;
    if (take_turn(db, &ours, err) != 0)
        return -1;
    if (!ours)
        return 0;
    /* Rows first, so that the bytes of a file that has just expired go in the same round. */
    rc = collect_rows(&run);
    if (rc == 0)
        rc = collect_folder(&run, "staging", staging_is_over, &report->staging);
    if (rc == 0)
        rc = collect_folder(&run, "recovery", recovery_is_over, &report->recovery);
    if (rc == 0)
        rc = collect_blobs(&run);
    db_exec(db, "SELECT pg_advisory_unlock(" COLLECTOR_LOCK ")", DB_NO_ARGS, NULL, NULL);
    return rc;
}
