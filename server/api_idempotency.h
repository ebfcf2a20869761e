/* api_idempotency.h: does what a POST asks once, also when it is sent again with the same
 * Idempotency-Key: rows, stored answer and key commit together. */
#ifndef GRAFT_API_IDEMPOTENCY_H
#define GRAFT_API_IDEMPOTENCY_H

#include <jansson.h>
#include <stddef.h>

#include "server/http_request.h"
#include "server/http_response.h"

struct api_once {
    /* All that the request says, from which it is known whether a second one with the key asks the
     * same. */
    const char *what;
    size_t what_len;
    /* NULL, or what takes long: runs outside of any transaction, before `create`, and not where the
     * key's answer is there already. What it saw in the database `create` must see again. */
    int (*check)(void *context, struct err *err);
    /* Runs inside the tenant's transaction; *body becomes the answer. */
    int (*create)(void *context, json_t **body, struct err *err);
    void *context;
};

/* One transaction around `create`, and the answer 200 with its body. */
int api_once(struct http_request *request, struct http_response *response,
             const struct api_once *once, struct err *err);

#endif
