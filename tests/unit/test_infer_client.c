/* Inference client against a worker that this test plays on the other end of a socket pair. */
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "server/infer_client.h"

static struct infer_client *client;
static int worker = -1;
static struct strbuf in, out;
static size_t used; /* of `in` by the last frame */

struct seen {
    char text[256];
    enum infer_event_kind last;
    enum err_kind error;
    enum engine_finish finish;
    int32_t tokens;
    atomic_int ends;
};

static int on_event(void *context, const struct infer_event *event)
{
    struct seen *s = context;

    s->last = event->kind;
    if (event->kind == INFER_TEXT)
        strncat(s->text, event->text, event->text_len);
    if (event->kind == INFER_DONE) {
        s->finish = event->finish;
        s->tokens = event->completion_tokens;
    }
    if (event->kind == INFER_ERROR)
        s->error = event->err->kind;
    if (event->kind != INFER_TEXT)
        atomic_fetch_add(&s->ends, 1);
    return event->kind == INFER_TEXT && strstr(s->text, "enough") != NULL ? -1 : 0;
}

static void wait_until(bool (*done)(void *), void *context)
{
    for (int i = 0; i < 2000 && !done(context); i++)
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    assert_true(done(context));
}

static bool is_ready(void *context)
{
    return infer_client_ready(client);
}

static bool has_ended(void *context)
{
    return atomic_load(&((struct seen *)context)->ends) > 0;
}

/* send_buffer: bytes under way to the worker at most, or about; 0: as it comes. */
static void attach_with(int send_buffer)
{
    int pair[2];

    if (worker >= 0)
        close(worker);
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
    worker = pair[0];
    if (send_buffer > 0)
        setsockopt(pair[1], SOL_SOCKET, SO_SNDBUF, &send_buffer, sizeof send_buffer);
    strbuf_reset(&in);
    used = 0;
    infer_client_attach(client, pair[1]);
}

static void attach(void)
{
    attach_with(0);
}

static void send_out(void)
{
    assert_int_equal(send(worker, out.data, out.len, MSG_NOSIGNAL), (ssize_t)out.len);
    strbuf_reset(&out);
}

/* The next frame from the client; its text stays valid until the next call. */
static void next(struct ipc_message *m)
{
    struct err err = {0};
    char buf[4096];
    int rc;

    memmove(in.data, in.data + used, in.len - used);
    in.len -= used;
    used = 0;
    while ((rc = ipc_take(in.data, in.len, &used, m, &err)) == 0) {
        struct pollfd fd = {.fd = worker, .events = POLLIN};
        ssize_t n;

        assert_int_equal(poll(&fd, 1, 5000), 1);
        n = recv(worker, buf, sizeof buf, 0);
        assert_true(n > 0);
        strbuf_add(&in, buf, (size_t)n);
    }
    assert_int_equal(rc, 1);
}

static void say_hello(void)
{
    struct ipc_message m;

    next(&m);
    assert_int_equal(m.type, IPC_HELLO);
    ipc_put_hello(&out);
    send_out();
    wait_until(is_ready, NULL);
}

#define MANY 4096
#define WAITING 65536

static int setup(void **state)
{
    const struct infer_client_options options = {.max_requests = 2};

    strbuf_init(&in, 1 << 20);
    strbuf_init(&out, 1 << 20);
    return infer_client_open(&client, &options, NULL);
}

static int teardown(void **state)
{
    infer_client_free(client);
    if (worker >= 0)
        close(worker);
    worker = -1;
    strbuf_release(&in);
    strbuf_release(&out);
    return 0;
}

/* Many requests, and little room for those that the worker has not taken yet. */
static int setup_narrow(void **state)
{
    const struct infer_client_options options = {.max_requests = MANY, .max_waiting = WAITING};

    strbuf_init(&in, 1 << 20);
    strbuf_init(&out, 1 << 20);
    return infer_client_open(&client, &options, NULL);
}

/* One that often asks the worker for its figures. */
static int setup_curious(void **state)
{
    const struct infer_client_options options = {.max_requests = 2, .stats_every = 500};

    strbuf_init(&in, 1 << 20);
    strbuf_init(&out, 1 << 20);
    return infer_client_open(&client, &options, NULL);
}

