/* stage.h: what a compression tells on its way, and asks each time: whether to go on. */
#ifndef GRAFT_CODEC_STAGE_H
#define GRAFT_CODEC_STAGE_H

#include <stdbool.h>

#include "engine/base/err.h"

/* As engine_compress_options has it: from the calling thread, share 0..1 of a stage; false: stop.
 * NULL: nobody listens, and it goes on. */
struct stage_listener {
    bool (*progress)(void *context, const char *stage, double share);
    void *context;
};

/* ERR_CANCELLED: it is to stop. */
int stage_tell(const struct stage_listener *listener, const char *stage, double share,
               struct err *err);

#endif
