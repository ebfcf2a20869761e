#include "server/api_devices.h"

#include <time.h>

#include "server/device_status.h"

static json_t *text_or_null(const char *text)
{
    return text[0] != '\0' ? json_string(text) : json_null();
}

static json_t *memory_json(const struct device_status *s)
{
    if (s->memory_bytes <= 0)
        return json_null();
    return json_pack("{s:I, s:I, s:I}", "total_bytes", (json_int_t)s->memory_bytes, "free_bytes",
                     (json_int_t)s->memory_free, "used_bytes",
                     (json_int_t)(s->memory_bytes - s->memory_free));
}

static json_t *device_json(const struct device_status *s)
{
    json_int_t seen = s->seen_at > 0 ? (json_int_t)s->seen_at : (json_int_t)time(NULL);

    return json_pack("{s:s, s:s, s:s, s:s, s:o, s:o, s:f, s:o, s:o, s:o, s:o, s:I}", "object",
                     "graft.device", "device", s->device, "role", s->role, "state", s->state,
                     "description", text_or_null(s->description), "memory", memory_json(s),
                     "utilization", s->utilization, "job", text_or_null(s->job), "restarts",
                     s->ours ? json_integer(s->restarts) : json_null(), "lost",
                     s->ours ? json_integer(s->lost) : json_null(), "last_failure",
                     text_or_null(s->reason), "seen_at", seen);
}

int api_devices_list(struct http_request *request, struct http_response *response, struct err *err)
{
    struct device_status_list list;
    json_t *data;

    if (device_status_collect(&list, request->api, request->db, request->tenant.project_id, err) !=
        0)
        return -1;
    data = json_array();
    for (int i = 0; i < list.count; i++)
        json_array_append_new(data, device_json(&list.items[i]));
    device_status_list_release(&list);
    return http_response_json(response, 200,
                              json_pack("{s:s, s:o}", "object", "list", "data", data), err);
}
