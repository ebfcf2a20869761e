/* api_idempotency.h: does what a POST asks once, also when it is sent again with the same
 * Idempotency-Key: rows, stored answer and key commit together. */
#ifndef GRAFT_API_IDEMPOTENCY_H
#define GRAFT_API_IDEMPOTENCY_H

#include <jansson.h>
#include <stddef.h>

#include "server/http_request.h"
#include "server/http_response.h"

/* Runs inside the tenant's transaction; *body becomes the answer. */
typedef int api_once_fn(void *context, json_t **body, struct err *err);

/* One transaction around `create`, and the answer 200 with its body. `what`: all that the request
 * says, from which it is known whether a second one with the key asks the same. */
int api_once(struct http_request *request, struct http_response *response, const char *what,
             size_t what_len, api_once_fn *create, void *context, struct err *err);

#endif
