/* cuda_backend.h: the table of operations of a CUDA device (cuda.h says what lies behind it), as
 * libgraft_cuda.so and, for tests, libgraft_shim.so export it. */
#ifndef GRAFT_CUDA_CUDA_BACKEND_H
#define GRAFT_CUDA_CUDA_BACKEND_H

#ifdef __cplusplus
extern "C" {
#endif

#include "engine/backend.h"

struct cuda_options {
    int ordinal;          /* device of this machine */
    enum dtype precision; /* F32 or BF16 */
};
/* ERR_UNAVAILABLE says what is missing. */
__attribute__((visibility("default"))) int
cuda_backend_open(struct backend *backend, const struct cuda_options *options, struct err *err);

#ifdef __cplusplus
}
#endif

#endif
