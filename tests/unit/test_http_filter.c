/* http_filter.h, http_path.h, http_route.h: what is refused before anything is read. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "server/http_filter.h"
#include "server/http_path.h"
#include "server/http_route.h"

/* "Name: value" lines, separated by '|', to a header list in `store`. */
static int headers_of(const char *lines, char *store, struct http_header *headers)
{
    int count = 0;
    strcpy(store, lines);
    for (char *line = store; *line;) {
        char *bar = strchr(line, '|');
        char *next = bar ? bar + 1 : line + strlen(line);
        if (bar)
            *bar = '\0';
        char *colon = strchr(line, ':');
        assert_non_null(colon);
        *colon = '\0';
        char *value = colon + 1;
        while (*value == ' ')
            value++;
        headers[count++] = (struct http_header){
            .name = line, .name_len = strlen(line), .value = value, .value_len = strlen(value)};
        line = next;
    }
    return count;
}

static int filter(const char *lines, int minor, struct http_head *head, int *status,
                  struct err *err)
{
    static char store[8192]; /* head points into it */
    static struct http_header headers[128];
    return http_filter_headers(headers, headers_of(lines, store, headers), minor, head, status,
                               err);
}

static void good_heads_are_read(void **state)
{
    struct http_head head;
    struct err err = {0};
    int status;
    assert_int_equal(filter("Host: a:80|Content-Length: 42|Authorization: Bearer k|Content-Type: x|"
                            "Idempotency-Key: i|Expect: 100-Continue|X: \x80\xff\t",
                            1, &head, &status, &err),
                     0);
    assert_int_equal(head.content_length, 42);
    assert_false(head.chunked);
    assert_true(head.expects_continue);
    assert_string_equal(head.authorization, "Bearer k");
    assert_string_equal(head.idempotency_key, "i");
    assert_string_equal(head.host, "a:80");
    assert_int_equal(filter("Host: [::1]:8080|transfer-encoding: Chunked", 1, &head, &status, &err),
                     0);
    assert_true(head.chunked);
    assert_int_equal(head.content_length, -1);
    assert_int_equal(filter("X: y", 0, &head, &status, &err), 0);
}

static void smuggling_shapes_are_refused(void **state)
{
    static const struct {
        const char *lines;
        int status;
        const char *says;
    } bad[] = {
        {"Host: a|Content-Length: 1|Content-Length: 2", 400, "Content-Length is given twice"},
        {"Host: a|Content-Length: 1|content-length: 1", 400, "Content-Length is given twice"},
        {"Host: a|Host: b", 400, "Host is given twice"},
        {"Host: a|Transfer-Encoding: chunked|Transfer-Encoding: chunked", 400, "given twice"},
        {"Host: a|Transfer-Encoding: identity|Transfer-Encoding: chunked", 400, "given twice"},
        {"Host: a|Content-Length: 3|Transfer-Encoding: chunked", 400, "exclude each other"},
        {"Host: a|Transfer-Encoding: xchunked", 400, "only Transfer-Encoding"},
        {"Host: a|Transfer-Encoding: gzip, chunked", 400, "only Transfer-Encoding"},
        {"Host: a|Transfer-Encoding: chunked ", 400, "only Transfer-Encoding"},
        {"Host: a|Transfer-Encoding: ", 400, "only Transfer-Encoding"},
        {"Host: a|Transfer-Encoding: identity", 400, "only Transfer-Encoding"},
        {"Host: a|Transfer-Encoding : chunked", 400, "malformed name"},
        {"Host: a|X\t: y", 400, "malformed name"},
        {" Host: a|Host: b", 400, "malformed name"},
        {"Host: a|: y", 400, "malformed name"},
        {"Host: a|X(: y", 400, "malformed name"},
        {"Host: a|X: a\rb", 400, "control bytes"},
        {"Host: a|X: a\nb", 400, "control bytes"},
        {"Host: a|X: \x7f", 400, "control bytes"},
        {"Host: a|Content-Length: +3", 400, "not a number"},
        {"Host: a|Content-Length: -3", 400, "not a number"},
        {"Host: a|Content-Length: 3, 3", 400, "not a number"},
        {"Host: a|Content-Length: 0x3", 400, "not a number"},
        {"Host: a|Content-Length: ", 400, "is empty"},
        {"Host: a|Content-Length: 9223372036854775808", 400, "not a number"},
        {"X: y", 400, "Host is missing"},
        {"Host: ", 400, "Host is malformed"},
        {"Host: a/b", 400, "Host is malformed"},
        {"Host: a b", 400, "Host is malformed"},
        {"Host: u@a", 400, "Host is malformed"},
        {"Host: a|Content-Encoding: gzip", 415, "Content-Encoding"},
        {"Host: a|content-encoding: identity", 415, "Content-Encoding"},
        {"Host: a|Expect: tea", 417, "100-continue"},
        {"Host: a|Authorization: Bearer a|Authorization: Bearer b", 400, "given twice"},
        {"Host: a|Idempotency-Key: a|Idempotency-Key: b", 400, "given twice"},
    };
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        struct http_head head;
        struct err err = {0};
        int status = 0;
        assert_int_equal(filter(bad[i].lines, 1, &head, &status, &err), -1);
        if (!strstr(err.message, bad[i].says))
            print_error("%s: %s\n", bad[i].lines, err.message);
        assert_non_null(strstr(err.message, bad[i].says));
        assert_int_equal(status, bad[i].status);
    }
    struct http_head head;
    struct err err = {0};
    int status;
    assert_int_equal(filter("Host: a|Transfer-Encoding: chunked", 0, &head, &status, &err), -1);
}

