#include "server/api_health.h"

#include "server/api_context.h"
#include "storage/db.h"

int api_health_live(struct http_request *request, struct http_response *response, struct err *err)
{
    return http_response_json(response, 200, json_pack("{s:s}", "status", "ok"), err);
}

int api_health_ready(struct http_request *request, struct http_response *response, struct err *err)
{
    struct api_context *api = request->api;
    if (http_request_database(request, err) < 0 || db_ping(request->db, err) < 0)
        return -1;
    if (api && api->workers_ready && api->workers_ready(api, err) < 0)
        return -1;
    return http_response_json(response, 200, json_pack("{s:s}", "status", "ready"), err);
}
