/* multipart.h: whatever the pieces in which a body arrives, the same parts come out. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/base/strbuf.h"
#include "server/multipart.h"

/* What came out, as one text: <name|filename|type>data</> for each part. */
static int on_part(void *context, const struct multipart_part *part, struct err *err)
{
    strbuf_addf(context, "<%s|%s|%s>", part->name, part->has_file_name ? part->file_name : "-",
                part->content_type);
    return 0;
}

static int on_data(void *context, const char *data, size_t len, struct err *err)
{
    strbuf_add(context, data, len);
    return 0;
}

static int on_part_end(void *context, struct err *err)
{
    strbuf_addstr(context, "</>");
    return 0;
}

/* Feeds `body` in pieces that end at the given offsets (0: no cut there). */
static int parse(const char *type, const char *body, size_t len, size_t cut, size_t cut2,
                 struct strbuf *out, struct err *err)
{
    const struct multipart_events events = {on_part, on_data, on_part_end, out};
    struct multipart mp;
    int rc = multipart_init(&mp, type, &events, err);
    size_t from = 0;
    size_t ends[] = {cut, cut2, len};
    for (int i = 0; i < 3 && rc == 0; i++) {
        if (ends[i] < from)
            continue;
        /* A copy of just that size, so that a reader that looks past a piece is caught. */
        size_t n = ends[i] - from;
        char *piece = malloc(n ? n : 1);
        assert_non_null(piece);
        memcpy(piece, body + from, n);
        rc = multipart_feed(&mp, piece, n, err);
        free(piece);
        from = ends[i];
    }
    if (rc == 0)
        rc = multipart_end(&mp, err);
    multipart_release(&mp);
    return rc;
}

static int parse_bytes(const char *type, const char *body, size_t len, struct strbuf *out,
                       struct err *err)
{
    const struct multipart_events events = {on_part, on_data, on_part_end, out};
    struct multipart mp;
    int rc = multipart_init(&mp, type, &events, err);
    for (size_t i = 0; i < len && rc == 0; i++)
        rc = multipart_feed(&mp, body + i, 1, err);
    if (rc == 0)
        rc = multipart_end(&mp, err);
    multipart_release(&mp);
    return rc;
}

struct message {
    const char *type, *body, *want; /* want NULL: an error that says `error` */
    const char *error;
};

#define TYPE "multipart/form-data; boundary=XX"
#define PART(head, data) "--XX\r\n" head "\r\n\r\n" data "\r\n"
#define FIELD(name, data) PART("Content-Disposition: form-data; name=" name, data)
#define END "--XX--\r\n"

