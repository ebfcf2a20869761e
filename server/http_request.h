/* http_request.h: what a handler sees of a request.
 *
 * Everything here is checked already: the request filter (http_filter.h) has refused malformed
 * requests, the path is decoded once, the body is complete and within the route's limit, JSON is
 * strict (json_text.h) and an object, the key is valid. Strings live as long as the request; the
 * request lives until the handler returns (http_later_* has its own life). One thread at a time. */
#ifndef GRAFT_HTTP_REQUEST_H
#define GRAFT_HTTP_REQUEST_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/err.h"
#include "server/http_route.h"

struct api_context; /* api_context.h: blob store, inference client, … shared by all handlers */
struct blob_writer; /* storage/blob_store.h */
struct db;          /* storage/db.h */

#define HTTP_SEGMENTS_MAX 16
#define HTTP_PATH_PARAMS_MAX 4
#define HTTP_QUERY_MAX 64
#define HTTP_REQUEST_ID_SIZE 40
#define HTTP_TENANT_ID_SIZE 64

struct http_pair {
    const char *name, *value; /* decoded; value "" where there is no '=' */
};

/* Who asks. A tenant is a project; set in every transaction (storage). */
struct http_tenant {
    char project_id[HTTP_TENANT_ID_SIZE];
    char organization_id[HTTP_TENANT_ID_SIZE];
    char organization[HTTP_TENANT_ID_SIZE]; /* its name: a part of fine-tuned models' names */
    char key_id[HTTP_TENANT_ID_SIZE];       /* fit for logs; the key itself is nowhere here */
};

/* The parts of a multipart/form-data body. The file's bytes are in the blob store's staging and
 * go away with the request unless the handler commits them. */
#define HTTP_UPLOAD_FIELDS_MAX 16
#define HTTP_UPLOAD_HEAD_MAX (64u << 10)
struct http_upload {
    struct http_pair fields[HTTP_UPLOAD_FIELDS_MAX]; /* all but the file, in order */
    int field_count;
    bool has_file;
    const char *file_field; /* the name of the file's field */
    const char *file_name;  /* as the client sent it: data, never a path */
    int64_t file_bytes;
    char *file_head; /* the first bytes of the file, for a look at its format */
    size_t file_head_len;
    struct blob_writer *blob; /* NULL without a file; a handler that takes it sets it to NULL */
};

struct http_request {
    const struct http_route *route;
    const char *method; /* "HEAD" arrives as "GET" */
    const char *path_params[HTTP_PATH_PARAMS_MAX];
    struct http_pair query[HTTP_QUERY_MAX];
    int query_count;
    char id[HTTP_REQUEST_ID_SIZE]; /* x-request-id */
    struct http_tenant tenant;
    struct api_context *api;
    struct db *db;       /* this handler thread's connection; in no transaction */
    struct db **db_slot; /* the HTTP layer's own */
    json_t *json;        /* HTTP_BODY_JSON */
    const char *body;    /* its text, NUL-terminated */
    size_t body_len;
    struct http_upload *upload;  /* HTTP_BODY_UPLOAD */
    char remote[48];             /* the peer's address as text */
    const char *idempotency_key; /* Idempotency-Key header, NULL when absent */
};

/* For routes without a key: opens this handler thread's connection into request->db.
 * ERR_UNAVAILABLE when the database is away or none is configured. */
int http_request_database(struct http_request *request, struct err *err);
/* First value of a query parameter; NULL when absent. */
const char *http_request_query(const struct http_request *request, const char *name);
/* A field of the upload; NULL when absent. */
const char *http_upload_field(const struct http_upload *upload, const char *name);

#endif
