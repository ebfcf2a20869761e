/* The bench's own kernels: ceilings are measured at all, fills are random and within bounds, a
 * cloned delta computes as the first one did. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/cuda/cuda_bench.h"
#include "tests/unit/shim_fixture.h"

static void test_ceilings(void **state)
{
    const struct cuda_ceiling_sizes sizes = {.gemm = 48, .bytes = 1 << 16, .repeats = 2};
    struct cuda_ceilings c;
    struct err err = {0};

    assert_int_equal(cuda_bench_ceilings(0, &sizes, &c, &err), 0);
    assert_true(c.gemm_f32 > 0 && c.gemm_bf16 > 0 && c.copy > 0 && c.read > 0 && c.launch > 0);
    assert_int_equal(cuda_bench_ceilings(1000, &sizes, &c, &err), -1);
    assert_int_equal(err.kind, ERR_UNAVAILABLE);
}

static void test_fill(void **state)
{
    struct backend *b = *state;
    static float value[3000];
    struct err err = {0};
    struct tensor t = tensor_view(NULL, DTYPE_F32, 1, (const int64_t[]){3000});
    double sum = 0, squares = 0;

    t.data = b->ops->alloc(b, sizeof value, &err);
    assert_non_null(t.data);
    cuda_bench_fill(b, &t, 0.5f);
    b->ops->download(b, value, t.data, sizeof value);
    assert_int_equal(b->ops->check(b, &err), 0);
    for (int i = 0; i < 3000; i++) {
        assert_true(fabsf(value[i]) <= 0.5f);
        sum += (double)value[i];
        squares += (double)(value[i] * value[i]);
    }
    assert_true(fabs(sum / 3000) < 0.02);
    assert_true(fabs(squares / 3000 - 1.0 / 12) < 0.01);
    b->ops->free(b, t.data);
}

/* Rows of the embedding with a delta, before and after cloning. */
static void test_clone(void **state)
{
    struct backend *b = *state;
    static const uint32_t bits[20 * 3] = {0x12345678, 0x9abcdef0, 0x0f1e2d3c, 77, 1u << 31};
    float scale = 0.25f;
    const struct delta_tensor delta = {.kind = DELTA_SIGN,
                                       .rows = 20,
                                       .cols = 70,
                                       .bits = bits,
                                       .scale = &scale,
                                       .scale_count = 1};
    struct packed_delta *first, *second;
    struct err err = {0};

    assert_int_equal(b->ops->delta_pack(b, &delta, &first, &err), 0);
    assert_int_equal(cuda_bench_clone(b, first, &second, &err), 0);
    assert_true(first != second);
    assert_int_equal(b->ops->delta_bytes(first), b->ops->delta_bytes(second));
    b->ops->delta_free(b, first); /* the clone stands alone: shim_protect would show otherwise */

    float embed[20 * 70] = {0}, x[2 * 70], inv_freq[2] = {1, 0.1f};
    int32_t token[] = {0, 19}, position[] = {0, 1}, cu_seqlens[] = {0, 2}, start[] = {0, 2};
    struct adapter_layer layer = {0};
    struct adapter adapter = {.layer = &layer, .embed = second};
    const struct adapter *adapters[] = {&adapter};
    struct model_config config = {.layers = 1, .hidden = 70, .vocabulary = 20, .head_dim = 4};
    struct batch batch = {.rows = 2,
                          .token = token,
                          .position = position,
                          .docs = 1,
                          .cu_seqlens = cu_seqlens,
                          .segments = {1, start, adapters},
                          .serving = true};
    struct tensor host = tensor_view(embed, DTYPE_F32, 2, (const int64_t[]){20, 70}), weight;
    struct tensor out = tensor_view(NULL, DTYPE_F32, 2, (const int64_t[]){2, 70});
    struct tensor rope = tensor_view(NULL, DTYPE_F32, 2, (const int64_t[]){2, 4});

    assert_int_equal(b->ops->weight_open(b, &host, &weight, &err), 0);
    out.data = b->ops->alloc(b, sizeof x, &err);
    rope.data = b->ops->alloc(b, 2 * 4 * sizeof(float), &err);
    assert_true(out.data && rope.data);
    b->ops->begin(b, &(struct begin_args){
                         .config = &config,
                         .batch = &batch,
                         .inv_freq = tensor_view(inv_freq, DTYPE_F32, 1, (const int64_t[]){2}),
                         .rope_magnitude = 1,
                         .rope = rope});
    b->ops->embed(b, &(struct embed_args){.batch = &batch, .embed = weight, .x = out});
    b->ops->download(b, x, out.data, sizeof x);
    assert_int_equal(b->ops->check(b, &err), 0);
    for (int r = 0; r < 2; r++)
        for (int c = 0; c < 70; c++) {
            bool plus = bits[token[r] * 3 + c / 32] >> c % 32 & 1;

            assert_true(x[r * 70 + c] == (plus ? scale : -scale));
        }
    b->ops->free(b, rope.data);
    b->ops->free(b, out.data);
    b->ops->weight_close(b, &weight);
    b->ops->delta_free(b, second);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_ceilings),
        cmocka_unit_test(test_fill),
        cmocka_unit_test(test_clone),
    };

    return cmocka_run_group_tests(tests, shim_setup, shim_teardown);
}
