/* migrate.h: brings the database to this binary's schema.
 *
 * migrations/NNNN_name.sql are compiled in. Forward only: each runs once, in a transaction of its
 * own, under an advisory lock, and is recorded with its SHA-256; a recorded file that has changed,
 * or one recorded that this binary does not know (a newer graft was here), is refused.
 *
 * The roles graft_owner, graft_app and graft_worker are made where the login may make roles; else
 * the error holds the SQL for the database's administrator. */
#ifndef GRAFT_STORAGE_MIGRATE_H
#define GRAFT_STORAGE_MIGRATE_H

#include "engine/base/err.h"

struct migrate_report {
    int applied; /* now */
    int version; /* number of the newest migration, now recorded */
};

/* Makes the three roles where absent and the current user a member: one statement, for
 * pg_cluster.c, which has an administrator's connection. */
extern const char migrate_roles_sql[];

int migrate_run(const char *url, struct migrate_report *report, struct err *err);

#endif
