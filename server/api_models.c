#include "server/api_models.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "server/api_blob.h"
#include "server/api_check.h"
#include "server/api_context.h"
#include "storage/blob_store.h"
#include "storage/models.h"

json_t *api_model_json(const struct model *model)
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
        json_array_append_new(data, api_model_json(&list.items[i]));
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
    return http_response_json(response, 200, api_model_json(&model), err);
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

/* ------------------------------------------------------------------ delta */

static unsigned nibble(char c)
{
    return (unsigned)(c <= '9' ? c - '0' : c - 'a' + 10);
}

/* "sha-256=:…:" (RFC 9530) from 64 hex digits: 32 bytes are 43 characters of base64 and one '='. */
static void format_digest(const char *sha256, char out[64])
{
    static const char alphabet[] =
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    unsigned held = 0; /* bits not written yet, the last ones of it */
    int bits = 0, n = snprintf(out, 64, "sha-256=:");
    for (; *sha256; sha256++) {
        held = held << 4 | nibble(*sha256);
        for (bits += 4; bits >= 6; bits -= 6)
            out[n++] = alphabet[held >> (bits - 6) & 63];
    }
    out[n++] = alphabet[held << (6 - bits) & 63];
    snprintf(out + n, 64 - (size_t)n, "=:");
}

/* The bytes are named by their digest, so the tag holds for ever. */
static int name_bytes(struct http_response *response, const char *sha256, struct err *err)
{
    char tag[SHA256_HEX + 2], digest[64];
    snprintf(tag, sizeof(tag), "\"%s\"", sha256);
    format_digest(sha256, digest);
    if (http_response_header(response, "etag", tag, err) < 0)
        return -1;
    return http_response_header(response, "repr-digest", digest, err);
}

static int send_delta(struct http_request *request, struct http_response *response,
                      const struct model *model, struct err *err)
{
    const struct blob_wanted want = {.owner = request->tenant.project_id,
                                     .sha256 = model->artifact_sha256,
                                     .name = model->name,
                                     .param = "model"};
    char name[MODEL_NAME_SIZE + 16];
    int fd;
    snprintf(name, sizeof(name), "%s.safetensors", model->name);
    for (char *p = name; *p; p++)
        if (*p == ':' || *p == '/') /* for file systems that will not have them */
            *p = '-';
    if (api_blob_open(request, &want, model->artifact_bytes, &fd, err) < 0)
        return -1;
    if (name_bytes(response, model->artifact_sha256, err) < 0) {
        close(fd);
        return -1;
    }
    return http_response_file(response, fd, model->artifact_bytes, "application/octet-stream", name,
                              err);
}

int api_models_delta(struct http_request *request, struct http_response *response, struct err *err)
{
    struct model model;
    if (models_resolve(request->db, request->tenant.project_id, request->path_params[0], &model,
                       err) < 0)
        return -1;
    if (model.kind == MODEL_BASE)
        return err_set_code(err, ERR_NOT_FOUND, "model_not_found", "model",
                            "The model `%.200s` is a base model: only a fine-tuned model has a "
                            "delta.",
                            model.name);
    return send_delta(request, response, &model, err);
}