static int submit_text(struct seen *seen, const char *text, uint64_t *id, struct err *err)
{
    const struct engine_message message = {"user", text};
    const struct ipc_submit request = {.tenant = "t",
                                       .base_sha256 = "d",
                                       .base_path = "/b",
                                       .delta_sha256 = "",
                                       .delta_path = "",
                                       .messages = &message,
                                       .message_count = 1,
                                       .temperature = 1,
                                       .top_p = 1};

    memset(seen, 0, sizeof *seen);
    return infer_client_submit(client, &request, on_event, seen, id, err);
}

static int submit(struct seen *seen, uint64_t *id, struct err *err)
{
    return submit_text(seen, "hello", id, err);
}

static void an_answer_comes_back(void **state)
{
    struct ipc_message m;
    static struct seen seen;
    uint64_t id;

    attach();
    say_hello();
    assert_int_equal(submit(&seen, &id, NULL), 0);
    next(&m);
    assert_int_equal(m.type, IPC_SUBMIT);
    assert_string_equal(m.submit.messages[0].content, "hello");
    ipc_put_text(&out, m.id, "wor", 3);
    ipc_put_text(&out, m.id, "ld", 2);
    ipc_put_done(&out, &(struct ipc_done){m.id, ENGINE_FINISH_STOP, 4, 2});
    ipc_message_release(&m);
    send_out();
    wait_until(has_ended, &seen);
    assert_string_equal(seen.text, "world");
    assert_int_equal(seen.last, INFER_DONE);
    assert_int_equal(seen.finish, ENGINE_FINISH_STOP);
    assert_int_equal(seen.tokens, 2);
}

static void without_a_worker_it_is_unavailable(void **state)
{
    struct err err = {0};
    static struct seen seen;
    uint64_t id;

    assert_int_equal(submit(&seen, &id, &err), -1);
    assert_int_equal(err.kind, ERR_UNAVAILABLE);
}

static void a_full_queue_is_a_rate_error(void **state)
{
    struct err err = {0};
    static struct seen a, b, c;
    uint64_t id;

    attach();
    say_hello();
    assert_int_equal(submit(&a, &id, NULL), 0);
    assert_int_equal(submit(&b, &id, NULL), 0);
    assert_int_equal(submit(&c, &id, &err), -1);
    assert_int_equal(err.kind, ERR_RATE);
    infer_client_cancel(client, id);
    assert_int_equal(submit(&c, &id, NULL), 0);
    infer_client_free(client); /* the two that are open end with an error */
    client = NULL;
    assert_int_equal(a.error, ERR_UNAVAILABLE);
    assert_int_equal(c.error, ERR_UNAVAILABLE);
    assert_int_equal(b.ends, 0);
}

static void a_dead_worker_ends_what_is_open(void **state)
{
    static struct seen seen;
    uint64_t id;

    attach();
    say_hello();
    assert_int_equal(submit(&seen, &id, NULL), 0);
    close(worker);
    worker = -1;
    wait_until(has_ended, &seen);
    assert_int_equal(seen.error, ERR_UNAVAILABLE);
    assert_false(infer_client_ready(client));
    attach();
    say_hello();
    assert_int_equal(submit(&seen, &id, NULL), 0);
}

static void a_garbled_worker_is_dropped(void **state)
{
    static struct seen seen;
    uint64_t id;

    attach();
    say_hello();
    assert_int_equal(submit(&seen, &id, NULL), 0);
    strbuf_add(&out, "\xff\xff\xff\xff", 4);
    send_out();
    wait_until(has_ended, &seen);
    assert_int_equal(seen.error, ERR_UNAVAILABLE);
}

static void after_cancel_nothing_comes(void **state)
{
    struct ipc_message m;
    static struct seen first, second;
    uint64_t id, other;

    attach();
    say_hello();
    assert_int_equal(submit(&first, &id, NULL), 0);
    assert_int_equal(submit(&second, &other, NULL), 0);
    infer_client_cancel(client, id);
    for (int i = 0; i < 3; i++) {
        next(&m);
        if (m.type == IPC_CANCEL)
            assert_true(m.id == id);
        ipc_message_release(&m);
    }
    ipc_put_text(&out, id, "late", 4);
    ipc_put_done(&out, &(struct ipc_done){id, ENGINE_FINISH_CANCEL, 1, 1});
    ipc_put_done(&out, &(struct ipc_done){other, ENGINE_FINISH_STOP, 1, 1});
    send_out();
    wait_until(has_ended, &second);
    assert_string_equal(first.text, "");
    assert_int_equal(first.ends, 0);
}

