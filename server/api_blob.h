/* api_blob.h: stored bytes that leave the server, or become something else in it, are those that
 * came in. Any thread. */
#ifndef GRAFT_API_BLOB_H
#define GRAFT_API_BLOB_H

#include <stdint.h>

#include "server/http_request.h"
#include "storage/blob_store.h"

/* blob_open_sound, where a large blob waits for the one before it: ERR_UNAVAILABLE, code
 * server_busy, when others wait already. */
int api_blob_open(struct http_request *request, const struct blob_wanted *want, int64_t bytes,
                  int *fd, struct err *err);

#endif
