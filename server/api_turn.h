/* api_turn.h: one at a time, for what reads a whole file on a handler thread: the other threads
 * stay free for everything else. A few wait for a moment, more are told to come again. Any thread.
 */
#ifndef GRAFT_API_TURN_H
#define GRAFT_API_TURN_H

#include <pthread.h>
#include <stdatomic.h>

#include "engine/base/err.h"

struct api_turn {
    pthread_mutex_t lock;
    atomic_int waiting;
};

#define API_TURN_INIT                                   \
    {                                                   \
        .lock = PTHREAD_MUTEX_INITIALIZER, .waiting = 0 \
    }

/* ERR_UNAVAILABLE, code server_busy: it is not to be had. */
int api_turn_take(struct api_turn *turn, struct err *err);
void api_turn_end(struct api_turn *turn);

#endif
