/* The blob store: what is committed is there, whole and under its digest; what failed left nothing.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/base/file_io.h"
#include "storage/blob_store.h"
#include "tests/unit/pg_fixture.h"

#define PROJECT "01234567-89ab-cdef-0123-456789abcdef"
#define OTHER "11111111-89ab-cdef-0123-456789abcdef"
#define HELLO "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03" /* "hello\n" */

static char root[32];
static struct blob_store *store;

static int setup(void **state)
{
    snprintf(root, sizeof root, "/tmp/graft-test-XXXXXX");
    return mkdtemp(root) == NULL ? -1 : blob_store_open_local(&store, root, NULL);
}

static int teardown(void **state)
{
    blob_store_close(store);
    return file_remove_tree(root, NULL);
}

static int entries(const char *folder)
{
    char path[64];
    struct dirent *entry;
    int n = 0;
    DIR *dir;

    snprintf(path, sizeof path, "%s/%s", root, folder);
    dir = opendir(path);
    assert_non_null(dir);
    while ((entry = readdir(dir)) != NULL)
        n += entry->d_name[0] != '.';
    closedir(dir);
    return n;
}

static int put(const char *owner, const char *content, char sha256[SHA256_HEX], struct err *err)
{
    struct blob_writer *w;
    int64_t bytes;

    if (blob_begin(store, owner, "upload", &w, err) != 0)
        return -1;
    /* In pieces, as an upload comes. */
    for (const char *p = content; *p != '\0'; p++)
        if (blob_write(w, p, 1, err) != 0) {
            blob_abort(w);
            return -1;
        }
    return blob_commit(w, sha256, &bytes, err);
}

static void a_committed_blob_is_there_under_its_digest(void **state)
{
    char sha256[SHA256_HEX], *path, *data;
    size_t len;
    struct stat st;

    assert_ok(put(PROJECT, "hello\n", sha256, err));
    assert_string_equal(sha256, HELLO);
    assert_ok(blob_path(store, PROJECT, sha256, &path, err));
    assert_non_null(strstr(path, "/blobs/" PROJECT "/58/91/" HELLO));
    assert_ok(file_read_all(path, 100, &data, &len, err));
    assert_string_equal(data, "hello\n");
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0400);
    free(data);
    free(path);
    assert_int_equal(entries("staging"), 0);
    assert_ok(put(PROJECT, "hello\n", sha256, err)); /* again is fine */
    assert_int_equal(entries("staging"), 0);
}

static void nothing_is_shared_between_projects(void **state)
{
    char sha256[SHA256_HEX], *path;

    assert_ok(put(PROJECT, "private\n", sha256, err));
    assert_err(blob_path(store, OTHER, sha256, &path, err), ERR_IO);
    assert_err(blob_path(store, BLOB_OWNER_BASE, sha256, &path, err), ERR_IO);
}

/* Another byte where the disk has this one. */
static void damage(const char *path, off_t at)
{
    int fd;

    assert_int_equal(chmod(path, 0600), 0);
    fd = open(path, O_WRONLY);
    assert_int_equal(pwrite(fd, "x", 1, at), 1);
    close(fd);
}

static void a_damaged_blob_is_not_opened(void **state)
{
    char sha256[SHA256_HEX], *path, read_back[6];
    struct err why = {0};
    const struct blob_wanted own = {
        .owner = PROJECT, .sha256 = sha256, .name = "file-one", .param = "file"};
    const struct blob_wanted others = {
        .owner = OTHER, .sha256 = sha256, .name = "file-one", .param = "file"};
    int fd;

    assert_ok(put(PROJECT, "sound\n", sha256, err));
    assert_ok(blob_open_sound(store, &own, &fd, err));
    assert_int_equal(read(fd, read_back, 6), 6);
    assert_memory_equal(read_back, "sound\n", 6);
    close(fd);
    assert_ok(blob_path(store, PROJECT, sha256, &path, err));
    damage(path, 0);
    free(path);
    assert_int_equal(blob_open_sound(store, &own, &fd, &why), -1);
    assert_int_equal(fd, -1);
    assert_string_equal(why.code, "damaged_file");
    assert_string_equal(why.param, "file");
    assert_non_null(strstr(why.message, "`file-one`"));
    assert_null(strchr(why.message, '/'));
    err_clear(&why);
    assert_int_equal(blob_open_sound(store, &others, &fd, &why), -1); /* not there at all */
    assert_int_equal(why.kind, ERR_IO);
    assert_string_equal(why.code, "");
    assert_ok(put(PROJECT, "sound\n", sha256, err));
    assert_ok(blob_open_sound(store, &own, &fd, err));
    close(fd);
}

