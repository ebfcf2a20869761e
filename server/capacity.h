/* capacity.h: what this machine has left, so that a job that can not fit fails with words instead
 * of being killed. */
#ifndef GRAFT_CAPACITY_H
#define GRAFT_CAPACITY_H

#include <stdint.h>

#include "engine/base/err.h"

/* Bytes of a disk that checkpoints and uploads leave free: the database may lie on it, and one that
 * finds no room for its log stops. */
#define CAPACITY_RESERVE (INT64_C(64) << 20)

/* Bytes this process may hold in all: what it holds now plus what is free, the machine's or (where
 * it is less) its cgroup's. INT64_MAX where nobody can tell. */
int64_t capacity_memory(void);
/* The machine's memory, or its cgroup's where that is less, and what of it is free; 0: nobody can
 * tell. */
void capacity_machine(int64_t *bytes, int64_t *bytes_free);
/* Bytes that an unprivileged writer can still put below `dir`. */
int capacity_disk(const char *dir, int64_t *bytes, struct err *err);

#endif
