/* Compression of made-up matrices: a budget is met, one that is too small is refused with what it
 * takes, and neither time nor threads change a byte. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include <cmocka.h>

#include "engine/base/file_io.h"
#include "engine/base/rng.h"
#include "engine/codec/compression.h"
#include "tests/unit/check.h"
#include "tests/unit/delta_fixture.h"

/* What a header is estimated too large by, for each tensor (artifact_overhead). In a real model it
 * is nothing beside the tensor: the budget is met to 1 in 100 with it. */
#define HEADER_SLACK 32

/* Large enough that a plane of a matrix, which is what a budget is filled up with, is about one in
 * a hundred of the smallest budget. */
static const struct artifact_tensor tensors[] = {
    {"model.embed_tokens.weight", ARTIFACT_EMBEDDING, 100, 320},
    {"q.weight", ARTIFACT_MATRIX, 320, 320},
    {"o.weight", ARTIFACT_MATRIX, 320, 320},
    {"norm.weight", ARTIFACT_VECTOR, 1, 320},
    {"gate.weight", ARTIFACT_MATRIX, 512, 320},
    {"up.weight", ARTIFACT_MATRIX, 512, 320},
    {"down.weight", ARTIFACT_MATRIX, 320, 512},
    {"same.weight", ARTIFACT_MATRIX, 320, 64},
};
enum { COUNT = sizeof(tensors) / sizeof(tensors[0]), EMBED = 0, NORM = 3, SAME = 7 };

static const char digest[] = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
static char folder[] = "/tmp/graft-compression-XXXXXX";
static char path[128];
static float *difference[COUNT]; /* [rows, cols] */

/* Singular values that fall like those of a fine-tune, rows and columns of unlike size. */
static void fill_difference(int32_t t)
{
    int64_t rows = tensors[t].rows, cols = tensors[t].cols;
    float *d = calloc((size_t)(rows * cols), sizeof *d);

    assert_non_null(d);
    for (int64_t i = 0; i < rows * cols; i++)
        d[i] = 1e-4f * (float)(2 * rng_unit_at(1, (uint64_t)t, (uint64_t)i) - 1);
    for (int64_t v = 0; v < 24; v++)
        for (int64_t r = 0; r < rows; r++) {
            double left = 2 * rng_unit_at(2, (uint64_t)(t * 100 + v), (uint64_t)r) - 1;

            for (int64_t c = 0; c < cols; c++)
                d[r * cols + c] +=
                    (float)(2e-3 * pow(0.8, (double)v) * left *
                            (2 * rng_unit_at(3, (uint64_t)(t * 100 + v), (uint64_t)c) - 1));
        }
    difference[t] = d;
}

static int read_values(void *context, int32_t index, int64_t from, int64_t count, float *base,
                       float *tuned, struct err *err)
{
    for (int64_t i = 0; i < count; i++) {
        base[i] = (float)((from + i) % 7) / 8;
        tuned[i] = base[i];
        if (index != EMBED && index != SAME)
            tuned[i] += difference[index][from + i];
    }
    return 0;
}

static struct artifact_source source(void)
{
    return (struct artifact_source){
        .tensor = tensors, .count = COUNT, .base_digest = digest, .read = read_values};
}

static int64_t bytes_16bit(void)
{
    int64_t bytes = 0;

    for (int32_t t = 0; t < COUNT; t++)
        bytes += 2 * (int64_t)tensors[t].rows * tensors[t].cols;
    return bytes;
}

/* ------------------------------------------------------------------ */

static struct compression *open_compression(const struct artifact_source *from, const char *codec,
                                            struct thread_pool *pool)
{
    const struct compression_options options = {.codec = codec_find(codec), .pool = pool};
    struct compression *c;
    struct err err = {0};

    if (compression_open(&c, from, &options, &err) || compression_decompose(c, NULL, NULL, &err))
        fail_msg("%s", err.message);
    return c;
}

/* The file of at most `bytes`: its size. */
static int64_t run_and_write(struct compression *c, int64_t bytes, const char *report)
{
    int64_t written = 0;
    struct err err = {0};
    struct stat st;
    double cost;

    if (compression_run(c, bytes, report ? strlen(report) : 0, &cost, &err) ||
        compression_write(c, path, report, &written, NULL, NULL, &err))
        fail_msg("%s", err.message);
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(written, st.st_size);
    return written;
}

