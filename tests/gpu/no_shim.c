/* What the tests of the CUDA backend ask of the shim (shim_control.h), on a GPU: its order is its
 * own, and it does not fail when it is told to, so a test that asks for a fault is skipped. */
#include <cmocka.h>

#include "engine/cuda/shim/shim_control.h"

void shim_seed(uint64_t seed)
{
}

void shim_protect(bool on)
{
}

int64_t shim_memory_used(void)
{
    return 0; /* compute-sanitizer looks for what was not freed */
}

int64_t shim_launches(const char *kernel)
{
    check_skip();
}

int shim_barrier_count(void)
{
    check_skip();
}

const char *shim_barrier_skip(int index)
{
    check_skip();
}

void shim_fail(enum shim_fault fault, int64_t nth)
{
    check_skip();
}

int64_t shim_counted(enum shim_fault fault)
{
    check_skip();
}

void shim_memory_limit(int64_t bytes)
{
    check_skip();
}

int64_t shim_self_test(enum shim_self_test test)
{
    check_skip();
}

/* A GPU does not tell. */
int64_t shim_graphs(void)
{
    return -1;
}