static void an_answer_may_be_given_up(void **state)
{
    struct ipc_message m;
    static struct seen seen;
    uint64_t id;

    attach();
    say_hello();
    assert_int_equal(submit(&seen, &id, NULL), 0);
    next(&m);
    ipc_message_release(&m);
    ipc_put_text(&out, id, "enough", 6);
    ipc_put_text(&out, id, " more", 5);
    send_out();
    next(&m);
    assert_int_equal(m.type, IPC_CANCEL);
    assert_true(m.id == id);
    ipc_put_done(&out, &(struct ipc_done){id, ENGINE_FINISH_CANCEL, 1, 1});
    send_out();
    infer_client_free(client);
    client = NULL;
    assert_string_equal(seen.text, "enough");
    assert_int_equal(seen.ends, 0);
}

/* Requests until not even the shortest has room; how many. */
static int fill(struct seen *seen, uint64_t ids[MANY])
{
    static char text[8001];
    struct err err = {0};
    size_t len = sizeof text - 1;
    int count = 0;

    memset(text, 'a', len);
    while (len > 0) {
        text[len] = '\0';
        assert_true(count < MANY);
        if (submit_text(seen, text, &ids[count], &err) == 0) {
            count++;
            continue;
        }
        assert_int_equal(err.kind, ERR_RATE);
        err_clear(&err);
        len /= 2;
        text[len] = 'a';
    }
    return count;
}

static void cancels_get_through_whole_when_requests_do_not(void **state)
{
    static uint64_t ids[MANY], more;
    static struct seen seen;
    struct ipc_message m;
    int count;

    attach_with(4096);
    say_hello();
    count = fill(&seen, ids); /* the worker takes nothing meanwhile */
    assert_true(count > 7);
    for (int i = 0; i < count; i++)
        infer_client_cancel(client, ids[i]);
    assert_int_equal(submit(&seen, &more, NULL), -1);
    for (int i = 0; i < 2 * count; i++) { /* every frame is whole and in its place */
        next(&m);
        assert_int_equal(m.type, i < count ? IPC_SUBMIT : IPC_CANCEL);
        assert_true(m.id == ids[i % count]);
        ipc_message_release(&m);
    }
    for (int i = 0; submit(&seen, &more, NULL) != 0;
         i++) { /* its thread may not have seen it yet */
        assert_true(i < 2000);
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
    next(&m);
    assert_int_equal(m.type, IPC_SUBMIT);
    ipc_message_release(&m);
}

/* The worker says something all the time, as under load. */
static void a_busy_worker_is_asked_for_its_figures(void **state)
{
    struct pollfd asked = {.events = POLLIN};
    struct infer_client_stats stats;
    struct ipc_message m;

    attach();
    say_hello();
    asked.fd = worker;
    for (int i = 0; i < 5000 && poll(&asked, 1, 1) == 0; i++) {
        ipc_put_text(&out, 1, "of a cancelled answer", 21);
        send_out();
    }
    assert_int_equal(asked.revents, POLLIN);
    next(&m);
    assert_int_equal(m.type, IPC_STATS_REQUEST);
    ipc_put_stats(&out, &(struct ipc_stats){.bases = 3});
    send_out();
    for (int i = 0; i < 2000; i++) {
        infer_client_stats(client, &stats);
        if (stats.worker.bases == 3)
            return;
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
    fail();
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(an_answer_comes_back, setup, teardown),
        cmocka_unit_test_setup_teardown(without_a_worker_it_is_unavailable, setup, teardown),
        cmocka_unit_test_setup_teardown(a_full_queue_is_a_rate_error, setup, teardown),
        cmocka_unit_test_setup_teardown(a_dead_worker_ends_what_is_open, setup, teardown),
        cmocka_unit_test_setup_teardown(a_garbled_worker_is_dropped, setup, teardown),
        cmocka_unit_test_setup_teardown(an_answer_may_be_given_up, setup, teardown),
        cmocka_unit_test_setup_teardown(after_cancel_nothing_comes, setup, teardown),
        cmocka_unit_test_setup_teardown(cancels_get_through_whole_when_requests_do_not,
                                        setup_narrow, teardown),
        cmocka_unit_test_setup_teardown(a_busy_worker_is_asked_for_its_figures, setup_curious,
                                        teardown),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
