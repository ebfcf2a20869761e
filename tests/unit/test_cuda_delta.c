/* Packed deltas of planes on CUDA: as small as the CPU's, the same value by value, alone in a copy,
 * and what can not be one is refused. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/base/rng.h"
#include "engine/cuda/cuda_bench.h"
#include "tests/unit/shim_fixture.h"

/* A delta of planes, with the memory behind it. */
struct planes_delta {
    struct delta_tensor tensor;
    int32_t *vector;
    uint32_t *right_bits, *left_bits;
    float *scale; /* right, left, row, col */
};

static int32_t words_of(int32_t bits)
{
    return (bits + 31) / 32;
}

/* Vectors of `width` planes each, the last of what is left. */
static struct planes_delta make_planes(int32_t rows, int32_t cols, int32_t planes, int32_t width)
{
    size_t right = (size_t)planes * (size_t)words_of(cols);
    size_t left = (size_t)rows * (size_t)words_of(planes);
    size_t scales = (size_t)(2 * planes + rows + cols);
    struct planes_delta d = {.vector = malloc((size_t)planes * sizeof(int32_t)),
                             .right_bits = malloc(right * sizeof(uint32_t)),
                             .left_bits = malloc(left * sizeof(uint32_t)),
                             .scale = malloc(scales * sizeof(float))};

    assert_true(d.vector && d.right_bits && d.left_bits && d.scale);
    for (int32_t i = 0; i < planes; i++)
        d.vector[i] = i / width;
    for (size_t i = 0; i < right; i++)
        d.right_bits[i] = (uint32_t)rng_at(31, 0, i);
    for (size_t i = 0; i < left; i++)
        d.left_bits[i] = (uint32_t)rng_at(31, 1, i);
    for (size_t i = 0; i < scales; i++)
        d.scale[i] = (float)(0.1 + 0.5 * rng_unit_at(31, 2, i));
    d.tensor = (struct delta_tensor){.kind = DELTA_PLANES,
                                     .rows = rows,
                                     .cols = cols,
                                     .planes = {.planes = planes,
                                                .rank = (planes - 1) / width + 1,
                                                .vector = d.vector,
                                                .right_bits = d.right_bits,
                                                .left_bits = d.left_bits,
                                                .right_scale = d.scale,
                                                .left_scale = d.scale + planes,
                                                .row_scale = d.scale + 2 * planes,
                                                .col_scale = d.scale + 2 * planes + rows}};
    return d;
}

static void free_planes(struct planes_delta *d)
{
    free(d->vector);
    free(d->right_bits);
    free(d->left_bits);
    free(d->scale);
}

static int64_t packed_bytes(struct backend *b, const struct delta_tensor *delta)
{
    struct packed_delta *packed;
    struct err err = {0};
    int64_t bytes;

    if (b->ops->delta_pack(b, delta, &packed, &err))
        fail_msg("%s", err.message);
    bytes = b->ops->delta_bytes(packed);
    b->ops->delta_free(b, packed);
    return bytes;
}

/* A sixteenth of the 16-bit matrix: 384 planes of a matrix of 768 by 768. */
static void test_planes_stay_packed(void **state)
{
    const struct {
        int32_t rows, cols, planes, width;
    } of[] = {{768, 768, 384, 3}, {576, 1536, 420, 5}, {192, 576, 145, 1}, {600, 333, 210, 8}};
    struct backend cpu;
    struct err err = {0};

    if (backend_open(&cpu, &(struct backend_options){.threads = 1}, &err))
        fail_msg("%s", err.message);
    for (size_t i = 0; i < sizeof of / sizeof of[0]; i++) {
        struct planes_delta d = make_planes(of[i].rows, of[i].cols, of[i].planes, of[i].width);
        int64_t bytes = packed_bytes(*state, &d.tensor), want = packed_bytes(&cpu, &d.tensor);

        if (bytes > want + want / 4)
            fail_msg("%d planes of %d by %d take %lld bytes, on the CPU %lld", of[i].planes,
                     of[i].rows, of[i].cols, (long long)bytes, (long long)want);
        free_planes(&d);
    }
    backend_close(&cpu);
}

/* ------------------------------------------------------------------ values */

#define ROWS 37
#define COLS 150

/* Of each row of the matrix what a zero embedding gets of it. */
static void read_values(struct backend *b, const struct packed_delta *delta, float *value)
{
    float inv_freq[1] = {1};
    int32_t token[ROWS], position[ROWS] = {0}, cu_seqlens[] = {0, ROWS};
    struct adapter_layer layer = {0};
    struct adapter adapter = {.layer = &layer, .embed = delta};
    const struct adapter *adapters[] = {&adapter};
    struct model_config config = {.layers = 1, .hidden = COLS, .vocabulary = ROWS, .head_dim = 2};
    struct batch batch = {.rows = ROWS,
                          .token = token,
                          .position = position,
                          .docs = 1,
                          .cu_seqlens = cu_seqlens,
                          .segments = {1, cu_seqlens, adapters},
                          .serving = true};
    struct tensor embed = tensor_view(NULL, b->activation, 2, (const int64_t[]){ROWS, COLS});
    struct tensor x = embed, rope = tensor_view(NULL, DTYPE_F32, 2, (const int64_t[]){ROWS, 2});
    size_t bytes = (size_t)(ROWS * COLS * dtype_size(b->activation));
    char *host = malloc(bytes);
    struct err err = {0};

    for (int32_t r = 0; r < ROWS; r++)
        token[r] = r;
    embed.data = b->ops->alloc(b, bytes, &err);
    x.data = b->ops->alloc(b, bytes, &err);
    rope.data = b->ops->alloc(b, ROWS * 2 * sizeof(float), &err);
    assert_true(host && embed.data && x.data && rope.data);
    b->ops->begin(b, &(struct begin_args){
                         .config = &config,
                         .batch = &batch,
                         .inv_freq = tensor_view(inv_freq, DTYPE_F32, 1, (const int64_t[]){1}),
                         .rope_magnitude = 1,
                         .rope = rope});
    b->ops->embed(b, &(struct embed_args){.batch = &batch, .embed = embed, .x = x});
    b->ops->download(b, host, x.data, bytes);
    assert_int_equal(b->ops->check(b, &err), 0);
    tensor_to_f32(&(struct tensor){.data = host, .dtype = x.dtype}, 0, ROWS * COLS, value);
    b->ops->free(b, rope.data);
    b->ops->free(b, x.data);
    b->ops->free(b, embed.data);
    free(host);
}

