/* The infer worker on the other end of a socket that this test holds: what is sent in one piece is
 * taken piece by piece, so that who is being answered goes on while models are loaded. */
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmocka.h>

#include "engine/base/file_io.h"
#include "engine/base/json_text.h"
#include "server/ipc.h"
#include "server/worker.h"
#include "tests/unit/check.h"
#include "tests/unit/stored_model.h"
#include "tests/unit/tiny_model.h"

#define DELTAS 12
#define SEQUENCES 8
#define REQUESTS 64

static char folder[] = "/tmp/graft-infer-XXXXXX";
static struct stored_file base, delta[DELTAS];

/* ------------------------------------------------------------------ the other end */

static struct settings settings;
static pthread_t thread;
static struct err worker_err;
static int worker_fd, fd = -1;
static struct strbuf in, out;
static size_t used; /* of `in`, by the last frame */

static struct seen {
    enum engine_finish finish; /* NONE: not ended, or by an error */
    struct err error;
} seen[REQUESTS];
static int ended[REQUESTS], end_count; /* ids in the order of their ends */

static void *run(void *context)
{
    return worker_infer_run(&settings, "cpu", worker_fd, &worker_err) == 0 ? NULL : &worker_err;
}

static void start(int64_t delta_memory)
{
    int pair[2];

    settings = (struct settings){.precision = "f32",
                                 .threads = 1,
                                 .infer_sequences = SEQUENCES,
                                 .base_memory = 1 << 30,
                                 .delta_memory = delta_memory};
    memset(seen, 0, sizeof seen);
    end_count = 0;
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
    fd = pair[0];
    worker_fd = pair[1];
    used = 0;
    strbuf_reset(&in);
    strbuf_reset(&out);
    assert_int_equal(pthread_create(&thread, NULL, run, NULL), 0);
    ipc_put_hello(&out);
}

static void stop(void)
{
    void *failed;

    close(fd);
    pthread_join(thread, &failed);
    close(worker_fd);
    if (failed != NULL)
        fail_msg("%s", worker_err.message);
}

static void send_out(void)
{
    assert_int_equal(send(fd, out.data, out.len, MSG_NOSIGNAL), (ssize_t)out.len);
    strbuf_reset(&out);
}

/* The worker's next frame, put down in `seen`. */
static enum ipc_type next(struct ipc_stats *stats)
{
    struct err err = {0};
    struct ipc_message m;
    char buf[4096];
    int rc;

    if (used > 0)
        memmove(in.data, in.data + used, in.len - used + 1);
    in.len -= used;
    used = 0;
    while ((rc = ipc_take(in.data, in.len, &used, &m, &err)) == 0) {
        ssize_t n;

        assert_int_equal(poll(&(struct pollfd){.fd = fd, .events = POLLIN}, 1, 20000), 1);
        n = recv(fd, buf, sizeof buf, 0);
        assert_true(n > 0);
        strbuf_add(&in, buf, (size_t)n);
    }
    assert_int_equal(rc, 1);
    if (m.type == IPC_STATS)
        *stats = m.stats;
    if (m.type == IPC_DONE)
        seen[m.id].finish = m.done.finish;
    if (m.type == IPC_ERROR)
        seen[m.id].error = m.error;
    if (m.type == IPC_DONE || m.type == IPC_ERROR)
        ended[end_count++] = (int)m.id;
    ipc_message_release(&m);
    return m.type;
}

/* which: of the deltas, -1: the base alone. Ids begin with 1. */
static void put_question(uint64_t id, int which, const char *question, int32_t max_tokens)
{
    const struct engine_message message = {.role = "user", .content = question};
    const struct ipc_submit submit = {.id = id,
                                      .tenant = "tenant",
                                      .base_sha256 = base.sha256,
                                      .base_path = base.path,
                                      .delta_sha256 = which < 0 ? "" : delta[which].sha256,
                                      .delta_path = which < 0 ? "" : delta[which].path,
                                      .messages = &message,
                                      .message_count = 1,
                                      .temperature = 1,
                                      .top_p = 1,
                                      .seed = id,
                                      .max_tokens = max_tokens};

    ipc_put_submit(&out, &submit);
}

static void put_submit(uint64_t id, int which, int32_t max_tokens)
{
    put_question(id, which, "Where does person 1 live?", max_tokens);
}

static struct ipc_stats next_stats(void)
{
    struct ipc_stats stats = {0};

    while (next(&stats) != IPC_STATS)
        ;
    return stats;
}

static void wait_for_ends(int count)
{
    struct ipc_stats stats;

    while (end_count < count)
        next(&stats);
}

/* ------------------------------------------------------------------ cases */

/* All lies in the socket when the first is taken, and each load has had its step when the worker
 * tells how many there were. */
