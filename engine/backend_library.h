/* backend_library.h: backends that come as shared objects, so that one program runs with and
 * without a GPU: libgraft_cuda.so and, for tests, libgraft_shim.so. For backend.c and devices.c.
 *
 * A library is looked for beside the program, in ../lib/graft from there, and where the dynamic
 * loader looks. It stays loaded until the process ends. */
#ifndef GRAFT_BACKEND_LIBRARY_H
#define GRAFT_BACKEND_LIBRARY_H

#include <stdbool.h>

#include "engine/base/err.h"
#include "engine/cuda/cuda_backend.h"

/* "cuda:1" → the family "cuda" and 1; a family alone is its number 0. */
struct backend_name {
    char family[16];
    int ordinal;
};
/* ERR_INVALID lists the names that are known. NULL is "cpu". */
int backend_name_parse(struct backend_name *out, const char *device, struct err *err);

typedef int cuda_backend_open_fn(struct backend *, const struct cuda_options *, struct err *);
typedef int cuda_device_list_fn(struct cuda_device *, int max, int *count, struct err *err);

struct backend_library {
    cuda_backend_open_fn *open;
    cuda_device_list_fn *list;
};
/* family: "cuda" or "shim". ERR_UNAVAILABLE where there is none or it is of another build. */
int backend_library_load(struct backend_library *out, const char *family, struct err *err);

#endif
