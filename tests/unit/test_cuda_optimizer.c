/* The norm of the gradients and AdamW: the CUDA kernels against the CPU, to the bit. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/base/rng.h"
#include "engine/cpu/cpu_backend.h"
#include "tests/unit/shim_fixture.h"

#define PARAMETERS 60 /* more than one launch takes */
#define STEPS 3

enum kind { PLAIN, WITH_COPY, NARROW, KINDS };

/* One block of numbers for all parameters, on each of two backends. */
struct optimizer_case {
    struct backend cpu, *backend[2];
    float *w[2], *g[2], *m[2], *v[2], *norm[2];
    uint16_t *copy[2], *narrow[2];
    int64_t elements;
    struct parameter parameter[2][PARAMETERS];
};

static const int64_t sizes[] = {1, 3, 16, 50, 1024, 4096, 4099, 9001};
#define SIZES ((int64_t)(sizeof sizes / sizeof sizes[0]))

static void *take(struct backend *b, int64_t count, size_t size)
{
    struct err err = {0};
    void *memory = b->ops->alloc(b, (size_t)count * size, &err);

    if (!memory)
        fail_msg("%s", err.message);
    return memory;
}

/* Parameters lie back to back, every third with a gap that spoils its alignment. */
static void place(struct optimizer_case *c, int side)
{
    int64_t at = 0;

    for (int i = 0; i < PARAMETERS; i++) {
        struct parameter *p = &c->parameter[side][i];
        int64_t n = sizes[i % SIZES];
        enum kind kind = i / 3 % KINDS;

        at += i % 3 == 0;
        p->w = kind == NARROW ? tensor_view(c->narrow[side] + at, DTYPE_BF16, 1, &n)
                              : tensor_view(c->w[side] + at, DTYPE_F32, 1, &n);
        p->g = tensor_view(c->g[side] + at, DTYPE_F32, 1, &n);
        p->m = tensor_view(c->m[side] + at, DTYPE_F32, 1, &n);
        p->v = tensor_view(c->v[side] + at, DTYPE_F32, 1, &n);
        if (kind == WITH_COPY)
            p->copy = tensor_view(c->copy[side] + at, DTYPE_BF16, 1, &n);
        p->decay = i % 2 == 0;
        at += (n + 15) / 16 * 16;
    }
    assert_true(at <= c->elements);
}

static void open_case(struct optimizer_case *c, struct backend *shim)
{
    struct err err = {0};

    memset(c, 0, sizeof *c);
    if (cpu_backend_open(&c->cpu, 1, NULL, DTYPE_F32, &err))
        fail_msg("%s", err.message);
    c->backend[0] = &c->cpu;
    c->backend[1] = shim;
    for (int i = 0; i < PARAMETERS; i++)
        c->elements += (sizes[i % SIZES] + 15) / 16 * 16 + (i % 3 == 0);
    for (int side = 0; side < 2; side++) {
        float **block[] = {&c->w[side], &c->g[side], &c->m[side], &c->v[side]};

        for (size_t i = 0; i < 4; i++)
            *block[i] = take(c->backend[side], c->elements, sizeof(float));
        c->copy[side] = take(c->backend[side], c->elements, sizeof(uint16_t));
        c->narrow[side] = take(c->backend[side], c->elements, sizeof(uint16_t));
        c->norm[side] = take(c->backend[side], 1, sizeof(float));
        place(c, side);
    }
}

static void close_case(struct optimizer_case *c)
{
    for (int side = 0; side < 2; side++) {
        void *memory[] = {c->w[side],    c->g[side],      c->m[side],   c->v[side],
                          c->copy[side], c->narrow[side], c->norm[side]};

        for (size_t i = 0; i < sizeof memory / sizeof memory[0]; i++)
            c->backend[side]->ops->free(c->backend[side], memory[i]);
    }
    c->cpu.ops->close(&c->cpu);
}

/* The same random numbers on both sides, in the form of each block. */
static void fill(struct optimizer_case *c, float **f32, uint16_t **bf16, uint64_t stream)
{
    float *values = malloc((size_t)c->elements * sizeof *values);
    uint16_t *halves = malloc((size_t)c->elements * sizeof *halves);

    assert_true(values && halves);
    for (int64_t i = 0; i < c->elements; i++) {
        values[i] = (float)(rng_unit_at(3, stream, (uint64_t)i) - 0.5);
        halves[i] = f32_to_bf16(values[i]);
    }
    for (int side = 0; side < 2; side++) {
        struct backend *b = c->backend[side];

        if (f32)
            b->ops->upload(b, f32[side], values, (size_t)c->elements * sizeof *values);
        if (bf16)
            b->ops->upload(b, bf16[side], halves, (size_t)c->elements * sizeof *halves);
    }
    free(halves);
    free(values);
}

static float norm_of(struct optimizer_case *c, int side, int32_t count)
{
    struct backend *b = c->backend[side];
    struct err err = {0};
    float norm;

    b->ops->gradient_norm(b, &(struct gradient_norm_args){
                                 .parameter = c->parameter[side],
                                 .count = count,
                                 .norm = tensor_view(c->norm[side], DTYPE_F32, 1, (int64_t[]){1}),
                             });
    b->ops->download(b, &norm, c->norm[side], sizeof norm);
    if (b->ops->check(b, &err))
        fail_msg("%s", err.message);
    return norm;
}

