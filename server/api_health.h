/* api_health.h: /healthz: the process answers; /readyz: it can do its work. */
#ifndef GRAFT_API_HEALTH_H
#define GRAFT_API_HEALTH_H

#include "server/http_request.h"
#include "server/http_response.h"

int api_health_live(struct http_request *request, struct http_response *response, struct err *err);
/* 503 that names what is missing: the database, or a worker. */
int api_health_ready(struct http_request *request, struct http_response *response, struct err *err);

#endif
