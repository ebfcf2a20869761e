/* log.h: one whole line a call, also from many threads and for long texts. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

#include "engine/base/file_io.h"
#include "engine/base/log.h"

static char path[] = "/tmp/graft-log.XXXXXX";

/* Standard error goes to a file while `body` runs; returns the text, to be freed. */
static char *captured(void (*body)(void))
{
    int saved = dup(STDERR_FILENO), fd = open(path, O_WRONLY | O_TRUNC | O_APPEND);
    char *text = NULL;
    size_t len;

    assert_true(saved >= 0 && fd >= 0);
    dup2(fd, STDERR_FILENO);
    body();
    dup2(saved, STDERR_FILENO);
    close(saved);
    close(fd);
    assert_int_equal(file_read_all(path, 64 << 20, &text, &len, NULL), 0);
    assert_int_equal(strlen(text), len);
    return text;
}

static void one_of_each(void)
{
    log_setup("test", LOG_LEVEL_INFO);
    log_debug("not seen");
    log_info("seen %d", 1);
    log_warn("seen %s", "two");
    log_error("seen");
}

static void levels_and_shape(void **state)
{
    char *text = captured(one_of_each), *line = strtok(text, "\n");

    assert_int_equal(strlen(line), strlen("2000-01-01T00:00:00.000Z info test: seen 1"));
    assert_int_equal(line[10], 'T');
    assert_int_equal(line[23], 'Z');
    assert_string_equal(line + 24, " info test: seen 1");
    line = strtok(NULL, "\n");
    assert_string_equal(line + 24, " warn test: seen two");
    line = strtok(NULL, "\n");
    assert_string_equal(line + 24, " error test: seen");
    assert_null(strtok(NULL, "\n"));
    free(text);
}

static void a_long_one(void)
{
    char words[10000];

    memset(words, 'w', sizeof words - 1);
    words[sizeof words - 1] = '\0';
    log_error("%s", words);
    log_error("next");
}

static void a_long_text_is_cut_and_still_a_line(void **state)
{
    char *text = captured(a_long_one), *end = strchr(text, '\n');

    assert_non_null(end);
    assert_true(end - text <= 2048);
    assert_non_null(strstr(end + 1, "next\n"));
    free(text);
}

static void hostile_ones(void)
{
    log_setup("test", LOG_LEVEL_INFO);
    log_info("%s", "first\n2000-01-01T00:00:00.000Z error test: forged");
    log_info("%s", "a\r\nb\tc\x1b[31md\x7f\xc3\xa4");
    log_info("ends\n");
}

static void what_is_inside_makes_no_line(void **state)
{
    char *text = captured(hostile_ones), *line = strtok(text, "\n");

    assert_string_equal(line + 24, " info test: first 2000-01-01T00:00:00.000Z error test: forged");
    line = strtok(NULL, "\n");
    assert_string_equal(line + 24, " info test: a  b c?[31md?\xc3\xa4");
    line = strtok(NULL, "\n");
    assert_string_equal(line + 24, " info test: ends ");
    assert_null(strtok(NULL, "\n"));
    free(text);
}

enum { THREADS = 4, LINES = 500 };

static void *write_lines(void *arg)
{
    for (int i = 0; i < LINES; i++)
        log_info("from %d: %0100d.", *(int *)arg, i);
    return NULL;
}

static void from_many_threads(void)
{
    pthread_t thread[THREADS];
    int id[THREADS];

    for (int i = 0; i < THREADS; i++) {
        id[i] = i;
        assert_int_equal(pthread_create(&thread[i], NULL, write_lines, &id[i]), 0);
    }
    for (int i = 0; i < THREADS; i++)
        pthread_join(thread[i], NULL);
}

static void lines_of_threads_do_not_mix(void **state)
{
    char *text = captured(from_many_threads);
    int lines = 0;

    for (char *line = strtok(text, "\n"); line != NULL; line = strtok(NULL, "\n"), lines++) {
        assert_int_equal(line[strlen(line) - 1], '.');
        assert_int_equal(strlen(line),
                         strlen("2000-01-01T00:00:00.000Z info test: from 0: .") + 100);
    }
    assert_int_equal(lines, THREADS * LINES);
    free(text);
}

static int setup(void **state)
{
    int fd = mkstemp(path);

    return fd < 0 ? -1 : close(fd);
}

static int teardown(void **state)
{
    return unlink(path);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(levels_and_shape),
        cmocka_unit_test(a_long_text_is_cut_and_still_a_line),
        cmocka_unit_test(what_is_inside_makes_no_line),
        cmocka_unit_test(lines_of_threads_do_not_mix),
    };

    return cmocka_run_group_tests(tests, setup, teardown);
}
