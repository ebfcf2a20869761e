#include "engine/cuda/shim/fiber.h"

#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#define FIBER_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FIBER_ASAN 1
#endif
#endif

#ifdef FIBER_ASAN
#include <sanitizer/common_interface_defs.h>
#define STACK_BYTES (256u << 10) /* frames have red zones */
#else
#define STACK_BYTES (64u << 10)
#define __sanitizer_start_switch_fiber(save, bottom, size) ((void)(save))
#define __sanitizer_finish_switch_fiber(save, bottom, size) ((void)(save))
#endif
#define PAGE 4096u

/* void fiber_switch(void **save, void *load): the registers that a call must keep go to the stack
 * that is left, and come from the one that is entered. */
extern "C" void fiber_switch(void **save, void *load);
asm(R"(
.text
.hidden fiber_switch
.globl fiber_switch
.type fiber_switch, @function
fiber_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size fiber_switch, . - fiber_switch
)");

/* The pool of the fiber that is being entered for the first time. */
static thread_local struct fiber_pool *entering;

static void fiber_main(void)
{
    struct fiber_pool *pool = entering;

    __sanitizer_finish_switch_fiber(nullptr, &pool->host_stack, &pool->host_stack_bytes);
    for (;;) {
        pool->body();
        fiber_yield(pool);
    }
}

/* A stack that fiber_switch can load: six registers, then where to return to. On entry a function
 * expects its stack to be 8 bytes off a multiple of 16. */
static void prepare(struct fiber *fiber, struct fiber_pool *pool)
{
    void **top = (void **)(fiber->stack + STACK_BYTES - 8);

    top[0] = nullptr;
    *--top = (void *)fiber_main;
    for (int i = 0; i < 6; i++)
        *--top = nullptr;
    fiber->stack_pointer = top;
    fiber->sanitizer = nullptr;
    fiber->pool = pool;
}

void fiber_pool_open(struct fiber_pool *pool, int count, void (*body)(void))
{
    size_t each = STACK_BYTES + PAGE;

    *pool = fiber_pool();
    pool->count = count;
    pool->body = body;
    pool->bytes = each * (size_t)count;
    pool->fiber = (struct fiber *)calloc((size_t)count, sizeof *pool->fiber);
    pool->memory = (char *)mmap(nullptr, pool->bytes, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (!pool->fiber || pool->memory == MAP_FAILED) {
        fprintf(stderr, "shim: no memory for %d fibers\n", count);
        abort();
    }
    for (int i = 0; i < count; i++) {
        char *guard = pool->memory + each * (size_t)i;

        if (mprotect(guard, PAGE, PROT_NONE))
            abort();
        pool->fiber[i].stack = guard + PAGE;
        prepare(&pool->fiber[i], pool);
    }
}

void fiber_pool_close(struct fiber_pool *pool)
{
    if (pool->memory)
        munmap(pool->memory, pool->bytes);
    free(pool->fiber);
    *pool = fiber_pool();
}

void fiber_resume(struct fiber *fiber)
{
    struct fiber_pool *pool = fiber->pool;

    entering = pool;
    pool->running = fiber;
    __sanitizer_start_switch_fiber(&pool->sanitizer, fiber->stack, STACK_BYTES);
    fiber_switch(&pool->stack_pointer, fiber->stack_pointer);
    __sanitizer_finish_switch_fiber(pool->sanitizer, nullptr, nullptr);
}

void fiber_yield(struct fiber_pool *pool)
{
    struct fiber *fiber = pool->running;

    __sanitizer_start_switch_fiber(&fiber->sanitizer, pool->host_stack, pool->host_stack_bytes);
    fiber_switch(&fiber->stack_pointer, pool->stack_pointer);
    __sanitizer_finish_switch_fiber(fiber->sanitizer, &pool->host_stack, &pool->host_stack_bytes);
}
