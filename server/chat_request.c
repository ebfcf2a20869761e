#include "server/chat_request.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/strbuf.h"
#include "server/api_check.h"
#include "server/field_table.h"

#define CONTENT_MAX ((size_t)IPC_FRAME_MAX)
#define STOP_CHARACTERS_MAX 256

/* ------------------------------------------------------------------ messages */

static int bad_content(const char *path, const char *what, struct err *err)
{
    return err_set_code(err, ERR_INVALID, "invalid_type", path, "Invalid type for '%s': %s.", path,
                        what);
}

static int add_part(struct strbuf *text, const json_t *part, const char *path, struct err *err)
{
    const char *type = json_string_value(json_object_get(part, "type"));
    const json_t *value = json_object_get(part, "text");

    if (type == NULL)
        return bad_content(path, "expected content parts with a 'type'", err);
    if (strcmp(type, "text") != 0)
        return err_set_code(
            err, ERR_INVALID, "unsupported_parameter", path,
            "Unsupported content part of type '%.40s' in '%s': the models here read "
            "text only.",
            type, path);
    if (!json_is_string(value))
        return bad_content(path, "a text part needs 'text', a string", err);
    strbuf_add(text, json_string_value(value), json_string_length(value));
    return 0;
}

/* An array of text parts reads as one text. */
static int join_parts(struct chat_request *r, const json_t *parts, const char *path,
                      const char **out, struct err *err)
{
    struct strbuf text;
    const json_t *part;
    size_t i;
    char *joined;

    if (json_array_size(parts) == 0)
        return bad_content(path, "expected at least one content part", err);
    strbuf_init(&text, CONTENT_MAX);
    json_array_foreach(parts, i, part)
    {
        if (add_part(&text, part, path, err) != 0) {
            strbuf_release(&text);
            return -1;
        }
    }
    joined = strbuf_detach(&text, NULL);
    if (joined == NULL)
        return err_set(err, ERR_NO_MEMORY, "message content: out of memory");
    r->joined[r->joined_count++] = joined;
    *out = joined;
    return 0;
}

static int parse_role(const json_t *message, int index, const char **role, struct err *err)
{
    static const char *const known[] = {"developer", "system", "user",
                                        "assistant", "tool",   "function"};
    char path[48];
    const json_t *value = json_object_get(message, "role");

    snprintf(path, sizeof path, "messages[%d].role", index);
    if (value == NULL)
        return err_set_code(err, ERR_INVALID, "missing_required_parameter", path,
                            "Missing required parameter: '%s'.", path);
    *role = json_string_value(value);
    for (size_t i = 0; *role != NULL && i < sizeof known / sizeof known[0]; i++) {
        if (strcmp(*role, known[i]) != 0)
            continue;
        if (strcmp(*role, "developer") == 0) /* the newer name of the same thing */
            *role = "system";
        if (strcmp(*role, "function") == 0) /* the older one */
            *role = "tool";
        return 0;
    }
    return err_set_code(err, ERR_INVALID, "invalid_value", path,
                        "Invalid value for '%s': expected one of 'developer', 'system', 'user', "
                        "'assistant', 'tool'.",
                        path);
}

static int parse_message(struct chat_request *r, const json_t *message, int index, struct err *err)
{
    struct engine_message *out = &r->messages[index];
    const json_t *content = json_object_get(message, "content");
    char path[48];

    snprintf(path, sizeof path, "messages[%d]", index);
    if (!json_is_object(message))
        return bad_content(path, "expected an object", err);
    if (parse_role(message, index, &out->role, err) != 0)
        return -1;
    if (json_array_size(json_object_get(message, "tool_calls")) > 0 ||
        json_is_object(json_object_get(message, "function_call")))
        return err_set_code(err, ERR_INVALID, "unsupported_parameter", path,
                            "Unsupported parameter in '%s': tool calls are not built.", path);
    snprintf(path, sizeof path, "messages[%d].content", index);
    if (json_is_string(content)) {
        out->content = json_string_value(content);
        return 0;
    }
    if (json_is_array(content))
        return join_parts(r, content, path, &out->content, err);
    if (strcmp(out->role, "assistant") == 0 && (content == NULL || json_is_null(content))) {
        out->content = "";
        return 0;
    }
    if (content == NULL)
        return err_set_code(err, ERR_INVALID, "missing_required_parameter", path,
                            "Missing required parameter: '%s'.", path);
    return bad_content(path, "expected a string or an array of text parts", err);
}

