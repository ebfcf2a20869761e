#include "server/api_turn.h"

#include <errno.h>
#include <time.h>

#define WAITING_MAX 2
#define PATIENCE_SECONDS 2

int api_turn_take(struct api_turn *turn, struct err *err)
{
    struct timespec until;
    int rc = EBUSY;
    if (pthread_mutex_trylock(&turn->lock) == 0)
        return 0;
    if (atomic_fetch_add(&turn->waiting, 1) < WAITING_MAX) {
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_sec += PATIENCE_SECONDS;
        rc = pthread_mutex_timedlock(&turn->lock, &until);
    }
    atomic_fetch_sub(&turn->waiting, 1);
    if (rc == 0)
        return 0;
    return err_set_code(err, ERR_UNAVAILABLE, "server_busy", "",
                        "Other files are being checked. Try again in a second.");
}

void api_turn_end(struct api_turn *turn)
{
    pthread_mutex_unlock(&turn->lock);
}
