#include "server/api_models.h"

#include "server/api_check.h"
#include "storage/models.h"

static json_t *model_json(const struct model *model)
{
    return json_pack("{s:s, s:s, s:I, s:s}", "id", model->name, "object", "model", "created",
                     (json_int_t)model->created_at, "owned_by", model->owned_by);
}

int api_models_list(struct http_request *request, struct http_response *response, struct err *err)
{
    struct model_list list = {0};
    if (models_list(request->db, request->tenant.project_id, &list, err) < 0)
        return -1;
    json_t *data = json_array();
    for (int i = 0; i < list.count; i++)
        json_array_append_new(data, model_json(&list.items[i]));
    model_list_release(&list);
    return http_response_json(response, 200,
                              json_pack("{s:s, s:o}", "object", "list", "data", data), err);
}

int api_models_get(struct http_request *request, struct http_response *response, struct err *err)
{
    struct model model;
    if (models_resolve(request->db, request->tenant.project_id, request->path_params[0], &model,
                       err) < 0)
        return -1;
    return http_response_json(response, 200, model_json(&model), err);
}

int api_models_delete(struct http_request *request, struct http_response *response, struct err *err)
{
    const char *name = request->path_params[0];
    if (models_delete(request->db, request->tenant.project_id, name, err) < 0)
        return -1;
    return http_response_json(
        response, 200, json_pack("{s:s, s:s, s:b}", "id", name, "object", "model", "deleted", 1),
        err);
}
