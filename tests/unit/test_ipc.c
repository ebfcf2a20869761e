/* Worker protocol: every message survives the trip; every cut or bent frame is refused. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "server/ipc.h"
#include "server/ipc_wire.h"

static struct strbuf out;
static struct ipc_message m;
static struct err err;

static int setup(void **state)
{
    strbuf_init(&out, 64u << 20);
    err_clear(&err);
    return 0;
}

static int teardown(void **state)
{
    strbuf_release(&out);
    return 0;
}

static void put_example_submit(void)
{
    static const struct engine_message messages[] = {{"system", "be brief"}, {"user", "h\xc3\xa9"}};
    static const char *const stop[] = {"\n", "END"};
    const struct ipc_submit s = {.id = UINT64_C(0x1122334455667788),
                                 .tenant = "t-1",
                                 .base_sha256 = "ab",
                                 .base_path = "/b",
                                 .delta_sha256 = "cd",
                                 .delta_path = "/d",
                                 .messages = messages,
                                 .message_count = 2,
                                 .temperature = 0.1,
                                 .top_p = 0.9,
                                 .seed = UINT64_MAX,
                                 .max_tokens = 77,
                                 .stop = stop,
                                 .stop_count = 2};

    ipc_put_submit(&out, &s);
    assert_false(strbuf_failed(&out));
}

static void submit_survives(void **state)
{
    size_t used = 0;

    put_example_submit();
    ipc_put_cancel(&out, 5);
    assert_int_equal(ipc_take(out.data, out.len, &used, &m, &err), 1);
    assert_int_equal(m.type, IPC_SUBMIT);
    assert_true(m.submit.id == UINT64_C(0x1122334455667788) && m.id == m.submit.id);
    assert_string_equal(m.submit.tenant, "t-1");
    assert_string_equal(m.submit.delta_path, "/d");
    assert_int_equal(m.submit.message_count, 2);
    assert_string_equal(m.submit.messages[1].content, "h\xc3\xa9");
    assert_true(m.submit.temperature == 0.1 && m.submit.top_p == 0.9);
    assert_true(m.submit.seed == UINT64_MAX);
    assert_int_equal(m.submit.max_tokens, 77);
    assert_string_equal(m.submit.stop[1], "END");
    ipc_message_release(&m);
    assert_int_equal(ipc_take(out.data + used, out.len - used, &used, &m, &err), 1);
    assert_int_equal(m.type, IPC_CANCEL);
    assert_int_equal(m.id, 5);
}

static void events_survive(void **state)
{
    const struct ipc_done done = {
        .id = 9, .finish = ENGINE_FINISH_LENGTH, .prompt_tokens = 3, .completion_tokens = 4};
    const struct ipc_stats stats = {.active = 1,
                                    .bases = 2,
                                    .deltas = 3,
                                    .base_bytes = 1 << 30,
                                    .delta_bytes = 5,
                                    .tokens = 6,
                                    .steps = 7,
                                    .utilization = 0.25,
                                    .memory_bytes = INT64_C(1) << 36,
                                    .memory_free = 8};
    struct err error = {0};
    size_t at = 0, used;

    err_set_code(&error, ERR_INVALID, "context_length_exceeded", "messages", "too long: %d", 5000);
    ipc_put_hello(&out);
    ipc_put_text(&out, 9, "a\0b", 3);
    ipc_put_done(&out, &done);
    ipc_put_error(&out, 8, &error);
    ipc_put_stats(&out, &stats);
    ipc_put_stats_request(&out);

    assert_int_equal(ipc_take(out.data + at, out.len - at, &used, &m, &err), 1);
    assert_int_equal(m.version, IPC_VERSION);
    at += used;
    assert_int_equal(ipc_take(out.data + at, out.len - at, &used, &m, &err), 1);
    assert_int_equal(m.text.len, 3);
    assert_memory_equal(m.text.text, "a\0b", 4);
    at += used;
    assert_int_equal(ipc_take(out.data + at, out.len - at, &used, &m, &err), 1);
    assert_true(m.done.id == 9 && m.done.finish == ENGINE_FINISH_LENGTH);
    assert_true(m.done.prompt_tokens == 3 && m.done.completion_tokens == 4);
    at += used;
    assert_int_equal(ipc_take(out.data + at, out.len - at, &used, &m, &err), 1);
    assert_memory_equal(&m.error, &error, sizeof error);
    at += used;
    assert_int_equal(ipc_take(out.data + at, out.len - at, &used, &m, &err), 1);
    assert_int_equal(m.stats.base_bytes, 1 << 30);
    assert_int_equal(m.stats.steps, 7);
    assert_true(m.stats.utilization == 0.25);
    assert_true(m.stats.memory_bytes == INT64_C(1) << 36 && m.stats.memory_free == 8);
    at += used;
    assert_int_equal(ipc_take(out.data + at, out.len - at, &used, &m, &err), 1);
    assert_int_equal(m.type, IPC_STATS_REQUEST);
    assert_int_equal(at + used, out.len);
}

static void a_frame_that_is_not_complete_waits(void **state)
{
    size_t used;

    put_example_submit();
    for (size_t n = 0; n < out.len; n++) {
        char *cut = malloc(n > 0 ? n : 1); /* exact, so that ASan sees a read behind it */

        memcpy(cut, out.data, n);
        assert_int_equal(ipc_take(cut, n, &used, &m, &err), 0);
        free(cut);
    }
}

