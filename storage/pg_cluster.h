/* pg_cluster.h: the private PostgreSQL cluster in DATA/pg, for an installation without a database
 * URL of its own.
 *
 * It listens on a Unix socket only, in a folder that only its user can enter. Whoever needs it
 * calls pg_cluster_acquire(): the first one creates and starts it, later ones (another `graft`
 * command, or a server after its predecessor was killed) attach to the postmaster that is there;
 * there are never two. pg_cluster_release() by the last user stops it; a user that was killed
 * counts no more.
 *
 * Run as root, PostgreSQL's programs run as user postgres (else nobody), who owns DATA/pg; a line
 * in the log says so. The data belong to one major version of PostgreSQL: with only another
 * installed, acquire refuses and says what to install.
 *
 * Files: DATA/pg (the cluster), DATA/pg/log, DATA/pg.lock, DATA/pg.users, and DATA/pg.socket, which
 * names the socket's folder where DATA is too long a path for one.
 * Threads: call from one thread, before or after others run; takes seconds. */
#ifndef GRAFT_STORAGE_PG_CLUSTER_H
#define GRAFT_STORAGE_PG_CLUSTER_H

#include <stdbool.h>
#include <sys/types.h>

#include "engine/base/err.h"

struct pg_cluster;

#define PG_CLUSTER_CONNECTIONS 120

/* Creates (first time), starts or attaches, and waits until the database `graft` answers. */
int pg_cluster_acquire(struct pg_cluster **out, const char *data_dir, struct err *err);
/* The same for a user that may open this many connections at once; one that runs already keeps what
 * it was started with. */
int pg_cluster_acquire_for(struct pg_cluster **out, const char *data_dir, int connections,
                           struct err *err);
/* The last user out stops it: fast shutdown, 20 s, then immediate (which loses nothing). NULL is
 * fine. */
void pg_cluster_release(struct pg_cluster *cluster);

/* For db_open(); valid until release. Holds no secret. */
const char *pg_cluster_url(const struct pg_cluster *cluster);
bool pg_cluster_started(const struct pg_cluster *cluster); /* false: attached to a running one */
pid_t pg_cluster_pid(const struct pg_cluster *cluster);    /* of the postmaster */
/* Starts it again where it died (attaches where another user already did); for a supervisor. */
int pg_cluster_revive(struct pg_cluster *cluster, struct err *err);

#endif
