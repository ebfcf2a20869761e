/* lossless.h: a file can not make a server inflate what it likes, and what we write is never taken
 * for such a file. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "engine/codec/artifact.h"
#include "engine/safetensors.h"

static const char digest[] = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

/* Nothing of it is inflated to find that out: it is no zlib stream at all. */
static void what_would_grow_out_of_all_proportion_is_refused_before_it_does(void **state)
{
    static const struct artifact_tensor large = {"m.weight", ARTIFACT_MATRIX, 8192, 16384};
    const struct artifact_expectation expected = {
        .tensor = &large, .count = 1, .base_digest = digest};
    static unsigned char nothing[3 << 20];
    int64_t shape[1];
    struct safetensors_writer *w;
    struct artifact *artifact;
    char path[] = "/tmp/graft-lossless-XXXXXX";

    close(mkstemp(path));
    for (int large_enough = 0; large_enough < 2; large_enough++) {
        struct err err = {0};

        shape[0] = large_enough ? (int64_t)sizeof nothing : 2 << 20; /* 512 MiB / 200 is between */
        assert_int_equal(safetensors_writer_open(&w, path, NULL), 0);
        safetensors_writer_metadata(w, "graft.format", "delta", NULL);
        safetensors_writer_metadata(w, "graft.version", ARTIFACT_VERSION, NULL);
        safetensors_writer_metadata(w, "graft.base", digest, NULL);
        safetensors_writer_metadata(w, "graft.codec", "lossless", NULL);
        safetensors_writer_declare(w, "m.weight.deflated", DTYPE_U8, 1, shape, NULL);
        safetensors_writer_begin(w, NULL);
        safetensors_writer_append(w, nothing, (size_t)shape[0], NULL);
        assert_int_equal(safetensors_writer_finish(w, NULL, NULL), 0);
        safetensors_writer_free(w);
        assert_int_equal(artifact_open(&artifact, path, &expected, &err), -1);
        assert_int_equal(err.kind, ERR_INVALID);
        if (strstr(err.message, large_enough ? "not a zlib stream" : "more than 200 times") == NULL)
            fail_msg("%s", err.message);
    }
    unlink(path);
}

/* Hardly anything changed in it: zlib alone would come to 1000 : 1. */
static void what_lossless_writes_is_never_that_small(void **state)
{
    const struct codec *codec = codec_find("lossless");
    enum { ROWS = 700, COLS = 1024 };
    float *delta = calloc(ROWS * COLS, sizeof *delta), *back = calloc(ROWS * COLS, sizeof *back);
    const struct codec_matrix matrix = {.rows = ROWS, .cols = COLS, .delta = delta};
    const struct codec_plan plan = {.rows = ROWS, .cols = COLS};
    struct tensor part[CODEC_MAX_PARTS];
    int64_t bytes;

    delta[ROWS * COLS / 3] = 0.125f;
    assert_int_equal(codec->compress(&matrix, &plan, part, NULL), 0);
    bytes = tensor_elements(&part[0]);
    assert_int_equal(codec->packed_bytes(part, ROWS, COLS), 4 * ROWS * COLS);
    if (4 * ROWS * COLS > CODEC_MAX_GROWTH * bytes)
        fail_msg("%lld bytes become %d", (long long)bytes, 4 * ROWS * COLS);
    assert_true(4 * ROWS * COLS > 20 * bytes); /* small it is, for all that */
    assert_int_equal(codec->accept(part, ROWS, COLS, NULL), 0);
    assert_int_equal(codec->expand(part, ROWS, COLS, back, NULL), 0);
    assert_memory_equal(delta, back, ROWS * COLS * sizeof *delta);
    free(part[0].data);
    free(delta);
    free(back);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_would_grow_out_of_all_proportion_is_refused_before_it_does),
        cmocka_unit_test(what_lossless_writes_is_never_that_small),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