static const struct message messages[] = {
    {TYPE, FIELD("\"purpose\"", "fine-tune") END, "<purpose|-|>fine-tune</>", NULL},
    /* the SDK's order: the file first */
    {TYPE,
     PART("Content-Disposition: form-data; name=\"file\"; filename=\"a.jsonl\"\r\n"
          "Content-Type: application/octet-stream",
          "{}\r\n{}\n") FIELD("\"purpose\"", "fine-tune") END,
     "<file|a.jsonl|application/octet-stream>{}\r\n{}\n</><purpose|-|>fine-tune</>", NULL},
    {TYPE, FIELD("purpose", "x") END, "<purpose|-|>x</>", NULL},
    {TYPE, FIELD("\"a\\\"b\\\\c\"", "x") END, "<a\"b\\c|-|>x</>", NULL},
    {TYPE, FIELD("\"a%22b\"", "x") END, "<a%22b|-|>x</>", NULL},
    {TYPE, FIELD("\"f\"; filename=\"../../etc/passwd\"", "x") END, "<f|../../etc/passwd|>x</>",
     NULL},
    {TYPE, FIELD("\"f\"; filename=\"\"", "x") END, "<f||>x</>", NULL},
    {TYPE, FIELD("\"f\"; filename=plain.txt", "x") END, "<f|plain.txt|>x</>", NULL},
    {TYPE, FIELD("f; filename*=UTF-8''na%20%C3%AFve.jsonl", "x") END,
     "<f|na \xc3\xafve.jsonl|>x</>", NULL},
    {TYPE, FIELD("f; filename*=utf-8'en'b; filename=\"a\"", "x") END, "<f|b|>x</>", NULL},
    {TYPE, FIELD("f; filename=\"a\"; filename*=utf-8''b", "x") END, "<f|b|>x</>", NULL},
    {TYPE, FIELD("\"expires_after[seconds]\"", "3600") END, "<expires_after[seconds]|-|>3600</>",
     NULL},
    {TYPE, FIELD("a", "") FIELD("b", "") END, "<a|-|></><b|-|></>", NULL},
    {TYPE, "preamble\r\n" FIELD("a", "x") END "epilogue --XX\r\n", "<a|-|>x</>", NULL},
    {TYPE, FIELD("a", "x") "--XX--", "<a|-|>x</>", NULL},
    {TYPE, END, "", NULL},
    {TYPE, "--XX \t\r\nContent-Disposition: form-data; name=a\r\n\r\nx\r\n" END, "<a|-|>x</>",
     NULL},
    /* data that nearly is a delimiter */
    {TYPE, FIELD("a", "\r\n--X\r\n--\r\r\n\r\n-") END, "<a|-|>\r\n--X\r\n--\r\r\n\r\n-</>", NULL},
    {TYPE, FIELD("a", "\r\n\r\n\r\n--Xx--XX") END, "<a|-|>\r\n\r\n\r\n--Xx--XX</>", NULL},
    {TYPE, FIELD("a", "\r") END, "<a|-|>\r</>", NULL},
    {TYPE, FIELD("a", "\r\n") END, "<a|-|>\r\n</>", NULL},
    {"multipart/form-data; boundary=\"X X\"; charset=utf-8",
     "--X X\r\nContent-Disposition: form-data; name=a\r\n\r\nx\r\n--X X--\r\n", "<a|-|>x</>", NULL},
    {"Multipart/Form-Data; Boundary=x",
     "--x\r\nCONTENT-DISPOSITION: Form-Data; NAME=a\r\n\r\nx\r\n--x--\r\n", "<a|-|>x</>", NULL},
    {TYPE, PART("X-Other: 1\r\nContent-Disposition: form-data; name=a;", "x") END, "<a|-|>x</>",
     NULL},

    {TYPE, "", NULL, "before its last boundary"},
    {TYPE, FIELD("a", "x"), NULL, "before its last boundary"},
    {TYPE, FIELD("a", "x") "--XX", NULL, "before its last boundary"},
    {TYPE, FIELD("a", "x") "--XX-", NULL, "before its last boundary"},
    {TYPE, "--XX\r\nContent-Disposition: form-data; na", NULL, "before its last boundary"},
    {TYPE, "--XX\n", NULL, "neither CRLF"},
    {TYPE, "--XXY\r\n", NULL, "neither CRLF"},
    {TYPE, "--XX-x", NULL, "a single \"-\""},
    {TYPE, "--XX\rx", NULL, "CR without LF"},
    {TYPE, "--XX\r\n\r\nx\r\n" END, NULL, "Content-Disposition is missing"},
    {TYPE, PART("Content-Type: text/plain", "x") END, NULL, "Content-Disposition is missing"},
    {TYPE, PART("Content-Disposition: form-data", "x") END, NULL, "has no name"},
    {TYPE, PART("Content-Disposition: form-data; name=\"\"", "x") END, NULL, "1 to 256 bytes"},
    {TYPE, PART("Content-Disposition: form-data; name=\"a", "x") END, NULL, "malformed"},
    {TYPE, PART("Content-Disposition: form-data; name=a; name=b", "x") END, NULL, "once"},
    {TYPE, PART("Content-Disposition: attachment; name=a", "x") END, NULL, "must be form-data"},
    {TYPE,
     PART("Content-Disposition: form-data; name=a\r\nContent-Disposition: form-data; name=b", "x")
         END,
     NULL, "given twice"},
    {TYPE, PART("Content-Disposition: form-data; name=a\nX: y", "x") END, NULL, "control byte"},
    {TYPE, PART("Content-Disposition: form-data; name=a\r\n folded", "x") END, NULL, "malformed"},
    {TYPE, PART("nonsense", "x") END, NULL, "malformed"},
    {TYPE, FIELD("f; filename*=latin1''a", "x") END, NULL, "filename*"},
    {TYPE, FIELD("f; filename*=UTF-8''%4", "x") END, NULL, "filename*"},
    {TYPE, FIELD("f; filename*=UTF-8''%00", "x") END, NULL, "filename*"},
    {TYPE,
     PART("Content-Disposition: form-data; name=a\r\nContent-Transfer-Encoding: base64", "eA==")
         END,
     NULL, "Content-Transfer-Encoding"},
    {TYPE,
     FIELD("a", "1") FIELD("b", "2") FIELD("c", "3") FIELD("d", "4") FIELD("e", "5") FIELD("f", "6")
         FIELD("g", "7") FIELD("h", "8") FIELD("i", "9") FIELD("j", "10") FIELD("k", "11")
             FIELD("l", "12") FIELD("m", "13") FIELD("n", "14") FIELD("o", "15") FIELD("p", "16")
                 FIELD("q", "17") END,
     NULL, "more than 16 parts"},
    {"text/plain", "", NULL, "must be multipart/form-data"},
    {"multipart/form-data", "", NULL, "boundary is missing"},
    {"multipart/form-data; boundary=", "", NULL, "1 to 70"},
    {"multipart/form-data; boundary=\"a\tb\"", "", NULL, "illegal character"},
    {"multipart/form-data; boundary=\"a \"", "", NULL, "1 to 70"},
    {"multipart/form-data; boundary=a; boundary=b", "", NULL, "1 to 70"},
    {"multipart/form-data; "
     "boundary=0123456789012345678901234567890123456789012345678901234567890123"
     "4567890",
     "", NULL, "1 to 70"},
};

