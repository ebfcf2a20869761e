/* The logits of small random Llama models are those that transformers computes
 * (tests/golden/make_logits.py), within 1e-4 of their size. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/safetensors.h"
#include "tests/unit/reference_model.h"
#include "tests/unit/tiny_model.h"

#define GOLDEN "tests/golden/logits.safetensors"
#define LEN 91
#define V 512

struct golden {
    const char *name;
    struct model_config config;
    uint64_t seed;
};

#define TINY \
    .layers = 2, .vocabulary = V, .context = 256, .rms_norm_eps = 1e-5f, .rope_theta = 10000
#define WIDE .hidden = 64, .intermediate = 128, .heads = 4, .head_dim = 16

static const struct golden models[] = {
    {"grouped_tied", {TINY, WIDE, .kv_heads = 2, .tied_embeddings = true}, 0},
    {"grouped_untied", {TINY, WIDE, .kv_heads = 2}, 1},
    {"multi_head_tied", {TINY, WIDE, .kv_heads = 4, .tied_embeddings = true}, 2},
    {"multi_head_untied", {TINY, WIDE, .kv_heads = 4}, 3},
    {"odd_widths",
     {TINY, .hidden = 72, .intermediate = 100, .heads = 6, .kv_heads = 3, .head_dim = 12,
      .tied_embeddings = true},
     4},
    {"linear",
     {TINY, WIDE, .kv_heads = 2, .tied_embeddings = true, .rope_scaling = ROPE_SCALING_LINEAR,
      .rope_factor = 2},
     5},
    {"llama3",
     {TINY, WIDE, .kv_heads = 2, .tied_embeddings = true, .rope_scaling = ROPE_SCALING_LLAMA3,
      .rope_factor = 8, .rope_low_freq_factor = 1, .rope_high_freq_factor = 4,
      .rope_original_context = 64},
     6},
    {"yarn",
     {TINY, WIDE, .kv_heads = 2, .tied_embeddings = true, .rope_scaling = ROPE_SCALING_YARN,
      .rope_factor = 4, .rope_original_context = 64},
     7},
};

static double relative_error(const float *got, const float *want)
{
    double difference = 0, size = 0;

    for (int32_t i = 0; i < V; i++) {
        difference += pow((double)got[i] - (double)want[i], 2);
        size += pow((double)want[i], 2);
    }
    return sqrt(difference / size);
}

static void compute(const struct golden *golden, float *logits)
{
    struct memory_model *memory = memory_model_new(&golden->config, DTYPE_F32, 0);
    struct model_source source = memory_model_source(memory);
    int32_t token[LEN], position[LEN], cu_seqlens[2] = {0, LEN};
    const int32_t logit_row[2] = {3, 90};
    struct batch batch = {
        .rows = LEN, .token = token, .position = position, .docs = 1, .cu_seqlens = cu_seqlens};
    struct model_decoder *decoder;
    struct backend backend;
    struct model *model;
    struct err err = {0};

    for (int32_t t = 0; t < memory->count; t++) {
        struct tensor *w = &memory->tensor[t];

        for (int64_t i = 0; i < tensor_elements(w); i++)
            ((float *)w->data)[i] =
                tiny_model_value(memory->name[t], i, w->shape[w->rank - 1], golden->seed);
    }
    for (int32_t i = 0; i < LEN; i++) {
        token[i] = (7 * i * i + 3 * i + 1) % V;
        position[i] = i;
    }
    assert_int_equal(backend_open(&backend, &(struct backend_options){.threads = 2}, &err), 0);
    assert_int_equal(model_open_source(&model, &backend, &source, &err), 0);
    assert_int_equal(model_decoder_open(&decoder, model, LEN, 2, &err), 0);
    assert_int_equal(model_decode(decoder,
                                  &(struct model_decode_args){.batch = &batch,
                                                              .logit_row = logit_row,
                                                              .logit_count = 2,
                                                              .logits = logits},
                                  &err),
                     0);
    model_decoder_free(decoder);
    model_free(model);
    backend_close(&backend);
    memory_model_free(memory);
}

static void test_logits(void **state)
{
    static float logits[2 * V];
    struct safetensors *file;
    struct err err = {0};

    assert_int_equal(safetensors_open(&file, GOLDEN, &err), 0);
    for (size_t i = 0; i < sizeof models / sizeof models[0]; i++) {
        const struct safetensors_tensor *want = safetensors_find(file, models[i].name);

        assert_non_null(want);
        assert_int_equal(tensor_elements(&want->view), 2 * V);
        compute(&models[i], logits);
        for (int32_t row = 0; row < 2; row++) {
            double error = relative_error(logits + row * V, (float *)want->view.data + row * V);

            printf("%s row %d: %.2g\n", models[i].name, row, error);
            if (!(error < 1e-4))
                fail_msg("%s, row %d: off by %g", models[i].name, row, error);
        }
    }
    safetensors_free(file);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_logits)};

    return cmocka_run_group_tests(tests, NULL, NULL);
}