/* ------------------------------------------------------------------ large blobs */

#define LARGE (17 << 20) /* bytes: whoever listens is asked once while they are hashed */

struct large {
    struct blob_wanted want;
    char sha256[SHA256_HEX], *path;
    int asked;
    bool heal, stop;
};

static void put_large(struct large *l)
{
    char *data = calloc(1, LARGE);
    struct blob_writer *w;
    int64_t bytes;

    assert_non_null(data);
    assert_ok(blob_begin(store, PROJECT, "upload", &w, err));
    assert_ok(blob_write(w, data, LARGE, err));
    assert_ok(blob_commit(w, l->sha256, &bytes, err));
    free(data);
}

static int when_asked(void *context, struct err *err)
{
    struct large *l = context;

    l->asked++;
    if (l->heal)
        put_large(l);
    return l->stop ? err_set(err, ERR_CANCELLED, "enough") : 0;
}

static void open_large(struct large *l)
{
    put_large(l);
    assert_ok(blob_path(store, PROJECT, l->sha256, &l->path, err));
    l->want = (struct blob_wanted){.owner = PROJECT,
                                   .sha256 = l->sha256,
                                   .name = "file-large",
                                   .go_on = when_asked,
                                   .context = l};
}

static void look(struct large *l)
{
    int fd;

    assert_ok(blob_open_sound(store, &l->want, &fd, err));
    close(fd);
}

static void a_hash_can_be_stopped(void **state)
{
    struct large l = {.stop = true};
    int fd;

    open_large(&l);
    assert_err(blob_open_sound(store, &l.want, &fd, err), ERR_CANCELLED);
    assert_int_equal(l.asked, 1);
    free(l.path);
}

/* From two seconds after the last change on, since a change would show by then. */
static void what_was_sound_is_not_hashed_again_until_it_is_touched(void **state)
{
    struct large l = {0};
    int fd;

    open_large(&l);
    look(&l);
    look(&l);
    assert_int_equal(l.asked, 2);
    sleep(3);
    look(&l);
    assert_int_equal(l.asked, 3);
    look(&l);
    look(&l);
    assert_int_equal(l.asked, 3);
    damage(l.path, LARGE / 2);
    assert_err(blob_open_sound(store, &l.want, &fd, err), ERR_IO);
    assert_int_equal(l.asked, 4);
    free(l.path);
}

static void a_blob_that_is_healed_while_it_is_read_is_sound(void **state)
{
    struct large l = {.heal = true};

    open_large(&l);
    damage(l.path, LARGE / 2);
    look(&l);
    assert_int_equal(l.asked, 2);
    free(l.path);
}

static void an_empty_blob_is_a_blob(void **state)
{
    char sha256[SHA256_HEX], *path;

    assert_ok(put(PROJECT, "", sha256, err));
    assert_memory_equal(sha256, "e3b0c442", 8);
    assert_ok(blob_path(store, PROJECT, sha256, &path, err));
    free(path);
}

static void an_aborted_blob_leaves_nothing(void **state)
{
    struct blob_writer *w;

    assert_ok(blob_begin(store, PROJECT, "upload", &w, err));
    assert_ok(blob_write(w, "x", 1, err));
    assert_int_equal(entries("staging"), 1);
    blob_abort(w);
    assert_int_equal(entries("staging"), 0);
    blob_abort(NULL);
}

