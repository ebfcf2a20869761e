#include "server/api_files.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/sha256.h"
#include "engine/base/strbuf.h"
#include "server/api_blob.h"
#include "server/api_check.h"
#include "server/api_context.h"
#include "server/api_idempotency.h"
#include "server/field_table.h"
#include "storage/blob_store.h"
#include "storage/files.h"

#define BATCH_EXPIRY (30 * 86400) /* seconds: files with purpose batch, unless told otherwise */
#define FILE_NAME_MAX 512

static json_t *file_json(const struct file *file)
{
    json_t *json =
        json_pack("{s:s, s:s, s:I, s:I, s:s, s:s, s:s}", "object", "file", "id", file->id, "bytes",
                  (json_int_t)file->bytes, "created_at", (json_int_t)file->created_at, "filename",
                  file->filename, "purpose", file->purpose, "status", file->status);
    if (json && file->expires_at)
        json_object_set_new(json, "expires_at", json_integer(file->expires_at));
    return json;
}

/* ------------------------------------------------------------------ upload */

/* As OpenAI takes them, and graft-delta, which is ours. It gives each back as it was sent, "evals"
 * too, which its schema of a file forgets and its guide to evals shows. */
static const char *const purposes[] = {"fine-tune", "batch", "assistants",  "vision",
                                       "user_data", "evals", "graft-delta", NULL};

static int wrong_line(long line, const char *why, struct err *err)
{
    return err_set_code(err, ERR_INVALID, "invalid_file_format", "file",
                        "Expected file to have JSONL format, where every line is a valid JSON "
                        "dictionary. Line %ld is not a dictionary: %s.",
                        line, why);
}

/* What else is wrong with the line is the job's to say. */
static int check_dictionary(long number, const char *line, size_t len, struct err *err)
{
    json_error_t at;
    json_t *json = json_loadb(line, len, JSON_DECODE_ANY, &at);
    bool is_json = json != NULL, yes = json_is_object(json);
    json_decref(json);
    return yes ? 0 : wrong_line(number, is_json ? "it is another JSON value" : at.text, err);
}

int api_files_check_jsonl(const char *head, size_t len, bool whole, struct err *err)
{
    long line = 0;
    bool any = false;
    if (len >= 3 && memcmp(head, "\xef\xbb\xbf", 3) == 0) { /* the job has its say about it */
        head += 3;
        len -= 3;
    }
    for (const char *p = head, *end = head + len; p < end;) {
        const char *newline = memchr(p, '\n', (size_t)(end - p));
        const char *stop = newline ? newline : end;
        const char *first = p;
        while (first < stop && strchr(" \t\r", *first) && *first)
            first++;
        line++;
        if (first < stop) {
            any = true;
            if (newline || whole) {
                if (check_dictionary(line, first, (size_t)(stop - first), err) != 0)
                    return -1;
            } else if (*first != '{') {
                return wrong_line(line, "it does not start with {", err);
            }
        }
        p = newline ? newline + 1 : end;
    }
    return any || !whole ? 0 : wrong_line(1, "there is nothing in it", err);
}

/* A form has no objects: "expires_after[seconds]" is the table's "expires_after.seconds", and
 * nothing else is. */
static int check_field_names(const struct http_upload *upload, struct err *err)
{
    for (int i = 0; i < upload->field_count; i++) {
        const char *name = upload->fields[i].name;
        char path[300];
        size_t n = strlen(name);
        const char *bracket = strchr(name, '[');
        if (bracket && name[n - 1] == ']')
            snprintf(path, sizeof(path), "%.*s.%.*s", (int)(bracket - name), name,
                     (int)(name + n - 1 - (bracket + 1)), bracket + 1);
        else
            snprintf(path, sizeof(path), "%s", name);
        if (!bracket && (strchr(name, '.') || strcmp(name, "expires_after") == 0))
            return err_set_code(err, ERR_INVALID, "unknown_parameter", name,
                                "Unknown parameter: '%s'. In a form, write "
                                "expires_after[anchor] and expires_after[seconds].",
                                name);
        if (field_table_check_name(&field_table_files, path, err) < 0)
            return -1;
    }
    if (upload->has_file && strcmp(upload->file_field, "file") != 0)
        return err_set_code(err, ERR_INVALID, "unknown_parameter", upload->file_field,
                            "Unknown parameter: '%s'.", upload->file_field);
    return 0;
}

static int read_expiry(const struct http_upload *upload, struct file_new *file, struct err *err)
{
    const char *anchor = http_upload_field(upload, "expires_after[anchor]");
    const char *seconds = http_upload_field(upload, "expires_after[seconds]");
    if (!anchor && !seconds) {
        file->expires_after = strcmp(file->purpose, "batch") == 0 ? BATCH_EXPIRY : 0;
        return 0;
    }
    static const char *const anchors[] = {"created_at", NULL};
    char *end = NULL;
    json_t *object = json_object();
    int64_t number = 0;
    int choice, rc = -1;
    if (anchor)
        json_object_set_new(object, "anchor", json_string(anchor));
    if (seconds) {
        long long n = strtoll(seconds, &end, 10);
        json_object_set_new(object, "seconds",
                            *seconds && !*end ? json_integer(n) : json_string(seconds));
    }
    const struct api_member anchor_member = {object, "anchor", "expires_after.anchor", true};
    const struct api_member seconds_member = {object, "seconds", "expires_after.seconds", true};
    if (api_check_choice(&anchor_member, anchors, &choice, err) < 0 ||
        api_check_integer(&seconds_member, 3600, 2592000, &number, err) < 0)
        goto out;
    file->expires_after = number;
    rc = 0;
out:
    json_decref(object);
    return rc;
}

