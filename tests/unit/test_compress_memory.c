/* What a compression of two models needs of memory: bounds that were measured, and that the models
 * themselves are counted only where they are copied. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "engine/engine.h"

#define MIB ((int64_t)1 << 20)

static const struct engine_base_info of_135m = {.parameters = 134515008,
                                                .linear_parameters = 106168320,
                                                .bytes_16bit = 2 * (int64_t)134515008,
                                                .layers = 30,
                                                .hidden = 576,
                                                .intermediate = 1536,
                                                .heads = 9,
                                                .kv_heads = 3,
                                                .head_dim = 64,
                                                .vocabulary = 49152};
static const struct engine_base_info of_8b = {.parameters = 8030261248,
                                              .linear_parameters = 6979321856,
                                              .bytes_16bit = 2 * (int64_t)8030261248,
                                              .layers = 32,
                                              .hidden = 4096,
                                              .intermediate = 14336,
                                              .heads = 32,
                                              .kv_heads = 8,
                                              .head_dim = 128,
                                              .vocabulary = 128256};
static const struct engine_options cpu = {.device = "cpu"};

static int64_t mib(const struct engine_base_info *info, const char *codec, int32_t steps,
                   int64_t tokens)
{
    const struct engine_compress_options options = {.codec = codec, .distill_steps = steps};

    return engine_compress_bytes(info, &cpu, &options, tokens) / MIB;
}

/* RssAnon of `graft delta compress` for a model of that shape, with two threads. */
static void test_no_less_than_was_measured(void **state)
{
    assert_in_range(mib(&of_135m, "bitdelta", -1, 0), 46, 100);
    assert_in_range(mib(&of_135m, "graft", -1, 0), 90, 250);
    assert_in_range(mib(&of_135m, "bitdelta", -1, 500), 1190, 1400);
    assert_in_range(mib(&of_135m, "graft", 0, 500), 1547, 1700);
}

/* Heads may be wider together than the stream that they read. */
static void test_wide_heads_count(void **state)
{
    struct engine_base_info wide = of_135m;
    int64_t more;

    wide.head_dim = 2 * of_135m.head_dim;
    more = mib(&wide, "graft", 0, 500) - mib(&of_135m, "graft", 0, 500);
    assert_true(more >= (2 * (4 - 1) * 576 * 576 + 2 * (4 - 1) * 192 * 192) * 4L * 30 / MIB - 1);
}

static void test_mapped_models_do_not_count(void **state)
{
    const struct engine_compress_options options = {.distill_steps = -1};
    struct engine_options bf16 = cpu, cuda = {.device = "cuda:0"};
    int64_t one = engine_weight_bytes(&of_8b, &cpu), mapped, copied;

    bf16.precision = ENGINE_PRECISION_BF16;
    mapped = engine_compress_bytes(&of_8b, &cpu, &options, 0);
    copied = engine_compress_bytes(&of_8b, &bf16, &options, 0);
    assert_true(mapped < one / 8);
    assert_int_equal(copied - mapped, 2 * engine_weight_bytes(&of_8b, &bf16));
    assert_int_equal(engine_compress_bytes(&of_8b, &cuda, &options, 1000),
                     2 * engine_weight_bytes(&of_8b, &cuda));
}

static void test_rows_cost_what_is_done_with_them(void **state)
{
    assert_true(mib(&of_8b, "graft", 0, 1000) > mib(&of_8b, "graft", 0, 0));
    assert_true(mib(&of_8b, "graft", 0, 1000) > mib(&of_8b, "delta-come", 0, 1000));
    assert_int_equal(mib(&of_8b, "bitdelta", 0, 1000), mib(&of_8b, "bitdelta", 0, 0));
    assert_true(mib(&of_8b, "bitdelta", -1, 1000) >= 8 * of_8b.linear_parameters / MIB);
    assert_int_equal(mib(&of_8b, "lossless", -1, 1000), mib(&of_8b, "lossless", -1, 0));
    assert_int_equal(mib(&of_8b, NULL, -1, 1000), mib(&of_8b, "graft", -1, 1000));
}

/* Where sizes are tried, statistics stay while one is distilled. */
static void test_a_search_keeps_its_statistics(void **state)
{
    struct engine_compress_options options = {.codec = "graft", .distill_steps = -1};
    int64_t once = engine_compress_bytes(&of_135m, &cpu, &options, 500), distilled;

    distilled = mib(&of_135m, "bitdelta", -1, 500); /* it takes no statistics */
    options.max_kl = 0.01;
    assert_true(engine_compress_bytes(&of_135m, &cpu, &options, 500) / MIB >= distilled + 1100);
    assert_true(engine_compress_bytes(&of_135m, &cpu, &options, 500) > once);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_no_less_than_was_measured),
        cmocka_unit_test(test_wide_heads_count),
        cmocka_unit_test(test_mapped_models_do_not_count),
        cmocka_unit_test(test_rows_cost_what_is_done_with_them),
        cmocka_unit_test(test_a_search_keeps_its_statistics),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
