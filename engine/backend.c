#include "engine/backend.h"

#include <string.h>

#include "engine/cpu/cpu_backend.h"

int backend_open(struct backend *backend, const char *device, int threads, struct err *err)
{
    memset(backend, 0, sizeof *backend);
    if (!device || strcmp(device, "cpu") == 0)
        return cpu_backend_open(backend, threads, NULL, err);
    return err_set(err, ERR_INVALID, "device \"%s\" is not known: use \"cpu\"", device);
}

void backend_close(struct backend *backend)
{
    if (backend->ops)
        backend->ops->close(backend);
    memset(backend, 0, sizeof *backend);
}
