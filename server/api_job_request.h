/* api_job_request.h: CreateFineTuningJobRequest, from JSON to a plain struct with everything
 * checked that can be checked without the database. */
#ifndef GRAFT_API_JOB_REQUEST_H
#define GRAFT_API_JOB_REQUEST_H

#include <jansson.h>

#include "storage/jobs.h"

struct api_job_request {
    struct job_new job;
    char *owned[4]; /* JSON texts in `job`; its other strings point into the body */
};

/* ERR_INVALID names the field (codes of api_check.h and field_table.h). */
int api_job_request_parse(struct api_job_request *request, const json_t *body, struct err *err);
void api_job_request_release(struct api_job_request *request); /* also after a failed parse */

#endif
