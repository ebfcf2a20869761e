/* cuda_backend.h: what libgraft_cuda.so and, for tests, libgraft_shim.so export: the table of
 * operations of a CUDA device (cuda.h says what lies behind it), and which devices there are.
 *
 * The engine opens them with dlopen (backend_library.h); loading them needs no driver. */
#ifndef GRAFT_CUDA_CUDA_BACKEND_H
#define GRAFT_CUDA_CUDA_BACKEND_H

#ifdef __cplusplus
extern "C" {
#endif

#include "engine/backend.h"

#define CUDA_EXPORT __attribute__((visibility("default")))

struct cuda_options {
    int ordinal;          /* device of this machine */
    enum dtype precision; /* F32 or BF16 */
};
/* ERR_UNAVAILABLE says what is missing. */
CUDA_EXPORT int cuda_backend_open(struct backend *backend, const struct cuda_options *options,
                                  struct err *err);

struct cuda_device {
    char description[128]; /* "NVIDIA H100 80GB HBM3, compute capability 9.0" */
    int64_t memory_bytes, memory_free;
    bool usable;
    char reason[256]; /* why it is not, and what to do */
};
/* The devices of this machine by number; *count is how many there are, of which at most `max` are
 * written. ERR_UNAVAILABLE: none can be used, and why. A device that this process does not use is
 * opened for a moment, to see what memory it has free. */
CUDA_EXPORT int cuda_device_list(struct cuda_device *out, int max, int *count, struct err *err);

/* The structs that cross the border, as the library was built; the engine compares. */
typedef unsigned long cuda_backend_layout_fn(void);
CUDA_EXPORT unsigned long cuda_backend_layout(void);
static inline unsigned long cuda_backend_layout_here(void)
{
    const unsigned long sizes[] = {
        sizeof(struct err),
        sizeof(struct tensor),
        sizeof(struct model_config),
        sizeof(struct layer_weights),
        sizeof(struct adapter),
        sizeof(struct adapter_layer),
        sizeof(struct delta_tensor),
        sizeof(struct batch),
        sizeof(struct kv_cache),
        sizeof(struct begin_args),
        sizeof(struct embed_args),
        sizeof(struct attn_in_args),
        sizeof(struct attention_args),
        sizeof(struct attn_out_args),
        sizeof(struct mlp_args),
        sizeof(struct head_args),
        sizeof(struct loss_margins),
        sizeof(struct head_loss_args),
        sizeof(struct mlp_backward_args),
        sizeof(struct attn_out_backward_args),
        sizeof(struct attention_backward_args),
        sizeof(struct attn_in_backward_args),
        sizeof(struct embed_backward_args),
        sizeof(struct parameter),
        sizeof(struct gradient_norm_args),
        sizeof(struct adamw_args),
        sizeof(struct backend_ops),
        sizeof(struct backend),
        sizeof(struct cuda_options),
        sizeof(struct cuda_device),
    };
    unsigned long sum = 0;

    for (unsigned long i = 0; i < sizeof sizes / sizeof sizes[0]; i++)
        sum = sum * 1000003 + sizes[i];
    return sum;
}

#ifdef __cplusplus
}
#endif

#endif
