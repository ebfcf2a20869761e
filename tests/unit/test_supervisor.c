/* supervisor.h: a worker for each device, the way back of one that lost its device, and an infer
 * worker that goes elsewhere. The workers are this program again. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include "engine/base/clock.h"
#include "server/cmd.h"
#include "server/infer_client.h"
#include "server/supervisor.h"

#define WORKERS_MAX 16

/* ------------------------------------------------------------------ the workers */

static const char *option(int argc, char **argv, const char *flag)
{
    for (int i = 1; i + 1 < argc; i++) {
        if (strcmp(argv[i], flag) == 0)
            return argv[i + 1];
    }
    return NULL;
}

/* A worker on a device that TEST_LOSE names loses it at once; others live until they are told. */
static int act_as_worker(int argc, char **argv)
{
    const char *lose = getenv("TEST_LOSE"), *device = option(argc, argv, "--device");
    int lifeline = atoi(option(argc, argv, "--lifeline-fd"));
    int words = atoi(option(argc, argv, "--words-fd"));
    char byte;

    if (lose != NULL && strstr(lose, device) != NULL) {
        if (write(words, "an illegal address", 18) != 18)
            return 9;
        return CMD_DEVICE_LOST;
    }
    return read(lifeline, &byte, 1) == 0 ? 0 : 9;
}

/* ------------------------------------------------------------------ the supervisor */

struct run {
    struct supervisor *supervisor;
    bool (*enough)(const struct supervisor_worker *workers, int count);
    struct supervisor_worker workers[WORKERS_MAX]; /* as they were when it was enough */
    int count, deaths;
    bool reached;
};

static void died(void *context, pid_t pid)
{
    struct run *run = context;

    run->deaths += pid > 0;
}

static void *watch(void *context)
{
    struct run *run = context;
    double deadline = clock_now() + 30;

    while (!run->reached && clock_now() < deadline) {
        usleep(20000);
        run->count = supervisor_workers(run->supervisor, run->workers, WORKERS_MAX);
        run->reached = run->enough(run->workers, run->count);
    }
    kill(getpid(), SIGTERM); /* ends supervisor_run */
    return NULL;
}

static void supervise(struct run *run, const char *devices, const char *infer, int64_t workers)
{
    struct settings settings;
    struct setting_args args;
    struct device_list list;
    struct infer_client *client = NULL;
    struct err err = {0};
    pthread_t thread;
    char number[24];
    char *argv[] = {"--workers", number};
    static const char *const names[] = {"workers", NULL};
    struct supervisor_options options = {
        .settings = &settings, .devices = &list, .infer_device = infer, .died = died};

    snprintf(number, sizeof number, "%d", (int)workers);
    options.context = run;
    assert_int_equal(
        settings_load(&settings, &args, &(struct setting_spec){.settings = names}, 2, argv, &err),
        0);
    assert_int_equal(devices_parse(devices, &list, &err), 0);
    assert_int_equal(
        infer_client_open(&client, &(struct infer_client_options){.max_requests = 1}, &err), 0);
    options.infer = client;
    assert_int_equal(supervisor_open(&run->supervisor, &options, &err), 0);
    assert_int_equal(pthread_create(&thread, NULL, watch, run), 0);
    assert_int_equal(supervisor_run(run->supervisor, &err), 0);
    pthread_join(thread, NULL);
    supervisor_stop(run->supervisor, 5);
    infer_client_free(client);
    supervisor_free(run->supervisor);
    settings_release(&settings);
}

static bool all_alive(const struct supervisor_worker *w, int count)
{
    for (int i = 0; i < count; i++) {
        if (w[i].pid == 0)
            return false;
    }
    return count > 0;
}

static void expect(const struct run *run, int i, bool train, const char *device)
{
    assert_true(i < run->count);
    assert_int_equal(run->workers[i].train, train);
    assert_string_equal(run->workers[i].device, device);
}

static void each_device_has_a_worker(void **state)
{
    struct run run = {.enough = all_alive};

    supervise(&run, "cuda:1,cpu,shim:0", "cuda:1", 2);
    assert_true(run.reached);
    assert_int_equal(run.count, 5);
    expect(&run, 0, false, "cuda:1");
    expect(&run, 1, true, "cuda:1");
    expect(&run, 2, true, "cpu"); /* as many as --workers says */
    expect(&run, 3, true, "cpu");
    expect(&run, 4, true, "shim:0");
    assert_int_equal(run.deaths, 5); /* all in the end, none before */
}

static void no_workers_means_none_on_any_device(void **state)
{
    struct run run = {.enough = all_alive};

    supervise(&run, "cuda:0,cuda:1", "cpu", 0);
    assert_int_equal(run.count, 1);
    expect(&run, 0, false, "cpu");
}

static bool train_lost_twice(const struct supervisor_worker *w, int count)
{
    return count == 3 && w[1].lost >= 2;
}

static void a_worker_that_lost_its_device_comes_back_to_it(void **state)
{
    struct run run = {.enough = train_lost_twice};

    setenv("TEST_LOSE", "shim:0", 1);
    supervise(&run, "shim:0,shim:1", "shim:1", 1);
    unsetenv("TEST_LOSE");
    assert_true(run.reached);
    expect(&run, 1, true, "shim:0");
    assert_string_equal(run.workers[1].reason, "an illegal address");
    assert_true(run.workers[1].restarts >= 1);
    assert_int_equal(run.workers[2].lost, 0);
    assert_int_equal(run.workers[0].lost, 0);
}

static bool infer_lives_elsewhere(const struct supervisor_worker *w, int count)
{
    return w[0].pid != 0 && strcmp(w[0].device, "shim:2") == 0;
}

static void an_infer_worker_goes_to_the_next_healthy_device(void **state)
{
    struct run run = {.enough = infer_lives_elsewhere};

    /* The next in the list, shim:1, is dying as well. */
    setenv("TEST_LOSE", "shim:0 shim:1", 1);
    supervise(&run, "shim:0,shim:1,shim:2", "shim:0", 1);
    unsetenv("TEST_LOSE");
    assert_true(run.reached);
    assert_true(run.workers[0].lost >= SUPERVISOR_LOSSES_MOVE);
    expect(&run, 1, true, "shim:0"); /* training waits for its own */
}

static bool infer_lost_often(const struct supervisor_worker *w, int count)
{
    return w[0].lost > SUPERVISOR_LOSSES_MOVE;
}

static void an_infer_worker_without_a_choice_stays(void **state)
{
    struct run run = {.enough = infer_lost_often};

    setenv("TEST_LOSE", "shim:0", 1);
    supervise(&run, "shim:0", "shim:0", 0);
    unsetenv("TEST_LOSE");
    assert_true(run.reached);
    expect(&run, 0, false, "shim:0");
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_device_has_a_worker),
        cmocka_unit_test(no_workers_means_none_on_any_device),
        cmocka_unit_test(a_worker_that_lost_its_device_comes_back_to_it),
        cmocka_unit_test(an_infer_worker_goes_to_the_next_healthy_device),
        cmocka_unit_test(an_infer_worker_without_a_choice_stays),
    };

    if (argc > 1 && strcmp(argv[1], "work") == 0)
        return act_as_worker(argc, argv);
    supervisor_block_signals();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
