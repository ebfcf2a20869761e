/* api_deltas.h: /v1/graft/deltas: deltas that were made elsewhere become models of the project. */
#ifndef GRAFT_API_DELTAS_H
#define GRAFT_API_DELTAS_H

#include "server/http_request.h"
#include "server/http_response.h"

/* {"file", "suffix"}: registers an uploaded file of purpose graft-delta as a fine-tuned model. The
 * answer is the model. ERR_INVALID, code invalid_delta, param file: not a delta, or of a base that
 * is not here. */
int api_deltas_create(struct http_request *request, struct http_response *response,
                      struct err *err);

#endif
