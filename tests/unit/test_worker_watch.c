/* worker_watch.h: a silent device ends its process with a word; a busy one, a slow one that still
 * answers, and the cpu do not. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "engine/base/log.h"
#include "engine/base/progress.h"
#include "server/cmd.h"
#include "server/worker_watch.h"

#define PATIENCE 0.4 /* s of silence allowed to the devices here */

/* How a worker of this device ended that did `work`; its log and its last words. */
static int run(const char *device, double seconds, void (*work)(void), char log[4096],
               char words[256])
{
    int log_pipe[2], words_pipe[2], status;
    ssize_t n, len = 0;
    pid_t pid;

    assert_int_equal(pipe(log_pipe) + pipe(words_pipe), 0);
    pid = fork();
    if (pid == 0) {
        const struct worker_watch_options options = {
            .device = device, .seconds = seconds, .words_fd = words_pipe[1]};

        dup2(log_pipe[1], STDERR_FILENO);
        log_setup("test", LOG_LEVEL_INFO);
        close(log_pipe[0]);
        if (worker_watch_start(&options, NULL) != 0)
            _exit(9);
        work();
        _exit(0);
    }
    close(log_pipe[1]);
    close(words_pipe[1]);
    while ((n = read(log_pipe[0], log + len, (size_t)(4095 - len))) > 0)
        len += n;
    log[len] = '\0';
    n = read(words_pipe[0], words, 255);
    words[n > 0 ? n : 0] = '\0';
    close(log_pipe[0]);
    close(words_pipe[0]);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFEXITED(status));
    return WEXITSTATUS(status);
}

static void hang(void)
{
    worker_watch_job("ftjob-1");
    worker_watch_begin("step", 17);
    sleep(20);
}

static void a_stuck_device_ends_the_process(void **state)
{
    char log[4096], words[256];

    assert_int_equal(run("shim:1", PATIENCE, hang, log, words), CMD_DEVICE_STUCK);
    assert_non_null(strstr(log, "device shim:1 made no progress for 0 s in step 17 of ftjob-1"));
    assert_string_equal(words, "no progress for 0 s in step 17"); /* no job: tenants may read it */
}

static void put_in_order(void *context)
{
    log_info("put in order: %s", (const char *)context);
}

static void hang_with_affairs(void)
{
    worker_watch_on_stuck(put_in_order, "yes");
    hang();
}

static void its_affairs_are_put_in_order_first(void **state)
{
    char log[4096], words[256];

    assert_int_equal(run("cuda:0", PATIENCE, hang_with_affairs, log, words), CMD_DEVICE_STUCK);
    assert_non_null(strstr(log, "put in order: yes"));
}

static void hang_there_too(void *context)
{
    sleep(30);
}

static void hang_everywhere(void)
{
    worker_watch_on_stuck(hang_there_too, NULL);
    hang();
}

static void affairs_that_take_for_ever_do_not_keep_it(void **state)
{
    char log[4096], words[256];
    time_t began = time(NULL);

    assert_int_equal(run("cuda:0", PATIENCE, hang_everywhere, log, words), CMD_DEVICE_STUCK);
    assert_true(time(NULL) - began < 15);
}

/* One call, longer than the patience, that shows a sign of life now and then. */
static void be_slow(void)
{
    worker_watch_begin("recall", 0);
    for (int i = 0; i < 12; i++) {
        usleep(100000);
        progress_tick();
    }
    worker_watch_end();
}

static void many_calls(void)
{
    for (int i = 0; i < 12; i++) {
        worker_watch_begin("step", i);
        usleep(100000);
        worker_watch_end();
    }
    sleep(1); /* idle: no call is under way */
}

static void wait_for_a_disk(void)
{
    worker_watch_begin("saving", 0);
    progress_wait_begin();
    usleep(1200000);
    progress_wait_end();
    usleep(100000);
    worker_watch_end();
}

static void hang_after_a_disk(void)
{
    wait_for_a_disk();
    hang();
}

static void what_is_slow_or_idle_lives(void **state)
{
    char log[4096], words[256];

    assert_int_equal(run("shim:0", PATIENCE, be_slow, log, words), 0);
    assert_int_equal(run("shim:0", PATIENCE, many_calls, log, words), 0);
    assert_int_equal(run("shim:0", PATIENCE, wait_for_a_disk, log, words), 0);
    assert_string_equal(words, "");
    assert_int_equal(run("shim:0", PATIENCE, hang_after_a_disk, log, words), CMD_DEVICE_STUCK);
}

static void hang_a_little(void)
{
    worker_watch_begin("step", 1);
    usleep(1500000);
    worker_watch_end();
}

static void the_cpu_is_never_stuck(void **state)
{
    char log[4096], words[256];

    assert_int_equal(run("cpu", PATIENCE, hang_a_little, log, words), 0);
    assert_int_equal(run("shim:0", 0, hang_a_little, log, words), 0); /* switched off */
    assert_int_equal(run("shim:0", PATIENCE, hang_a_little, log, words), CMD_DEVICE_STUCK);
}

static void lose(void)
{
    struct err why = {0};

    err_set(&why, ERR_DEVICE, "an illegal address");
    worker_watch_lost(&why);
}

static void a_lost_device_has_its_own_exit_code(void **state)
{
    char log[4096], words[256];

    assert_int_equal(run("cuda:3", PATIENCE, lose, log, words), CMD_DEVICE_LOST);
    assert_non_null(strstr(log, "device cuda:3 is lost: an illegal address"));
    assert_string_equal(words, "an illegal address");
}

static void utilization_is_a_share_of_time(void **state)
{
    double share;

    assert_int_equal(
        worker_watch_start(&(struct worker_watch_options){.device = "cpu", .words_fd = -1}, NULL),
        0);
    usleep(300000);
    assert_true(worker_watch_utilization() == 0);
    worker_watch_begin("step", 1);
    usleep(600000);
    share = worker_watch_utilization(); /* counts the call under way */
    worker_watch_end();
    assert_true(share > 0.4 && share < 0.8);
    usleep(600000);
    assert_true(worker_watch_utilization() < share);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_stuck_device_ends_the_process),
        cmocka_unit_test(its_affairs_are_put_in_order_first),
        cmocka_unit_test(affairs_that_take_for_ever_do_not_keep_it),
        cmocka_unit_test(what_is_slow_or_idle_lives),
        cmocka_unit_test(the_cpu_is_never_stuck),
        cmocka_unit_test(a_lost_device_has_its_own_exit_code),
        cmocka_unit_test(utilization_is_a_share_of_time),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
