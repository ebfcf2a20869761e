#include "server/api_deltas.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/engine.h"
#include "server/api_blob.h"
#include "server/api_check.h"
#include "server/api_compression.h"
#include "server/api_context.h"
#include "server/api_idempotency.h"
#include "server/api_job_json.h"
#include "server/api_jobs.h"
#include "server/api_models.h"
#include "server/api_turn.h"
#include "server/delta_header.h"
#include "server/field_table.h"
#include "storage/blob_store.h"
#include "storage/jobs.h"
#include "storage/models.h"

/* api_once, with the whole body as what is asked. */
static int run_once(struct http_request *request, struct http_response *response,
                    struct api_once *once, struct err *err)
{
    char *what = json_dumps(request->json, JSON_COMPACT | JSON_SORT_KEYS);
    if (!what)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    once->what = what;
    once->what_len = strlen(what);
    int rc = api_once(request, response, once, err);
    free(what);
    return rc;
}

/* ------------------------------------------------------------------ a file */

static struct api_turn turn = API_TURN_INIT; /* to check one */

struct import {
    struct http_request *request;
    struct model_new model;
    struct base base;
};

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

/* A file that has rotted since it came may well have the shape of a delta still. */
static int check_bytes(struct http_request *request, const struct file *file, struct err *err)
{
    const struct blob_wanted want = {.owner = request->tenant.project_id,
                                     .sha256 = file->sha256,
                                     .name = file->id,
                                     .param = "file"};
    int fd;
    if (api_blob_open(request, &want, file->bytes, &fd, err) < 0)
        return -1;
    close(fd);
    return 0;
}

static int look(struct http_request *request, const struct file *file, struct base *base,
                struct err *err)
{
    const char *project = request->tenant.project_id;
    struct delta_header header;
    char *path = NULL;
    int rc = -1;
    if (check_bytes(request, file, err) == 0 &&
        blob_path(request->api->blobs, project, file->sha256, &path, err) == 0 &&
        delta_header_read(path, &header, err) == 0 &&
        find_base(request->db, header.base, base, err) == 0)
        rc = check(request, base, path, err);
    free(path);
    return rc;
}

static int find_file(const struct import *import, struct file *file, struct err *err)
{
    struct http_request *request = import->request;
    return models_import_file(request->db, request->tenant.project_id, import->model.file, file,
                              err);
}

static int import_check(void *context, struct err *err)
{
    struct import *import = context;
    struct file file = {0};
    struct err why = {0};
    int rc = -1;
    if (find_file(import, &file, err) < 0)
        return -1;
    if (api_turn_take(&turn, err) == 0) {
        rc = look(import->request, &file, &import->base, &why);
        api_turn_end(&turn);
    }
    file_release(&file);
    /* Bytes that are not there are no fault where the file has been deleted meanwhile. */
    if (why.kind == ERR_IO && find_file(import, &file, err) == 0)
        file_release(&file);
    if (err_is_set(&why) && !err_is_set(err))
        *err = why;
    return rc;
}

/* A file's row never changes: where it is there still, it names the bytes that were checked. */
static int import_row(void *context, json_t **body, struct err *err)
{
    struct import *import = context;
    struct http_request *request = import->request;
    struct model model;
    if (models_import(request->db, request->tenant.project_id, &import->model, &model, err) < 0)
        return -1;
    *body = api_model_json(&model);
    return 0;
}

static int import_file(struct http_request *request, struct http_response *response,
                       const char *suffix, struct err *err)
{
    static const char *const others[] = {"calibration_file", "compression", "seed"};
    const struct api_member file = {request->json, "file", "file", true};
    struct import import = {.request = request, .model = {.suffix = suffix}};
    for (size_t i = 0; i < sizeof(others) / sizeof(others[0]); i++)
        if (api_check_given(request->json, others[i]))
            return err_set_code(err, ERR_INVALID, "invalid_value", others[i],
                                "Invalid '%s': it can not be given together with 'file', which is "
                                "compressed already.",
                                others[i]);
    if (api_check_string(&file, 1, 300, &import.model.file, err) < 0)
        return -1;
    import.model.base = &import.base;
    return run_once(
        request, response,
        &(struct api_once){.check = import_check, .create = import_row, .context = &import}, err);
}

/* ------------------------------------------------------------------ two models */

struct compress {
    struct http_request *request;
    struct job_new job;
    struct base base, tuned;
};

