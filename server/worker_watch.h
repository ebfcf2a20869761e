/* worker_watch.h: an eye on the worker's device: is it computing, for what share of the time, and
 * does it still answer?
 *
 * Every call into the engine that uses the device stands between worker_watch_begin and
 * worker_watch_end. On a device other than the cpu a thread of its own looks at them: a call
 * without any sign of life (engine/base/progress.h) for `seconds` will never return, and only the
 * end of the process can free the device. It says so in the log, leaves its last words, lets the
 * owner put its affairs in order (5 s at most), and ends the process with CMD_DEVICE_STUCK.
 *
 * A process has one device and one thread that calls the engine: the state here is the process's.
 * begin, end and job belong to that thread; utilization may be asked from any.
 *
 * To see it at work without a GPU: the shim reads GRAFT_SHIM_FAULT (engine/cuda/shim/). */
#ifndef GRAFT_WORKER_WATCH_H
#define GRAFT_WORKER_WATCH_H

#include <stdint.h>

#include "engine/base/err.h"

struct worker_watch_options {
    const char *device; /* a static string, or one that outlives the process's work */
    double seconds;     /* of silence; 0: the watchdog is off, as it is on the cpu */
    int words_fd;       /* of the supervisor, for the reason of a death; -1 */
};

/* Call once, after worker_setup. */
int worker_watch_start(const struct worker_watch_options *options, struct err *err);
/* What remains to be done when the device is stuck, on the watchdog's thread, while the caller's
 * thread hangs: nothing that it may hold can be used. */
void worker_watch_on_stuck(void (*fn)(void *context), void *context);

void worker_watch_job(const char *job);                    /* for the log; "": none */
void worker_watch_begin(const char *call, int64_t number); /* a static string; a step's number */
void worker_watch_end(void);

/* Share of the last minute (or of the time since the start) spent between begin and end: 0..1. */
double worker_watch_utilization(void);

/* The device is gone: log line, last words, and the end with CMD_DEVICE_LOST. At once: whatever a
 * clean-up asks of the driver may hang. */
_Noreturn void worker_watch_lost(const struct err *why);

#endif
