/* api_check.h: reads values out of a request's JSON and query, with the contract's wording for what
 * is wrong with them.
 *
 * Each reads member `key` of `object`; `path` is how the client knows it, for message and param
 * ("method.supervised.hyperparameters.n_epochs"). Absent and null leave *out as it is and return 0,
 * unless `required` is set; -1 with ERR_INVALID and one of the codes missing_required_parameter,
 * invalid_type, invalid_value, string_below_min_length, string_above_max_length,
 * integer_below_min_value, integer_above_max_value, decimal_below_min_value,
 * decimal_above_max_value (api-spec/errors.md). */
#ifndef GRAFT_API_CHECK_H
#define GRAFT_API_CHECK_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "engine/base/err.h"
#include "server/http_request.h"

struct api_member {
    const json_t *object;
    const char *key, *path;
    bool required;
};

/* Is there a member that is not null? */
bool api_check_given(const json_t *object, const char *key);
/* Lengths in characters. *out points into the JSON. */
int api_check_string(const struct api_member *member, size_t min, size_t max, const char **out,
                     struct err *err);
int api_check_integer(const struct api_member *member, int64_t min, int64_t max, int64_t *out,
                      struct err *err);
int api_check_number(const struct api_member *member, double min, double max, double *out,
                     struct err *err);
int api_check_bool(const struct api_member *member, bool *out, struct err *err);
/* *out borrowed. */
int api_check_object(const struct api_member *member, const json_t **out, struct err *err);
/* One of the strings of a NULL-terminated list; *out is its index. */
int api_check_choice(const struct api_member *member, const char *const *choices, int *out,
                     struct err *err);
/* 1..64 letters, digits, '.', '_' and '-': it becomes a part of a model's name. */
int api_check_suffix(const struct api_member *member, const char **out, struct err *err);
/* At most 16 pairs, keys of 1..64 and values of 0..512 characters, values strings. */
int api_check_metadata(const json_t *metadata, struct err *err);

/* ------------------------------------------------------------------ lists */

struct api_page {
    const char *after; /* NULL: from the start */
    int limit;
    bool ascending; /* ?order=asc */
};

struct api_page_rules {
    int default_limit, max_limit;
    bool order;               /* asc and desc are known; default desc */
    const char *const *other; /* further parameters, NULL-terminated; "metadata" allows
                                 metadata[key] as well; NULL: none */
};

/* Reads after, limit, order; refuses other query parameters by name. */
int api_page_parse(const struct http_request *request, const struct api_page_rules *rules,
                   struct api_page *page, struct err *err);

#endif
