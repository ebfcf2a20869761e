/* report.h: what a compression took and cost, as the JSON that its file carries in graft.report. */
#ifndef GRAFT_CODEC_REPORT_H
#define GRAFT_CODEC_REPORT_H

#include <jansson.h>

#include "engine/codec/artifact.h"

/* What the JSON takes in a file's header at most, for so many tensors; files are laid out with it.
 */
size_t report_room(int32_t tensors);
/* *out is malloc'ed and filled up with blanks: in a header it takes exactly report_room(tensors).
 * error, norm: [tensors] Σ (stored - difference)² and Σ difference² of each matrix; bytes: of its
 * parts; all 0 for what is no matrix or did not change. `held_out`: what is measured was measured
 * on rows of its own. NULL report: blanks alone. */
int report_json(char **out, const struct engine_delta_report *report, bool held_out,
                int32_t tensors, const int64_t *bytes, const double *error, const double *norm,
                struct err *err);

/* The points of a curve as [[bytes, kl], ...], and back; what is no such list has no points. A new
 * reference; NULL: no memory. */
json_t *report_points(const struct engine_delta_curve *curve);
void report_read_points(const json_t *points, struct engine_delta_curve *curve);

#endif
