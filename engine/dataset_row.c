#include "engine/dataset_row.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/json_text.h"
#include "engine/base/strbuf.h"
#include "engine/base/utf8.h"
#include "engine/dataset.h"

static const char *const roles[] = {"system", "developer", "user", "assistant", "tool", "function"};

int dataset_row_init(struct dataset_row *row, const struct engine_dataset_options *options,
                     struct err *err)
{
    *row = (struct dataset_row){
        .validation = options->validation,
        .file_id = options->file_id != NULL ? options->file_id : "",
        .message = calloc(DATASET_MAX_MESSAGES, sizeof(*row->message)),
        .weight = calloc(DATASET_MAX_MESSAGES, sizeof(*row->weight)),
        .joined = calloc(DATASET_MAX_MESSAGES, sizeof(*row->joined)),
    };
    if (row->message == NULL || row->weight == NULL || row->joined == NULL) {
        dataset_row_release(row);
        return err_set(err, ERR_NO_MEMORY, "out of memory for a row of the dataset");
    }
    return 0;
}

static void forget_line(struct dataset_row *row)
{
    for (int32_t i = 0; i < row->count; i++) {
        free(row->joined[i]);
        row->joined[i] = NULL;
    }
    row->count = 0;
    json_decref(row->root);
    row->root = NULL;
}

void dataset_row_release(struct dataset_row *row)
{
    if (row->joined != NULL)
        forget_line(row);
    free(row->message);
    free(row->weight);
    free(row->joined);
    row->message = NULL;
    row->weight = NULL;
    row->joined = NULL;
}

const char *dataset_row_kind(const struct dataset_row *row)
{
    return row->validation ? "validation" : "training";
}

const char *dataset_row_param(const struct dataset_row *row)
{
    return row->validation ? "validation_file" : "training_file";
}

int dataset_row_invalid(const struct dataset_row *row, struct err *err, const char *fmt, ...)
{
    char text[768];
    va_list args;

    va_start(args, fmt);
    vsnprintf(text, sizeof(text), fmt, args);
    va_end(args);
    return err_set_code(err, ERR_INVALID,
                        row->validation ? "invalid_validation_file" : "invalid_training_file",
                        dataset_row_param(row), "The job failed due to an invalid %s file. %s",
                        dataset_row_kind(row), text);
}

int dataset_row_malformed(const struct dataset_row *row, struct err *err, const char *fmt, ...)
{
    char text[768];
    va_list args;

    va_start(args, fmt);
    vsnprintf(text, sizeof(text), fmt, args);
    va_end(args);
    return err_set_code(err, ERR_INVALID, "invalid_file_format", dataset_row_param(row),
                        "The job failed due to a file format error in the %s file. Invalid file "
                        "format. %s",
                        dataset_row_kind(row), text);
}

/* "Invalid file format. Example 3, message 2 ": where the contract's texts begin. */
static int bad_message(const struct dataset_row *row, int32_t index, struct err *err,
                       const char *fmt, ...) __attribute__((format(printf, 4, 5)));
static int bad_message(const struct dataset_row *row, int32_t index, struct err *err,
                       const char *fmt, ...)
{
    char text[512];
    va_list args;

    va_start(args, fmt);
    vsnprintf(text, sizeof(text), fmt, args);
    va_end(args);
    return dataset_row_invalid(row, err, "Invalid file format. Example %lld, message %d %s",
                               (long long)row->number, index + 1, text);
}

/* No information in it: a key with such a value may be there without effect. */
static bool says_nothing(const json_t *value)
{
    return json_is_null(value) || (json_is_array(value) && json_array_size(value) == 0);
}

static bool is_one_of(const char *key, const char *const names[], size_t count)
{
    for (size_t i = 0; i < count; i++) {
        if (strcmp(key, names[i]) == 0)
            return true;
    }
    return false;
}

static bool is_tool_key(const char *key)
{
    static const char *const names[] = {"tools",       "functions",     "tool_calls",
                                        "tool_choice", "function_call", "tool_call_id"};

    return is_one_of(key, names, sizeof(names) / sizeof(names[0]));
}

/* An array of {"type": "text", "text": ...}: the texts joined, owned by the row. */
static int join_parts(struct dataset_row *row, int32_t index, const json_t *parts, const char **out,
                      struct err *err)
{
    struct strbuf text;
    const json_t *part;
    size_t i;

    strbuf_init(&text, DATASET_MAX_LINE);
    json_array_foreach(parts, i, part)
    {
        const char *type = json_string_value(json_object_get(part, "type"));
        const json_t *value = json_object_get(part, "text");

        if (type == NULL || strcmp(type, "text") != 0 || !json_is_string(value) ||
            json_object_size(part) != 2) {
            bad_message(
                row, index, err,
                "part %zu of 'content' is not {\"type\": \"text\", \"text\": \"...\"}; other "
                "parts can not be trained on",
                i + 1);
            goto fail;
        }
        strbuf_add(&text, json_string_value(value), json_string_length(value));
    }
    row->joined[index] = strbuf_detach(&text, NULL);
    if (row->joined[index] == NULL) {
        err_set(err, ERR_NO_MEMORY, "out of memory for a message");
        goto fail;
    }
    *out = row->joined[index];
    return 0;
fail:
    strbuf_release(&text);
    return -1;
}