static void check(const struct message *m, int rc, const struct strbuf *out, const struct err *err)
{
    assert_false(strbuf_failed(out));
    if (m->want) {
        if (rc != 0)
            print_error("refused: %s\n", err->message);
        assert_int_equal(rc, 0);
        assert_string_equal(out->data, m->want);
    } else {
        assert_int_equal(rc, -1);
        assert_int_equal(err->kind, ERR_INVALID);
        if (!strstr(err->message, m->error))
            print_error("got: %s\n", err->message);
        assert_non_null(strstr(err->message, m->error));
    }
}

static void each_message_reads_the_same_in_all_splits(void **state)
{
    size_t runs = 0;
    for (size_t i = 0; i < sizeof(messages) / sizeof(messages[0]); i++) {
        const struct message *m = &messages[i];
        size_t len = strlen(m->body);
        struct strbuf out;
        strbuf_init(&out, 1 << 20);
        /* all pairs of cuts for short messages; for long ones all single cuts */
        for (size_t a = 0; a <= len; a++) {
            for (size_t b = a; b <= (len < 140 ? len : a); b++, runs++) {
                struct err err = {0};
                strbuf_reset(&out);
                check(m, parse(m->type, m->body, len, a, b, &out, &err), &out, &err);
            }
        }
        struct err err = {0};
        strbuf_reset(&out);
        check(m, parse_bytes(m->type, m->body, len, &out, &err), &out, &err);
        strbuf_release(&out);
    }
    assert_true(runs > 50000);
}

static void a_part_header_has_a_limit(void **state)
{
    for (int extra = 0; extra < 2; extra++) {
        struct strbuf body, out;
        struct err err = {0};
        strbuf_init(&body, 1 << 20);
        strbuf_init(&out, 1 << 20);
        static const char head[] = "Content-Disposition: form-data; name=a\r\nX: ";
        strbuf_addf(&body, "--XX\r\n%s", head);
        size_t fill = MULTIPART_HEADER_MAX - (sizeof(head) - 1) - 4;
        for (size_t i = 0; i < fill + (size_t)extra; i++)
            strbuf_addch(&body, 'y');
        strbuf_addstr(&body, "\r\n\r\nx\r\n--XX--\r\n");
        int rc = parse(TYPE, body.data, body.len, 0, 0, &out, &err);
        assert_int_equal(rc, extra ? -1 : 0);
        if (extra)
            assert_non_null(strstr(err.message, "8192 bytes"));
        strbuf_release(&body);
        strbuf_release(&out);
    }
}

static int refuse_data(void *context, const char *data, size_t len, struct err *err)
{
    return err_set(err, ERR_TOO_LARGE, "enough");
}

static void an_error_of_the_receiver_stops_the_reader_and_sticks(void **state)
{
    struct strbuf out;
    strbuf_init(&out, 1000);
    const struct multipart_events events = {on_part, refuse_data, on_part_end, &out};
    struct multipart mp;
    struct err err = {0}, again = {0}, end = {0};
    assert_int_equal(multipart_init(&mp, TYPE, &events, &err), 0);
    const char body[] = FIELD("a", "x") END;
    assert_int_equal(multipart_feed(&mp, body, sizeof(body) - 1, &err), -1);
    assert_int_equal(err.kind, ERR_TOO_LARGE);
    assert_non_null(strstr(err.message, "part 1: enough"));
    assert_int_equal(multipart_feed(&mp, body, sizeof(body) - 1, &again), -1);
    assert_int_equal(multipart_end(&mp, &end), -1);
    assert_string_equal(again.message, err.message);
    assert_string_equal(end.message, err.message);
    assert_string_equal(out.data, "<a|-|>");
    multipart_release(&mp);
    multipart_release(&mp);
    strbuf_release(&out);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_message_reads_the_same_in_all_splits),
        cmocka_unit_test(a_part_header_has_a_limit),
        cmocka_unit_test(an_error_of_the_receiver_stops_the_reader_and_sticks),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
