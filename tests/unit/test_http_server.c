/* http_server.h, in process and over real sockets: routes of the test, no database. */
#include <arpa/inet.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "engine/base/json_text.h"
#include "engine/base/log.h"
#include "server/api_context.h"
#include "server/http_request.h"
#include "server/http_response.h"
#include "server/http_server.h"

static void sleep_ms(int ms)
{
    struct timespec pause = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L};
    nanosleep(&pause, NULL);
}

static int64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* ------------------------------------------------------------------ the test's routes */

static atomic_int gate;    /* `block` waits while it is 1 */
static atomic_int blocked; /* requests inside `block` */
static struct http_later *_Atomic kept;
static atomic_int gone_calls, release_calls;

static int hi(struct http_request *request, struct http_response *response, struct err *err)
{
    return http_response_json(response, 200, json_pack("{s:s}", "hi", "there"), err);
}

static int echo(struct http_request *request, struct http_response *response, struct err *err)
{
    return http_response_json(response, 200, json_incref(request->json), err);
}

static int say(struct http_request *request, struct http_response *response, struct err *err)
{
    const char *q = http_request_query(request, "q");
    return http_response_json(
        response, 200, json_pack("{s:s, s:s?}", "param", request->path_params[0], "q", q), err);
}

static int broken(struct http_request *request, struct http_response *response, struct err *err)
{
    return err_set(err, ERR_INTERNAL, "secret detail /path");
}

static int away(struct http_request *request, struct http_response *response, struct err *err)
{
    return err_set(err, ERR_UNAVAILABLE, "connection to server on socket \"/secret\" failed");
}

static int block(struct http_request *request, struct http_response *response, struct err *err)
{
    atomic_fetch_add(&blocked, 1);
    while (atomic_load(&gate))
        sleep_ms(5);
    atomic_fetch_sub(&blocked, 1);
    return hi(request, response, err);
}

static void on_gone(void *context)
{
    atomic_fetch_add((atomic_int *)context, 1);
}

static void on_release(void *context)
{
    atomic_fetch_add(&release_calls, 1);
}

static int later(struct http_request *request, struct http_response *response, struct err *err)
{
    const struct http_later_options options = {
        .ring_bytes = http_request_query(request, "big") ? 1 << 20 : 4096,
        .context = &gone_calls,
        .gone = on_gone,
        .release = on_release};
    struct http_later *handle = http_response_later(response, &options, err);
    if (!handle)
        return -1;
    if (http_request_query(request, "now")) /* answered before the handler has returned */
        http_later_json(handle, 200, json_pack("{s:s}", "later", "now"));
    else
        atomic_store(&kept, handle);
    return 0;
}

static const struct http_route routes[] = {
    {.method = "GET",
     .pattern = "/fast",
     .handler = hi,
     .on_event_thread = true,
     .operation = "fast"},
    {.method = "GET", .pattern = "/hi", .handler = hi, .operation = "hi"},
    {.method = "GET", .pattern = "/say/{what}", .handler = say, .operation = "say"},
    {.method = "POST",
     .pattern = "/echo",
     .handler = echo,
     .body = HTTP_BODY_JSON,
     .body_limit = 1000,
     .operation = "echo"},
    {.method = "POST", .pattern = "/none", .handler = hi, .operation = "none"},
    {.method = "GET", .pattern = "/fail", .handler = broken, .operation = "fail"},
    {.method = "GET", .pattern = "/away", .handler = away, .operation = "away"},
    {.method = "GET", .pattern = "/block", .handler = block, .operation = "block"},
    {.method = "GET", .pattern = "/later", .handler = later, .operation = "later"},
    {.method = "GET", .pattern = "/key", .handler = hi, .auth = HTTP_AUTH_KEY, .operation = "key"},
    {.method = "POST",
     .pattern = "/upload",
     .handler = hi,
     .auth = HTTP_AUTH_KEY,
     .body = HTTP_BODY_UPLOAD,
     .operation = "upload"},
};