static void a_full_disk_is_a_clean_failure(void **state)
{
    struct rlimit old, small = {4096, 4096};
    struct blob_writer *w;
    char chunk[1024] = {1}, sha256[SHA256_HEX];
    struct err why = {0};
    int64_t bytes;
    int rc = 0;

    signal(SIGXFSZ, SIG_IGN); /* then write says EFBIG */
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
    small.rlim_max = old.rlim_max;
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    assert_ok(blob_begin(store, PROJECT, "upload", &w, err));
    for (int i = 0; i < 8 && rc == 0; i++)
        rc = blob_write(w, chunk, sizeof chunk, &why);
    assert_int_equal(rc, -1);
    assert_int_equal(why.kind, ERR_NO_SPACE);
    /* A writer that failed can only be ended, also by a commit that does not happen. */
    assert_err(blob_commit(w, sha256, &bytes, err), ERR_INTERNAL);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
    assert_int_equal(entries("staging"), 0);
    assert_ok(put(PROJECT, "after\n", sha256, err)); /* and it goes on */
}

static void what_is_to_stay_free_stays_free(void **state)
{
    struct blob_writer *w = NULL;
    static char megabyte[1 << 20];

    blob_store_keep_free(store, INT64_MAX);
    assert_err(blob_begin(store, PROJECT, "upload", &w, err), ERR_NO_SPACE);
    assert_null(w);
    blob_store_keep_free(store, 0);
    assert_ok(blob_begin(store, PROJECT, "upload", &w, err));
    assert_ok(blob_write(w, megabyte, sizeof megabyte, err));
    blob_store_keep_free(store, INT64_MAX);
    assert_err(blob_write(w, megabyte, sizeof megabyte, err), ERR_NO_SPACE);
    blob_abort(w);
    blob_store_keep_free(store, 0);
    assert_int_equal(entries("staging"), 0);
}

static void a_file_of_a_job_is_adopted(void **state)
{
    char sha256[SHA256_HEX], *dir, *path;
    char file[160];
    int64_t bytes;

    assert_ok(blob_staging_dir(store, "ftjob-0123456789abcdefghijABCD", 7, &dir, err));
    assert_non_null(strstr(dir, "/staging/ftjob-0123456789abcdefghijABCD.7."));
    snprintf(file, sizeof file, "%s/delta", dir);
    assert_ok(file_write_durable(file, "hello\n", 6, err));
    assert_ok(blob_adopt(store, OTHER, file, sha256, &bytes, err));
    assert_string_equal(sha256, HELLO);
    assert_int_equal(bytes, 6);
    assert_int_equal(access(file, F_OK), -1);
    assert_ok(blob_path(store, OTHER, sha256, &path, err));
    free(path);
    assert_err(blob_adopt(store, OTHER, file, sha256, &bytes, err), ERR_IO); /* gone */
    assert_ok(file_remove_tree(dir, err));
    free(dir);
}

static void names_from_outside_reach_no_path(void **state)
{
    struct blob_writer *w;
    char *path;

    assert_err(blob_begin(store, "../../etc", "upload", &w, err), ERR_INTERNAL);
    assert_err(blob_begin(store, "", "upload", &w, err), ERR_INTERNAL);
    assert_err(blob_path(store, PROJECT, "../../../etc/passwd", &path, err), ERR_INTERNAL);
    assert_err(blob_path(store, "..", HELLO, &path, err), ERR_INTERNAL);
    assert_err(blob_staging_dir(store, "../x", 1, &path, err), ERR_INTERNAL);
    assert_err(blob_recovery_path(store, "ftjob-x/../../y", &path, err), ERR_INTERNAL);
    assert_err(blob_recovery_path(store, "../y", &path, err), ERR_INTERNAL);
}

