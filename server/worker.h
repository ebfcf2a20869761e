/* worker.h: the two kinds of worker process, and what they have in common.
 *
 * A worker owns a device: one engine thread pool, one role. It is started by `graft serve`
 * (supervisor.h) or, for training alone, by hand. It exits at once when its lifeline ends, and in
 * order on SIGTERM: a train worker finishes the step, saves, and hands its job back; a compression
 * or recall under way is given up within a step of it, and nothing of it is saved.
 *
 * A device that is lost (ERR_DEVICE from any call into the engine) is lost to the process for good:
 * it ends at once with CMD_DEVICE_LOST, see worker_watch.h. */
#ifndef GRAFT_WORKER_H
#define GRAFT_WORKER_H

#include <stdbool.h>

#include "engine/base/err.h"
#include "server/settings.h"

/* Signals, the OOM killer's preference, parent-death signal and the lifeline's thread. Call before
 * any other thread starts. lifeline_fd -1: started by hand. */
int worker_setup(int lifeline_fd, struct err *err);
bool worker_stopping(void); /* SIGTERM came */
/* Sleeps up to `seconds`, less when SIGTERM comes. */
void worker_sleep(double seconds);

/* After the engine refused a file of the store, which vouches for its bytes, or could not read it:
 * what it says of one, and the path in it, is for the log. It is no client's fault, so ERR_INVALID
 * and ERR_IO become ERR_INTERNAL; an error that has a code is worded for the client. -1. */
int worker_hide_place(const char *what, const char *sha256, struct err *err);

/* Answers requests from `socket_fd` (server/ipc.h) until the other end closes it. Opens files, no
 * database. */
int worker_infer_run(const struct settings *settings, const char *device, int socket_fd,
                     struct err *err);

/* Takes jobs from the database and trains them until SIGTERM. */
int worker_train_run(const struct settings *settings, const char *device, struct err *err);

#endif