static struct http_server *start_with(struct http_server_options options)
{
    struct http_server *server = NULL;
    struct err err = {0};
    options.listen = "127.0.0.1:0";
    options.routes = routes;
    options.route_count = sizeof(routes) / sizeof(routes[0]);
    if (http_server_start(&server, &options, &err) < 0)
        fail_msg("%s", err.message);
    return server;
}

static struct http_server *start(void)
{
    return start_with((struct http_server_options){.handler_threads = 2});
}

/* ------------------------------------------------------------------ the client */

static int dial(struct http_server *server)
{
    const char *url = http_server_url(server);
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_port = htons((uint16_t)atoi(strrchr(url, ':') + 1)),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    assert_int_equal(connect(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    return fd;
}

static void put(int fd, const char *text)
{
    assert_int_equal(send(fd, text, strlen(text), MSG_NOSIGNAL), (ssize_t)strlen(text));
}

/* Reads until `until` has come, the peer has closed (*closed) or ms have passed. */
static const char *get(int fd, const char *until, int ms, bool *closed)
{
    static char text[1 << 16];
    size_t len = 0;
    int64_t end = now_ms() + ms;
    text[0] = '\0';
    if (closed)
        *closed = false;
    while (now_ms() < end && (!until || !strstr(text, until))) {
        struct pollfd poll_fd = {.fd = fd, .events = POLLIN};
        if (poll(&poll_fd, 1, (int)(end - now_ms())) <= 0)
            break;
        ssize_t n = recv(fd, text + len, sizeof(text) - 1 - len, 0);
        if (n <= 0) {
            if (closed)
                *closed = true;
            break;
        }
        len += (size_t)n;
        text[len] = '\0';
    }
    return text;
}

static void assert_has(const char *text, const char *part)
{
    if (!strstr(text, part))
        print_error("no \"%s\" in:\n%s\n", part, text);
    assert_non_null(strstr(text, part));
}

/* One request on its own connection; expects the status and, with `closes`, the end of the
 * connection. */
static const char *ask(struct http_server *server, const char *request, int status, bool closes)
{
    int fd = dial(server);
    char line[32];
    bool closed;
    put(fd, request);
    snprintf(line, sizeof(line), "HTTP/1.1 %d", status);
    const char *text = get(fd, closes ? NULL : "\r\n\r\n", 2000, &closed);
    if (!closes) {
        /* headers are there; the small bodies of this test come with them or right after */
        if (!strstr(text, "}") && !strstr(text, "content-length: 0") &&
            !strstr(text, "HTTP/1.1 204"))
            sleep_ms(20);
    }
    assert_has(text, line);
    assert_int_equal(closed, closes);
    close(fd);
    return text;
}

#define GET(path) "GET " path " HTTP/1.1\r\nHost: x\r\n\r\n"

/* ------------------------------------------------------------------ tests */

static void answers_carry_the_headers_that_clients_read(void **state)
{
    struct http_server *server = start();
    const char *text = ask(server, GET("/hi"), 200, false);
    assert_has(text, "{\"hi\":\"there\"}");
    assert_has(text, "x-request-id: req_");
    assert_has(text, "openai-version: 2020-10-01");
    assert_has(text, "openai-processing-ms: ");
    assert_has(text, "content-type: application/json");
    text = ask(server, GET("/fast"), 200, false);
    assert_has(text, "{\"hi\":\"there\"}");
    text = ask(server, "HEAD /hi HTTP/1.1\r\nHost: x\r\n\r\n", 200, false);
    assert_null(strstr(text, "there"));
    text = ask(server, "OPTIONS /hi HTTP/1.1\r\nHost: x\r\n\r\n", 204, false);
    assert_has(text, "allow: GET, HEAD, OPTIONS");
    text = ask(server, "PUT /hi HTTP/1.1\r\nHost: x\r\n\r\n", 405, false);
    assert_has(text, "allow: GET, HEAD, OPTIONS");
    text = ask(server, GET("/nowhere"), 404, false);
    assert_has(text, "{\"error\":{\"message\":\"Unknown request URL");
    assert_has(text, "\"type\":\"invalid_request_error\",\"param\":null,\"code\":\"unknown_url\"");
    text = ask(server, GET("/fail"), 500, false);
    assert_has(text, "x-should-retry: false");
    assert_null(strstr(text, "secret"));
    text = ask(server, GET("/away"), 503, false);
    assert_has(text, "retry-after: 1");
    assert_null(strstr(text, "secret"));
    text = ask(server, GET("/say/a%3Ab?q=1%202"), 200, false);
    assert_has(text, "{\"param\":\"a:b\",\"q\":\"1 2\"}");
    http_server_stop(server, 1000);
}

static void requests_follow_one_another_on_a_connection(void **state)
{
    struct http_server *server = start();
    int fd = dial(server);
    for (int i = 0; i < 3; i++) {
        put(fd, GET("/hi"));
        assert_has(get(fd, "there\"}", 2000, NULL), "HTTP/1.1 200");
    }
    put(fd, GET("/say/one") GET("/say/two"));
    const char *text = get(fd, "two\"", 2000, NULL);
    assert_has(text, "one");
    assert_has(text, "two");
    close(fd);
    http_server_stop(server, 1000);
}

static void json_bodies_are_read_strictly(void **state)
{
    struct http_server *server = start();
#define POST(headers, body) "POST /echo HTTP/1.1\r\nHost: x\r\n" headers "\r\n" body
    const char *text = ask(server, POST("Content-Length: 7\r\n", "{\"a\":1}"), 200, false);
    assert_has(text, "{\"a\":1}");
    text =
        ask(server, POST("Transfer-Encoding: chunked\r\n", "3\r\n{\"a\r\n4\r\n\":1}\r\n0\r\n\r\n"),
            200, false);
    assert_has(text, "{\"a\":1}");
    ask(server,
        POST("Content-Length: 7\r\nContent-Type: application/json; charset=utf-8\r\n", "{\"a\":1}"),
        200, false);
    text = ask(server, POST("Content-Length: 13\r\n", "{\"a\":1,\"a\":2}"), 400, false);
    assert_has(text, "could not parse the JSON body of your request: it is not valid JSON");
    ask(server, POST("Content-Length: 2\r\n", "[]"), 400, false);
    ask(server, POST("Content-Length: 1\r\n", "1"), 400, false);
    ask(server, POST("Content-Length: 8\r\n", "{\"a\":1}x"), 400, false);
    ask(server, POST("Content-Length: 9\r\n", "{\"a\":\"\xff\"}"), 400, false);
    text = ask(server, POST("Content-Length: 0\r\n", ""), 400, false);
    assert_has(text, "has no body");
    text =
        ask(server,
            POST("Content-Length: 3\r\nContent-Type: application/x-www-form-urlencoded\r\n", "a=1"),
            415, true);
    assert_has(text, "unsupported_content_type");
    /* a body that nobody wants does no harm, whatever it is called */
    ask(server, "POST /none HTTP/1.1\r\nHost: x\r\n\r\n", 200, false);
    ask(server, "POST /none HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", 200, false);
    ask(server, "POST /none HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", 200, false);
    http_server_stop(server, 1000);
}

static void bodies_have_limits(void **state)
{
    struct http_server *server = start();
    /* before it is sent when the client waits to be told, or has very much to send */
    const char *text =
        ask(server, POST("Content-Length: 1001\r\nExpect: 100-continue\r\n", ""), 413, true);
    assert_has(text, "request_too_large");
    assert_null(strstr(text, "100 Continue"));
    ask(server, POST("Content-Length: 67108865\r\n", "{"), 413, true);
    int fd = dial(server);
    put(fd, POST("Content-Length: 7\r\nExpect: 100-continue\r\n", ""));
    assert_has(get(fd, "100 Continue", 1000, NULL), "100 Continue");
    put(fd, "{\"a\":1}");
    assert_has(get(fd, "}", 1000, NULL), "200 OK");
    close(fd);
    /* chunked, no length declared: found while reading, answered at the end */
    char body[2000];
    memset(body, ' ', sizeof(body));
    fd = dial(server);
    put(fd, POST("Transfer-Encoding: chunked\r\n", "7d0\r\n"));
    assert_int_equal(send(fd, body, sizeof(body), MSG_NOSIGNAL), sizeof(body));
    put(fd, "\r\n0\r\n\r\n");
    assert_has(get(fd, "}}", 1000, NULL), "HTTP/1.1 413");
    close(fd);
    http_server_stop(server, 1000);
}

static void malformed_requests_are_refused_and_closed(void **state)
{
    struct http_server *server = start();
    static const struct {
        const char *request;
        int status;
    } bad[] = {
        {"POST /none HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n"
         "0\r\n\r\n" GET("/say/smuggled"),
         400},
        {"POST /none HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nContent-Length: 40\r\n\r\n" GET(
             "/say/smuggled"),
         400},
        {"GET /hi HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n" GET("/say/smuggled"), 400},
        {"POST /none HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" GET(
             "/say/smuggled"),
         400},
        {"POST /none HTTP/1.1\r\nHost: x\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n" GET(
             "/say/smuggled"),
         400},
        {"GET /hi HTTP/1.1\r\nHost: x\r\nX: a\r\n b\r\n\r\n" GET("/say/smuggled"), 400},
        {"GET /hi HTTP/1.1\nHost: x\nX: a\n\n" GET("/say/smuggled"), 400},
        {"GET /hi HTTP/1.1\r\nHost: x\nX: a\r\n\r\n" GET("/say/smuggled"), 400},
        {"GET /h%00i HTTP/1.1\r\nHost: x\r\n\r\n" GET("/say/smuggled"), 400},
        {"GET /say/..%2fhi HTTP/1.1\r\nHost: x\r\n\r\n" GET("/say/smuggled"), 400},
        {"GET /../hi HTTP/1.1\r\nHost: x\r\n\r\n" GET("/say/smuggled"), 400},
        {"GET http://x/hi HTTP/1.1\r\nHost: x\r\n\r\n" GET("/say/smuggled"), 400},
        {"POST /none HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Encoding: gzip\r\n\r\nx",
         415},
        {"GET /hi HTTP/1.1\r\n\r\n" GET("/say/smuggled"), 400},
        {"POST /none HTTP/1.1\r\nHost: x\r\nContent-Length: 1x\r\n\r\n" GET("/say/smuggled"), 400},
        {"GET /hi HTTP/2.0\r\nHost: x\r\n\r\n", 505},
    };
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        const char *text = ask(server, bad[i].request, bad[i].status, true);
        if (strstr(text, "smuggled"))
            print_error("smuggled by:\n%s\n", bad[i].request);
        assert_null(strstr(text, "smuggled"));
    }
    struct http_server_stats stats;
    http_server_stats(server, &stats);
    assert_true(stats.refused_filter >= 12);
    http_server_stop(server, 1000);
}

static void a_full_queue_is_503_and_the_fast_lane_stays_open(void **state)
{
    struct http_server *server =
        start_with((struct http_server_options){.handler_threads = 1, .queue_length = 2});
    int fds[3];
    atomic_store(&gate, 1);
    for (int i = 0; i < 3; i++) {
        fds[i] = dial(server);
        put(fds[i], GET("/block"));
        while (i == 0 && atomic_load(&blocked) == 0)
            sleep_ms(2);
    }
    struct http_server_stats stats;
    do {
        sleep_ms(2);
        http_server_stats(server, &stats);
    } while (stats.queued < 2);
    const char *text = ask(server, GET("/hi"), 503, false);
    assert_has(text, "retry-after: 1");
    assert_has(text, "server_busy");
    ask(server, GET("/fast"), 200, false);
    atomic_store(&gate, 0);
    for (int i = 0; i < 3; i++) {
        assert_has(get(fds[i], "there", 2000, NULL), "200 OK");
        close(fds[i]);
    }
    http_server_stop(server, 1000);
}

static struct http_later *wait_kept(void)
{
    struct http_later *handle = NULL;
    for (int i = 0; i < 400 && !handle; i++) {
        handle = atomic_exchange(&kept, NULL);
        sleep_ms(5);
    }
    assert_non_null(handle);
    return handle;
}

static void answers_may_come_later(void **state)
{
    struct http_server *server = start();
    atomic_store(&release_calls, 0);
    assert_has(ask(server, GET("/later?now"), 200, false), "{\"later\":\"now\"}");
    int fd = dial(server);
    put(fd, GET("/later"));
    struct http_later *handle = wait_kept();
    sleep_ms(30);
    http_later_json(handle, 201, json_pack("{s:i}", "n", 1));
    assert_has(get(fd, "}", 1000, NULL), "HTTP/1.1 201");
    put(fd, GET("/later"));
    struct err err = {0};
    err_set_code(&err, ERR_RATE, "queue_full", "", "Busy.");
    http_later_error(wait_kept(), &err);
    const char *text = get(fd, "}}", 1000, NULL);
    assert_has(text, "HTTP/1.1 429");
    assert_has(text, "retry-after: 1");
    assert_has(text, "\"code\":\"queue_full\"");
    put(fd, GET("/later"));
    http_later_finish(wait_kept()); /* an answerer that forgot */
    assert_has(get(fd, "}}", 1000, NULL), "HTTP/1.1 500");
    close(fd);
    http_server_stop(server, 1000);
    assert_int_equal(atomic_load(&release_calls), 4);
}

static void streams_flow_ping_and_end(void **state)
{
    struct http_server *server =
        start_with((struct http_server_options){.handler_threads = 1, .ping_ms = 300});
    int fd = dial(server);
    put(fd, GET("/later"));
    struct http_later *handle = wait_kept();
    http_later_stream(handle, "text/event-stream");
    const char *text = get(fd, "\r\n\r\n", 1000, NULL);
    assert_has(text, "HTTP/1.1 200");
    assert_has(text, "content-type: text/event-stream");
    int64_t began = now_ms();
    assert_int_equal(http_later_write_event(handle, json_pack("{s:i}", "n", 1)), 0);
    assert_has(get(fd, "\n\n\r\n", 1000, NULL), "data: {\"n\":1}\n\n");
    assert_true(now_ms() - began < 400);
    assert_has(get(fd, "ping\n\n", 1500, NULL), ": ping\n\n");
    for (int i = 0; i < 500; i++)
        assert_int_equal(http_later_write(handle, "x", 1), 0);
    http_later_write(handle, "data: [DONE]\n\n", 14);
    http_later_finish(handle);
    text = get(fd, "0\r\n\r\n", 2000, NULL);
    assert_has(text, "xxxxdata: [DONE]\n\n");
    /* and the connection goes on */
    put(fd, GET("/hi"));
    assert_has(get(fd, "there", 1000, NULL), "200 OK");
    close(fd);
    http_server_stop(server, 1000);
}

static void a_slow_reader_fills_its_ring_and_nobody_elses(void **state)
{
    struct http_server *server = start();
    int fd = dial(server);
    static char block_of_data[200000];
    memset(block_of_data, 'x', sizeof(block_of_data));
    put(fd, GET("/later?big"));
    struct http_later *handle = wait_kept();
    http_later_stream(handle, "text/event-stream");
    int full_for = 0;
    for (int i = 0; i < 2000 && full_for < 10; i++) { /* the kernel's buffers take megabytes */
        if (http_later_write(handle, block_of_data, sizeof(block_of_data)) == 0) {
            full_for = 0;
        } else {
            full_for++;
            sleep_ms(20);
        }
    }
    assert_int_equal(full_for, 10);
    ask(server, GET("/hi"), 200, false);
    http_later_finish(handle);
    close(fd);
    http_server_stop(server, 1000);
}

static void a_client_that_goes_is_noticed(void **state)
{
    struct http_server *server = start();
    for (int streaming = 0; streaming < 2; streaming++) {
        atomic_store(&gone_calls, 0);
        atomic_store(&release_calls, 0);
        int fd = dial(server);
        put(fd, GET("/later"));
        struct http_later *handle = wait_kept();
        if (streaming) {
            http_later_stream(handle, "text/event-stream");
            http_later_write(handle, "data: 1\n\n", 9);
            get(fd, "data: 1", 1000, NULL);
        }
        close(fd);
        for (int i = 0; i < 200 && !atomic_load(&gone_calls); i++)
            sleep_ms(10);
        assert_int_equal(atomic_load(&gone_calls), 1);
        assert_true(http_later_gone(handle));
        assert_int_equal(http_later_write(handle, "x", 1), 0);
        assert_int_equal(atomic_load(&release_calls), 0);
        http_later_finish(handle);
        for (int i = 0; i < 200 && !atomic_load(&release_calls); i++)
            sleep_ms(10);
        assert_int_equal(atomic_load(&release_calls), 1);
        assert_int_equal(atomic_load(&gone_calls), 1);
    }
    http_server_stop(server, 1000);
}

static void slow_drips_are_cut(void **state)
{
    struct http_server *server = start_with((struct http_server_options){
        .header_deadline_ms = 500, .body_deadline_ms = 600, .idle_ms = 700});
    int header = dial(server), body = dial(server), idle = dial(server), good = dial(server);
    int silent = dial(server);
    int64_t began = now_ms();
    put(header, "GET /hi HTTP/1.1\r\nHost: x\r\n");
    put(body, POST("Content-Length: 500\r\n", ""));
    put(idle, GET("/hi"));
    get(idle, "there", 1000, NULL);
    bool header_open = true, body_open = true;
    int64_t header_ms = 0, body_ms = 0;
    while (now_ms() - began < 3000 && (header_open || body_open)) {
        sleep_ms(100);
        if (header_open && send(header, "X: y\r\n", 6, MSG_NOSIGNAL) < 0) {
            header_open = false;
            header_ms = now_ms() - began;
        }
        if (body_open && send(body, " ", 1, MSG_NOSIGNAL) < 0) {
            body_open = false;
            body_ms = now_ms() - began;
        }
        if (now_ms() - began < 400) { /* keeps asking: never idle */
            put(good, GET("/hi"));
            assert_has(get(good, "there", 1000, NULL), "200 OK");
        }
    }
    assert_false(header_open);
    assert_false(body_open);
    assert_in_range(header_ms, 400, 1500);
    assert_in_range(body_ms, 500, 1600);
    bool closed;
    get(idle, NULL, 1500, &closed);
    assert_true(closed);
    get(silent, NULL, 1500, &closed);
    assert_true(closed);
    struct http_server_stats stats;
    http_server_stats(server, &stats);
    assert_true(stats.cut_slow >= 4);
    ask(server, GET("/hi"), 200, false);
    int all[] = {header, body, idle, good, silent};
    for (int i = 0; i < 5; i++)
        close(all[i]);
    http_server_stop(server, 1000);
}

static void the_limit_of_connections_keeps_room(void **state)
{
    struct http_server *server = start_with((struct http_server_options){.max_connections = 50});
    int fds[60];
    for (int i = 0; i < 60; i++)
        fds[i] = dial(server);
    sleep_ms(1200); /* the oldest half-open ones go */
    ask(server, GET("/hi"), 200, false);
    struct http_server_stats stats;
    http_server_stats(server, &stats);
    assert_true(stats.connections < 50);
    for (int i = 0; i < 60; i++)
        close(fds[i]);
    http_server_stop(server, 1000);
}

static void *stop_thread(void *server)
{
    http_server_stop(server, 2000);
    return NULL;
}

static void stop_lets_what_is_under_way_finish(void **state)
{
    struct http_server *server = start();
    int busy = dial(server), streaming = dial(server), waiting = dial(server);
    pthread_t thread;
    atomic_store(&gone_calls, 0);
    put(streaming, GET("/later"));
    struct http_later *stream = wait_kept();
    http_later_stream(stream, "text/event-stream");
    get(streaming, "\r\n\r\n", 1000, NULL);
    put(waiting, GET("/later"));
    struct http_later *handle = wait_kept();
    atomic_store(&gate, 1);
    put(busy, GET("/block"));
    while (atomic_load(&blocked) == 0)
        sleep_ms(2);
    int64_t began = now_ms();
    assert_int_equal(pthread_create(&thread, NULL, stop_thread, server), 0);
    sleep_ms(200);
    atomic_store(&gate, 0);
    const char *text = get(busy, "there", 1000, NULL);
    assert_has(text, "200 OK");
    assert_has(text, "onnection: close");
    /* the answerers of the other two never end in order */
    text = get(waiting, "}}", 5000, NULL);
    assert_has(text, "HTTP/1.1 503");
    assert_has(text, "shutting_down");
    bool closed;
    get(streaming, NULL, 3000, &closed);
    assert_true(closed);
    pthread_join(thread, NULL);
    assert_true(now_ms() - began < 8000);
    assert_int_equal(atomic_load(&gone_calls), 2);
    /* their handles outlive the server */
    http_later_write(stream, "x", 1);
    http_later_finish(stream);
    http_later_json(handle, 200, json_object());
    close(busy);
    close(streaming);
    close(waiting);
}

static void stop_waits_for_a_body_that_is_on_its_way(void **state)
{
    struct http_server *server = start();
    int sending = dial(server);
    pthread_t thread;
    put(sending, POST("Content-Length: 7\r\n", "{\"a\""));
    sleep_ms(50);
    int64_t began = now_ms();
    assert_int_equal(pthread_create(&thread, NULL, stop_thread, server), 0);
    sleep_ms(200);
    put(sending, ":1}");
    assert_has(get(sending, "}", 1000, NULL), "200 OK");
    pthread_join(thread, NULL);
    assert_true(now_ms() - began < 2000);
    close(sending);
}

static void a_quiet_server_takes_nothing_new(void **state)
{
    struct http_server *server = start();
    int fd = dial(server), other = dial(server);
    put(fd, GET("/hi"));
    get(fd, "there", 1000, NULL);
    put(other, GET("/hi"));
    get(other, "there", 1000, NULL);
    http_server_quiesce(server);
    bool closed;
    put(fd, GET("/hi"));
    const char *text = get(fd, NULL, 1000, &closed);
    assert_has(text, "HTTP/1.1 503");
    assert_has(text, "shutting_down");
    assert_true(closed);
    put(other, GET("/fast")); /* still alive */
    assert_has(get(other, "there", 1000, NULL), "200 OK");
    const char *url = http_server_url(server);
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_port = htons((uint16_t)atoi(strrchr(url, ':') + 1)),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int late = socket(AF_INET, SOCK_STREAM, 0);
    assert_int_equal(connect(late, (struct sockaddr *)&address, sizeof(address)), -1);
    close(late);
    close(fd);
    close(other);
    http_server_stop(server, 1000);
}

static void keys_are_needed_where_the_route_says_so(void **state)
{
    struct http_server *server = start();
    const char *text = ask(server, GET("/key"), 401, false);
    assert_has(text, "\"code\":\"invalid_api_key\"");
    text = ask(server, "GET /key HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-secret\r\n\r\n",
               401, false);
    assert_null(strstr(text, "secret"));
    ask(server, "GET /key HTTP/1.1\r\nHost: x\r\nAuthorization: Basic eDp5\r\n\r\n", 401, false);
    /* one address guessing, faster than it is forgiven */
    for (int i = 0; i < 1000 && !strstr(text, "HTTP/1.1 429"); i++) {
        int fd = dial(server);
        put(fd, GET("/key"));
        text = get(fd, "}}", 1000, NULL);
        close(fd);
    }
    assert_has(text, "HTTP/1.1 429");
    assert_has(text, "too_many_failed_keys");
    ask(server, GET("/hi"), 200, false);
    http_server_stop(server, 1000);
}

/* Of nobody; its checksum is right, so only the database can tell. */
#define WELL_FORMED                               \
    "gk-"                                         \
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" \
    "2UKuNk"

/* An upload waits for its key to be looked up while its body is there already: the event thread may
 * look at the request in the very moment in which a handler thread is through with it. */
static void an_upload_waits_for_its_key(void **state)
{
    struct http_server *server = start();
    static const char body[] = "--b\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\n"
                               "fine-tune\r\n--b--\r\n";
    char request[512];
    int length =
        snprintf(request, sizeof(request),
                 "POST /upload HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " WELL_FORMED "\r\n"
                 "Content-Type: multipart/form-data; boundary=b\r\n"
                 "Content-Length: %zu\r\n\r\n",
                 sizeof(body) - 1);
    memcpy(request + length, body, sizeof(body));
    for (int i = 0; i < 200; i++) {
        bool closed;
        int fd = dial(server);
        put(fd, request);
        /* There is no database to look it up in. */
        assert_has(get(fd, "}}", 5000, &closed), "HTTP/1.1 503");
        close(fd);
    }
    http_server_stop(server, 1000);
}

static void beyond_loopback_needs_tls_or_a_word(void **state)
{
    struct http_server *server = NULL;
    struct http_server_options options = {.routes = routes, .route_count = 1};
    static const char *const open[] = {"0.0.0.0:0", "*:0", "[::]:0"};
    for (size_t i = 0; i < 3; i++) {
        struct err err = {0};
        options.listen = open[i];
        assert_int_equal(http_server_start(&server, &options, &err), -1);
        assert_has(err.message, "--insecure");
    }
    struct err err = {0};
    options.listen = "0.0.0.0:0";
    options.insecure = true;
    assert_int_equal(http_server_start(&server, &options, &err), 0);
    http_server_stop(server, 0);
    static const char *const wrong[] = {"",       "8080",   "127.0.0.1", "127.0.0.1:x",
                                        "::1:80", "a:70000"};
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        err_clear(&err);
        options.listen = wrong[i];
        assert_int_equal(http_server_start(&server, &options, &err), -1);
        assert_has(err.message, "HOST:PORT");
    }
    err_clear(&err);
    options.listen = "127.0.0.1:0";
    options.tls_cert = "/nonexistent";
    assert_int_equal(http_server_start(&server, &options, &err), -1);
    assert_has(err.message, "belong together");
}

