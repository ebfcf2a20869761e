/* api_deltas.h: /v1/graft/deltas: what was tuned elsewhere becomes a model of the project: a delta
 * that is there already, or one that is made of two imported models. */
#ifndef GRAFT_API_DELTAS_H
#define GRAFT_API_DELTAS_H

#include "server/http_request.h"
#include "server/http_response.h"

/* {"base", "tuned", …}: a job that compresses the difference of the two; the answer is the job, and
 * the job's fine_tuned_model what comes of it.
 *
 * {"file", "suffix"}: registers an uploaded file of purpose graft-delta as a fine-tuned model. The
 * answer is the model. ERR_INVALID, code invalid_delta, param file: not a delta, of a base that is
 * not here, or no longer what was uploaded. ERR_UNAVAILABLE, code server_busy: others are being
 * checked. */
int api_deltas_create(struct http_request *request, struct http_response *response,
                      struct err *err);

#endif
