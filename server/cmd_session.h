/* cmd_session.h: the durable state as the operator's commands use it: opened as `serve` opens it,
 * so a command works beside a running server (it shares the private database) and without one (it
 * starts and stops it). */
#ifndef GRAFT_CMD_SESSION_H
#define GRAFT_CMD_SESSION_H

#include "server/settings.h"
#include "storage/db.h"
#include "storage/storage.h"

struct cmd_session {
    struct storage storage;
    struct db *db;
};

int cmd_session_begin(struct cmd_session *session, const struct settings *settings,
                      enum db_role role, struct err *err);
/* After begin, also after one that failed. Returns the exit code for `rc`. */
int cmd_session_end(struct cmd_session *session, int rc);

#endif
