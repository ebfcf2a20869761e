#include "engine/backend.h"

#include <string.h>

#include "engine/cpu/cpu_backend.h"

int backend_open(struct backend *backend, const struct backend_options *options, struct err *err)
{
    memset(backend, 0, sizeof *backend);
    if (options->precision != DTYPE_F32)
        return err_set(err, ERR_INVALID, "precision %s is not known on the cpu: use F32",
                       dtype_name(options->precision));
    if (!options->device || strcmp(options->device, "cpu") == 0)
        return cpu_backend_open(backend, options->threads, NULL, err);
    return err_set(err, ERR_INVALID, "device \"%s\" is not known: use \"cpu\"", options->device);
}

void backend_close(struct backend *backend)
{
    if (backend->ops)
        backend->ops->close(backend);
    memset(backend, 0, sizeof *backend);
}
