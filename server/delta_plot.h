/* delta_plot.h: a delta as a picture (SVG): what each matrix takes, and what of its difference is
 * lost, layer by layer; and the KL over the file's size, as far as its report knows it. */
#ifndef GRAFT_DELTA_PLOT_H
#define GRAFT_DELTA_PLOT_H

#include "engine/base/err.h"

/* json: what engine_delta_describe says. Written durably to `path`. ERR_INVALID: the delta carries
 * no report of its matrices. */
int delta_plot(const char *json, const char *path, struct err *err);

#endif
