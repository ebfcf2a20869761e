/* worker_check.h: a file hashed beside the work, by a thread of its own: what takes a minute to
 * read may not keep everybody waiting. Where there is no memory for it, it is tried again until
 * there is: the check runs for so long. One owner, any thread. */
#ifndef GRAFT_WORKER_CHECK_H
#define GRAFT_WORKER_CHECK_H

#include "engine/base/err.h"

struct worker_check;

enum worker_check_state {
    WORKER_CHECK_RUNS,
    WORKER_CHECK_SOUND,
    WORKER_CHECK_DAMAGED, /* another SHA-256, or it can not be read: the log says */
};

int worker_check_start(struct worker_check **out, const char *path, const char *sha256,
                       struct err *err);
enum worker_check_state worker_check_state(const struct worker_check *check);
void worker_check_free(struct worker_check *check); /* ends the thread soon; NULL is fine */

#endif
