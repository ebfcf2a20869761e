/* shim_fixture.h: opens the CUDA backend on the test shim, and runs a case for many shapes and many
 * random orders. For tests/unit/test_cuda_*.c, which are linked against the shim. */
#ifndef GRAFT_TESTS_SHIM_FIXTURE_H
#define GRAFT_TESTS_SHIM_FIXTURE_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "engine/cuda/cuda_backend.h"
#include "engine/cuda/shim/shim_control.h"
#include "tests/unit/parity.h"

/* Orders of blocks and warps that each case runs in: 20, or what the environment says. On a GPU,
 * whose order is not ours to choose, SHIM_ORDERS is 1. */
static inline uint64_t shim_orders(void)
{
#ifdef SHIM_ORDERS
    return SHIM_ORDERS;
#else
    const char *text = getenv("SHIM_ORDERS");
    int orders = text ? atoi(text) : 20;

    return orders > 0 ? (uint64_t)orders : 1;
#endif
}

static inline int shim_setup_in(void **state, enum dtype precision)
{
    const struct cuda_options options = {.ordinal = 0, .precision = precision};
    struct backend *backend = calloc(1, sizeof *backend);
    struct err err = {0};

    *state = backend;
    if (!backend || cuda_backend_open(backend, &options, &err)) {
        fprintf(stderr, "%s\n", err.message);
        return -1;
    }
    shim_protect(true);
    return 0;
}

/* Group fixtures: *state becomes a struct backend on shim:0. Teardown fails where device memory is
 * left. */
static inline int shim_setup(void **state)
{
    return shim_setup_in(state, DTYPE_F32);
}
static inline int shim_setup_bf16(void **state)
{
    return shim_setup_in(state, DTYPE_BF16);
}

static inline int shim_teardown(void **state)
{
    struct backend *backend = *state;
    int64_t left;

    backend->ops->close(backend);
    free(backend);
    left = shim_memory_used();
    if (left)
        fprintf(stderr, "%lld bytes of device memory were not freed\n", (long long)left);
    return left ? -1 : 0;
}

typedef void shim_shape_case(struct backend *shim, const struct parity_shape *shape);

static inline void shim_shapes_in(struct backend *shim, const struct parity_shape *shapes,
                                  shim_shape_case *run, uint64_t orders)
{
    for (; shapes->name; shapes++)
        for (uint64_t seed = 0; seed < orders; seed++) {
            shim_seed(seed);
            run(shim, shapes);
        }
}

static inline void shim_every_shape(struct backend *shim, const struct parity_shape *shapes,
                                    shim_shape_case *run)
{
    shim_shapes_in(shim, shapes, run, shim_orders());
}

/* Large shapes, of kernels that meet all orders in smaller ones: a quarter of the orders. */
static inline void shim_large_shapes(struct backend *shim, const struct parity_shape *shapes,
                                     shim_shape_case *run)
{
    shim_shapes_in(shim, shapes, run, (shim_orders() + 3) / 4);
}

#endif
