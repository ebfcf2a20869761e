/* api_jobs.h: /v1/fine_tuning/jobs: create, list, look, cancel; a job's events and checkpoints. */
#ifndef GRAFT_API_JOBS_H
#define GRAFT_API_JOBS_H

#include "server/http_request.h"
#include "server/http_response.h"

#define API_JOBS_UNFINISHED_MAX 100 /* of a project */

/* Job, first events and outbox row commit together before the answer: a job acknowledged with 200
 * is never lost. */
int api_jobs_create(struct http_request *request, struct http_response *response, struct err *err);
int api_jobs_list(struct http_request *request, struct http_response *response, struct err *err);
int api_jobs_get(struct http_request *request, struct http_response *response, struct err *err);
int api_jobs_cancel(struct http_request *request, struct http_response *response, struct err *err);
int api_jobs_events(struct http_request *request, struct http_response *response, struct err *err);
int api_jobs_checkpoints(struct http_request *request, struct http_response *response,
                         struct err *err);

#endif