/* One compression for all sizes: what one leaves behind must not show in the next. */
static void a_budget_is_met(void **state)
{
    static const double ratios[] = {8, 256, 16, 64};
    const char *report = "{\"what\":\"a report has its place in the budget as well\"}";
    struct artifact_source from = source();
    struct thread_pool *pool;
    struct compression *c;
    double last_error = 0;

    assert_int_equal(thread_pool_open(&pool, 2, NULL), 0);
    c = open_compression(&from, "graft", pool);
    for (size_t i = 0; i < sizeof ratios / sizeof ratios[0]; i++) {
        int64_t asked = (int64_t)((double)bytes_16bit() / ratios[i]);
        int64_t bytes = run_and_write(c, asked, report);
        double error[COUNT], norm[COUNT], sum = 0, whole = 0;

        print_message("# 1/%g: %lld bytes asked for, %lld taken\n", ratios[i], (long long)asked,
                      (long long)bytes);
        assert_true(bytes <= asked);
        assert_true((double)(asked - bytes) <= 0.01 * (double)asked + HEADER_SLACK * COUNT);
        assert_int_equal(compression_measure(c, error, norm, NULL), 0);
        for (int32_t t = 0; t < COUNT; t++) {
            sum += error[t];
            whole += norm[t];
        }
        assert_true(sum > 0 && sum < whole);
        if (i == 0)
            last_error = sum;
        else
            assert_true(sum > last_error); /* 1/8 loses least */
        assert_int_equal(compression_part_bytes(c, EMBED), 0);
        assert_int_equal(compression_part_bytes(c, SAME), 0);
        assert_null(compression_parts(c, SAME));
        assert_false(compression_changed(c, SAME));
        assert_true(compression_changed(c, NORM));
    }
    compression_free(c);
    thread_pool_free(pool);
}

/* The tensors of SmolLM2-135M, whose singular values are made up. */
enum { LAYERS = 30, MODEL_COUNT = 1 + 9 * LAYERS + 1 };

struct whole_model {
    struct artifact_tensor tensor[MODEL_COUNT];
    bool changed[MODEL_COUNT];
    struct tensor part[MODEL_COUNT][CODEC_MAX_PARTS];
    struct codec_plan plan[MODEL_COUNT]; /* of the matrices, the others empty */
    int64_t bytes_16bit;
};

static void add_tensor(struct whole_model *m, int32_t t, const char *name, int32_t rows,
                       int32_t cols)
{
    struct artifact_tensor *a = &m->tensor[t];
    struct codec_plan *p = &m->plan[t];
    double *energy;

    snprintf(a->name, sizeof a->name,
             t == 0 || t == MODEL_COUNT - 1 ? "model.%s.weight" : "model.layers.%2$d.%1$s.weight",
             name, (t - 1) / 9);
    a->kind = t == 0 ? ARTIFACT_EMBEDDING : rows == 1 ? ARTIFACT_VECTOR : ARTIFACT_MATRIX;
    a->rows = rows;
    a->cols = cols;
    m->changed[t] = t > 0;
    m->bytes_16bit += 2 * (int64_t)rows * cols;
    if (a->kind != ARTIFACT_MATRIX)
        return;
    p->rows = rows;
    p->cols = cols;
    p->rank = rows < cols ? rows : cols;
    p->width = calloc((size_t)p->rank, 1);
    p->energy = energy = calloc((size_t)p->rank, sizeof *energy);
    assert_true(p->width && energy);
    for (int32_t v = 0; v < p->rank; v++)
        energy[v] = (1 + rng_unit_at(5, 0, (uint64_t)t)) * pow(0.98, v);
}

static void fill_model(struct whole_model *m)
{
    static const struct {
        const char *name;
        int32_t rows, cols;
    } layer[9] = {{"input_layernorm", 1, 576},    {"self_attn.q_proj", 576, 576},
                  {"self_attn.k_proj", 192, 576}, {"self_attn.v_proj", 192, 576},
                  {"self_attn.o_proj", 576, 576}, {"post_attention_layernorm", 1, 576},
                  {"mlp.gate_proj", 1536, 576},   {"mlp.up_proj", 1536, 576},
                  {"mlp.down_proj", 576, 1536}};

    add_tensor(m, 0, "embed_tokens", 49152, 576);
    for (int32_t t = 0; t < 9 * LAYERS; t++)
        add_tensor(m, t + 1, layer[t % 9].name, layer[t % 9].rows, layer[t % 9].cols);
    add_tensor(m, MODEL_COUNT - 1, "norm", 1, 576);
}

