/* delta_header.h: what a delta file says of itself (api-spec/delta-format.md), read from its header
 * alone: enough to know which base it belongs to. Whether its tensors are sound and the version
 * known is the engine's to say (engine_delta_check). */
#ifndef GRAFT_DELTA_HEADER_H
#define GRAFT_DELTA_HEADER_H

#include "engine/base/err.h"

struct delta_header {
    char base[65]; /* digest of the base's values: 64 lower-case hex digits */
};

/* A client's file: whatever it holds, the result is a header of which all above is true or
 * ERR_INVALID (code invalid_delta, param file) in words for the client. */
int delta_header_read(const char *path, struct delta_header *out, struct err *err);

#endif