static double value_of(const struct delta_tensor *delta, int32_t r, int32_t c)
{
    const struct delta_planes *p = &delta->planes;
    double sum = 0;

    for (int32_t v = 0; v < p->rank; v++) {
        double left = 0, right = 0;

        for (int32_t i = 0; i < p->planes; i++) {
            if (p->vector[i] != v)
                continue;
            left += (p->left_bits[r * words_of(p->planes) + i / 32] >> i % 32 & 1 ? 1 : -1) *
                    (double)p->left_scale[i];
            right += (p->right_bits[i * words_of(delta->cols) + c / 32] >> c % 32 & 1 ? 1 : -1) *
                     (double)p->right_scale[i];
        }
        sum += left * right;
    }
    return (double)p->row_scale[r] * sum * (double)p->col_scale[c];
}

/* As packed, and as copied once that is gone (shim_protect would show otherwise). */
static void test_values_of_planes(void **state)
{
    struct backend *b = *state;
    static float value[2][ROWS * COLS];
    const int32_t width[] = {1, 5, 23, 64};

    for (size_t i = 0; i < sizeof width / sizeof width[0]; i++) {
        struct planes_delta d = make_planes(ROWS, COLS, 70, width[i]);
        struct packed_delta *packed = NULL, *copy = NULL;
        double difference = 0, size = 0;
        struct err err = {0};

        if (b->ops->delta_pack(b, &d.tensor, &packed, &err) ||
            cuda_bench_clone(b, packed, &copy, &err))
            fail_msg("%s", err.message);
        assert_int_equal(b->ops->delta_bytes(packed), b->ops->delta_bytes(copy));
        read_values(b, packed, value[0]);
        b->ops->delta_free(b, packed);
        read_values(b, copy, value[1]);
        b->ops->delta_free(b, copy);
        assert_memory_equal(value[0], value[1], sizeof value[0]);
        for (int32_t k = 0; k < ROWS * COLS; k++) {
            double want = value_of(&d.tensor, k / COLS, k % COLS);

            difference += ((double)value[0][k] - want) * ((double)value[0][k] - want);
            size += want * want;
        }
        assert_true(sqrt(difference / size) < (b->activation == DTYPE_BF16 ? 4e-3 : 1e-6));
        free_planes(&d);
    }
}

/* ------------------------------------------------------------------ what is refused */

static void refused(struct backend *b, const struct delta_tensor *delta, const char *message)
{
    struct packed_delta *packed;
    struct err err = {0};

    assert_int_equal(b->ops->delta_pack(b, delta, &packed, &err), -1);
    assert_int_equal(err.kind, ERR_INVALID);
    if (!strstr(err.message, message))
        fail_msg("\"%s\" does not say \"%s\"", err.message, message);
}

static void test_bad_planes_are_refused(void **state)
{
    struct planes_delta d = make_planes(3, 5, 66, 1);
    struct delta_tensor bad = d.tensor;
    struct backend cpu;
    struct err err = {0};

    if (backend_open(&cpu, &(struct backend_options){.threads = 1}, &err))
        fail_msg("%s", err.message);
    for (int i = 0; i < 2; i++) {
        struct backend *b = i ? &cpu : *state;

        bad = d.tensor;
        bad.planes.planes = 0;
        refused(b, &bad, "0 planes of 66 vectors");
        bad.planes.planes = 66;
        bad.planes.rank = 0;
        refused(b, &bad, "66 planes of 0 vectors");
        bad.planes.rank = 65;
        refused(b, &bad, "plane 65 belongs to vector 65 of 65");
        bad.planes.rank = 66;
        d.vector[0] = -1;
        refused(b, &bad, "plane 0 belongs to vector -1 of 66");
        d.vector[0] = 2;
        refused(b, &bad, "plane 1 belongs to vector 1 of 66");
        for (int32_t k = 0; k < 66; k++)
            d.vector[k] = k > 0;
        refused(b, &bad, "vector 1 has more than 64 planes");
        for (int32_t k = 0; k < 66; k++)
            d.vector[k] = k;
        bad.cols = 0;
        refused(b, &bad, "a matrix of 3 by 0");
    }
    backend_close(&cpu);
    free_planes(&d);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_planes_stay_packed),
        cmocka_unit_test(test_values_of_planes),
        cmocka_unit_test(test_bad_planes_are_refused),
    };

    return cmocka_run_group_tests_name("f32", tests, shim_setup, shim_teardown) +
           cmocka_run_group_tests_name("bf16", tests, shim_setup_bf16, shim_teardown);
}
