/* check.h: a call that must not fail in a test: CHECK(do_it(x, &err)); `err` is its own. */
#ifndef GRAFT_TESTS_CHECK_H
#define GRAFT_TESTS_CHECK_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "engine/base/err.h"

#define CHECK(call)                      \
    do {                                 \
        struct err err = {0};            \
        if ((call) != 0)                 \
            fail_msg("%s", err.message); \
    } while (0)

#endif