static int compress_row(void *context, json_t **body, struct err *err)
{
    struct compress *c = context;
    struct job job = {0};
    if (jobs_create(c->request->db, c->request->tenant.project_id, &c->job, &job, err) < 0)
        return -1;
    *body = api_job_json(&job);
    job_release(&job);
    return 0;
}

/* A base model by its name, which is in field `key`. */
static int read_base(struct http_request *request, const char *key, struct base *out,
                     struct err *err)
{
    const struct api_member member = {request->json, key, key, true};
    const char *name = NULL;
    struct err why = {0};
    if (api_check_string(&member, 1, 300, &name, err) < 0)
        return -1;
    if (bases_get(request->db, name, out, &why) == 0)
        return 0;
    if (why.kind == ERR_NOT_FOUND)
        return err_set_code(err, ERR_NOT_FOUND, "model_not_found", key,
                            "The model `%.200s` is not one of this server's base models.", name);
    *err = why;
    return -1;
}

/* What the engine would find out later, of what is known now. */
static int check_pair(const struct base *base, const struct base *tuned, struct err *err)
{
    if (strcmp(base->digest, tuned->digest) == 0)
        return err_set_code(err, ERR_INVALID, "invalid_value", "tuned",
                            "Invalid 'tuned': `%s` has the values of its base: there is no "
                            "difference to compress.",
                            tuned->name);
    if (strcmp(base->architecture, tuned->architecture) != 0 || base->layers != tuned->layers ||
        base->hidden != tuned->hidden || base->intermediate != tuned->intermediate ||
        base->heads != tuned->heads || base->kv_heads != tuned->kv_heads ||
        base->vocabulary != tuned->vocabulary || base->parameters != tuned->parameters)
        return err_set_code(err, ERR_INVALID, "invalid_value", "tuned",
                            "Invalid 'tuned': `%s` has other shapes than its base `%s` (%lld "
                            "parameters and %lld): it was not tuned from it.",
                            tuned->name, base->name, (long long)tuned->parameters,
                            (long long)base->parameters);
    return 0;
}

static int read_compress(struct compress *c, struct err *err)
{
    const json_t *body = c->request->json, *compression = NULL;
    const struct api_member rows = {body, "calibration_file", "calibration_file", false};
    const struct api_member how = {body, "compression", "compression", false};
    const struct api_member seed = {body, "seed", "seed", false};
    c->job.seed = -1;
    if (api_check_string(&rows, 1, 300, &c->job.training_file, err) < 0 ||
        api_check_object(&how, &compression, err) < 0 ||
        api_compression_read(compression, "compression", &c->job.compression, err) < 0 ||
        api_check_integer(&seed, 0, INT32_MAX, &c->job.seed, err) < 0)
        return -1;
    if (c->job.compression.max_kl > 0 && !c->job.training_file)
        return err_set_code(err, ERR_INVALID, "missing_required_parameter", "calibration_file",
                            "Missing required parameter: 'calibration_file': with max_kl there "
                            "must be something to measure it on.");
    if (read_base(c->request, "base", &c->base, err) < 0 ||
        read_base(c->request, "tuned", &c->tuned, err) < 0 ||
        check_pair(&c->base, &c->tuned, err) < 0)
        return -1;
    /* Whether their embeddings differ as well is not known yet. */
    return api_compression_check(&c->job.compression, "compression", c->request->api->blobs,
                                 c->base.sha256, false, err);
}

static int compress_models(struct http_request *request, struct http_response *response,
                           const char *suffix, struct err *err)
{
    struct compress compress = {
        .request = request, .job = {.suffix = suffix, .max_unfinished = API_JOBS_UNFINISHED_MAX}};
    if (read_compress(&compress, err) < 0)
        return -1;
    compress.job.model = compress.base.name;
    compress.job.tuned = &compress.tuned;
    return run_once(request, response,
                    &(struct api_once){.create = compress_row, .context = &compress}, err);
}

int api_deltas_create(struct http_request *request, struct http_response *response, struct err *err)
{
    const json_t *body = request->json;
    const struct api_member suffix_member = {body, "suffix", "suffix", false};
    const char *suffix = NULL;
    if (field_table_check(&field_table_deltas, body, err) < 0 ||
        api_check_suffix(&suffix_member, &suffix, err) < 0)
        return -1;
    if (!api_check_given(body, "base") && !api_check_given(body, "tuned"))
        return import_file(request, response, suffix, err);
    if (api_check_given(body, "file"))
        return err_set_code(err, ERR_INVALID, "invalid_value", "file",
                            "Invalid 'file': give either a delta's file, or two models.");
    return compress_models(request, response, suffix, err);
}