static int parse_messages(struct chat_request *r, const json_t *json, struct err *err)
{
    const json_t *messages = json_object_get(json, "messages");
    size_t count = json_array_size(messages);

    if (messages == NULL || json_is_null(messages))
        return err_set_code(err, ERR_INVALID, "missing_required_parameter", "messages",
                            "Missing required parameter: 'messages'.");
    if (!json_is_array(messages))
        return bad_content("messages", "expected an array of messages", err);
    if (count == 0)
        return err_set_code(err, ERR_INVALID, "empty_array", "messages",
                            "Invalid 'messages': empty array. Expected at least one message.");
    if (count > IPC_MESSAGES_MAX)
        return err_set_code(err, ERR_INVALID, "array_above_max_length", "messages",
                            "Invalid 'messages': %zu messages, at most %d are allowed.", count,
                            IPC_MESSAGES_MAX);
    r->messages = calloc(count, sizeof *r->messages);
    r->joined = calloc(count, sizeof *r->joined);
    if (r->messages == NULL || r->joined == NULL)
        return err_set(err, ERR_NO_MEMORY, "messages: out of memory");
    for (size_t i = 0; i < count; i++) {
        if (parse_message(r, json_array_get(messages, i), (int)i, err) != 0)
            return -1;
        r->message_count++;
    }
    return 0;
}

/* ------------------------------------------------------------------ the rest */

static int add_stop(struct chat_request *r, const json_t *value, struct err *err)
{
    size_t len = json_string_length(value);

    if (!json_is_string(value))
        return bad_content("stop", "expected a string or up to 4 strings", err);
    if (len > 4 * STOP_CHARACTERS_MAX)
        return err_set_code(err, ERR_INVALID, "string_above_max_length", "stop",
                            "Invalid 'stop': a string of %zu bytes is too long.", len);
    if (len > 0) /* an empty string stops nothing */
        r->stop[r->stop_count++] = json_string_value(value);
    return 0;
}

static int parse_stop(struct chat_request *r, const json_t *json, struct err *err)
{
    const json_t *stop = json_object_get(json, "stop");

    if (stop == NULL || json_is_null(stop))
        return 0;
    if (!json_is_array(stop))
        return add_stop(r, stop, err);
    if (json_array_size(stop) > IPC_STOP_MAX)
        return err_set_code(err, ERR_INVALID, "array_above_max_length", "stop",
                            "Invalid 'stop': at most %d strings are allowed.", IPC_STOP_MAX);
    for (size_t i = 0; i < json_array_size(stop); i++) {
        if (add_stop(r, json_array_get(stop, i), err) != 0)
            return -1;
    }
    return 0;
}

static struct api_member member(const json_t *object, const char *key, const char *path)
{
    return (struct api_member){.object = object, .key = key, .path = path};
}

/* max_completion_tokens is the newer name and wins. */
static int parse_max_tokens(struct chat_request *r, const json_t *json, struct err *err)
{
    static const char *const names[] = {"max_tokens", "max_completion_tokens"};

    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        struct api_member m = member(json, names[i], names[i]);
        int64_t v = r->max_tokens;

        if (api_check_integer(&m, 1, INT32_MAX, &v, err) != 0)
            return -1;
        r->max_tokens = (int32_t)v;
    }
    return 0;
}

static int parse_sampling(struct chat_request *r, const json_t *json, struct err *err)
{
    struct api_member temperature = member(json, "temperature", "temperature");
    struct api_member top_p = member(json, "top_p", "top_p");
    struct api_member seed = member(json, "seed", "seed");
    const json_t *value = json_object_get(json, "seed");
    int64_t v = 0;

    r->temperature = r->top_p = 1;
    if (api_check_number(&temperature, 0, 2, &r->temperature, err) != 0 ||
        api_check_number(&top_p, 0, 1, &r->top_p, err) != 0 ||
        api_check_integer(&seed, INT64_MIN, INT64_MAX, &v, err) != 0)
        return -1;
    r->has_seed = value != NULL && !json_is_null(value);
    r->seed = (uint64_t)v;
    return 0;
}

static int parse_stream(struct chat_request *r, const json_t *json, struct err *err)
{
    struct api_member stream = member(json, "stream", "stream");
    struct api_member options = member(json, "stream_options", "stream_options");
    const json_t *object = NULL;
    struct api_member usage;

    if (api_check_bool(&stream, &r->stream, err) != 0 ||
        api_check_object(&options, &object, err) != 0)
        return -1;
    if (object == NULL)
        return 0;
    usage = member(object, "include_usage", "stream_options.include_usage");
    return api_check_bool(&usage, &r->include_usage, err);
}

int chat_request_parse(struct chat_request *request, const json_t *json, struct err *err)
{
    struct api_member model = member(json, "model", "model");

    memset(request, 0, sizeof *request);
    model.required = true;
    if (field_table_check(&field_table_chat, json, err) != 0 ||
        api_check_string(&model, 1, 512, &request->model, err) != 0 ||
        api_check_metadata(json_object_get(json, "metadata"), err) != 0 ||
        parse_messages(request, json, err) != 0 || parse_sampling(request, json, err) != 0 ||
        parse_max_tokens(request, json, err) != 0 || parse_stop(request, json, err) != 0 ||
        parse_stream(request, json, err) != 0) {
        chat_request_release(request);
        return -1;
    }
    return 0;
}

void chat_request_release(struct chat_request *request)
{
    for (int32_t i = 0; i < request->joined_count; i++)
        free(request->joined[i]);
    free(request->joined);
    free(request->messages);
    memset(request, 0, sizeof *request);
}
