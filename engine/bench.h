/* bench.h: what the benches share. */
#ifndef GRAFT_BENCH_H
#define GRAFT_BENCH_H

#include "engine/engine.h"

/* Sorts x. */
double bench_median(double *x, int32_t n);

#endif
