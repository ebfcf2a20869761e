#include "engine/codec/report.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define FIXED_ROOM 1400
#define TENSOR_ROOM 22 /* "12345678,1.234e-05," of a tensor */

size_t report_room(int32_t tensors)
{
    return FIXED_ROOM + TENSOR_ROOM * (size_t)tensors;
}

static json_t *number(double value)
{
    return isfinite(value) ? json_real(value) : json_null();
}

/* Arrays of the matrices alone, in the order of the model's tensors. */
static json_t *matrices(int32_t tensors, const int64_t *bytes, const double *error,
                        const double *norm)
{
    json_t *sizes = json_array(), *errors = json_array();

    for (int32_t i = 0; i < tensors; i++) {
        if (bytes[i] == 0)
            continue;
        json_array_append_new(sizes, json_integer(bytes[i]));
        json_array_append_new(errors, number(norm[i] > 0 ? sqrt(error[i] / norm[i]) : 0));
    }
    return json_pack("{s:o, s:o}", "bytes", sizes, "relative_error", errors);
}

json_t *report_points(const struct engine_delta_curve *c)
{
    json_t *list = json_array();

    for (int32_t i = 0; i < c->count; i++)
        json_array_append_new(list, json_pack("[I, o]", (json_int_t)c->bytes[i], number(c->kl[i])));
    return list;
}

void report_read_points(const json_t *points, struct engine_delta_curve *c)
{
    *c = (struct engine_delta_curve){0};
    for (size_t i = 0; i < json_array_size(points) && i < ENGINE_DELTA_POINTS; i++, c->count++) {
        const json_t *point = json_array_get(points, i);

        c->bytes[i] = json_integer_value(json_array_get(point, 0));
        c->kl[i] = json_number_value(json_array_get(point, 1));
    }
}

static json_t *object_of(const struct engine_delta_report *r, bool held_out, json_t *per_matrix)
{
    return json_pack(
        "{s:s, s:I, s:I, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:s, s:I, s:I, s:i, s:o, s:o, "
        "s:o}",
        "codec", r->codec, "bytes", (json_int_t)r->bytes, "linear_bytes",
        (json_int_t)r->linear_bytes, "ratio", number(r->ratio), "linear_ratio",
        number(r->linear_ratio), "relative_error", number(r->relative_error), "predicted_kl",
        number(r->predicted_kl), "measured_kl", number(r->measured_kl), "answer_kl",
        number(r->answer_kl), "held_out_loss", number(r->held_out_loss), "tuned_loss",
        number(r->tuned_loss), "measured_on", held_out ? "held_out" : "calibration",
        "measured_tokens", (json_int_t)r->measured_tokens, "calibration_tokens",
        (json_int_t)r->calibration_tokens, "distill_steps", r->distill_steps, "predicted",
        report_points(&r->predicted), "tried", report_points(&r->tried), "matrices", per_matrix);
}

/* Characters that JSON escapes once more in the header. */
static size_t escapes(const char *text)
{
    size_t count = 0;

    for (; *text; text++)
        count += *text == '"' || *text == '\\';
    return count;
}

int report_json(char **out, const struct engine_delta_report *report, bool held_out,
                int32_t tensors, const int64_t *bytes, const double *error, const double *norm,
                struct err *err)
{
    size_t room = report_room(tensors), len = 0, taken;
    json_t *object =
        report ? object_of(report, held_out, matrices(tensors, bytes, error, norm)) : NULL;
    char *text = object ? json_dumps(object, JSON_COMPACT | JSON_REAL_PRECISION(4)) : NULL;

    json_decref(object);
    *out = malloc(room + 1);
    if (!*out || (report && !text)) {
        free(text);
        free(*out);
        *out = NULL;
        return err_set(err, ERR_NO_MEMORY, "no memory for a report");
    }
    len = text ? strlen(text) : 0;
    taken = text ? len + escapes(text) : 0;
    if (taken > room) {
        free(text);
        free(*out);
        *out = NULL;
        return err_set(err, ERR_INTERNAL, "a report of %zu bytes has room for %zu", taken, room);
    }
    if (text)
        memcpy(*out, text, len);
    memset(*out + len, ' ', room - taken);
    (*out)[len + room - taken] = '\0';
    free(text);
    return 0;
}
