/* bench.h: what the benches share. */
#ifndef GRAFT_BENCH_H
#define GRAFT_BENCH_H

#include "engine/engine.h"

/* Opens a base file as it is; anything else that can be imported goes through a temporary one, gone
 * from the folder as soon as it is open. */
int bench_open_model(struct engine **engine, const char *path, const struct engine_options *options,
                     struct err *err);
/* Sorts x. */
double bench_median(double *x, int32_t n);
double bench_clock(void); /* s */

#endif
