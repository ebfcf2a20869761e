/* fiber.h: coroutines for the shim's threads: a stack each, switched by hand (x86-64 System V).
 *
 * Fibers live as long as the pool and are used again: one that has run its body waits to be given
 * the next. All belong to the host thread that made the pool. AddressSanitizer is told of every
 * switch. */
#ifndef GRAFT_CUDA_SHIM_FIBER_H
#define GRAFT_CUDA_SHIM_FIBER_H

#include <cstddef>

struct fiber {
    void *stack_pointer; /* of the fiber while it does not run */
    void *sanitizer;     /* AddressSanitizer's fake stack meanwhile */
    char *stack;
    struct fiber_pool *pool;
};

struct fiber_pool {
    struct fiber *fiber; /* [count] */
    int count;
    char *memory;
    size_t bytes;
    void (*body)(void);              /* what a fiber runs once each time it is begun */
    void *stack_pointer, *sanitizer; /* of the host's own stack while a fiber runs */
    const void *host_stack;
    size_t host_stack_bytes;
    struct fiber *running;
};

/* Ends the process when there is no memory: this is test code. */
void fiber_pool_open(struct fiber_pool *pool, int count, void (*body)(void));
void fiber_pool_close(struct fiber_pool *pool);
/* From the host: runs the fiber until it calls fiber_yield or its body returns. */
void fiber_resume(struct fiber *fiber);
/* From a fiber: back to the host. */
void fiber_yield(struct fiber_pool *pool);

#endif
