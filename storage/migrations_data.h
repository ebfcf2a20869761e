/* migrations_data.h: migrations/NNNN_*.sql inside the binary. The build makes the source file
 * (migrations/embed.sh). */
#ifndef GRAFT_STORAGE_MIGRATIONS_DATA_H
#define GRAFT_STORAGE_MIGRATIONS_DATA_H

#include <stddef.h>

struct migration_data {
    int number;       /* ascending */
    const char *name; /* "0001_tenants" */
    const char *sql;  /* NUL-terminated */
    size_t len;
};

extern const struct migration_data migrations_data[];
extern const int migrations_data_count;

#endif
