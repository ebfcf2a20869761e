/* pg_process.h: runs PostgreSQL's programs: as an unprivileged user where this process is root,
 * because they refuse root, and with an environment of their own.
 *
 * Where their user may not walk the path to the data folder (one below /root), they are given
 * /proc/self/fd/63 in its place: an open descriptor of the same folder. */
#ifndef GRAFT_STORAGE_PG_PROCESS_H
#define GRAFT_STORAGE_PG_PROCESS_H

#include <stdbool.h>
#include <sys/types.h>

#include "engine/base/err.h"

struct pg_user {
    bool change; /* this process is root */
    uid_t uid;
    gid_t gid;
    char name[32];
};

/* Root: user postgres, else nobody. Anyone else: themselves. */
int pg_user_choose(struct pg_user *out, struct err *err);
/* The owner of a cluster that is there already; a root-owned one is refused. */
int pg_user_of(const char *dir, struct pg_user *out, struct err *err);

#define PG_PROCESS_DATA "\001data" /* in argv: stands for the data folder */

struct pg_process {
    const struct pg_user *user;
    const char *program;     /* absolute */
    const char *const *argv; /* NULL-ended, ≤ 63; argv[0] becomes the program's path */
    const char *data;        /* absolute path of the data folder */
    int output;              /* a file descriptor for its stdout and stderr */
};

/* Runs it to its end; *status as waitpid gives it. */
int pg_process_run(const struct pg_process *process, int *status, struct err *err);
/* Starts it as a daemon of its own session: no child of ours, so that it outlives us and nobody
 * reaps it by mistake. */
int pg_process_start(const struct pg_process *process, struct err *err);

enum pg_process_state {
    PG_PROCESS_GONE,
    PG_PROCESS_OURS,    /* alive, and its working directory is `data`: postmasters live there */
    PG_PROCESS_OTHER,   /* the pid is a zombie's, or of a process that works elsewhere */
    PG_PROCESS_UNKNOWN, /* this user may not look */
};
enum pg_process_state pg_process_look(pid_t pid, const char *data);

#endif
