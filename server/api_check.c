#include "server/api_check.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *type_name(const json_t *value)
{
    switch (json_typeof(value)) {
    case JSON_OBJECT:
        return "an object";
    case JSON_ARRAY:
        return "an array";
    case JSON_STRING:
        return "a string";
    case JSON_INTEGER:
        return "an integer";
    case JSON_REAL:
        return "a decimal";
    case JSON_TRUE:
    case JSON_FALSE:
        return "a boolean";
    default:
        return "null";
    }
}

static int wrong_type(const char *path, const char *expected, const json_t *value, struct err *err)
{
    return err_set_code(err, ERR_INVALID, "invalid_type", path,
                        "Invalid type for '%s': expected %s, but got %s instead.", path, expected,
                        type_name(value));
}

/* 1 with *value set; 0 where there is nothing to check; -1. */
static int get(const struct api_member *member, json_t **value, struct err *err)
{
    *value = json_object_get(member->object, member->key);
    if (*value && !json_is_null(*value))
        return 1;
    if (!member->required)
        return 0;
    return err_set_code(err, ERR_INVALID, "missing_required_parameter", member->path,
                        "Missing required parameter: '%s'.", member->path);
}

bool api_check_given(const json_t *object, const char *key)
{
    const json_t *value = json_object_get(object, key);
    return value && !json_is_null(value);
}

static size_t characters(const char *text)
{
    size_t n = 0;
    for (; *text; text++)
        n += ((unsigned char)*text & 0xc0) != 0x80;
    return n;
}

static int check_length(const char *path, const char *text, size_t min, size_t max, struct err *err)
{
    size_t n = characters(text);
    if (n < min)
        return err_set_code(err, ERR_INVALID, "string_below_min_length", path,
                            "Invalid '%s': string too short. Expected a string with minimum length "
                            "%zu, but got %s instead.",
                            path, min, n == 0 ? "an empty string" : "a shorter one");
    if (n > max)
        return err_set_code(err, ERR_INVALID, "string_above_max_length", path,
                            "Invalid '%s': string too long. Expected a string with maximum length "
                            "%zu, but got a string with length %zu instead.",
                            path, max, n);
    return 0;
}

int api_check_string(const struct api_member *member, size_t min, size_t max, const char **out,
                     struct err *err)
{
    json_t *value;
    int rc = get(member, &value, err);
    if (rc <= 0)
        return rc;
    if (!json_is_string(value))
        return wrong_type(member->path, "a string", value, err);
    if (check_length(member->path, json_string_value(value), min, max, err) < 0)
        return -1;
    *out = json_string_value(value);
    return 0;
}

static int check_integer_bounds(const char *path, int64_t n, int64_t min, int64_t max,
                                struct err *err)
{
    if (n < min)
        return err_set_code(err, ERR_INVALID, "integer_below_min_value", path,
                            "Invalid '%s': integer below minimum value. Expected a value >= %lld, "
                            "but got %lld instead.",
                            path, (long long)min, (long long)n);
    if (n > max)
        return err_set_code(err, ERR_INVALID, "integer_above_max_value", path,
                            "Invalid '%s': integer above maximum value. Expected a value <= %lld, "
                            "but got %lld instead.",
                            path, (long long)max, (long long)n);
    return 0;
}

int api_check_integer(const struct api_member *member, int64_t min, int64_t max, int64_t *out,
                      struct err *err)
{
    json_t *value;
    int rc = get(member, &value, err);
    if (rc <= 0)
        return rc;
    int64_t n;
    double real = json_number_value(value);
    if (json_is_integer(value))
        n = json_integer_value(value);
    else if (json_is_real(value) && real > -9e15 && real < 9e15 && real == (double)(int64_t)real)
        n = (int64_t)real; /* 3.0: some clients have one number type */
    else
        return wrong_type(member->path, "an integer", value, err);
    if (check_integer_bounds(member->path, n, min, max, err) < 0)
        return -1;
    *out = n;
    return 0;
}

int api_check_number(const struct api_member *member, double min, double max, double *out,
                     struct err *err)
{
    json_t *value;
    int rc = get(member, &value, err);
    if (rc <= 0)
        return rc;
    if (!json_is_number(value))
        return wrong_type(member->path, "a number", value, err);
    double n = json_number_value(value);
    if (n < min)
        return err_set_code(
            err, ERR_INVALID, "decimal_below_min_value", member->path,
            "Invalid '%s': decimal below minimum value. Expected a value >= %g, but "
            "got %g instead.",
            member->path, min, n);
    if (n > max)
        return err_set_code(
            err, ERR_INVALID, "decimal_above_max_value", member->path,
            "Invalid '%s': decimal above maximum value. Expected a value <= %g, but "
            "got %g instead.",
            member->path, max, n);
    *out = n;
    return 0;
}

int api_check_bool(const struct api_member *member, bool *out, struct err *err)
{
    json_t *value;
    int rc = get(member, &value, err);
    if (rc <= 0)
        return rc;
    if (!json_is_boolean(value))
        return wrong_type(member->path, "a boolean", value, err);
    *out = json_is_true(value);
    return 0;
}

