/* api_chat.h: POST /v1/chat/completions, as one JSON object or as a stream.
 *
 * The handler resolves the model for the tenant in one transaction, hands the request to the infer
 * worker and returns; the answer comes later, on the inference client's thread. When the client
 * goes, the worker is told to stop. */
#ifndef GRAFT_API_CHAT_H
#define GRAFT_API_CHAT_H

#include "server/http_request.h"
#include "server/http_response.h"

int api_chat_create(struct http_request *request, struct http_response *response, struct err *err);

#endif