static void headers_are_counted(void **state)
{
    struct http_header headers[HTTP_HEADERS_MAX + 1];
    struct http_head head;
    int status;
    for (int i = 0; i <= HTTP_HEADERS_MAX; i++)
        headers[i] = (struct http_header){.name = "X", .name_len = 1, .value = "", .value_len = 0};
    headers[0] = (struct http_header){.name = "Host", .name_len = 4, .value = "a", .value_len = 1};
    struct err err = {0};
    assert_int_equal(http_filter_headers(headers, HTTP_HEADERS_MAX, 1, &head, &status, &err), 0);
    assert_int_equal(http_filter_headers(headers, HTTP_HEADERS_MAX + 1, 1, &head, &status, &err),
                     -1);
    assert_int_equal(status, 400);
}

/* A head parsed in place, as MHD 0.9 leaves it: each separator became a NUL. */
static void layout_shows_folds_and_bare_line_feeds(void **state)
{
    static const struct {
        const char *text; /* '~': a byte that a line end left */
        int rc;           /* 0, -1 between two fields, -2 behind the last */
    } cases[] = {
        {"HTTP/1.1~~Host~ a~~X~ b~~~~", 0}, {"HTTP/1.1~~Host~ a~X~ b~~~~", -1},
        {"HTTP/1.1~Host~ a~~X~ b~~~~", -1}, {"HTTP/1.1~~Host~ a~~~~X~ b~~~~", -1},
        {"HTTP/1.1~~Host~a~~~~", 0},        {"HTTP/1.1~~Host~ a~~~ y~~", -2},
        {"HTTP/1.1~~Host~ a~~~G", -2},      {"HTTP/1.1~~~~", 0},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        char text[64];
        struct http_header headers[4];
        int count = 0;
        strcpy(text, cases[i].text);
        size_t len = strlen(text);
        for (size_t j = 0; j < len; j++)
            if (text[j] == '~')
                text[j] = '\0';
        /* -2: the list ends with Host, whatever comes behind it */
        char *header_end = text + (cases[i].rc == -2 ? sizeof("HTTP/1.1~~Host~ a") - 1 : len);
        for (char *p = text + strlen(text); p < header_end;) {
            while (p < header_end && !*p)
                p++;
            if (p == header_end)
                break;
            char *value = p + strlen(p) + 1;
            while (*value == ' ')
                value++;
            headers[count++] = (struct http_header){
                .name = p, .name_len = strlen(p), .value = value, .value_len = strlen(value)};
            p = value + strlen(value);
        }
        struct err err = {0};
        assert_int_equal(http_filter_layout(headers, count, text + strlen("HTTP/1.1"), &err),
                         cases[i].rc ? -1 : 0);
    }
}

