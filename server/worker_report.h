/* worker_report.h: what compression measured, for the client: a line to read, and all of it as
 * JSON. */
#ifndef GRAFT_WORKER_REPORT_H
#define GRAFT_WORKER_REPORT_H

#include "engine/base/err.h"
#include "engine/engine.h"

/* "Compressed by graft: 8.4 MB, 1/32 of the 16-bit model, KL 0.021", and the report as the JSON
 * text of an object with a key for each of its members: null where nothing was measured (NAN). Both
 * malloc'ed. */
int worker_report_format(const struct engine_delta_report *report, char **message, char **data,
                         struct err *err);

#endif
