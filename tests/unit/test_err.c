/* err.h: the first error wins, messages keep their shape, kinds come from errno. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>
#include <errno.h>

#include "engine/base/err.h"

static void first_error_wins(void **state)
{
    struct err err = {0};

    assert_int_equal(err_set(&err, ERR_INVALID, "line %d", 3), -1);
    assert_int_equal(err_set(&err, ERR_IO, "later"), -1);
    assert_int_equal(err_set_code(&err, ERR_IO, "code", "param", "later"), -1);
    assert_int_equal(err_set_errno(&err, ENOSPC, "later"), -1);
    assert_int_equal(err.kind, ERR_INVALID);
    assert_string_equal(err.message, "line 3");
    assert_string_equal(err.code, "");
}

static void a_null_error_is_fine(void **state)
{
    assert_int_equal(err_set(NULL, ERR_INVALID, "x"), -1);
    assert_int_equal(err_set_code(NULL, ERR_INVALID, "c", "p", "x"), -1);
    assert_int_equal(err_set_errno(NULL, ENOENT, "x"), -1);
    assert_int_equal(err_prefix(NULL, "x"), -1);
    err_clear(NULL);
    assert_false(err_is_set(NULL));
}

static void code_and_param_are_kept(void **state)
{
    struct err err = {0};

    err_set_code(&err, ERR_NOT_FOUND, "model_not_found", "model", "no %s", "x");
    assert_string_equal(err.code, "model_not_found");
    assert_string_equal(err.param, "model");
    err_prefix(&err, "job %d", 7);
    assert_string_equal(err.message, "job 7: no x");
    assert_string_equal(err.code, "model_not_found");
    err_clear(&err);
    assert_false(err_is_set(&err));
    err_set_code(&err, ERR_NOT_FOUND, NULL, NULL, "y");
    assert_string_equal(err.code, "");
}

static void kind_follows_errno(void **state)
{
    static const struct {
        int errnum;
        enum err_kind kind;
    } cases[] = {
        {ENOSPC, ERR_NO_SPACE},  {EDQUOT, ERR_NO_SPACE}, {EFBIG, ERR_NO_SPACE},
        {ENOMEM, ERR_NO_MEMORY}, {EIO, ERR_IO},          {ENOENT, ERR_IO},
    };

    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct err err = {0};

        err_set_errno(&err, cases[i].errnum, "write %s", "f");
        assert_int_equal(err.kind, cases[i].kind);
        assert_memory_equal(err.message, "write f: ", 9);
        assert_true(strlen(err.message) > 9);
    }
}

static void long_messages_are_cut_not_overrun(void **state)
{
    char text[4096];
    struct err err = {0};

    memset(text, 'a', sizeof text - 1);
    text[sizeof text - 1] = '\0';
    err_set_code(&err, ERR_INVALID, text, text, "%s", text);
    assert_int_equal(strlen(err.message), sizeof err.message - 1);
    assert_int_equal(strlen(err.code), sizeof err.code - 1);
    assert_int_equal(strlen(err.param), sizeof err.param - 1);
    err_prefix(&err, "%s", text);
    assert_int_equal(strlen(err.message), sizeof err.message - 1);
    err_clear(&err);
    err_set_errno(&err, EIO, "%s", text);
    assert_int_equal(strlen(err.message), sizeof err.message - 1);
}

static void a_prefix_needs_an_error(void **state)
{
    struct err err = {0};

    err_prefix(&err, "job");
    assert_false(err_is_set(&err));
    assert_string_equal(err.message, "");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(first_error_wins),
        cmocka_unit_test(a_null_error_is_fine),
        cmocka_unit_test(code_and_param_are_kept),
        cmocka_unit_test(kind_follows_errno),
        cmocka_unit_test(long_messages_are_cut_not_overrun),
        cmocka_unit_test(a_prefix_needs_an_error),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