static int read_content(struct dataset_row *row, int32_t index, const json_t *content,
                        const char **out, struct err *err)
{
    if (json_is_string(content)) {
        *out = json_string_value(content);
        return 0;
    }
    if (json_is_array(content) && json_array_size(content) > 0)
        return join_parts(row, index, content, out, err);
    if (content == NULL)
        return bad_message(row, index, err, "is missing key 'content'");
    return bad_message(row, index, err,
                       "has a 'content' that is neither a string nor a list of text parts");
}

static int read_weight(struct dataset_row *row, int32_t index, const json_t *weight,
                       struct err *err)
{
    double value = json_number_value(weight);
    bool assistant = strcmp(row->message[index].role, "assistant") == 0;

    row->weight[index] = assistant ? 1 : 0;
    if (weight == NULL || json_is_null(weight))
        return 0;
    if (!assistant)
        return dataset_row_malformed(
            row, err,
            "Example %lld contains an extra \"weight\". Message %d is not an assistant's; only "
            "assistant messages have a weight.",
            (long long)row->number, index + 1);
    if (!json_is_number(weight) || (value != 0 && value != 1))
        return bad_message(row, index, err, "has a 'weight' that is not 0 or 1");
    row->weight[index] = (float)value;
    return 0;
}

static int read_role(struct dataset_row *row, int32_t index, const json_t *message, struct err *err)
{
    const json_t *role = json_object_get(message, "role");
    const char *name = json_string_value(role);

    if (role == NULL)
        return bad_message(row, index, err, "Discriminator 'role' is missing in value");
    for (size_t i = 0; name != NULL && i < sizeof(roles) / sizeof(roles[0]); i++) {
        if (strcmp(name, roles[i]) == 0) {
            row->message[index].role = roles[i];
            return 0;
        }
    }
    return bad_message(row, index, err,
                       "has the role %.64s; it must be one of system, developer, user, assistant, "
                       "tool, function",
                       name != NULL ? name : "of another type than string");
}

static int read_message(struct dataset_row *row, int32_t index, json_t *message, struct err *err)
{
    static const char *const known[] = {"role", "content", "weight"};
    /* What a stored answer carries beside: fine as long as it says nothing. */
    static const char *const empty_only[] = {"name", "refusal", "audio", "annotations"};
    const char *key;
    json_t *value;

    if (!json_is_object(message))
        return bad_message(row, index, err, "is not a JSON object");
    if (read_role(row, index, message, err) != 0)
        return -1;
    json_object_foreach(message, key, value)
    {
        bool empty = says_nothing(value);

        if (is_one_of(key, known, sizeof(known) / sizeof(known[0])))
            continue;
        if (is_tool_key(key) && !empty)
            return bad_message(row, index, err,
                               "has \"%s\": tool calls can not be trained on yet. Remove it, or "
                               "leave the example out.",
                               key);
        if (empty && (is_tool_key(key) || is_one_of(key, empty_only, 4)))
            continue;
        return dataset_row_malformed(
            row, err,
            "Example %lld contains an extra \"%.64s\". Message %d may have role, content and "
            "weight only; remove it.",
            (long long)row->number, key, index + 1);
    }
    if (read_content(row, index, json_object_get(message, "content"), &row->message[index].content,
                     err) != 0)
        return -1;
    return read_weight(row, index, json_object_get(message, "weight"), err);
}

static int read_chat(struct dataset_row *row, struct err *err)
{
    json_t *messages = json_object_get(row->root, "messages"), *message;
    const char *key;
    json_t *value;
    size_t i;

    if (!json_is_array(messages) || json_array_size(messages) == 0)
        return dataset_row_invalid(
            row, err,
            "Invalid file format. Example %lld has a 'messages' that is not a list of at least one "
            "message.",
            (long long)row->number);
    if (json_array_size(messages) > DATASET_MAX_MESSAGES)
        return dataset_row_invalid(row, err,
                                   "Invalid file format. Example %lld has %zu messages; at most %d "
                                   "are allowed. Split it.",
                                   (long long)row->number, json_array_size(messages),
                                   DATASET_MAX_MESSAGES);
    json_object_foreach(row->root, key, value)
    {
        if (strcmp(key, "messages") == 0 || (is_tool_key(key) && says_nothing(value)))
            continue;
        if (strcmp(key, "parallel_tool_calls") == 0 &&
            says_nothing(json_object_get(row->root, "tools")))
            continue;
        if (is_tool_key(key))
            return dataset_row_invalid(
                row, err,
                "Invalid file format. Example %lld has \"%s\": tools can not "
                "be trained on yet. Remove it, or leave the example out.",
                (long long)row->number, key);
        return dataset_row_malformed(row, err,
                                     "Example %lld contains an extra \"%.64s\". Remove it: only "
                                     "\"messages\" is trained on.",
                                     (long long)row->number, key);
    }
    json_array_foreach(messages, i, message)
    {
        row->count = (int32_t)i + 1; /* so that what it owns is freed on failure too */
        if (read_message(row, (int32_t)i, message, err) != 0)
            return -1;
    }
    return 0;
}

