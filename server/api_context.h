/* api_context.h: what handlers share beside their thread's database connection. Filled by
 * `graft serve` before http_server_start, never changed after; what it points to is thread-safe. */
#ifndef GRAFT_API_CONTEXT_H
#define GRAFT_API_CONTEXT_H

#include <stdbool.h>
#include <stddef.h>

#include "engine/base/err.h"

struct blob_store;
struct device_list;
struct http_server;
struct infer_client;
struct supervisor;

struct api_context {
    struct blob_store *blobs;
    struct infer_client *infer;
    struct supervisor *supervisor;
    const struct device_list *devices; /* those of the workers, with descriptions */
    struct http_server *http;          /* set by http_server_start: for metrics */
    /* /readyz: 0, or -1 with what is not ready in err. NULL: workers are not asked. */
    int (*workers_ready)(struct api_context *api, struct err *err);
};

#endif
