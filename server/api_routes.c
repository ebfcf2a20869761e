#include "server/api_routes.h"

#include "server/api_chat.h"
#include "server/api_deltas.h"
#include "server/api_devices.h"
#include "server/api_files.h"
#include "server/api_health.h"
#include "server/api_jobs.h"
#include "server/api_models.h"
#include "server/metrics.h"

#define JOBS "/v1/fine_tuning/jobs"
#define JOB JOBS "/{fine_tuning_job_id}"

/* clang-format off */
const struct http_route api_routes[] = {
    {.method = "POST",   .pattern = "/v1/files", .handler = api_files_create, .auth = HTTP_AUTH_KEY,
     .body = HTTP_BODY_UPLOAD, .body_limit = HTTP_LIMIT_FILE, .operation = "createFile"},
    {.method = "GET",    .pattern = "/v1/files", .handler = api_files_list, .auth = HTTP_AUTH_KEY,
     .operation = "listFiles"},
    {.method = "GET",    .pattern = "/v1/files/{file_id}", .handler = api_files_get, .auth = HTTP_AUTH_KEY,
     .operation = "retrieveFile"},
    {.method = "DELETE", .pattern = "/v1/files/{file_id}", .handler = api_files_delete, .auth = HTTP_AUTH_KEY,
     .operation = "deleteFile"},
    {.method = "GET",    .pattern = "/v1/files/{file_id}/content", .handler = api_files_content, .auth = HTTP_AUTH_KEY,
     .operation = "downloadFile"},

    {.method = "POST",   .pattern = JOBS, .handler = api_jobs_create, .auth = HTTP_AUTH_KEY,
     .body = HTTP_BODY_JSON, .body_limit = HTTP_LIMIT_CONTROL, .operation = "createFineTuningJob"},
    {.method = "GET",    .pattern = JOBS, .handler = api_jobs_list, .auth = HTTP_AUTH_KEY,
     .operation = "listPaginatedFineTuningJobs"},
    {.method = "GET",    .pattern = JOB, .handler = api_jobs_get, .auth = HTTP_AUTH_KEY,
     .operation = "retrieveFineTuningJob"},
    {.method = "POST",   .pattern = JOB "/cancel", .handler = api_jobs_cancel, .auth = HTTP_AUTH_KEY,
     .operation = "cancelFineTuningJob"},
    {.method = "GET",    .pattern = JOB "/events", .handler = api_jobs_events, .auth = HTTP_AUTH_KEY,
     .operation = "listFineTuningEvents"},
    {.method = "GET",    .pattern = JOB "/checkpoints", .handler = api_jobs_checkpoints, .auth = HTTP_AUTH_KEY,
     .operation = "listFineTuningJobCheckpoints"},

    {.method = "GET",    .pattern = "/v1/models", .handler = api_models_list, .auth = HTTP_AUTH_KEY,
     .operation = "listModels"},
    {.method = "GET",    .pattern = "/v1/models/{model}", .handler = api_models_get, .auth = HTTP_AUTH_KEY,
     .slash_in_param = true, .operation = "retrieveModel"},
    {.method = "DELETE", .pattern = "/v1/models/{model}", .handler = api_models_delete, .auth = HTTP_AUTH_KEY,
     .slash_in_param = true, .operation = "deleteModel"},
    {.method = "GET",    .pattern = "/v1/models/{model}/delta", .handler = api_models_delta, .auth = HTTP_AUTH_KEY,
     .slash_in_param = true, .operation = "downloadDelta"},

    {.method = "POST",   .pattern = "/v1/chat/completions", .handler = api_chat_create, .auth = HTTP_AUTH_KEY,
     .body = HTTP_BODY_JSON, .body_limit = HTTP_LIMIT_CHAT, .operation = "createChatCompletion"},

    {.method = "GET",    .pattern = "/v1/graft/devices", .handler = api_devices_list, .auth = HTTP_AUTH_KEY,
     .operation = "listDevices"},
    {.method = "POST",   .pattern = "/v1/graft/deltas", .handler = api_deltas_create, .auth = HTTP_AUTH_KEY,
     .body = HTTP_BODY_JSON, .body_limit = HTTP_LIMIT_CONTROL, .operation = "createDelta"},

    {.method = "GET",    .pattern = "/healthz", .handler = api_health_live, .auth = HTTP_AUTH_NONE,
     .on_event_thread = true, .operation = "healthz"},
    {.method = "GET",    .pattern = "/readyz", .handler = api_health_ready, .auth = HTTP_AUTH_NONE,
     .operation = "readyz"},
    {.method = "GET",    .pattern = "/metrics", .handler = metrics_get, .auth = HTTP_AUTH_NONE,
     .operation = "metrics"},
};
/* clang-format on */

const size_t api_route_count = sizeof(api_routes) / sizeof(api_routes[0]);
