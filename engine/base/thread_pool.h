/* thread_pool.h: runs numbered tasks on a few threads; the caller is one of them.
 *
 * Tasks are cut by the caller, never by the pool, and write to places of their own: so what is
 * computed does not depend on how many threads there are. One thread at a time calls
 * thread_pool_run; tasks do not call it. Waiting threads spin for some microseconds, then sleep. */
#ifndef GRAFT_BASE_THREAD_POOL_H
#define GRAFT_BASE_THREAD_POOL_H

#include <stdint.h>

#include "engine/base/err.h"

struct thread_pool;

/* worker: 0..threads-1, 0 is the caller: an index into per-thread scratch. */
typedef void thread_pool_fn(void *context, int64_t task, int worker);

/* threads: 0 means thread_pool_cores(). */
int thread_pool_open(struct thread_pool **out, int threads, struct err *err);
void thread_pool_free(struct thread_pool *pool);
int thread_pool_threads(const struct thread_pool *pool);
/* fn(context, t, worker) for every t in [0, tasks), in no particular order; returns when all are
 * done. What tasks wrote is visible to the caller. */
void thread_pool_run(struct thread_pool *pool, int64_t tasks, thread_pool_fn *fn, void *context);

/* Cores this process may use: its affinity mask, and the CPU quota of its cgroup. At least 1. */
int thread_pool_cores(void);

#endif
