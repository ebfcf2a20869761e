#include "engine/base/progress.h"

#include <stdatomic.h>

static _Atomic uint64_t ticks;
static _Atomic int waits;

void progress_tick(void)
{
    atomic_fetch_add_explicit(&ticks, 1, memory_order_relaxed);
}

uint64_t progress_count(void)
{
    return atomic_load_explicit(&ticks, memory_order_relaxed);
}

void progress_wait_begin(void)
{
    atomic_fetch_add_explicit(&waits, 1, memory_order_relaxed);
}

void progress_wait_end(void)
{
    progress_tick(); /* what was silent until now begins anew */
    atomic_fetch_sub_explicit(&waits, 1, memory_order_relaxed);
}

bool progress_waits(void)
{
    return atomic_load_explicit(&waits, memory_order_relaxed) > 0;
}