static int read_zeros(void *context, int32_t index, int64_t from, int64_t count, float *base,
                      float *tuned, struct err *err)
{
    memset(base, 0, (size_t)count * sizeof *base);
    memset(tuned, 0, (size_t)count * sizeof *tuned);
    return 0;
}

/* A file of the model within `bytes`, its parts empty: its size. */
static int64_t write_model(struct whole_model *m, int64_t bytes)
{
    struct artifact_source from = {
        .tensor = m->tensor, .count = MODEL_COUNT, .base_digest = digest, .read = read_zeros};
    struct artifact_content content = {
        .source = &from, .codec = codec_find("graft"), .changed = m->changed, .part = m->part};
    struct codec_plan plan[MODEL_COUNT];
    int32_t matrices = 0;
    double cost;
    struct err err = {0};

    for (int32_t t = 0; t < MODEL_COUNT; t++)
        if (m->tensor[t].kind == ARTIFACT_MATRIX)
            plan[matrices++] = m->plan[t];
    if (content.codec->allot(plan, matrices, bytes - artifact_overhead(&content, 0), &cost, &err))
        fail_msg("%s", err.message);
    assert_true(isfinite(cost) && cost > 0);
    matrices = 0;
    for (int32_t t = 0; t < MODEL_COUNT; t++) {
        int64_t size = plan[matrices].bytes;

        if (m->tensor[t].kind != ARTIFACT_MATRIX)
            continue;
        m->part[t][0] = tensor_view(calloc((size_t)size, 1), DTYPE_U8, 1, &size);
        assert_non_null(m->part[t][0].data);
        matrices++;
    }
    if (artifact_write(&content, path, &bytes, NULL, NULL, &err))
        fail_msg("%s", err.message);
    for (int32_t t = 0; t < MODEL_COUNT; t++)
        free(m->part[t][0].data);
    return bytes;
}

static void a_budget_is_met_at_the_size_of_a_model(void **state)
{
    struct whole_model *m;

#ifdef __SANITIZE_THREAD__
    print_message("a minute under TSan, of one thread\n");
    skip();
#endif
    m = calloc(1, sizeof *m);
    assert_non_null(m);
    fill_model(m);
    for (int32_t ratio = 8; ratio <= 256; ratio *= 2) {
        int64_t asked = m->bytes_16bit / ratio, bytes = write_model(m, asked);

        print_message("# 1/%d: %lld bytes asked for, %lld taken\n", ratio, (long long)asked,
                      (long long)bytes);
        assert_true(bytes <= asked && (double)bytes >= 0.99 * (double)asked);
    }
    for (int32_t t = 0; t < MODEL_COUNT; t++) {
        free(m->plan[t].width);
        free((double *)(uintptr_t)m->plan[t].energy);
    }
    free(m);
}

/* The number in a message behind `what`. */
static int64_t number_behind(const char *message, const char *what)
{
    const char *at = strstr(message, what);

    if (!at)
        fail_msg("\"%s\" is not in \"%s\"", what, message);
    return strtoll(at + strlen(what), NULL, 10);
}

/* Refused with the number that is enough; and it is. */
static void too_small_a_budget_is_refused_with_what_it_takes(void **state)
{
    struct artifact_source from = source();
    char codec[DELTA_FIXTURE_NAME];
    struct thread_pool *pool;

    assert_int_equal(thread_pool_open(&pool, 2, NULL), 0);
    for (int i = 0; delta_fixture_maker(i, codec); i++) {
        struct compression *c = open_compression(&from, codec, pool);
        int64_t needed = 2, asked;
        char report[101];
        double cost;

        memset(report, ' ', sizeof report - 1);
        report[sizeof report - 1] = '\0';
        for (int k = 0; k < 3; k++) { /* nothing, half of it, all but a byte */
            struct err err = {0};

            asked = k < 2 ? k * needed / 2 : needed - 1;
            assert_int_equal(compression_run(c, asked, 100, &cost, &err), -1);
            assert_int_equal(err.kind, ERR_INVALID);
            assert_int_equal(number_behind(err.message, "a delta of "), asked);
            needed = number_behind(err.message, "it takes at least ");
            assert_true(needed > 500); /* names and 16-bit differences alone */
        }
        assert_true(run_and_write(c, needed, report) <= needed);
        compression_free(c);
    }
    thread_pool_free(pool);
}