int main(void)
{
    json_text_setup();
    log_setup("test", LOG_LEVEL_ERROR + 1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(answers_carry_the_headers_that_clients_read),
        cmocka_unit_test(requests_follow_one_another_on_a_connection),
        cmocka_unit_test(json_bodies_are_read_strictly),
        cmocka_unit_test(bodies_have_limits),
        cmocka_unit_test(malformed_requests_are_refused_and_closed),
        cmocka_unit_test(a_full_queue_is_503_and_the_fast_lane_stays_open),
        cmocka_unit_test(answers_may_come_later),
        cmocka_unit_test(streams_flow_ping_and_end),
        cmocka_unit_test(a_slow_reader_fills_its_ring_and_nobody_elses),
        cmocka_unit_test(a_client_that_goes_is_noticed),
        cmocka_unit_test(slow_drips_are_cut),
        cmocka_unit_test(the_limit_of_connections_keeps_room),
        cmocka_unit_test(stop_lets_what_is_under_way_finish),
        cmocka_unit_test(stop_waits_for_a_body_that_is_on_its_way),
        cmocka_unit_test(a_quiet_server_takes_nothing_new),
        cmocka_unit_test(keys_are_needed_where_the_route_says_so),
        cmocka_unit_test(an_upload_waits_for_its_key),
        cmocka_unit_test(beyond_loopback_needs_tls_or_a_word),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
