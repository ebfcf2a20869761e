#include "engine/codec/stage.h"

int stage_tell(const struct stage_listener *listener, const char *stage, double share,
               struct err *err)
{
    if (!listener->progress || listener->progress(listener->context, stage, share))
        return 0;
    return err_set(err, ERR_CANCELLED, "the compression was stopped");
}