/* A frame whose length says less or more than its fields need. */
static void wrong_lengths_are_refused(void **state)
{
    size_t whole, used;

    put_example_submit();
    whole = out.len;
    for (uint32_t n = 1; n < whole - 4; n++) {
        char *bent = malloc(4 + n);
        struct err e = {0};

        memcpy(bent, out.data, 4 + n);
        for (int i = 0; i < 4; i++)
            bent[i] = (char)(n >> (8 * i));
        assert_int_equal(ipc_take(bent, 4 + n, &used, &m, &e), -1);
        free(bent);
    }
}

static int take_raw(const char *bytes, size_t len)
{
    size_t used;
    char *copy = malloc(len);
    int rc;

    memcpy(copy, bytes, len);
    err_clear(&err);
    rc = ipc_take(copy, len, &used, &m, &err);
    if (rc == 1)
        ipc_message_release(&m);
    free(copy);
    return rc;
}

static void bent_fields_are_refused(void **state)
{
    assert_int_equal(take_raw("\0\0\0\0", 4), -1);           /* empty frame */
    assert_int_equal(take_raw("\xff\xff\xff\xff", 4), -1);   /* over the maximum */
    assert_int_equal(take_raw("\x01\0\0\0\x63", 5), -1);     /* no such type */
    assert_int_equal(take_raw("\x02\0\0\0\x04\x01", 6), -1); /* a field too many */
    assert_int_equal(take_raw("\x12\0\0\0\x06"
                              "\1\0\0\0\0\0\0\0"
                              "\0"
                              "\1\0\0\0\1\0\0\0",
                              22),
                     -1); /* done without a finish */
    assert_int_equal(take_raw("\x12\0\0\0\x06"
                              "\1\0\0\0\0\0\0\0"
                              "\1"
                              "\1\0\0\x80\1\0\0\0",
                              22),
                     -1); /* a negative count */
    assert_int_equal(take_raw("\x10\0\0\0\x05"
                              "\1\0\0\0\0\0\0\0"
                              "\2\0\0\0abX",
                              20),
                     -1); /* text without its NUL */
}

static void bits_flipped_anywhere_never_read_outside(void **state)
{
    size_t used;

    put_example_submit();
    for (size_t i = 4; i < out.len; i++) {
        char *bent = malloc(out.len);
        struct err e = {0};

        memcpy(bent, out.data, out.len);
        bent[i] = (char)(bent[i] ^ 0xff);
        if (ipc_take(bent, out.len, &used, &m, &e) == 1)
            ipc_message_release(&m);
        free(bent);
    }
}

static void an_oversized_frame_is_not_written(void **state)
{
    size_t len = IPC_FRAME_MAX;
    char *text = calloc(len, 1);

    ipc_put_text(&out, 1, text, len);
    assert_true(strbuf_failed(&out));
    free(text);
}

static void a_frame_that_does_not_fit_leaves_nothing(void **state)
{
    for (size_t max = 0; max < 64; max++) {
        struct strbuf small;
        size_t at = 0, used;

        strbuf_init(&small, max);
        while (!strbuf_failed(&small))
            ipc_put_cancel(&small, 7);
        while (ipc_take(small.data + at, small.len - at, &used, &m, &err) == 1)
            at += used;
        assert_int_equal(at, small.len);
        assert_int_equal(small.len, max / 13 * 13);
        strbuf_release(&small);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(submit_survives, setup, teardown),
        cmocka_unit_test_setup_teardown(events_survive, setup, teardown),
        cmocka_unit_test_setup_teardown(a_frame_that_is_not_complete_waits, setup, teardown),
        cmocka_unit_test_setup_teardown(wrong_lengths_are_refused, setup, teardown),
        cmocka_unit_test_setup_teardown(bent_fields_are_refused, setup, teardown),
        cmocka_unit_test_setup_teardown(bits_flipped_anywhere_never_read_outside, setup, teardown),
        cmocka_unit_test_setup_teardown(an_oversized_frame_is_not_written, setup, teardown),
        cmocka_unit_test(a_frame_that_does_not_fit_leaves_nothing),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