static void adamw(struct optimizer_case *c, int side, int32_t step, float norm)
{
    struct backend *b = c->backend[side];
    struct err err = {0};

    b->ops->upload(b, c->norm[side], &norm, sizeof norm);
    b->ops->adamw(b, &(struct adamw_args){
                         .parameter = c->parameter[side],
                         .count = PARAMETERS,
                         .norm = tensor_view(c->norm[side], DTYPE_F32, 1, (int64_t[]){1}),
                         .max_norm = 1.0f,
                         .learning_rate = 0.01f,
                         .beta1 = 0.9f,
                         .beta2 = 0.99f,
                         .epsilon = 1e-8f,
                         .weight_decay = 0.1f,
                         .step = step,
                         .seed = 4242,
                     });
    if (b->ops->check(b, &err))
        fail_msg("%s", err.message);
}

static void assert_same(struct optimizer_case *c, const char *name, void *a, void *b, size_t size)
{
    size_t bytes = (size_t)c->elements * size;
    void *other = malloc(bytes);

    assert_non_null(other);
    c->backend[1]->ops->download(c->backend[1], other, b, bytes);
    if (memcmp(a, other, bytes))
        fail_msg("%s: not the CPU's bits", name);
    free(other);
}

static void test_norm(void **state)
{
    struct optimizer_case c;

    open_case(&c, *state);
    for (uint64_t seed = 0; seed < shim_orders(); seed++) {
        int32_t count = seed % 2 ? PARAMETERS : 7;

        shim_seed(seed);
        fill(&c, c.g, NULL, seed);
        float want = norm_of(&c, 0, count), got = norm_of(&c, 1, count);
        assert_true(want > 1 && fabsf(got - want) <= 1e-6f * want);
        assert_true(norm_of(&c, 1, count) == got);
    }
    close_case(&c);
}

/* Without parameters, and with a gradient that is no number. */
static void test_norm_of_nothing_and_of_nan(void **state)
{
    struct optimizer_case c;
    float nan = NAN;

    open_case(&c, *state);
    assert_true(norm_of(&c, 1, 0) == 0);
    assert_true(norm_of(&c, 1, PARAMETERS) == 0);
    c.backend[1]->ops->upload(c.backend[1], c.parameter[1][PARAMETERS - 1].g.data, &nan,
                              sizeof nan);
    assert_true(isnan(norm_of(&c, 1, PARAMETERS)));
    close_case(&c);
}

static void test_adamw(void **state)
{
    struct optimizer_case c;

    for (uint64_t seed = 0; seed < shim_orders(); seed++) {
        shim_seed(seed);
        open_case(&c, *state);
        fill(&c, c.w, c.narrow, 100);
        fill(&c, NULL, c.copy, 101);
        for (int32_t step = 1; step <= STEPS; step++) {
            fill(&c, c.g, NULL, 200 + (uint64_t)step);
            float norm = step == 2 ? 0.5f : norm_of(&c, 0, PARAMETERS);
            adamw(&c, 0, step, norm);
            adamw(&c, 1, step, norm);
        }
        assert_same(&c, "w", c.w[0], c.w[1], sizeof(float));
        assert_same(&c, "narrow w", c.narrow[0], c.narrow[1], sizeof(uint16_t));
        assert_same(&c, "copy", c.copy[0], c.copy[1], sizeof(uint16_t));
        assert_same(&c, "m", c.m[0], c.m[1], sizeof(float));
        assert_same(&c, "v", c.v[0], c.v[1], sizeof(float));
        assert_same(&c, "g", c.g[0], c.g[1], sizeof(float));
        for (int i = 0; i < PARAMETERS; i++)
            assert_true(((float *)c.parameter[0][i].g.data)[0] == 0);
        close_case(&c);
    }
}

static void test_unknown_dtype_is_refused(void **state)
{
    struct optimizer_case c;
    struct err err = {0};

    open_case(&c, *state);
    for (int side = 0; side < 2; side++) {
        struct backend *b = c.backend[side];

        c.parameter[side][0].w.dtype = DTYPE_F16;
        b->ops->adamw(b, &(struct adamw_args){
                             .parameter = c.parameter[side],
                             .count = 1,
                             .norm = tensor_view(c.norm[side], DTYPE_F32, 1, (int64_t[]){1}),
                             .step = 1,
                         });
        assert_int_equal(b->ops->check(b, &err), -1);
        assert_string_equal(err.message, "adamw: a weight of dtype F16");
        err_clear(&err);
    }
    close_case(&c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_norm),
        cmocka_unit_test(test_norm_of_nothing_and_of_nan),
        cmocka_unit_test(test_adamw),
        cmocka_unit_test(test_unknown_dtype_is_refused),
    };

    return cmocka_run_group_tests_name("f32", tests, shim_setup, shim_teardown) +
           cmocka_run_group_tests_name("bf16", tests, shim_setup_bf16, shim_teardown);
}
