#include "server/api_jobs.h"

#include <stdlib.h>
#include <string.h>

#include "server/api_check.h"
#include "server/api_compression.h"
#include "server/api_context.h"
#include "server/api_idempotency.h"
#include "server/api_job_json.h"
#include "server/api_job_request.h"
#include "storage/models.h"

#define LIMIT_MAX 1000

/* ------------------------------------------------------------------ create */

struct create {
    struct http_request *request;
    struct api_job_request parsed;
};

/* What of the request only the base can answer. That there is no such model is jobs_create's to
 * say. */
static int check_base(const struct create *create, struct err *err)
{
    struct http_request *request = create->request;
    const struct job_new *job = &create->parsed.job;
    struct model model;
    struct err ignored = {0};
    if (models_resolve(request->db, request->tenant.project_id, job->model, &model, &ignored) < 0)
        return 0;
    return api_compression_check(&job->compression, "graft.compression", request->api->blobs,
                                 model.base_sha256, job->train_embeddings, err);
}

static int create_rows(void *context, json_t **body, struct err *err)
{
    struct create *create = context;
    struct job job = {0};
    if (check_base(create, err) < 0)
        return -1;
    if (jobs_create(create->request->db, create->request->tenant.project_id, &create->parsed.job,
                    &job, err) < 0)
        return -1;
    *body = api_job_json(&job);
    job_release(&job);
    return 0;
}

int api_jobs_create(struct http_request *request, struct http_response *response, struct err *err)
{
    struct create create = {.request = request};
    char *what = NULL;
    int rc = -1;
    if (api_job_request_parse(&create.parsed, request->json, err) < 0)
        goto out;
    create.parsed.job.max_unfinished = API_JOBS_UNFINISHED_MAX;
    what = json_dumps(request->json, JSON_COMPACT | JSON_SORT_KEYS);
    if (!what) {
        err_set(err, ERR_NO_MEMORY, "out of memory");
        goto out;
    }
    rc = api_once(
        request, response,
        &(struct api_once){
            .what = what, .what_len = strlen(what), .create = create_rows, .context = &create},
        err);
out:
    free(what);
    api_job_request_release(&create.parsed);
    return rc;
}

/* ------------------------------------------------------------------ list */

/* metadata[key]=value pairs as JSON text; *none for metadata=null. */
static int read_metadata_filter(const struct http_request *request, char **filter, bool *none,
                                struct err *err)
{
    json_t *object = json_object();
    for (int i = 0; i < request->query_count; i++) {
        const struct http_pair *pair = &request->query[i];
        if (strncmp(pair->name, "metadata", 8) != 0)
            continue;
        if (pair->name[8] == '\0') {
            *none = strcmp(pair->value, "null") == 0;
            if (*none || pair->value[0] == '\0')
                continue;
            json_decref(object);
            return err_set_code(err, ERR_INVALID, "invalid_value", "metadata",
                                "Invalid 'metadata': filter with metadata[key]=value, or "
                                "metadata=null for jobs without metadata.");
        }
        size_t n = strlen(pair->name);
        json_object_setn_new(object, pair->name + 9, n - 10, json_string(pair->value));
    }
    if (json_object_size(object) > 0)
        *filter = json_dumps(object, JSON_COMPACT);
    bool failed = json_object_size(object) > 0 && !*filter;
    json_decref(object);
    return failed ? err_set(err, ERR_NO_MEMORY, "out of memory") : 0;
}

int api_jobs_list(struct http_request *request, struct http_response *response, struct err *err)
{
    static const char *const other[] = {"metadata", NULL};
    const struct api_page_rules rules = {
        .default_limit = 20, .max_limit = LIMIT_MAX, .other = other};
    struct api_page page;
    struct job_list list = {0};
    char *filter = NULL;
    bool none = false;
    int rc = -1;
    if (api_page_parse(request, &rules, &page, err) < 0 ||
        read_metadata_filter(request, &filter, &none, err) < 0)
        goto out;
    const struct job_query query = {
        .after = page.after, .limit = page.limit, .metadata = filter, .without_metadata = none};
    if (jobs_list(request->db, request->tenant.project_id, &query, &list, err) < 0)
        goto out;
    json_t *data = json_array();
    for (int i = 0; i < list.count; i++)
        json_array_append_new(data, api_job_json(&list.items[i]));
    rc = http_response_json(response, 200,
                            json_pack("{s:s, s:o, s:b}", "object", "list", "data", data, "has_more",
                                      (int)list.has_more),
                            err);
out:
    free(filter);
    job_list_release(&list);
    return rc;
}

/* ------------------------------------------------------------------ one job */

typedef int job_fn(struct db *db, const char *project, const char *id, struct job *out,
                   struct err *err);

static int answer_job(struct http_request *request, struct http_response *response, job_fn *fn,
                      struct err *err)
{
    struct job job = {0};
    if (fn(request->db, request->tenant.project_id, request->path_params[0], &job, err) < 0)
        return -1;
    json_t *body = api_job_json(&job);
    job_release(&job);
    return http_response_json(response, 200, body, err);
}

int api_jobs_get(struct http_request *request, struct http_response *response, struct err *err)
{
    return answer_job(request, response, jobs_get, err);
}

int api_jobs_cancel(struct http_request *request, struct http_response *response, struct err *err)
{
    return answer_job(request, response, jobs_cancel, err);
}

int api_jobs_events(struct http_request *request, struct http_response *response, struct err *err)
{
    const struct api_page_rules rules = {.default_limit = 20, .max_limit = LIMIT_MAX};
    struct api_page page;
    struct event_list list = {0};
    if (api_page_parse(request, &rules, &page, err) < 0 ||
        events_list(request->db, request->tenant.project_id, request->path_params[0], page.after,
                    page.limit, &list, err) < 0)
        return -1;
    json_t *data = json_array();
    for (int i = 0; i < list.count; i++)
        json_array_append_new(data, api_event_json(&list.items[i]));
    json_t *body = json_pack("{s:s, s:o, s:b}", "object", "list", "data", data, "has_more",
                             (int)list.has_more);
    event_list_release(&list);
    return http_response_json(response, 200, body, err);
}

int api_jobs_checkpoints(struct http_request *request, struct http_response *response,
                         struct err *err)
{
    const struct api_page_rules rules = {.default_limit = 10, .max_limit = LIMIT_MAX};
    struct api_page page;
    struct checkpoint_list list = {0};
    if (api_page_parse(request, &rules, &page, err) < 0 ||
        checkpoints_list(request->db, request->tenant.project_id, request->path_params[0],
                         page.after, page.limit, &list, err) < 0)
        return -1;
    json_t *data = json_array();
    for (int i = 0; i < list.count; i++)
        json_array_append_new(data, api_checkpoint_json(&list.items[i]));
    const char *first = list.count ? list.items[0].id : NULL;
    const char *last = list.count ? list.items[list.count - 1].id : NULL;
    json_t *body = json_pack("{s:s, s:o, s:s?, s:s?, s:b}", "object", "list", "data", data,
                             "first_id", first, "last_id", last, "has_more", (int)list.has_more);
    checkpoint_list_release(&list);
    return http_response_json(response, 200, body, err);
}