static int read_legacy(struct dataset_row *row, struct err *err)
{
    static const char *const keys[] = {"prompt", "completion"};
    const char *key;
    json_t *value;

    json_object_foreach(row->root, key, value)
    {
        if (!is_one_of(key, keys, 2))
            return dataset_row_malformed(
                row, err,
                "Example %lld contains an extra \"%.64s\". Remove it: only "
                "\"prompt\" and \"completion\" are trained on.",
                (long long)row->number, key);
        if (!json_is_string(value))
            return dataset_row_invalid(
                row, err, "Invalid file format. Example %lld has a '%s' that is not a string.",
                (long long)row->number, key);
    }
    row->message[0] =
        (struct engine_message){"user", json_string_value(json_object_get(row->root, "prompt"))};
    row->message[1] = (struct engine_message){
        "assistant", json_string_value(json_object_get(row->root, "completion"))};
    row->weight[0] = 0;
    row->weight[1] = 1;
    row->count = 2;
    return 0;
}

static bool is_preference(const json_t *root)
{
    static const char *const keys[] = {"preferred_output", "non_preferred_output",
                                       "preferred_completion", "non_preferred_completion"};

    for (size_t i = 0; i < sizeof(keys) / sizeof(keys[0]); i++) {
        if (json_object_get(root, keys[i]) != NULL)
            return true;
    }
    return false;
}

static int read_format(struct dataset_row *row, struct err *err)
{
    bool chat = json_object_get(row->root, "messages") != NULL;
    bool legacy = json_object_get(row->root, "prompt") != NULL &&
                  json_object_get(row->root, "completion") != NULL;

    if (row->format == DATASET_FORMAT_UNKNOWN && is_preference(row->root))
        return dataset_row_invalid(row, err,
                                   "Invalid file format. Input file %.128s is in the "
                                   "fine-tune-preference format, but the specified fine-tuning job "
                                   "is not using 'dpo' as the training method (provided "
                                   "method=supervised). ",
                                   row->file_id);
    if (row->format == DATASET_FORMAT_UNKNOWN) {
        row->format = chat     ? DATASET_FORMAT_CHAT
                      : legacy ? DATASET_FORMAT_LEGACY
                               : DATASET_FORMAT_UNKNOWN;
        if (row->format == DATASET_FORMAT_UNKNOWN)
            return dataset_row_invalid(row, err,
                                       "Unexpected file format, expected either prompt/completion "
                                       "pairs or chat messages.");
    }
    if (row->format == DATASET_FORMAT_CHAT && !chat)
        return dataset_row_invalid(row, err,
                                   "Invalid file format. Example %lld is missing key 'messages'.",
                                   (long long)row->number);
    if (row->format == DATASET_FORMAT_LEGACY && !legacy)
        return dataset_row_invalid(
            row, err, "Invalid file format. Example %lld is missing key '%s'.",
            (long long)row->number,
            json_object_get(row->root, "prompt") == NULL ? "prompt" : "completion");
    return 0;
}

static int parse_json(struct dataset_row *row, const char *line, size_t len, struct err *err)
{
    static const char noise[] = "(line 1, ";
    struct err why = {0};
    char *at;

    if (memchr(line, '\0', len) != NULL)
        return dataset_row_malformed(row, err,
                                     "Example %lld cannot be parsed. Error: line contains a NUL "
                                     "byte; the file must be UTF-8 text.",
                                     (long long)row->number);
    if (!utf8_valid(line, len))
        return dataset_row_malformed(row, err,
                                     "Example %lld cannot be parsed. Error: line is not valid "
                                     "UTF-8; save the file in that encoding.",
                                     (long long)row->number);
    row->root = json_text_load(line, len, JSON_DECODE_ANY, &why);
    if (row->root == NULL) {
        /* The parser counts lines inside of this one. */
        at = strstr(why.message, noise);
        if (at != NULL)
            memmove(at + 1, at + sizeof(noise) - 1, strlen(at + sizeof(noise) - 1) + 1);
        return dataset_row_malformed(row, err,
                                     "Example %lld cannot be parsed. Error: line contains invalid "
                                     "json: it %.400s",
                                     (long long)row->number, why.message);
    }
    if (!json_is_object(row->root))
        return dataset_row_malformed(row, err,
                                     "Example %lld is not a JSON object; every line must be one "
                                     "{...}.",
                                     (long long)row->number);
    return 0;
}

int dataset_row_parse(struct dataset_row *row, const char *line, size_t len, struct err *err)
{
    forget_line(row);
    row->number++;
    if (parse_json(row, line, len, err) != 0 || read_format(row, err) != 0)
        return -1;
    return row->format == DATASET_FORMAT_CHAT ? read_chat(row, err) : read_legacy(row, err);
}
