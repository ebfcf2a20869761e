/* Which devices there are, and opening one by its name: the library is found at run time, and what
 * is missing is said with its remedy. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "engine/backend.h"
#include "engine/backend_library.h"
#include "engine/cuda/shim/shim_control.h"
#include "engine/engine.h"

static void test_names(void **state)
{
    static const struct {
        const char *text, *family; /* NULL: refused */
        int ordinal;
    } name[] = {
        {NULL, "cpu", 0},      {"cpu", "cpu", 0},       {"cuda", "cuda", 0},
        {"cuda:0", "cuda", 0}, {"cuda:12", "cuda", 12}, {"shim:3", "shim", 3},
        {"", NULL, 0},         {"cpu:0", NULL, 0},      {"cuda:", NULL, 0},
        {"cuda:-1", NULL, 0},  {"cuda:1x", NULL, 0},    {"cuda: 1", NULL, 0},
        {"cud", NULL, 0},      {"cuda0", NULL, 0},      {"cuda:99999999999999999999", NULL, 0},
        {"gpu", NULL, 0},      {":1", NULL, 0},
    };

    for (size_t i = 0; i < sizeof name / sizeof name[0]; i++) {
        struct backend_name got;
        struct err err = {0};
        int rc = backend_name_parse(&got, name[i].text, &err);

        if (rc != (name[i].family ? 0 : -1))
            fail_msg("\"%s\": %d", name[i].text, rc);
        if (rc == 0) {
            assert_string_equal(got.family, name[i].family);
            assert_int_equal(got.ordinal, name[i].ordinal);
        } else {
            assert_int_equal(err.kind, ERR_INVALID);
            assert_non_null(strstr(err.message, "cuda:0"));
        }
    }
}

/* A name opens a table that computes on the device it names. */
static void test_open_by_name(void **state)
{
    struct backend_options options = {.device = "shim:1", .precision = DTYPE_F32};
    struct backend backend;
    struct err err = {0};
    float in[3] = {1, 2, 3}, out[3] = {0};
    void *memory;

    assert_int_equal(backend_open(&backend, &options, &err), 0);
    assert_string_equal(backend.ops->name, "cuda");
    memory = backend.ops->alloc(&backend, sizeof in, &err);
    assert_non_null(memory);
    assert_true(shim_memory_used() > 0);
    backend.ops->upload(&backend, memory, in, sizeof in);
    backend.ops->download(&backend, out, memory, sizeof out);
    assert_int_equal(backend.ops->check(&backend, &err), 0);
    assert_memory_equal(in, out, sizeof in);
    backend.ops->free(&backend, memory);
    backend_close(&backend);
    assert_int_equal(shim_memory_used(), 0);
}

static void test_what_can_not_be_opened(void **state)
{
    struct backend_options options = {.precision = DTYPE_F32};
    struct backend backend;
    struct err err = {0};

    options.device = "shim:900";
    assert_int_equal(backend_open(&backend, &options, &err), -1);
    assert_int_equal(err.kind, ERR_UNAVAILABLE);
    assert_non_null(strstr(err.message, "8 devices"));
    assert_null(backend.ops);

    err_clear(&err);
    options.device = "tpu:0";
    assert_int_equal(backend_open(&backend, &options, &err), -1);
    assert_int_equal(err.kind, ERR_INVALID);
    backend_close(&backend);
}

static void test_a_missing_library(void **state)
{
    struct backend_library library;
    struct err err = {0};

    assert_int_equal(backend_library_load(&library, "none", &err), -1);
    assert_int_equal(err.kind, ERR_UNAVAILABLE);
    assert_non_null(strstr(err.message, "libgraft_none.so"));
    assert_non_null(strstr(err.message, "make CUDA=1"));
}

/* The cpu always; of CUDA the devices, or one entry that says why there is none. */
static void test_list(void **state)
{
    struct engine_device device[ENGINE_MAX_DEVICES];
    struct err err = {0};
    int count;

    assert_int_equal(engine_devices(device, ENGINE_MAX_DEVICES, &count, &err), 0);
    assert_true(count >= 2);
    assert_string_equal(device[0].name, "cpu");
    assert_true(device[0].usable);
    assert_true(device[0].memory_bytes > 1 << 28);
    assert_true(device[0].memory_free > 0 && device[0].memory_free <= device[0].memory_bytes);
    assert_non_null(strstr(device[0].description, "core"));
    for (int i = 1; i < count; i++) {
        assert_memory_equal(device[i].name, "cuda", 4);
        assert_true(device[i].usable == (device[i].reason[0] == '\0'));
        if (device[i].usable)
            assert_true(device[i].memory_bytes > 0);
    }
    assert_int_equal(engine_devices(device, 1, &count, &err), -1);
    assert_int_equal(err.kind, ERR_INVALID);
}

static void test_find(void **state)
{
    struct engine_device device;
    struct err err = {0};

    assert_int_equal(engine_device_find("cpu", &device, &err), 0);
    assert_true(device.usable);
    shim_memory_limit(3 << 20);
    assert_int_equal(engine_device_find("shim:2", &device, &err), 0);
    shim_memory_limit(0);
    assert_true(device.usable);
    assert_string_equal(device.name, "shim:2");
    assert_int_equal(device.memory_bytes, 3 << 20);
    assert_int_equal(engine_device_find("shim:8", &device, &err), 0);
    assert_false(device.usable);
    assert_non_null(strstr(device.reason, "shim:8"));
    assert_int_equal(engine_device_find("nothing", &device, &err), -1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_names),
        cmocka_unit_test(test_open_by_name),
        cmocka_unit_test(test_what_can_not_be_opened),
        cmocka_unit_test(test_a_missing_library),
        cmocka_unit_test(test_list),
        cmocka_unit_test(test_find),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
