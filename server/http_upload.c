/* A multipart/form-data body into a struct http_upload: text fields in memory, the one file part
 * into the blob store's staging.
 *
 * This runs on event threads. blob_write() hashes and write(2)s into the page cache; what can wait
 * for a disk (fsync, verification, the database) is left to the handler thread. */
#include <stdlib.h>
#include <string.h>

#include "engine/base/utf8.h"
#include "server/api_context.h"
#include "server/http_internal.h"
#include "storage/blob_store.h"

#define VALUE_MAX (64u << 10)

/* The string lives as long as the exchange. */
static const char *keep(struct http_exchange *exchange, const char *text, struct err *err)
{
    char *copy = strdup(text);
    if (!copy) {
        err_set(err, ERR_NO_MEMORY, "out of memory");
        return NULL;
    }
    exchange->upload_text[exchange->upload_text_count++] = copy;
    return copy;
}

static int begin_file(struct http_exchange *exchange, const struct multipart_part *part,
                      struct err *err)
{
    struct http_upload *upload = &exchange->upload;
    if (upload->has_file)
        return err_set(err, ERR_INVALID, "a second file; send one file in a request");
    if (!utf8_valid(part->file_name, strlen(part->file_name)))
        return err_set(err, ERR_INVALID, "the file's name is not UTF-8");
    upload->file_field = keep(exchange, part->name, err);
    upload->file_name = upload->file_field ? keep(exchange, part->file_name, err) : NULL;
    if (!upload->file_name)
        return -1;
    struct api_context *api = exchange->server->options.api;
    if (!api || !api->blobs)
        return err_set(err, ERR_UNAVAILABLE, "this server has no blob store");
    upload->file_head = malloc(HTTP_UPLOAD_HEAD_MAX);
    if (!upload->file_head)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    upload->has_file = true;
    return blob_begin(api->blobs, exchange->request.tenant.project_id, "upload", &upload->blob,
                      err);
}

static int on_part(void *context, const struct multipart_part *part, struct err *err)
{
    struct http_exchange *exchange = context;
    struct http_upload *upload = &exchange->upload;
    exchange->upload_in_file = part->has_file_name;
    if (part->has_file_name)
        return begin_file(exchange, part, err);
    if (!utf8_valid(part->name, strlen(part->name)))
        return err_set(err, ERR_INVALID, "the field's name is not UTF-8");
    const char *name = keep(exchange, part->name, err);
    if (!name)
        return -1;
    if (http_upload_field(upload, name))
        return err_set_code(err, ERR_INVALID, "", name, "field \"%s\" is given twice", name);
    upload->fields[upload->field_count].name = name;
    strbuf_reset(&exchange->upload_value);
    return 0;
}

static int on_data(void *context, const char *data, size_t len, struct err *err)
{
    struct http_exchange *exchange = context;
    struct http_upload *upload = &exchange->upload;
    if (!exchange->upload_in_file) {
        strbuf_add(&exchange->upload_value, data, len);
        return strbuf_failed(&exchange->upload_value)
                   ? err_set(err, ERR_INVALID, "a field's value has more than %u bytes", VALUE_MAX)
                   : 0;
    }
    int64_t limit = exchange->server->options.max_file_bytes;
    if ((int64_t)len > limit - upload->file_bytes)
        return err_set_code(err, ERR_TOO_LARGE, "file_too_large", "file",
                            "the file has more than %lld bytes", (long long)limit);
    upload->file_bytes += (int64_t)len;
    size_t room = HTTP_UPLOAD_HEAD_MAX - upload->file_head_len;
    size_t take = len < room ? len : room;
    memcpy(upload->file_head + upload->file_head_len, data, take);
    upload->file_head_len += take;
    return blob_write(upload->blob, data, len, err);
}

static int on_part_end(void *context, struct err *err)
{
    struct http_exchange *exchange = context;
    struct http_upload *upload = &exchange->upload;
    if (exchange->upload_in_file)
        return 0;
    const struct strbuf *value = &exchange->upload_value;
    if (strlen(value->data) != value->len || !utf8_valid(value->data, value->len))
        return err_set(err, ERR_INVALID, "field \"%s\" is not UTF-8 text",
                       upload->fields[upload->field_count].name);
    const char *text = keep(exchange, value->data, err);
    if (!text)
        return -1;
    upload->fields[upload->field_count++].value = text;
    return 0;
}

int http_upload_begin(struct http_exchange *exchange, const char *content_type, struct err *err)
{
    const struct multipart_events events = {
        .on_part = on_part, .on_data = on_data, .on_part_end = on_part_end, .context = exchange};
    strbuf_init(&exchange->upload_value, VALUE_MAX);
    exchange->uploading = true;
    return multipart_init(&exchange->multipart, content_type, &events, err);
}

int http_upload_feed(struct http_exchange *exchange, const char *data, size_t len, struct err *err)
{
    return multipart_feed(&exchange->multipart, data, len, err);
}

int http_upload_end(struct http_exchange *exchange, struct err *err)
{
    return multipart_end(&exchange->multipart, err);
}

void http_upload_release(struct http_exchange *exchange)
{
    if (!exchange->uploading)
        return;
    blob_abort(exchange->upload.blob);
    exchange->upload.blob = NULL;
    free(exchange->upload.file_head);
    exchange->upload.file_head = NULL;
    for (int i = 0; i < exchange->upload_text_count; i++)
        free(exchange->upload_text[i]);
    exchange->upload_text_count = 0;
    strbuf_release(&exchange->upload_value);
    multipart_release(&exchange->multipart);
    exchange->uploading = false;
}