static void another_users_store_is_refused(void **state)
{
    char where[96], blobs[112];
    struct blob_store *theirs;
    struct err why = {0};

    if (geteuid() != 0) {
        print_message("# SKIP only root can write to another user's store\n");
        skip();
    }
    snprintf(where, sizeof where, "%s/theirs", blob_store_root(store));
    snprintf(blobs, sizeof blobs, "%s/blobs", where);
    assert_ok(blob_store_open_local(&theirs, where, err));
    blob_store_close(theirs);
    assert_int_equal(chown(blobs, 65534, 65534), 0);
    assert_int_equal(blob_store_open_local(&theirs, where, &why), -1);
    assert_int_equal(why.kind, ERR_INVALID);
    assert_non_null(strstr(why.message, "run graft as that user"));
    assert_int_equal(rmdir(blobs), 0); /* nothing was left in it */
    assert_ok(file_remove_tree(where, err));
}

static int count_blob(void *context, const char *owner, const char *sha256, int64_t bytes,
                      int64_t mtime)
{
    int *count = context;

    if (strcmp(owner, PROJECT) == 0 && strcmp(sha256, HELLO) == 0) {
        assert_int_equal(bytes, 6);
        assert_true(mtime > 1600000000);
        (*count)++;
    }
    return 0;
}

static void blobs_are_listed_and_deleted(void **state)
{
    char sha256[SHA256_HEX], *path;
    int count = 0, removed;

    assert_ok(put(PROJECT, "hello\n", sha256, err));
    assert_ok(blob_list(store, count_blob, &count, err));
    assert_int_equal(count, 1);
    /* A fresh one is not old. */
    assert_ok(blob_delete_old(store, PROJECT, sha256, 1600000000, &removed, err));
    assert_int_equal(removed, 0);
    assert_ok(blob_delete_old(store, PROJECT, sha256, INT64_MAX, &removed, err));
    assert_int_equal(removed, 1);
    assert_err(blob_path(store, PROJECT, sha256, &path, err), ERR_IO);
    assert_ok(blob_delete(store, PROJECT, sha256, err)); /* absent is fine */
}

static void *put_many(void *context)
{
    bool *failed = context;
    char sha256[SHA256_HEX], text[32];

    for (int i = 0; i < 40 && !*failed; i++) {
        snprintf(text, sizeof text, "content %d\n", i % 8);
        *failed = put(PROJECT, text, sha256, NULL) != 0;
    }
    return NULL;
}

static void many_threads_may_commit_the_same_content(void **state)
{
    bool failed[4] = {false};
    pthread_t threads[4];

    for (int i = 0; i < 4; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, put_many, &failed[i]), 0);
    for (int i = 0; i < 4; i++) {
        pthread_join(threads[i], NULL);
        assert_false(failed[i]);
    }
    assert_int_equal(entries("staging"), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_committed_blob_is_there_under_its_digest),
        cmocka_unit_test(nothing_is_shared_between_projects),
        cmocka_unit_test(a_damaged_blob_is_not_opened),
        cmocka_unit_test(a_hash_can_be_stopped),
        cmocka_unit_test(what_was_sound_is_not_hashed_again_until_it_is_touched),
        cmocka_unit_test(a_blob_that_is_healed_while_it_is_read_is_sound),
        cmocka_unit_test(an_empty_blob_is_a_blob),
        cmocka_unit_test(an_aborted_blob_leaves_nothing),
        cmocka_unit_test(a_full_disk_is_a_clean_failure),
        cmocka_unit_test(what_is_to_stay_free_stays_free),
        cmocka_unit_test(a_file_of_a_job_is_adopted),
        cmocka_unit_test(names_from_outside_reach_no_path),
        cmocka_unit_test(another_users_store_is_refused),
        cmocka_unit_test(blobs_are_listed_and_deleted),
        cmocka_unit_test(many_threads_may_commit_the_same_content),
    };

    return cmocka_run_group_tests(tests, setup, teardown);
}
