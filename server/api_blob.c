#include "server/api_blob.h"

#include "server/api_context.h"
#include "server/api_turn.h"

#define LARGE (INT64_C(16) << 20) /* bytes: hashed in some hundredths of a second */

static struct api_turn turn = API_TURN_INIT;

int api_blob_open(struct http_request *request, const struct blob_wanted *want, int64_t bytes,
                  int *fd, struct err *err)
{
    int rc;
    if (bytes < LARGE)
        return blob_open_sound(request->api->blobs, want, fd, err);
    if (api_turn_take(&turn, err) < 0)
        return -1;
    rc = blob_open_sound(request->api->blobs, want, fd, err);
    api_turn_end(&turn);
    return rc;
}