static void compress_with(int threads, const char *codec, int64_t bytes, char hash[65])
{
    struct artifact_source from = source();
    struct thread_pool *pool;
    struct compression *c;

    from.any_thread = threads > 1;
    assert_int_equal(thread_pool_open(&pool, threads, NULL), 0);
    c = open_compression(&from, codec, pool);
    run_and_write(c, bytes, NULL);
    assert_int_equal(file_sha256(path, hash, NULL, NULL), 0);
    compression_free(c);
    thread_pool_free(pool);
}

static void threads_do_not_change_a_byte(void **state)
{
    char codec[DELTA_FIXTURE_NAME], one[65], again[65], four[65];

    for (int i = 0; delta_fixture_maker(i, codec); i++) {
        /* As large as it likes only where it has one size of its own. */
        int64_t bytes = delta_fixture_sizes(codec) ? bytes_16bit() / 24 : INT64_MAX;

        compress_with(1, codec, bytes, one);
        compress_with(1, codec, bytes, again);
        compress_with(4, codec, bytes, four);
        assert_string_equal(one, again);
        assert_string_equal(one, four);
    }
}

static int read_but_not_gate(void *context, int32_t index, int64_t from, int64_t count, float *base,
                             float *tuned, struct err *err)
{
    if (strcmp(tensors[index].name, "gate.weight") == 0 && count > 1 << 16)
        return err_set(err, ERR_IO, "the disk is gone");
    return read_values(context, index, from, count, base, tuned, err);
}

/* By whoever reads it. */
static void a_matrix_that_can_not_be_read_is_named(void **state)
{
    struct artifact_source from = source();
    struct compression_options with = {.codec = codec_find("bitdelta")};
    double cost;

    from.read = read_but_not_gate;
    assert_int_equal(thread_pool_open(&with.pool, 2, NULL), 0);
    for (int i = 0; i < 2; i++) {
        struct compression *c;
        struct err err = {0};

        from.any_thread = i == 1;
        assert_int_equal(compression_open(&c, &from, &with, &err), 0);
        assert_int_equal(compression_decompose(c, NULL, NULL, &err), 0);
        assert_int_equal(compression_run(c, INT64_MAX, 0, &cost, &err), -1);
        assert_int_equal(err.kind, ERR_IO);
        assert_non_null(strstr(err.message, "the disk is gone"));
        if (from.any_thread)
            assert_non_null(strstr(err.message, "gate.weight"));
        compression_free(c);
    }
    thread_pool_free(with.pool);
}

/* What messages list is what there is. */
static void the_names_are_those_of_the_table(void **state)
{
    char all[200] = "", makers[200] = "";
    size_t len = 0, made = 0;

    for (size_t i = 0; codec_at(i); i++) {
        const char *name = codec_at(i)->name;

        assert_ptr_equal(codec_find(name), codec_at(i));
        len += (size_t)snprintf(all + len, sizeof all - len, "%s%s", len ? ", " : "", name);
        if (!codec_at(i)->imports)
            made += (size_t)snprintf(makers + made, sizeof makers - made, "%s%s", made ? ", " : "",
                                     name);
    }
    assert_string_equal(codec_names(), all);
    assert_string_equal(codec_makers(), makers);
    assert_string_equal(codec_default(), codec_at(0)->name);
    assert_null(codec_find("zip"));
}

static int setup(void **state)
{
    if (mkdtemp(folder) == NULL)
        return -1;
    snprintf(path, sizeof path, "%s/delta.safetensors", folder);
    for (int32_t t = 0; t < COUNT; t++)
        fill_difference(t);
    return 0;
}

static int teardown(void **state)
{
    for (int32_t t = 0; t < COUNT; t++)
        free(difference[t]);
    return file_remove_tree(folder, NULL);
}

/* ------------------------------------------------------------------ what has diverged */

enum { LARGE_ROWS = 150, LARGE_COLS = 300, LARGE = LARGE_ROWS * LARGE_COLS };

