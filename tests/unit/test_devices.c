/* devices.h: names of devices, what `--devices` means on a machine, and the child that looks. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <signal.h>
#include <unistd.h>

#include "server/devices.h"

static struct device_list list;
static struct err err;

static const struct engine_device machine[] = {
    {.name = "cpu", .usable = true},
    {.name = "cuda:0", .usable = false, .reason = "compute capability 7.5: 8.0 is needed"},
    {.name = "cuda:1", .usable = true},
    {.name = "cuda:2", .usable = true},
    {.name = "shim:1", .usable = true},
};

static int parse(const char *text)
{
    err_clear(&err);
    return devices_parse(text, &list, &err);
}

static int choose(const char *text, int count)
{
    err_clear(&err);
    return devices_choose(text, machine, count, &list, &err);
}

static void refused(int rc, const char *words)
{
    assert_int_equal(rc, -1);
    assert_int_equal(err.kind, ERR_INVALID);
    if (strstr(err.message, words) == NULL)
        fail_msg("%s", err.message);
}

static void names_become_canonical(void **state)
{
    assert_int_equal(parse("cpu"), 0);
    assert_int_equal(list.count, 1);
    assert_int_equal(parse("cuda:1, shim ,cuda,cuda:63"), 0);
    assert_int_equal(list.count, 4);
    assert_string_equal(list.name[0], "cuda:1");
    assert_string_equal(list.name[1], "shim:0");
    assert_string_equal(list.name[2], "cuda:0");
    assert_string_equal(list.name[3], "cuda:63");
    assert_int_equal(devices_index(&list, "cuda:0"), 2);
    assert_int_equal(devices_index(&list, "cpu"), -1);
    assert_int_equal(parse("auto"), 0);
    assert_int_equal(list.count, 0);
}

static void names_that_are_none_are_refused(void **state)
{
    static const char *const wrong[] = {"",        "gpu0",    "cuda:",    "cuda:x", "cuda:1x",
                                        "cuda:-1", "cuda:+1", "cuda:100", "CPU",    "cpu:0",
                                        "cpu,",    ",cpu",    "cuda0",    "shim:a", "cuda: 1"};

    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        refused(parse(wrong[i]), "use cpu, cuda:N or shim:N");
    refused(parse("cpu,auto"), "auto stands alone");
    refused(parse("cuda,cuda:0"), "cuda:0 is there twice");
    refused(parse("cpu,cpu"), "--workers");
}

static void auto_takes_what_can_be_used(void **state)
{
    assert_int_equal(choose("auto", 5), 0);
    assert_int_equal(list.count, 2);
    assert_string_equal(list.name[0], "cuda:1");
    assert_string_equal(list.name[1], "cuda:2");
    for (int count = 0; count <= 2;
         count++) { /* nothing seen, the cpu alone, a GPU that is too old */
        assert_int_equal(choose("auto", count), 0);
        assert_int_equal(list.count, 1);
        assert_string_equal(list.name[0], "cpu");
    }
}

static void a_named_device_must_be_there(void **state)
{
    assert_int_equal(choose("cuda:2,cpu,shim:1", 5), 0);
    assert_int_equal(list.count, 3);
    refused(choose("cuda:2,cuda:0", 4), "cuda:0 can not be used: compute capability 7.5");
    refused(choose("cuda:3", 4), "there is no cuda:3 here; what can be used: cpu, cuda:1, cuda:2");
    refused(choose("shim:1", 4), "there is no shim:1 here");
    refused(choose("cuda:1", 0), "what can be used: cpu (");
    assert_int_equal(choose("cpu", 0), 0); /* always there, without a look */
}

/* ------------------------------------------------------------------ the child */

/* This program again, as devices_probe starts it: what it does is in the environment. */
static int act_as_probe(const char *names)
{
    const char *act = getenv("TEST_DEVICES_ACT");

    if (act == NULL)
        return devices_parse(names, &list, &err) == 0 && devices_print(&list, &err) == 0 ? 0 : 1;
    if (strcmp(act, "die") == 0)
        raise(SIGKILL);
    if (strcmp(act, "fail") == 0)
        return 3;
    printf("%s\n", act);
    return 0;
}

static int probe(const char *act, struct engine_device *out, int *count)
{
    static const struct device_list all;

    err_clear(&err);
    if (act != NULL)
        setenv("TEST_DEVICES_ACT", act, 1);
    else
        unsetenv("TEST_DEVICES_ACT");
    return devices_probe(&all, out, DEVICES_MAX, count, &err);
}

static void the_child_finds_the_cpu_first(void **state)
{
    struct engine_device found[DEVICES_MAX];
    int count;

    assert_int_equal(probe(NULL, found, &count), 0);
    assert_true(count >= 1);
    assert_string_equal(found[0].name, "cpu");
    assert_true(found[0].usable);
    assert_true(found[0].memory_bytes > found[0].memory_free && found[0].memory_free > 0);
    assert_non_null(strstr(found[0].description, "core"));
    for (int i = 0; i < count; i++)
        assert_int_not_equal(strncmp(found[i].name, "shim", 4), 0);
}

static void the_child_looks_for_what_is_named(void **state)
{
    struct engine_device found[DEVICES_MAX];
    int count;

    unsetenv("TEST_DEVICES_ACT");
    assert_int_equal(parse("cuda:63,cpu"), 0);
    assert_int_equal(devices_probe(&list, found, DEVICES_MAX, &count, &err), 0);
    assert_int_equal(count, 2);
    assert_string_equal(found[0].name, "cuda:63");
    assert_false(found[0].usable);
    assert_string_not_equal(found[0].reason, "");
    assert_string_equal(found[1].name, "cpu");
}

static void a_child_that_fails_is_no_disaster(void **state)
{
    struct engine_device found[DEVICES_MAX];
    int count;

    assert_int_equal(probe("die", found, &count), -1);
    assert_int_equal(err.kind, ERR_UNAVAILABLE);
    assert_non_null(strstr(err.message, "signal 9"));
    assert_int_equal(probe("fail", found, &count), -1);
    assert_non_null(strstr(err.message, "status 3"));
    assert_int_equal(probe("{\"name\":\"cpu\"}", found, &count), -1);
    assert_non_null(strstr(err.message, "something else"));
    assert_int_equal(probe("libcuda says hello", found, &count), -1);
    assert_int_equal(count, 0);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(names_become_canonical),
        cmocka_unit_test(names_that_are_none_are_refused),
        cmocka_unit_test(auto_takes_what_can_be_used),
        cmocka_unit_test(a_named_device_must_be_there),
        cmocka_unit_test(the_child_finds_the_cpu_first),
        cmocka_unit_test(the_child_looks_for_what_is_named),
        cmocka_unit_test(a_child_that_fails_is_no_disaster),
    };

    if (argc > 1 && strcmp(argv[1], "work") == 0)
        return act_as_probe(argv[5]);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
