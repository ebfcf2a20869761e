/* delta_report.h: what compression measured, for the client: a line to read, and all of it as
 * JSON. */
#ifndef GRAFT_DELTA_REPORT_H
#define GRAFT_DELTA_REPORT_H

#include <jansson.h>

#include "engine/base/err.h"
#include "engine/engine.h"

/* The report as an object with a key for each of its members: null where nothing was measured
 * (NAN). The caller's; NULL: out of memory. */
json_t *delta_report_object(const struct engine_delta_report *report);
/* "Compressed by graft: 8.4 MB, 1/32 of the 16-bit model, KL 0.021", and the report as JSON text.
 * Both malloc'ed. */
int delta_report_format(const struct engine_delta_report *report, char **message, char **data,
                        struct err *err);

#endif