/* What a codec makes of a difference: the parts, or -1. */
static int compress_large(const struct codec *codec, const float *delta, struct tensor part[],
                          struct err *err)
{
    uint8_t width[LARGE_ROWS];
    double energy[LARGE_ROWS], cost;
    struct codec_plan plan = {.rows = LARGE_ROWS,
                              .cols = LARGE_COLS,
                              .rank = LARGE_ROWS,
                              .energy = energy,
                              .width = width};
    const struct codec_matrix m = {.rows = LARGE_ROWS, .cols = LARGE_COLS, .delta = delta};

    return (codec->energy && codec->energy(&m, energy, err)) ||
                   codec->allot(&plan, 1, codec->ratio > 0 ? LARGE / 2 : INT64_MAX, &cost, err) ||
                   codec->compress(&m, &plan, part, err)
               ? -1
               : 0;
}

static double share_lost(const struct codec *codec, const float *delta, const struct tensor part[])
{
    static float back[LARGE];
    double error = 0, norm = 0;

    CHECK(codec->accept(part, LARGE_ROWS, LARGE_COLS, &err));
    CHECK(codec->expand(part, LARGE_ROWS, LARGE_COLS, back, &err));
    for (int i = 0; i < LARGE; i++) {
        error += pow((double)back[i] - (double)delta[i], 2);
        norm += pow((double)delta[i], 2);
    }
    return sqrt(error / norm);
}

/* Is it refused? Else it can be read, and is what it was where the codec says so, near to it where
 * it has the bytes. */
static bool large_is_refused(const struct codec *codec, const float *delta)
{
    struct tensor part[CODEC_MAX_PARTS] = {{0}};
    struct err err = {0};
    bool refused = compress_large(codec, delta, part, &err) != 0;

    if (refused) {
        assert_int_equal(err.kind, ERR_INVALID);
        assert_non_null(strstr(err.message, "diverged"));
    } else {
        double lost = share_lost(codec, delta, part);

        /* Signs at their best scale are never worse than nothing. */
        assert_true(codec->own_size ? lost == 0 : lost < (codec->ratio > 0 ? 0.4 : 1));
    }
    for (int p = 0; p < CODEC_MAX_PARTS; p++)
        free(part[p].data);
    return refused;
}

/* All elements of a difference so large, or one of them. What a format can hold differs: nothing
 * that is 1e4 is refused, and from 1e12 on there is no scale for it in 16 bits. */
static void what_is_too_large_is_refused(void **state)
{
    static const float size[] = {1, 1e4f, 1e5f, 1e7f, 1e9f, 1e12f, 1e30f, 3e38f};
    float *all = malloc(LARGE * sizeof *all), *one = malloc(LARGE * sizeof *one);
    char name[DELTA_FIXTURE_NAME];

    assert_true(all && one);
    for (size_t s = 0; s < sizeof size / sizeof size[0]; s++) {
        for (int e = 0; e < LARGE; e++) {
            all[e] = size[s] * (float)(2 * rng_unit_at(4, 1, (uint64_t)e) - 1);
            one[e] = 1e-3f * (float)(2 * rng_unit_at(4, 2, (uint64_t)e) - 1);
        }
        one[LARGE / 2] = size[s];
        for (int i = 0; delta_fixture_maker(i, name); i++) {
            bool exact = strcmp(name, "lossless") == 0;
            bool refused_all = large_is_refused(codec_find(name), all);
            bool refused_one = large_is_refused(codec_find(name), one);

            if (size[s] <= 1e4f || exact)
                assert_false(refused_all || refused_one);
            else if (size[s] >= 1e12f)
                assert_true(refused_all && refused_one);
        }
    }
    free(one);
    free(all);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_budget_is_met),
        cmocka_unit_test(a_budget_is_met_at_the_size_of_a_model),
        cmocka_unit_test(too_small_a_budget_is_refused_with_what_it_takes),
        cmocka_unit_test(a_matrix_that_can_not_be_read_is_named),
        cmocka_unit_test(what_is_too_large_is_refused),
        cmocka_unit_test(the_names_are_those_of_the_table),
        cmocka_unit_test(threads_do_not_change_a_byte),
    };

    return cmocka_run_group_tests(tests, setup, teardown);
}
