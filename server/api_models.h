/* api_models.h: /v1/models: base models and the project's own fine-tunes. */
#ifndef GRAFT_API_MODELS_H
#define GRAFT_API_MODELS_H

#include "server/http_request.h"
#include "server/http_response.h"
#include "storage/models.h"

/* The contract's Model; a new reference, NULL when out of memory. */
json_t *api_model_json(const struct model *model);

int api_models_list(struct http_request *request, struct http_response *response, struct err *err);
int api_models_get(struct http_request *request, struct http_response *response, struct err *err);
/* The file of a fine-tuned model or a checkpoint, with its SHA-256 as etag and repr-digest; 500
 * where the disk has other bytes. */
int api_models_delta(struct http_request *request, struct http_response *response, struct err *err);
/* A fine-tune, with its job's checkpoint of the same bytes, or a checkpoint; a base is 403. */
int api_models_delete(struct http_request *request, struct http_response *response,
                      struct err *err);

#endif