static int read_upload(const struct http_upload *upload, struct file_new *file, struct err *err)
{
    const char *purpose = http_upload_field(upload, "purpose");
    json_t *object = json_object();
    int choice, rc = -1;
    if (purpose)
        json_object_set_new(object, "purpose", json_string(purpose));
    const struct api_member purpose_member = {object, "purpose", "purpose", true};
    if (check_field_names(upload, err) < 0 ||
        api_check_choice(&purpose_member, purposes, &choice, err) < 0)
        goto out;
    file->purpose = purposes[choice];
    if (!upload->has_file) {
        err_set_code(err, ERR_INVALID, "missing_required_parameter", "file",
                     "Missing required parameter: 'file'. Send it as a part with a file name.");
        goto out;
    }
    if (upload->file_bytes == 0) {
        err_set_code(err, ERR_INVALID, "empty_file", "file", "The file is empty.");
        goto out;
    }
    if (strlen(upload->file_name) > FILE_NAME_MAX) {
        err_set_code(err, ERR_INVALID, "string_above_max_length", "file",
                     "The file's name has more than %d bytes.", FILE_NAME_MAX);
        goto out;
    }
    file->filename = upload->file_name[0] ? upload->file_name : "file";
    bool lines = strcmp(file->purpose, "fine-tune") == 0 || strcmp(file->purpose, "batch") == 0;
    if (read_expiry(upload, file, err) < 0 ||
        (lines &&
         api_files_check_jsonl(upload->file_head, upload->file_head_len,
                               (int64_t)upload->file_head_len == upload->file_bytes, err) < 0))
        goto out;
    rc = 0;
out:
    json_decref(object);
    return rc;
}

struct create {
    struct http_request *request;
    struct file_new file;
};

static int create_row(void *context, json_t **body, struct err *err)
{
    struct create *create = context;
    struct file row = {0};
    struct http_request *request = create->request;
    if (files_create(request->db, request->tenant.project_id, &create->file, &row, err) < 0)
        return -1;
    *body = file_json(&row);
    file_release(&row);
    return 0;
}

int api_files_create(struct http_request *request, struct http_response *response, struct err *err)
{
    struct create create = {.request = request};
    struct file_new *file = &create.file;
    char sha256[SHA256_HEX];
    if (read_upload(request->upload, file, err) < 0)
        return -1;
    struct blob_writer *blob = request->upload->blob;
    request->upload->blob = NULL; /* blob_commit ends it */
    if (blob_commit(blob, sha256, &file->bytes, err) < 0)
        return -1;
    file->sha256 = sha256;
    struct strbuf what;
    strbuf_init(&what, 4096);
    strbuf_addf(&what, "%s\n%s\n%lld\n%s", file->purpose, sha256, (long long)file->expires_after,
                file->filename);
    int rc = api_once(
        request, response,
        &(struct api_once){
            .what = what.data, .what_len = what.len, .create = create_row, .context = &create},
        err);
    strbuf_release(&what);
    return rc;
}

/* ------------------------------------------------------------------ the rest */

int api_files_list(struct http_request *request, struct http_response *response, struct err *err)
{
    static const char *const other[] = {"purpose", NULL};
    const struct api_page_rules rules = {
        .default_limit = 10000, .max_limit = 10000, .order = true, .other = other};
    struct api_page page;
    struct file_list list = {0};
    if (api_page_parse(request, &rules, &page, err) < 0)
        return -1;
    const struct file_query query = {.after = page.after,
                                     .purpose = http_request_query(request, "purpose"),
                                     .limit = page.limit,
                                     .ascending = page.ascending};
    if (files_list(request->db, request->tenant.project_id, &query, &list, err) < 0)
        return -1;
    json_t *data = json_array();
    for (int i = 0; i < list.count; i++)
        json_array_append_new(data, file_json(&list.items[i]));
    const char *first = list.count ? list.items[0].id : "";
    const char *last = list.count ? list.items[list.count - 1].id : "";
    json_t *body = json_pack("{s:s, s:o, s:s, s:s, s:b}", "object", "list", "data", data,
                             "first_id", first, "last_id", last, "has_more", (int)list.has_more);
    file_list_release(&list);
    return http_response_json(response, 200, body, err);
}

int api_files_get(struct http_request *request, struct http_response *response, struct err *err)
{
    struct file file = {0};
    if (files_get(request->db, request->tenant.project_id, request->path_params[0], &file, err) < 0)
        return -1;
    json_t *body = file_json(&file);
    file_release(&file);
    return http_response_json(response, 200, body, err);
}

int api_files_content(struct http_request *request, struct http_response *response, struct err *err)
{
    const char *project = request->tenant.project_id;
    struct file file = {0};
    int fd, rc = -1;
    if (files_get(request->db, project, request->path_params[0], &file, err) < 0)
        return -1;
    const struct blob_wanted want = {.owner = project, .sha256 = file.sha256, .name = file.id};
    if (api_blob_open(request, &want, file.bytes, &fd, err) == 0)
        rc = http_response_file(response, fd, file.bytes, "application/octet-stream", file.filename,
                                err);
    file_release(&file);
    return rc;
}

int api_files_delete(struct http_request *request, struct http_response *response, struct err *err)
{
    const char *id = request->path_params[0];
    if (files_delete(request->db, request->tenant.project_id, id, err) < 0)
        return -1;
    return http_response_json(
        response, 200, json_pack("{s:s, s:s, s:b}", "id", id, "object", "file", "deleted", 1), err);
}
