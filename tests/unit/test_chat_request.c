/* Chat bodies: what is honoured arrives, what is refused is refused by name. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/base/json_text.h"
#include "server/chat_request.h"

static struct chat_request chat;
static struct err err;
static json_t *json;

static int setup(void **state)
{
    json_text_setup();
    err_clear(&err);
    return 0;
}

static int teardown(void **state)
{
    chat_request_release(&chat);
    json_decref(json);
    json = NULL;
    return 0;
}

static int parse(const char *body)
{
    err_clear(&err);
    json_decref(json);
    json = json_text_load(body, strlen(body), 0, &err);
    assert_non_null(json);
    return chat_request_parse(&chat, json, &err);
}

#define BODY(more) "{\"model\":\"m\",\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]" more "}"

static void defaults_are_the_contracts(void **state)
{
    assert_int_equal(parse(BODY("")), 0);
    assert_string_equal(chat.model, "m");
    assert_int_equal(chat.message_count, 1);
    assert_string_equal(chat.messages[0].role, "user");
    assert_string_equal(chat.messages[0].content, "hi");
    assert_true(chat.temperature == 1 && chat.top_p == 1);
    assert_false(chat.has_seed || chat.stream || chat.include_usage);
    assert_int_equal(chat.max_tokens, 0);
    assert_int_equal(chat.stop_count, 0);
}

static void everything_honoured_arrives(void **state)
{
    assert_int_equal(parse(BODY(",\"temperature\":0.25,\"top_p\":0.5,\"seed\":-7,\"max_tokens\":5,"
                                "\"max_completion_tokens\":6,\"stop\":[\"a\",\"\",\"b\"],"
                                "\"stream\":true,\"stream_options\":{\"include_usage\":true}")),
                     0);
    assert_true(chat.temperature == 0.25 && chat.top_p == 0.5);
    assert_true(chat.has_seed && chat.seed == (uint64_t)-7);
    assert_int_equal(chat.max_tokens, 6);
    assert_int_equal(chat.stop_count, 2);
    assert_string_equal(chat.stop[1], "b");
    assert_true(chat.stream && chat.include_usage);
}

static void text_parts_are_one_text(void **state)
{
    assert_int_equal(parse("{\"model\":\"m\",\"messages\":["
                           "{\"role\":\"developer\",\"content\":\"d\"},"
                           "{\"role\":\"assistant\",\"content\":null},"
                           "{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"a\"},"
                           "{\"type\":\"text\",\"text\":\"b\"}]}]}"),
                     0);
    assert_string_equal(chat.messages[0].role, "system");
    assert_string_equal(chat.messages[1].content, "");
    assert_string_equal(chat.messages[2].content, "ab");
}

static void neutral_values_and_nulls_pass(void **state)
{
    assert_int_equal(parse(BODY(",\"n\":1,\"logprobs\":false,\"tools\":null,\"stop\":null,"
                                "\"response_format\":{\"type\":\"text\"},\"store\":false,"
                                "\"user\":\"u\",\"metadata\":{\"a\":\"b\"},\"temperature\":null,"
                                "\"service_tier\":\"auto\",\"seed\":null")),
                     0);
    assert_false(chat.has_seed);
}

static void refused(const char *body, const char *code, const char *param)
{
    assert_int_equal(parse(body), -1);
    assert_int_equal(err.kind, ERR_INVALID);
    assert_string_equal(err.code, code);
    assert_string_equal(err.param, param);
    assert_null(chat.messages);
}

static void what_is_not_built_is_refused_by_name(void **state)
{
    refused(BODY(",\"n\":2"), "unsupported_parameter", "n");
    refused(BODY(",\"tools\":[{\"type\":\"function\"}]"), "unsupported_parameter", "tools");
    refused(BODY(",\"logprobs\":true"), "unsupported_parameter", "logprobs");
    refused(BODY(",\"response_format\":{\"type\":\"json_object\"}"), "unsupported_parameter",
            "response_format");
    refused(BODY(",\"nonsense\":1"), "unknown_parameter", "nonsense");
    refused("{\"model\":\"m\",\"messages\":[{\"role\":\"user\",\"content\":"
            "[{\"type\":\"image_url\",\"image_url\":{}}]}]}",
            "unsupported_parameter", "messages[0].content");
}

static void broken_messages_name_the_place(void **state)
{
    refused("{\"messages\":[]}", "missing_required_parameter", "model");
    refused("{\"model\":\"m\"}", "missing_required_parameter", "messages");
    refused("{\"model\":\"m\",\"messages\":[]}", "empty_array", "messages");
    refused("{\"model\":\"m\",\"messages\":\"hi\"}", "invalid_type", "messages");
    refused("{\"model\":\"m\",\"messages\":[1]}", "invalid_type", "messages[0]");
    refused("{\"model\":\"m\",\"messages\":[{\"content\":\"x\"}]}", "missing_required_parameter",
            "messages[0].role");
    refused("{\"model\":\"m\",\"messages\":[{\"role\":\"boss\",\"content\":\"x\"}]}",
            "invalid_value", "messages[0].role");
    refused("{\"model\":\"m\",\"messages\":[{\"role\":\"user\"}]}", "missing_required_parameter",
            "messages[0].content");
    refused("{\"model\":\"m\",\"messages\":[{\"role\":\"user\",\"content\":7}]}", "invalid_type",
            "messages[0].content");
    refused("{\"model\":\"m\",\"messages\":[{\"role\":\"user\",\"content\":[]}]}", "invalid_type",
            "messages[0].content");
}

static void bounds_are_held(void **state)
{
    refused(BODY(",\"temperature\":2.5"), "decimal_above_max_value", "temperature");
    refused(BODY(",\"top_p\":-0.1"), "decimal_below_min_value", "top_p");
    refused(BODY(",\"max_tokens\":0"), "integer_below_min_value", "max_tokens");
    refused(BODY(",\"seed\":\"x\""), "invalid_type", "seed");
    refused(BODY(",\"stop\":[\"a\",\"b\",\"c\",\"d\",\"e\"]"), "array_above_max_length", "stop");
    refused(BODY(",\"stop\":[1]"), "invalid_type", "stop");
    refused(BODY(",\"stream\":1"), "invalid_type", "stream");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(defaults_are_the_contracts, setup, teardown),
        cmocka_unit_test_setup_teardown(everything_honoured_arrives, setup, teardown),
        cmocka_unit_test_setup_teardown(text_parts_are_one_text, setup, teardown),
        cmocka_unit_test_setup_teardown(neutral_values_and_nulls_pass, setup, teardown),
        cmocka_unit_test_setup_teardown(what_is_not_built_is_refused_by_name, setup, teardown),
        cmocka_unit_test_setup_teardown(broken_messages_name_the_place, setup, teardown),
        cmocka_unit_test_setup_teardown(bounds_are_held, setup, teardown),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
