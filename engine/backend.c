#include "engine/backend.h"

#include <string.h>

#include "engine/backend_library.h"
#include "engine/base/progress.h"
#include "engine/cpu/cpu_backend.h"

static int open_library(struct backend *backend, const struct backend_name *name,
                        const struct backend_options *options, struct err *err)
{
    const struct cuda_options cuda = {.ordinal = name->ordinal, .precision = options->precision};
    struct backend_library library;

    if (backend_library_load(&library, name->family, err))
        return err_prefix(err, "device \"%s\"", options->device);
    return library.open(backend, &cuda, err);
}

int backend_open(struct backend *backend, const struct backend_options *options, struct err *err)
{
    struct backend_name name;

    memset(backend, 0, sizeof *backend);
    if (options->precision != DTYPE_F32 && options->precision != DTYPE_BF16)
        return err_set(err, ERR_INVALID, "precision %s is none: F32 or BF16",
                       dtype_name(options->precision));
    if (backend_name_parse(&name, options->device, err))
        return -1;
    if (strcmp(name.family, "cpu") != 0)
        return open_library(backend, &name, options, err);
    return cpu_backend_open(backend, options->threads, NULL, options->precision, err);
}

int backend_check(struct backend *backend, struct err *err)
{
    int rc = backend->ops->check(backend, err);

    progress_tick();
    return rc;
}

void backend_close(struct backend *backend)
{
    if (backend->ops)
        backend->ops->close(backend);
    memset(backend, 0, sizeof *backend);
}

const char *backend_cpu_kernels(void)
{
    return cpu_kernels_usable()[0]->name;
}
