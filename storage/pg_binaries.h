/* pg_binaries.h: finds PostgreSQL's server programs on this machine: the folders where
 * distributions put them, then the PATH and pg_config. */
#ifndef GRAFT_STORAGE_PG_BINARIES_H
#define GRAFT_STORAGE_PG_BINARIES_H

#include "engine/base/err.h"

#define PG_OLDEST_MAJOR 14

struct pg_binaries {
    char dir[512]; /* holds initdb and postgres */
    int major;     /* 15 */
};

/* wanted 0: the newest that is PG_OLDEST_MAJOR or later. Else that major version alone; where only
 * others are installed the error says which, and what to do. */
int pg_binaries_find(int wanted, struct pg_binaries *out, struct err *err);

#endif
