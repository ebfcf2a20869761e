/* api_job_json.h: jobs, events and checkpoints as the contract's objects. New references; NULL when
 * out of memory. */
#ifndef GRAFT_API_JOB_JSON_H
#define GRAFT_API_JOB_JSON_H

#include <jansson.h>

#include "storage/checkpoints.h"
#include "storage/events.h"
#include "storage/jobs.h"

/* FineTuningJob, and beside the contract's keys: user_provided_suffix, and `graft` with what only
 * Graft knows (state, progress, dataset report, recall, delta). */
json_t *api_job_json(const struct job *job);
json_t *api_event_json(const struct event *event);
json_t *api_checkpoint_json(const struct checkpoint *checkpoint);

#endif
