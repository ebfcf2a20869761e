/* supervisor.h: starts the worker processes of a server, and starts them again when they die.
 *
 * A worker is this same binary, run as `graft work`. It inherits the read end of a pipe that nobody
 * writes to (its lifeline): when the server is gone, however it went, the pipe ends and the worker
 * exits at once. It also asks for SIGKILL at its parent's death, and is the OOM killer's first
 * choice. The infer worker inherits one end of a socket pair too; the other goes to the inference
 * client.
 *
 * One train worker for each device of the list (on the cpu as many as --workers says), and one
 * infer worker.
 *
 * A dead worker is started again at once; one that dies young (within 5 s) waits 0.25 s, doubling
 * up to 2 s. The owner is told of each death so that it can release what the process held. A worker
 * that says that its device is lost (exit codes CMD_DEVICE_LOST, CMD_DEVICE_STUCK) is no different
 * at first: a new process has a new context on the device. One that loses it again and again waits
 * up to 30 s, and after SUPERVISOR_LOSSES_MOVE times in a row an infer worker goes to the next
 * device of the list that does not do the same: training can wait for its device, chat can not.
 *
 * Threads: supervisor_run and supervisor_stop belong to the process's main thread, since a child's
 * death signal is tied to the thread that made it. Before any thread starts, call
 * supervisor_block_signals. supervisor_stats may be called from anywhere. */
#ifndef GRAFT_SUPERVISOR_H
#define GRAFT_SUPERVISOR_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "engine/base/err.h"
#include "server/devices.h"
#include "server/settings.h"

#define SUPERVISOR_LOSSES_MOVE 3

struct infer_client;
struct supervisor;

struct supervisor_options {
    const struct settings *settings;   /* workers get them through their environment */
    const char *database;              /* the URL for workers, instead of settings->database */
    const struct device_list *devices; /* copied */
    const char *infer_device;          /* copied; canonical */
    struct infer_client *infer;        /* gets the socket of each new infer worker */
    /* A worker process is gone. Called on the main thread; must not block. */
    void (*died)(void *context, pid_t pid);
    void *context;
};

/* SIGTERM, SIGINT, SIGHUP and SIGCHLD are taken from a descriptor; SIGPIPE is ignored. */
void supervisor_block_signals(void);
/* Back to an ordinary SIGINT, for the way down. */
void supervisor_unblock_interrupt(void);

int supervisor_open(struct supervisor **out, const struct supervisor_options *options,
                    struct err *err);
/* Starts the workers and keeps them alive until SIGTERM or SIGINT. */
int supervisor_run(struct supervisor *supervisor, struct err *err);
/* Asks the train workers to stop (they save and release their jobs); returns at once. */
void supervisor_stop_training(struct supervisor *supervisor);
/* Asks all workers to stop, waits until `seconds` have passed, and kills those that are left. */
void supervisor_stop(struct supervisor *supervisor, double seconds);
void supervisor_free(struct supervisor *supervisor); /* kills what is left */

struct supervisor_stats {
    int train_workers, infer_workers;       /* alive now */
    int train_wanted;                       /* how many there should be */
    int64_t train_restarts, infer_restarts; /* deaths answered with a new process */
};
void supervisor_stats(struct supervisor *supervisor, struct supervisor_stats *out);

/* One worker as its supervisor knows it: also of a device whose worker is dead at the moment. */
struct supervisor_worker {
    bool train; /* else infer */
    char device[DEVICE_NAME_SIZE];
    pid_t pid;        /* 0: dead, waits for its next start */
    int64_t restarts; /* deaths answered with a new process */
    int64_t lost;     /* those of them that the device caused */
    char reason[256]; /* of the last such; "" */
};
/* Fills at most `max`, the infer worker first; returns how many there are, the same for as long as
 * the supervisor lives. From anywhere. */
int supervisor_workers(struct supervisor *supervisor, struct supervisor_worker *out, int max);

#endif
