#include "server/api_deltas.h"

#include <stdlib.h>
#include <string.h>

#include "engine/engine.h"
#include "server/api_check.h"
#include "server/api_context.h"
#include "server/api_idempotency.h"
#include "server/api_models.h"
#include "server/delta_header.h"
#include "server/field_table.h"
#include "storage/blob_store.h"
#include "storage/models.h"

struct create {
    struct http_request *request;
    struct model_new model;
};

static int create_row(void *context, json_t **body, struct err *err)
{
    struct create *create = context;
    struct http_request *request = create->request;
    struct model model;
    if (models_import(request->db, request->tenant.project_id, &create->model, &model, err) < 0)
        return -1;
    *body = api_model_json(&model);
    return 0;
}

static int read_request(const json_t *body, struct model_new *out, struct err *err)
{
    const struct api_member file = {body, "file", "file", true};
    const struct api_member suffix = {body, "suffix", "suffix", false};
    if (field_table_check(&field_table_deltas, body, err) < 0 ||
        api_check_string(&file, 1, 300, &out->file, err) < 0 ||
        api_check_suffix(&suffix, &out->suffix, err) < 0)
        return -1;
    return 0;
}

static int find_base(struct db *db, const char *digest, struct base *out, struct err *err)
{
    struct err why = {0};
    if (bases_find(db, digest, out, &why) == 0)
        return 0;
    if (why.kind == ERR_NOT_FOUND)
        return err_set_code(err, ERR_INVALID, "invalid_delta", "file",
                            "The delta is of the base with digest %s, which this server does not "
                            "have.",
                            digest);
    *err = why;
    return -1;
}

/* All that the infer worker would look at before it answers from it. */
static int check(struct http_request *request, const struct base *base, const char *path,
                 struct err *err)
{
    struct err why = {0};
    char *base_path = NULL;
    int rc;
    if (blob_path(request->api->blobs, BLOB_OWNER_BASE, base->sha256, &base_path, err) < 0)
        return -1;
    rc = engine_delta_check(base_path, path, "file", &why);
    free(base_path);
    if (rc == 0)
        return 0;
    if (why.kind == ERR_INVALID)
        return err_set_code(err, ERR_INVALID, "invalid_delta", "file",
                            "The file is not a delta that can be used here: %s.", why.message);
    *err = why;
    return -1;
}

/* The bytes are immutable, whatever becomes of the row between this look and the import. */
static int look(struct http_request *request, const char *file_id, struct base *base,
                struct err *err)
{
    const char *project = request->tenant.project_id;
    struct delta_header header;
    struct file file = {0};
    char *path = NULL;
    int rc = -1;
    if (models_import_file(request->db, project, file_id, &file, err) < 0)
        return -1;
    if (blob_path(request->api->blobs, project, file.sha256, &path, err) == 0 &&
        delta_header_read(path, &header, err) == 0 &&
        find_base(request->db, header.base, base, err) == 0)
        rc = check(request, base, path, err);
    free(path);
    file_release(&file);
    return rc;
}

int api_deltas_create(struct http_request *request, struct http_response *response, struct err *err)
{
    struct create create = {.request = request};
    struct base base;
    if (read_request(request->json, &create.model, err) < 0 ||
        look(request, create.model.file, &base, err) < 0)
        return -1;
    create.model.base = &base;
    char *what = json_dumps(request->json, JSON_COMPACT | JSON_SORT_KEYS);
    if (!what)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    int rc = api_once(request, response, what, strlen(what), create_row, &create, err);
    free(what);
    return rc;
}