static void paths_are_split_then_decoded_once(void **state)
{
    struct http_path path;
    struct err err = {0};
    assert_int_equal(http_path_parse(&path,
                                     "/v1/models/ft:a%3Ab%2Fc?limit=2&metadata%5Bk%5D=a+b%26"
                                     "&x&=&e=&u=%C3%A9",
                                     &err),
                     0);
    assert_int_equal(path.segment_count, 3);
    assert_string_equal(path.segments[0], "v1");
    assert_string_equal(path.segments[2], "ft:a:b/c");
    assert_false(path.slash[0]);
    assert_true(path.slash[2]);
    assert_int_equal(path.query_count, 6);
    assert_string_equal(path.query[1].name, "metadata[k]");
    assert_string_equal(path.query[1].value, "a b&");
    assert_string_equal(path.query[2].name, "x");
    assert_string_equal(path.query[2].value, "");
    assert_string_equal(path.query[5].value, "\xc3\xa9");
    http_path_release(&path);
    assert_int_equal(http_path_parse(&path, "/a%252e%252e/+", &err), 0);
    assert_string_equal(path.segments[0], "a%2e%2e");
    assert_string_equal(path.segments[1], "+");
    http_path_release(&path);
    assert_int_equal(http_path_parse(&path, "/a//b/", &err), 0);
    assert_int_equal(path.segment_count, 4);
    assert_string_equal(path.segments[1], "");
    http_path_release(&path);
}

static void dangerous_paths_are_refused(void **state)
{
    static const char *const bad[] = {"",
                                      "*",
                                      "v1",
                                      "http://a/b",
                                      "/a%00b",
                                      "/a%5cb",
                                      "/a\\b",
                                      "/./a",
                                      "/../a",
                                      "/a/..",
                                      "/%2e%2e/a",
                                      "/a/.%2E",
                                      "/..%2f..%2fx",
                                      "/a%2f..",
                                      "/a%2F.%2fb",
                                      "/%80",
                                      "/\x80",
                                      "/%1f",
                                      "/%7f",
                                      "/a%",
                                      "/a%2",
                                      "/a%zz",
                                      "/a b",
                                      "/a\x01",
                                      "/a#b",
                                      "/?a=%00",
                                      "/?%zz",
                                      "/?a=%ff",
                                      "/?a=%c3",
                                      "/?a=%ed%a0%80",
                                      "/?a=\xc3\xa9",
                                      "/1/2/3/4/5/6/7/8/9/0/1/2/3/4/5/6/7"};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        struct http_path path;
        struct err err = {0};
        int rc = http_path_parse(&path, bad[i], &err);
        if (rc == 0)
            print_error("accepted: %s\n", bad[i]);
        assert_int_equal(rc, -1);
        assert_int_equal(err.kind, ERR_INVALID);
        http_path_release(&path);
    }
    char longest[HTTP_URI_MAX + 2];
    memset(longest, 'a', sizeof(longest));
    longest[0] = '/';
    longest[HTTP_URI_MAX + 1] = '\0';
    struct http_path path;
    struct err err = {0};
    assert_int_equal(http_path_parse(&path, longest, &err), -1);
    assert_int_equal(err.kind, ERR_TOO_LARGE);
    http_path_release(&path);
    longest[HTTP_URI_MAX] = '\0';
    err_clear(&err);
    assert_int_equal(http_path_parse(&path, longest, &err), 0);
    http_path_release(&path);
    /* many empty names with values: the buffer holds the worst case */
    for (int i = 1; i < 4000; i += 2)
        memcpy(longest + i, i == 1 ? "?x" : i < 120 ? "&y" : "zz", 2);
    assert_int_equal(http_path_parse(&path, longest, &err), 0);
    http_path_release(&path);
}