int api_check_object(const struct api_member *member, const json_t **out, struct err *err)
{
    json_t *value;
    int rc = get(member, &value, err);
    if (rc <= 0)
        return rc;
    if (!json_is_object(value))
        return wrong_type(member->path, "an object", value, err);
    *out = value;
    return 0;
}

static int not_a_choice(const char *path, const char *got, const char *const *choices,
                        struct err *err)
{
    char list[256] = "";
    for (int i = 0; choices[i]; i++) {
        size_t len = strlen(list);
        snprintf(list + len, sizeof(list) - len, "%s'%s'", i ? ", " : "", choices[i]);
    }
    return err_set_code(err, ERR_INVALID, "invalid_value", path,
                        "Invalid value: '%.64s'. Supported values are: %s.", got, list);
}

static int find_choice(const char *path, const char *text, const char *const *choices, int *out,
                       struct err *err)
{
    for (int i = 0; choices[i]; i++) {
        if (strcmp(text, choices[i]) == 0) {
            *out = i;
            return 0;
        }
    }
    return not_a_choice(path, text, choices, err);
}

int api_check_choice(const struct api_member *member, const char *const *choices, int *out,
                     struct err *err)
{
    json_t *value;
    int rc = get(member, &value, err);
    if (rc <= 0)
        return rc;
    if (!json_is_string(value))
        return wrong_type(member->path, "a string", value, err);
    return find_choice(member->path, json_string_value(value), choices, out, err);
}

int api_check_suffix(const struct api_member *member, const char **out, struct err *err)
{
    static const char plain[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-";
    const char *suffix = NULL;
    if (api_check_string(member, 1, 64, &suffix, err) < 0)
        return -1;
    if (suffix && suffix[strspn(suffix, plain)])
        return err_set_code(err, ERR_INVALID, "invalid_value", member->path,
                            "Invalid '%s': it becomes a part of the model's name, so only "
                            "letters, digits, '.', '_' and '-' are allowed.",
                            member->path);
    *out = suffix;
    return 0;
}

int api_check_metadata(const json_t *metadata, struct err *err)
{
    const char *key;
    json_t *value;
    if (json_object_size(metadata) > 16)
        return err_set_code(err, ERR_INVALID, "object_above_max_properties", "metadata",
                            "Invalid 'metadata': too many properties. Expected an object with at "
                            "most 16 properties, but got an object with %zu properties instead.",
                            json_object_size(metadata));
    json_object_foreach((json_t *)(uintptr_t)metadata, key, value)
    {
        char path[96];
        snprintf(path, sizeof(path), "metadata.%.64s", key);
        if (!json_is_string(value))
            return wrong_type("metadata", "an object whose values are strings", value, err);
        if (check_length("metadata", key, 1, 64, err) < 0 ||
            check_length(path, json_string_value(value), 0, 512, err) < 0)
            return -1;
    }
    return 0;
}

/* ------------------------------------------------------------------ lists */

static int parse_limit(const char *text, int max, int *limit, struct err *err)
{
    char *end;
    errno = 0;
    long long n = strtoll(text, &end, 10);
    if (end == text || *end || strchr(" \t\n\v\f\r", *text))
        return err_set_code(err, ERR_INVALID, "invalid_type", "limit",
                            "Invalid type for 'limit': expected an integer, but got a string "
                            "instead.");
    if (check_integer_bounds("limit", n, 1, max, err) < 0)
        return -1;
    *limit = (int)n;
    return 0;
}

static bool is_known(const char *name, const struct api_page_rules *rules)
{
    if (strcmp(name, "after") == 0 || strcmp(name, "limit") == 0)
        return true;
    if (strcmp(name, "order") == 0)
        return rules->order;
    for (int i = 0; rules->other && rules->other[i]; i++) {
        if (strcmp(name, rules->other[i]) == 0)
            return true;
        size_t n = strlen(rules->other[i]);
        if (strcmp(rules->other[i], "metadata") == 0 && strncmp(name, "metadata[", n + 1) == 0 &&
            strlen(name) > n + 2 && name[strlen(name) - 1] == ']')
            return true;
    }
    return false;
}

int api_page_parse(const struct http_request *request, const struct api_page_rules *rules,
                   struct api_page *page, struct err *err)
{
    static const char *const orders[] = {"desc", "asc", NULL};
    *page = (struct api_page){.limit = rules->default_limit};
    for (int i = 0; i < request->query_count; i++) {
        const char *name = request->query[i].name;
        if (!is_known(name, rules))
            return err_set_code(err, ERR_INVALID, "unknown_parameter", name,
                                "Unknown parameter: '%.200s'.", name);
    }
    const char *limit = http_request_query(request, "limit");
    const char *order = http_request_query(request, "order");
    const char *after = http_request_query(request, "after");
    int ascending = 0;
    if (limit && parse_limit(limit, rules->max_limit, &page->limit, err) < 0)
        return -1;
    if (order && find_choice("order", order, orders, &ascending, err) < 0)
        return -1;
    page->ascending = ascending == 1;
    page->after = after && after[0] ? after : NULL;
    return 0;
}