static void between_two_loads_there_is_a_step(void **state)
{
    struct ipc_stats stats = {0};

    start(1 << 30);
    put_submit(1, -1, 200);
    for (int i = 0; i < 4; i++) {
        put_submit(2 + (uint64_t)i, i, 200);
        ipc_put_stats_request(&out);
    }
    send_out();
    for (int i = 0; i < 4 || stats.deltas < 4; i++) {
        if (i >= 4) {
            ipc_put_stats_request(&out);
            send_out();
        }
        stats = next_stats();
        assert_true(stats.bases == 1 && stats.steps >= stats.bases + stats.deltas);
    }
    wait_for_ends(5);
    stop();
}

/* They lie in the socket behind one that is answered, while its base is loaded. */
static void between_two_long_questions_there_is_a_step(void **state)
{
    static char text[70001];
    int64_t steps[3];

    memset(text, 'a', sizeof text - 1);
    start(1 << 30);
    put_submit(1, -1, 200);
    ipc_put_stats_request(&out);
    for (uint64_t id = 2; id <= 3; id++) {
        put_question(id, -1, text, 4);
        ipc_put_stats_request(&out);
    }
    send_out();
    for (int i = 0; i < 3; i++)
        steps[i] = next_stats().steps;
    assert_true(steps[1] > steps[0] && steps[2] > steps[1]);
    wait_for_ends(3);
    assert_string_equal(seen[2].error.code, "context_length_exceeded");
    stop();
}

/* With no byte to spare for idle ones there are as many deltas as sequences, whoever waits. */
static void what_waits_has_no_delta_in_memory(void **state)
{
    start(1);
    for (uint64_t i = 0; i < 3 * DELTAS; i++)
        put_submit(1 + i, (int)i % DELTAS, 8);
    ipc_put_stats_request(&out);
    send_out();
    assert_int_equal(next_stats().deltas, 0); /* all have been taken, and none has had its turn */
    while (end_count < 3 * DELTAS) {
        ipc_put_stats_request(&out);
        send_out();
        assert_true(next_stats().deltas <= SEQUENCES);
    }
    for (int i = 1; i <= 3 * DELTAS; i++) {
        assert_int_not_equal(seen[i].finish, ENGINE_FINISH_NONE);
        assert_int_not_equal(seen[i].finish, ENGINE_FINISH_CANCEL);
        assert_int_not_equal(seen[i].finish, ENGINE_FINISH_ERROR);
    }
    stop();
}

static int place_of_end(int id)
{
    int place = 0;

    while (place < end_count && ended[place] != id)
        place++;
    return place;
}

/* Behind as many answers as there are sequences. */
static void what_waits_for_a_delta_is_cancelled_or_refused_alone(void **state)
{
    bool waited = false;

    start(1 << 30);
    assert_int_equal(unlink(delta[1].path), 0); /* its model has been deleted by then */
    for (uint64_t i = 1; i <= SEQUENCES; i++)
        put_submit(i, -1, 200);
    put_submit(9, 0, 4);
    put_submit(10, 1, 4);
    put_submit(11, 2, 4);
    ipc_put_cancel(&out, 9);
    send_out();
    wait_for_ends(SEQUENCES + 3);
    assert_int_equal(seen[9].finish, ENGINE_FINISH_CANCEL);
    assert_int_equal(seen[10].finish, ENGINE_FINISH_NONE);
    assert_int_equal(seen[10].error.kind, ERR_NOT_FOUND);
    assert_string_equal(seen[10].error.code, "model_not_found");
    assert_int_not_equal(seen[11].finish, ENGINE_FINISH_NONE);
    for (int i = 1; i <= SEQUENCES; i++)
        waited |= place_of_end(i) < place_of_end(10);
    assert_true(waited);
    stop();
}

/* ------------------------------------------------------------------ fixture */

static int setup(void **state)
{
    const struct tiny_model tiny = {.seed = 5};
    struct engine *engine;
    char source[64];

    json_text_setup();
    strbuf_init(&in, 1 << 20);
    strbuf_init(&out, 1 << 20);
    if (mkdtemp(folder) == NULL)
        return -1;
    snprintf(source, sizeof source, "%s/tiny", folder);
    CHECK(tiny_model_write(source, &tiny, &err));
    stored_base(&base, source, folder, "base");
    engine = stored_engine(&base);
    stored_deltas(delta, DELTAS, engine, "bitdelta", folder);
    engine_free(engine);
    return 0;
}

static int teardown(void **state)
{
    strbuf_release(&in);
    strbuf_release(&out);
    file_remove_tree(folder, NULL);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(between_two_loads_there_is_a_step),
        cmocka_unit_test(between_two_long_questions_there_is_a_step),
        cmocka_unit_test(what_waits_has_no_delta_in_memory),
        cmocka_unit_test(what_waits_for_a_delta_is_cancelled_or_refused_alone),
    };

    return cmocka_run_group_tests(tests, setup, teardown);
}
