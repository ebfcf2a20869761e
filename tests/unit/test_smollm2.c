/* A real model answers as it does under transformers: SmolLM2-135M-Instruct, 20 prompts, greedy
 * (tests/golden/make_greedy.py). Skips where the model is not at hand. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "engine/model.h"
#include "tests/unit/golden.h"

#define CLOSE 1e-3 /* two best logits nearer than this may change places */
#define LEN_MAX 256

struct fixture {
    struct backend backend;
    struct base_file *base;
    struct model *model;
    struct model_decoder *decoder;
    struct kv_cache cache;
    float *logits;
};

static void open_all(struct fixture *f, const char *path)
{
    char file[] = "/tmp/graft-smollm2.XXXXXX";
    struct engine_base_info info;
    struct err err = {0};
    int fd = mkstemp(file);

    assert_true(fd >= 0);
    close(fd);
    if (engine_import(path, file, &info, &err) != 0 || base_file_open(&f->base, file, &err) != 0)
        fail_msg("%s", err.message);
    unlink(file); /* the mapping keeps it */
    if (backend_open(&f->backend, &(struct backend_options){.device = "cpu"}, &err) != 0 ||
        model_open(&f->model, &f->backend, f->base, &err) != 0 ||
        model_decoder_open(&f->decoder, f->model, LEN_MAX, 1, &err) != 0 ||
        model_kv_cache_open(&f->cache, f->model, 1, LEN_MAX, &err) != 0)
        fail_msg("%s", err.message);
    f->logits = malloc((size_t)model_get_config(f->model)->vocabulary * sizeof *f->logits);
    assert_non_null(f->logits);
}

static void close_all(struct fixture *f)
{
    free(f->logits);
    model_kv_cache_close(&f->cache, f->model);
    model_decoder_free(f->decoder);
    model_free(f->model);
    backend_close(&f->backend);
    base_file_free(f->base);
}

/* Appends `count` tokens behind `past`; the best next token. */
static int32_t next(struct fixture *f, const int32_t *token, int32_t past, int32_t count)
{
    int32_t position[LEN_MAX], cu_seqlens[2] = {0, count}, row = count - 1, best = 0;
    struct batch_slot slot = {.slot = 0, .past = past};
    struct batch batch = {.rows = count,
                          .token = token,
                          .position = position,
                          .docs = 1,
                          .cu_seqlens = cu_seqlens,
                          .slot = &slot};
    struct err err = {0};

    for (int32_t i = 0; i < count; i++)
        position[i] = past + i;
    if (model_decode(f->decoder,
                     &(struct model_decode_args){.batch = &batch,
                                                 .cache = &f->cache,
                                                 .logit_row = &row,
                                                 .logit_count = 1,
                                                 .logits = f->logits},
                     &err) != 0)
        fail_msg("%s", err.message);
    for (int32_t i = 1; i < model_get_config(f->model)->vocabulary; i++)
        if (f->logits[i] > f->logits[best])
            best = i;
    return best;
}

/* Tokens that were compared: fewer than all where the reference was undecided and we differ. */
static size_t compare(struct fixture *f, const json_t *entry)
{
    const json_t *ids = json_object_get(entry, "ids"), *greedy = json_object_get(entry, "greedy");
    const json_t *margin = json_object_get(entry, "margin");
    int32_t token[LEN_MAX], past = 0, count = (int32_t)json_array_size(ids);

    assert_true(count > 0 && count + (int32_t)json_array_size(greedy) <= LEN_MAX);
    for (int32_t i = 0; i < count; i++)
        token[i] = (int32_t)json_integer_value(json_array_get(ids, (size_t)i));
    for (size_t i = 0; i < json_array_size(greedy); i++) {
        int32_t want = (int32_t)json_integer_value(json_array_get(greedy, i));
        int32_t got = next(f, token, past, count);

        if (got != want && json_number_value(json_array_get(margin, i)) < CLOSE)
            return i;
        if (got != want)
            fail_msg("\"%s\", new token %zu: %d, the reference has %d",
                     json_string_value(json_object_get(entry, "prompt")), i, got, want);
        past += count;
        count = 1;
        token[0] = got;
    }
    return json_array_size(greedy);
}

static void test_greedy_tokens_are_the_references(void **state)
{
    const char *path = golden_smollm2();
    json_t *golden = golden_load("tests/golden/greedy_smollm2.json");
    struct fixture f = {0};
    size_t compared = 0;

    if (path == NULL) {
        json_decref(golden);
        print_message("skipped: SmolLM2 is not at hand (GRAFT_TEST_SMOLLM2, .cache/models)\n");
        skip();
    }
    assert_int_equal(json_array_size(golden), 20);
    open_all(&f, path);
    for (size_t i = 0; i < json_array_size(golden); i++)
        compared += compare(&f, json_array_get(golden, i));
    printf("%zu of 480 tokens compared\n", compared);
    assert_true(compared > 400);
    close_all(&f);
    json_decref(golden);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_greedy_tokens_are_the_references)};

    return cmocka_run_group_tests(tests, NULL, NULL);
}
