/* A later answer that fails: what its client is told of a failure of ours is where to look for it,
 * in the log under the request's id, and there it is. */
#include <arpa/inet.h>
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

#include "engine/base/json_text.h"
#include "engine/base/log.h"
#include "server/http_request.h"
#include "server/http_response.h"
#include "server/http_server.h"

#define REASON "the reason is ours alone"

static int fail_later(struct http_request *request, struct http_response *response, struct err *err)
{
    const struct http_later_options options = {0};
    struct http_later *later = http_response_later(response, &options, err);
    struct err why = {0};

    if (later == NULL)
        return -1;
    if (http_request_query(request, "stream") != NULL)
        http_later_stream(later, "text/event-stream");
    err_set(&why, ERR_INTERNAL, REASON);
    http_later_error(later, &why);
    return 0;
}

static const struct http_route routes[] = {
    {.method = "GET", .pattern = "/fail", .handler = fail_later, .operation = "fail"},
};

/* All that comes until the server closes the connection. */
static void ask(const struct http_server *server, const char *path, char *answer, size_t size)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    size_t len = 0;
    ssize_t n;

    address.sin_port = htons((uint16_t)atoi(strrchr(http_server_url(server), ':') + 1));
    assert_int_equal(connect(fd, (struct sockaddr *)&address, sizeof address), 0);
    dprintf(fd, "GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", path);
    while ((n = recv(fd, answer + len, size - 1 - len, 0)) > 0)
        len += (size_t)n;
    answer[len] = '\0';
    close(fd);
}

/* The answer to one request, and what the server has logged meanwhile. */
static void answer_and_log(const char *path, char *answer, char *log, size_t size)
{
    const struct http_server_options options = {
        .listen = "127.0.0.1:0", .routes = routes, .route_count = 1, .handler_threads = 1};
    struct http_server *server;
    FILE *file = tmpfile();
    int standard_error = dup(STDERR_FILENO);
    ssize_t n;

    assert_non_null(file);
    dup2(fileno(file), STDERR_FILENO);
    assert_int_equal(http_server_start(&server, &options, NULL), 0);
    ask(server, path, answer, size);
    http_server_stop(server, 1000);
    dup2(standard_error, STDERR_FILENO);
    close(standard_error);
    n = pread(fileno(file), log, size - 1, 0);
    assert_true(n >= 0);
    log[n] = '\0';
    fclose(file);
}

static void check(const char *path, const char *status)
{
    char answer[4096], log[4096], id[64] = "", line[128];
    const char *header;

    answer_and_log(path, answer, log, sizeof answer);
    assert_ptr_equal(strstr(answer, status), answer);
    assert_non_null(strstr(answer, "in the server's log under this answer's x-request-id"));
    assert_null(strstr(answer, REASON));
    header = strstr(answer, "x-request-id: ");
    assert_non_null(header);
    sscanf(header, "x-request-id: %63s", id);
    snprintf(line, sizeof line, "request %s: %s", id, REASON);
    if (strstr(log, line) == NULL)
        fail_msg("no \"%s\" in: %s", line, log);
}

static void an_answer_s_failure_is_in_the_log_under_its_request(void **state)
{
    check("/fail", "HTTP/1.1 500");
}

static void a_stream_s_failure_is_in_the_log_under_its_request(void **state)
{
    check("/fail?stream=1", "HTTP/1.1 200");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(an_answer_s_failure_is_in_the_log_under_its_request),
        cmocka_unit_test(a_stream_s_failure_is_in_the_log_under_its_request),
    };

    json_text_setup();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
