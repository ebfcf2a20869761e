/* file_io.h: whole reads, durable writes, folders, hashes, maps; what is wrong is said by name. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/base/file_io.h"

static char root[] = "/tmp/graft-file-io.XXXXXX";

static const char *at(const char *name)
{
    static char path[4][256];
    static int turn;
    char *p = path[turn++ % 4];

    snprintf(p, sizeof path[0], "%s/%s", root, name);
    return p;
}

static int entries(const char *dir)
{
    DIR *d = opendir(dir);
    int n = 0;

    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d)) != NULL;)
        n += e->d_name[0] != '.';
    closedir(d);
    return n;
}

static void what_is_written_is_read(void **state)
{
    struct err err = {0};
    char *data;
    size_t len;

    assert_int_equal(file_write_durable(at("a"), "x\0y", 3, &err), 0);
    assert_int_equal(file_read_all(at("a"), 3, &data, &len, &err), 0);
    assert_int_equal(len, 3);
    assert_memory_equal(data, "x\0y", 4);
    free(data);
    assert_int_equal(file_write_durable(at("a"), "", 0, &err), 0);
    assert_int_equal(file_read_all(at("a"), 0, &data, &len, &err), 0);
    assert_int_equal(len, 0);
    assert_string_equal(data, "");
    free(data);
    assert_int_equal(entries(root), 1); /* no temporary file stays */
    unlink(at("a"));
}

static void reading_has_a_limit_and_names_the_file(void **state)
{
    struct err err = {0};
    char *data;
    size_t len;

    assert_int_equal(file_write_durable(at("b"), "1234", 4, &err), 0);
    assert_int_equal(file_read_all(at("b"), 3, &data, &len, &err), -1);
    assert_int_equal(err.kind, ERR_TOO_LARGE);
    assert_non_null(strstr(err.message, "/b has 4 bytes"));
    err_clear(&err);
    assert_int_equal(file_read_all(at("none"), 3, &data, &len, &err), -1);
    assert_int_equal(err.kind, ERR_IO);
    assert_non_null(strstr(err.message, "/none: No such file"));
    err_clear(&err);
    assert_int_equal(file_read_all(root, 3, &data, &len, &err), -1);
    assert_non_null(strstr(err.message, "not a regular file"));
    unlink(at("b"));
}

static void a_failed_write_leaves_the_old_content(void **state)
{
    struct rlimit old, small = {2, 2};
    struct err err = {0};
    char *data;
    size_t len;

    assert_int_equal(file_write_durable(at("c"), "old", 3, &err), 0);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
    signal(SIGXFSZ, SIG_IGN);
    small.rlim_max = old.rlim_max;
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    assert_int_equal(file_write_durable(at("c"), "newer", 5, &err), -1);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
    assert_int_equal(err.kind, ERR_NO_SPACE);
    err_clear(&err);
    assert_int_equal(file_read_all(at("c"), 10, &data, &len, &err), 0);
    assert_string_equal(data, "old");
    free(data);
    assert_int_equal(entries(root), 1);
    unlink(at("c"));
    assert_int_equal(file_write_durable(at("no/c"), "x", 1, &err), -1);
    assert_int_equal(err.kind, ERR_IO);
}

static void folders_are_made_and_removed_whole(void **state)
{
    struct err err = {0};
    struct stat st;

    assert_int_equal(file_make_dirs(at("d/e/f"), 0700, &err), 0);
    assert_int_equal(file_make_dirs(at("d/e/f"), 0700, &err), 0);
    assert_int_equal(file_make_dirs(at("d/e//f/"), 0700, &err), 0);
    assert_int_equal(stat(at("d/e/f"), &st), 0);
    assert_int_equal(st.st_mode & 0777, 0700);
    assert_int_equal(file_write_durable(at("d/e/f/g"), "x", 1, &err), 0);
    assert_int_equal(symlink(root, at("d/link")), 0); /* removed itself, not what it names */
    assert_int_equal(file_write_durable(at("keep"), "x", 1, &err), 0);
    assert_int_equal(file_remove_tree(at("d"), &err), 0);
    assert_int_equal(access(at("d"), F_OK), -1);
    assert_int_equal(access(at("keep"), F_OK), 0);
    assert_int_equal(file_remove_tree(at("d"), &err), 0);
    assert_int_equal(file_make_dirs(at("keep/x"), 0700, &err), -1);
    assert_int_equal(err.kind, ERR_IO);
    unlink(at("keep"));
}

static void a_file_hashes_like_its_bytes(void **state)
{
    struct err err = {0};
    char *big = malloc(200000), hex[65];
    int64_t bytes = 0;

    assert_non_null(big);
    assert_int_equal(file_write_durable(at("h"), "abc", 3, &err), 0);
    assert_int_equal(file_sha256(at("h"), hex, &bytes, &err), 0);
    assert_string_equal(hex, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    assert_int_equal(bytes, 3);
    memset(big, 'a', 200000); /* several reads */
    assert_int_equal(file_write_durable(at("h"), big, 200000, &err), 0);
    assert_int_equal(file_sha256(at("h"), hex, &bytes, &err), 0);
    assert_int_equal(bytes, 200000);
    assert_string_equal(hex, "2287d207f24a941ff3b56c04c8a25ad56b63e3023207b3bb5b4ac0c9869d74be");
    assert_int_equal(file_sha256(at("none"), hex, NULL, &err), -1);
    unlink(at("h"));
    free(big);
}

static void maps_show_the_file(void **state)
{
    struct err err = {0};
    struct file_map map;

    assert_int_equal(file_write_durable(at("m"), "mapped", 6, &err), 0);
    assert_int_equal(file_map_open(&map, at("m"), &err), 0);
    assert_int_equal(map.len, 6);
    assert_memory_equal(map.data, "mapped", 6);
    file_map_close(&map);
    assert_null(map.data);
    file_map_close(&map);
    assert_int_equal(file_write_durable(at("m"), "", 0, &err), 0);
    assert_int_equal(file_map_open(&map, at("m"), &err), 0);
    assert_null(map.data);
    assert_int_equal(map.len, 0);
    file_map_close(&map);
    assert_int_equal(file_map_open(&map, root, &err), -1);
    assert_int_equal(err.kind, ERR_INVALID);
    unlink(at("m"));
}

static void a_write_to_a_closed_pipe_is_an_error(void **state)
{
    struct err err = {0};
    int ends[2];

    signal(SIGPIPE, SIG_IGN);
    assert_int_equal(pipe(ends), 0);
    close(ends[0]);
    assert_int_equal(file_write_full(ends[1], "x", 1, "the pipe", &err), -1);
    assert_non_null(strstr(err.message, "write the pipe: "));
    close(ends[1]);
}

static int setup(void **state)
{
    return mkdtemp(root) == NULL ? -1 : 0;
}

static int teardown(void **state)
{
    return file_remove_tree(root, NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_written_is_read),
        cmocka_unit_test(reading_has_a_limit_and_names_the_file),
        cmocka_unit_test(a_failed_write_leaves_the_old_content),
        cmocka_unit_test(folders_are_made_and_removed_whole),
        cmocka_unit_test(a_file_hashes_like_its_bytes),
        cmocka_unit_test(maps_show_the_file),
        cmocka_unit_test(a_write_to_a_closed_pipe_is_an_error),
    };

    return cmocka_run_group_tests(tests, setup, teardown);
}