static int nothing(struct http_request *request, struct http_response *response, struct err *err)
{
    return 0;
}

static const struct http_route routes[] = {
    {.method = "GET", .pattern = "/v1/files", .handler = nothing, .operation = "list"},
    {.method = "POST", .pattern = "/v1/files", .handler = nothing, .operation = "create"},
    {.method = "GET", .pattern = "/v1/files/{id}", .handler = nothing, .operation = "get"},
    {.method = "GET", .pattern = "/v1/files/{id}/content", .handler = nothing, .operation = "read"},
    {.method = "GET", .pattern = "/v1/files/special", .handler = nothing, .operation = "special"},
    {.method = "DELETE",
     .pattern = "/v1/models/{m}",
     .handler = nothing,
     .slash_in_param = true,
     .operation = "delete"},
};

static const char *route_of(const char *method, const char *target, const char **param,
                            char allow[64])
{
    struct http_path path;
    struct err err = {0};
    static char kept[64];
    const char *params[HTTP_PATH_PARAMS_MAX] = {NULL};
    assert_int_equal(http_path_parse(&path, target, &err), 0);
    const struct http_route *route =
        http_route_find(routes, sizeof(routes) / sizeof(routes[0]), method, &path, params, allow);
    strcpy(kept, params[0] ? params[0] : "");
    if (param)
        *param = kept;
    http_path_release(&path);
    return route ? route->operation : "-";
}

static void routes_match_whole_paths(void **state)
{
    const char *param;
    char allow[64];
    assert_string_equal(route_of("GET", "/v1/files?x=1", NULL, allow), "list");
    assert_string_equal(route_of("HEAD", "/v1/files", NULL, allow), "list");
    assert_string_equal(route_of("POST", "/v1/files", NULL, allow), "create");
    assert_string_equal(route_of("GET", "/v1/files/file-1", &param, allow), "get");
    assert_string_equal(param, "file-1");
    assert_string_equal(route_of("GET", "/v1/files/special", NULL, allow), "special");
    assert_string_equal(route_of("GET", "/v1/files/x/content", &param, allow), "read");
    assert_string_equal(param, "x");
    assert_string_equal(route_of("DELETE", "/v1/models/a%2Fb", &param, allow), "delete");
    assert_string_equal(param, "a/b");
    static const char *const none[] = {"/",
                                       "/v1",
                                       "/v1/files/",
                                       "/v1//files",
                                       "/v1/files/a%2Fb",
                                       "/v1/files/a/b",
                                       "/v1/models/a/b",
                                       "/V1/files",
                                       "/v1/files/x/content/"};
    for (size_t i = 0; i < sizeof(none) / sizeof(none[0]); i++) {
        assert_string_equal(route_of("GET", none[i], NULL, allow), "-");
        assert_string_equal(allow, "");
    }
    assert_string_equal(route_of("PUT", "/v1/files", NULL, allow), "-");
    assert_string_equal(allow, "GET, HEAD, POST, OPTIONS");
    assert_string_equal(route_of("GET", "/v1/models/x", NULL, allow), "-");
    assert_string_equal(allow, "DELETE, OPTIONS");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(good_heads_are_read),
        cmocka_unit_test(smuggling_shapes_are_refused),
        cmocka_unit_test(headers_are_counted),
        cmocka_unit_test(layout_shows_folds_and_bare_line_feeds),
        cmocka_unit_test(paths_are_split_then_decoded_once),
        cmocka_unit_test(dangerous_paths_are_refused),
        cmocka_unit_test(routes_match_whole_paths),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
