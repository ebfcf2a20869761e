/* The delta file: what is written comes back, the same bytes each time, and nothing else is read.
 *
 * usage: test_artifact            the tests
 *        test_artifact FOLDER     writes a file of each codec there: the corpus of fuzz_artifact */
#include <fcntl.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "engine/base/file_io.h"
#include "engine/codec/artifact.h"
#include "engine/codec/lora.h"
#include "engine/codec/planes.h"
#include "engine/codec/sparse_signs.h"
#include "engine/safetensors.h"
#include "tests/unit/delta_fixture.h"
#include "tests/unit/format_reader.h"

/* Odd sizes on purpose: nothing may rely on rows or columns being even. */
static const struct artifact_tensor tensors[] = {
    {"model.embed_tokens.weight", ARTIFACT_EMBEDDING, 11, 5},
    {"a.weight", ARTIFACT_MATRIX, 3, 37},
    {"a_norm.weight", ARTIFACT_VECTOR, 1, 37},
    {"b.weight", ARTIFACT_MATRIX, 7, 64},
    {"frozen.weight", ARTIFACT_MATRIX, 5, 5},
    {"lm_head.weight", ARTIFACT_EMBEDDING, 11, 5},
};
enum { COUNT = sizeof(tensors) / sizeof(tensors[0]), EMBED = 0, A, NORM, B, FROZEN, HEAD };

static const char digest[] = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
static char folder[] = "/tmp/graft-artifact-XXXXXX";
static char path[128], other_path[128];

static float base_value(int32_t index, int64_t i)
{
    return sinf((float)(index * 1000 + i)) * 0.1f;
}

/* embed and frozen stay as they are; the head changes in one place far back */
static float tuned_value(int32_t index, int64_t i)
{
    float base = base_value(index, i);

    if (index == EMBED || index == FROZEN)
        return base;
    if (index == HEAD)
        return i == 54 ? base + 0.25f : base;
    return base + cosf((float)(index * 77 + i * i)) * 1e-3f;
}

static int read_values(void *context, int32_t index, int64_t from, int64_t count, float *base,
                       float *tuned, struct err *err)
{
    for (int64_t i = 0; i < count; i++) {
        base[i] = base_value(index, from + i);
        tuned[i] = tuned_value(index, from + i);
    }
    return 0;
}

static struct artifact_source source(void)
{
    return (struct artifact_source){
        .tensor = tensors, .count = COUNT, .base_digest = digest, .read = read_values};
}

static const struct artifact_expectation want = {tensors, COUNT, digest};

/* Of the matrices, by a codec that was not asked for a size: nothing where it says so, else about
 * twice as much as it did once. */
static double may_lose(const char *codec)
{
    if (codec_find(codec)->own_size)
        return 1e-6;
    if (strcmp(codec, "graft") == 0)
        return 0.02;
    return strcmp(codec, "delta-come") == 0 ? 0.2 : 0.6;
}

static void comes_back(const char *codec)
{
    const char *said = "{\"a\":\"\\\\b\"}  ";
    struct artifact_source from = source();
    struct delta_fixture report;
    struct artifact *artifact;
    struct stat st;
    float out[512];
    double error = 0, norm = 0, matrix_error = 0, matrix_norm = 0;

    assert_int_equal(delta_fixture_write(&from, codec, 0, said, path, &report, NULL), 0);
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(report.bytes, st.st_size);
    assert_int_equal(artifact_open(&artifact, path, &want, NULL), 0);
    assert_ptr_equal(artifact_codec(artifact), codec_find(codec));
    assert_string_equal(artifact_report(artifact), said);
    assert_null(artifact_parts(artifact, EMBED));
    assert_null(artifact_parts(artifact, FROZEN));
    for (int32_t t = 0; t < COUNT; t++) {
        assert_int_equal(artifact_expand(artifact, t, out, NULL), 0);
        for (int64_t i = 0; i < tensors[t].rows * tensors[t].cols; i++) {
            double delta = (double)tuned_value(t, i) - base_value(t, i);

            if (tensors[t].kind != ARTIFACT_MATRIX)
                assert_true(fabs(out[i] - delta) <= fabs(delta) / 2048 + 1e-7);
            else if (strcmp(codec, "bitdelta") == 0)
                assert_true((out[i] >= 0) == (delta >= 0));
            error += (out[i] - delta) * (out[i] - delta);
            norm += delta * delta;
            if (tensors[t].kind == ARTIFACT_MATRIX) {
                matrix_error += (out[i] - delta) * (out[i] - delta);
                matrix_norm += delta * delta;
            }
        }
    }
    print_message("# %s loses %.3g\n", codec, sqrt(matrix_error / matrix_norm));
    assert_true(sqrt(matrix_error / matrix_norm) < may_lose(codec));
    assert_true(fabs(report.relative_error - sqrt(error / norm)) < 1e-4);
    artifact_free(artifact);
}

static void what_is_written_comes_back(void **state)
{
    char codec[DELTA_FIXTURE_NAME];

    for (int i = 0; delta_fixture_codec(i, codec); i++)
        comes_back(codec);
}

static void the_same_weights_give_the_same_bytes(void **state)
{
    struct artifact_source from = source();
    struct delta_fixture report;
    char first[65], second[65], codec[DELTA_FIXTURE_NAME];

    for (int i = 0; delta_fixture_codec(i, codec); i++) {
        assert_int_equal(delta_fixture_write(&from, codec, 0, NULL, path, &report, NULL), 0);
        assert_int_equal(delta_fixture_write(&from, codec, 0, NULL, other_path, &report, NULL), 0);
        assert_int_equal(file_sha256(path, first, NULL, NULL), 0);
        assert_int_equal(file_sha256(other_path, second, NULL, NULL), 0);
        assert_string_equal(first, second);
    }
}

static void another_base_or_model_is_refused(void **state)
{
    struct artifact_source from = source();
    struct artifact_expectation other = want;
    struct artifact_tensor changed[COUNT];
    struct delta_fixture report;
    struct artifact *artifact;
    struct err err = {0};

    assert_int_equal(delta_fixture_write(&from, "bitdelta", 0, NULL, path, &report, NULL), 0);
    other.base_digest = "ffff456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    assert_int_equal(artifact_open(&artifact, path, &other, &err), -1);
    assert_int_equal(err.kind, ERR_INVALID);
    assert_non_null(strstr(err.message, "another base"));

    memcpy(changed, tensors, sizeof(tensors));
    other = want;
    other.tensor = changed;
    changed[B].cols = 65;
    err_clear(&err);
    assert_int_equal(artifact_open(&artifact, path, &other, &err), -1);
    assert_non_null(strstr(err.message, "b.weight"));

    memcpy(changed, tensors, sizeof(tensors));
    strcpy(changed[NORM].name, "renamed.weight");
    err_clear(&err);
    assert_int_equal(artifact_open(&artifact, path, &other, &err), -1);
    assert_non_null(strstr(err.message, "belong to no tensor"));
}

/* Replaces the first `old` in the file by `new`, of the same length; tells how opening fails. */
static void damaged(const char *old, const char *new, size_t len, const char *complaint)
{
    struct artifact *artifact = NULL;
    struct err err = {0};
    char *data, *at;
    size_t size;

    assert_int_equal(file_read_all(path, 1 << 20, &data, &size, NULL), 0);
    at = memmem(data, size, old, len);
    assert_non_null(at);
    memcpy(at, new, len);
    assert_int_equal(artifact_open_memory(&artifact, data, size, "x", &want, &err), -1);
    assert_int_equal(err.kind, ERR_INVALID);
    if (strstr(err.message, complaint) == NULL)
        fail_msg("\"%s\" is not in \"%s\"", complaint, err.message);
    free(data);
}

static void damaged_files_are_refused_by_name(void **state)
{
    struct artifact_source from = source();
    struct delta_fixture report;

    assert_int_equal(delta_fixture_write(&from, "bitdelta", 0, NULL, path, &report, NULL), 0);
    damaged("\"delta\"", "\"dalte\"", 7, "not a delta");
    damaged("\"graft.version\":\"2\"", "\"graft.version\":\"3\"", 19, "version 3");
    damaged("bitdelta", "bitdalte", 8, "bitdalte");
    damaged("b.weight.scale", "b.weight.skale", 14, "1 of the 2 parts");
    damaged("a_norm.weight.diff", "a_norm.weight.dufe", 18, "belong to no tensor");
    damaged("\"graft.codec\"", "\"graft.kodec\"", 13, "codec (none)");
    assert_int_equal(delta_fixture_write(&from, "graft", 0, NULL, path, &report, NULL), 0);
    damaged("b.weight.planes", "b.weight.planet", 15, "belong to no tensor");
    damaged("\"graft.codec\":\"graft\"", "\"graft.codec\":\"draft\"", 21, "codec draft");
}

/* Opens the bytes: refused in words, or of use. True: it opened. */
static bool open_or_refuse(const char *data, size_t size)
{
    struct artifact *artifact = NULL;
    struct err err = {0};
    float out[512];

    if (artifact_open_memory(&artifact, data, size, "x", &want, &err) != 0) {
        assert_int_equal(err.kind, ERR_INVALID);
        assert_true(err.message[0] != '\0');
        return false;
    }
    for (int32_t t = 0; t < COUNT; t++) {
        const struct tensor *part = artifact_parts(artifact, t);
        struct delta_tensor view;
        void *memory;

        assert_int_equal(artifact_expand(artifact, t, out, NULL), 0);
        for (int64_t i = 0; i < tensors[t].rows * tensors[t].cols; i++)
            assert_true(isfinite(out[i]));
        if (!part || tensors[t].kind != ARTIFACT_MATRIX)
            continue;
        assert_int_equal(artifact_codec(artifact)->view(part, tensors[t].rows, tensors[t].cols,
                                                        &view, &memory, NULL),
                         0);
        free(memory);
    }
    artifact_free(artifact);
    return true;
}

/* Each bit of a file of each codec, and each length: what a flip does to values only its digest can
 * tell (test_worker_models), but nothing stumbles over it. */
static void flipped_bits_and_cut_files_do_no_harm(void **state)
{
    struct artifact_source from = source();
    char codec[DELTA_FIXTURE_NAME];

    for (int i = 0; delta_fixture_codec(i, codec); i++) {
        struct delta_fixture report;
        size_t size, opened = 0;
        char *data;

        assert_int_equal(delta_fixture_write(&from, codec, 0, NULL, path, &report, NULL), 0);
        assert_int_equal(file_read_all(path, 1 << 20, &data, &size, NULL), 0);
        for (size_t bit = 0; bit < 8 * size; bit++) {
            data[bit / 8] ^= (char)(1 << bit % 8);
            opened += open_or_refuse(data, size);
            data[bit / 8] ^= (char)(1 << bit % 8);
        }
        assert_true(opened > 0 && opened < 8 * size);
        for (size_t len = 0; len < size; len++)
            assert_false(open_or_refuse(data, len));
        assert_true(open_or_refuse(data, size));
        print_message("# %s: %zu of %zu flips open\n", codec, opened, 8 * size);
        free(data);
    }
}

/* Writes a file that declares what it likes, by hand. */
static void values_that_are_not_finite_are_refused(void **state)
{
    const int64_t shape[1] = {37};
    uint16_t diff[37] = {0};
    struct safetensors_writer *writer;
    struct artifact *artifact;
    struct err err = {0};

    diff[36] = 0xfc00;
    assert_int_equal(safetensors_writer_open(&writer, path, NULL), 0);
    safetensors_writer_metadata(writer, "graft.format", "delta", NULL);
    safetensors_writer_metadata(writer, "graft.version", ARTIFACT_VERSION, NULL);
    safetensors_writer_metadata(writer, "graft.base", digest, NULL);
    safetensors_writer_metadata(writer, "graft.codec", "bitdelta", NULL);
    safetensors_writer_declare(writer, "a_norm.weight.diff", DTYPE_F16, 1, shape, NULL);
    safetensors_writer_begin(writer, NULL);
    safetensors_writer_append(writer, diff, sizeof(diff), NULL);
    assert_int_equal(safetensors_writer_finish(writer, NULL, NULL), 0);
    safetensors_writer_free(writer);
    assert_int_equal(artifact_open(&artifact, path, &want, &err), -1);
    assert_non_null(strstr(err.message, "not finite"));
}

/* Opens a file of zeros with these tensors; tells how that fails, or NULL. */
static const char *refusal_of(const char *codec, const char *declared, size_t bytes)
{
    static struct err err;
    struct artifact *artifact;
    char *data = calloc(1, 1 << 11);
    uint64_t len = 0;

    assert_non_null(data);
    err_clear(&err);
    len =
        (uint64_t)snprintf(data + 8, 1 << 10,
                           "{\"__metadata__\":{\"graft.format\":\"delta\",\"graft.version\":\"2\","
                           "\"graft.base\":\"%s\",\"graft.codec\":\"%s\"},%s}",
                           digest, codec, declared);
    for (; len % 8 != 0; len++)
        data[8 + len] = ' ';
    memcpy(data, &len, sizeof(len));
    if (artifact_open_memory(&artifact, data, 8 + len + bytes, "x", &want, &err) == 0)
        artifact_free(artifact);
    free(data);
    return err.kind == ERR_NONE ? NULL : err.message;
}

/* Other programs may lay a file out otherwise, but values must lie where they can be read. */
static void any_order_is_read_where_all_is_aligned(void **state)
{
    const char *refusal = refusal_of(
        "bitdelta",
        "\"a.weight.scale\":{\"dtype\":\"F16\",\"shape\":[3],\"data_offsets\":[0,6]},"
        "\"b.weight.scale\":{\"dtype\":\"F16\",\"shape\":[7],\"data_offsets\":[6,20]},"
        "\"b.weight.sign\":{\"dtype\":\"I32\",\"shape\":[7,2],\"data_offsets\":[20,76]},"
        "\"a.weight.sign\":{\"dtype\":\"I32\",\"shape\":[3,2],\"data_offsets\":[76,100]}",
        100);

    if (refusal != NULL)
        fail_msg("%s", refusal);
    refusal = refusal_of(
        "graft",
        "\"a.weight.planes\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},"
        "\"a_norm.weight.diff\":{\"dtype\":\"F16\",\"shape\":[37],\"data_offsets\":[1,75]}",
        75);
    assert_non_null(refusal);
    assert_non_null(strstr(refusal, "\"a_norm.weight.diff\" is not aligned"));
}

static int read_diverged(void *context, int32_t index, int64_t from, int64_t count, float *base,
                         float *tuned, struct err *err)
{
    read_values(context, index, from, count, base, tuned, err);
    if (index == *(int32_t *)context)
        tuned[count - 1] = NAN;
    return 0;
}

static void leaves_no_file(const char *codec, int32_t index)
{
    struct artifact_source from = source();
    struct delta_fixture report;
    struct err err = {0};

    unlink(path);
    from.read = read_diverged;
    from.context = &index;
    assert_int_equal(delta_fixture_write(&from, codec, 0, NULL, path, &report, &err), -1);
    assert_int_equal(err.kind, ERR_INVALID);
    assert_non_null(strstr(err.message, "diverged"));
    assert_non_null(strstr(err.message, tensors[index].name));
    assert_int_equal(access(path, F_OK), -1);
}

static void a_diverged_training_leaves_no_file(void **state)
{
    char codec[DELTA_FIXTURE_NAME];

    for (int i = 0; delta_fixture_codec(i, codec); i++) {
        leaves_no_file(codec, A);
        leaves_no_file(codec, NORM);
    }
}

static int read_unchanged(void *context, int32_t index, int64_t from, int64_t count, float *base,
                          float *tuned, struct err *err)
{
    for (int64_t i = 0; i < count; i++)
        base[i] = tuned[i] = base_value(index, from + i);
    return 0;
}

static void a_training_that_changed_nothing_gives_an_empty_delta(void **state)
{
    struct artifact_source from = source();
    char codec[DELTA_FIXTURE_NAME];

    from.read = read_unchanged;
    for (int i = 0; delta_fixture_codec(i, codec); i++) {
        struct delta_fixture report;
        struct artifact *artifact;

        assert_int_equal(delta_fixture_write(&from, codec, 0, NULL, path, &report, NULL), 0);
        assert_true(report.relative_error == 0);
        assert_int_equal(artifact_open(&artifact, path, &want, NULL), 0);
        for (int32_t t = 0; t < COUNT; t++)
            assert_null(artifact_parts(artifact, t));
        artifact_free(artifact);
    }
}

static void version_1_is_read(void **state)
{
    struct artifact_source from = source();
    struct artifact *artifact;
    struct delta_fixture report;
    char *data, *at;
    size_t size;

    assert_int_equal(delta_fixture_write(&from, "bitdelta", 0, NULL, path, &report, NULL), 0);
    assert_int_equal(file_read_all(path, 1 << 20, &data, &size, NULL), 0);
    at = memmem(data, size, "\"graft.version\":\"2\"", 19);
    assert_non_null(at);
    at[17] = '1';
    assert_int_equal(artifact_open_memory(&artifact, data, size, "x", &want, NULL), 0);
    assert_non_null(artifact_parts(artifact, B));
    assert_null(artifact_report(artifact));
    artifact_free(artifact);
    free(data);
}

/* A base with the right shapes, for a reader that needs its header. */
static void write_base(void)
{
    static const float zeros[11 * 64];
    struct safetensors_writer *writer;

    assert_int_equal(safetensors_writer_open(&writer, other_path, NULL), 0);
    for (int32_t t = 0; t < COUNT; t++) {
        int64_t shape[2] = {tensors[t].rows, tensors[t].cols};
        int vector = tensors[t].kind == ARTIFACT_VECTOR;

        safetensors_writer_declare(writer, tensors[t].name, DTYPE_F32, 2 - vector, shape + vector,
                                   NULL);
    }
    safetensors_writer_begin(writer, NULL);
    for (int32_t t = 0; t < COUNT; t++)
        safetensors_writer_append(
            writer, zeros, (size_t)(tensors[t].rows * tensors[t].cols) * sizeof(float), NULL);
    assert_int_equal(safetensors_writer_finish(writer, NULL, NULL), 0);
    safetensors_writer_free(writer);
}

/* Runs the reader on the file at `path`: what it prints is what artifact_expand gives. Sums of f32
 * products are rounded on their way, one scale times a sign is not. */
static void compare_with_reader(double tolerance)
{
    struct artifact *artifact;
    char script[128], command[512], name[96];
    long long elements;
    double sum;
    int lines = 0, present = 0;
    FILE *reader;

    assert_int_equal(artifact_open(&artifact, path, &want, NULL), 0);
    snprintf(script, sizeof(script), "%s/reader.py", folder);
    format_reader_write(script);
    snprintf(command, sizeof(command), "python3 %s %s %s", script, path, other_path);
    reader = popen(command, "r");
    assert_non_null(reader);
    while (fscanf(reader, "%95s %lld %lf", name, &elements, &sum) == 3) {
        double ours = 0, size = 0;
        float out[512];
        int32_t t = 0;

        while (t < COUNT && strcmp(tensors[t].name, name) != 0)
            t++;
        assert_true(t < COUNT && artifact_parts(artifact, t) != NULL);
        assert_int_equal(elements, tensors[t].rows * tensors[t].cols);
        assert_int_equal(artifact_expand(artifact, t, out, NULL), 0);
        for (int64_t i = 0; i < elements; i++) {
            ours += (double)(i + 1) * out[i];
            size += (double)(i + 1) * fabs(out[i]);
        }
        if (!(fabs(ours - sum) <= tolerance * size))
            fail_msg("%s: %s is %.9g, the reader says %.9g", artifact_codec(artifact)->name, name,
                     ours, sum);
        lines++;
    }
    assert_int_equal(pclose(reader), 0);
    for (int32_t t = 0; t < COUNT; t++)
        present += artifact_parts(artifact, t) != NULL;
    assert_int_equal(lines, present);
    artifact_free(artifact);
}

static void the_reader_in_the_description_reads_it(void **state)
{
    struct artifact_source from = source();
    char codec[DELTA_FIXTURE_NAME];

    format_reader_need_python();
    write_base();
    for (int i = 0; delta_fixture_codec(i, codec); i++) {
        struct delta_fixture report;
        struct err err = {0};

        if (delta_fixture_write(&from, codec, 0, "{\"codec\": \"\\\"\"}  ", path, &report, &err) !=
            0)
            fail_msg("%s: %s", codec, err.message);
        compare_with_reader(strcmp(codec, "bitdelta") == 0 ? 1e-9 : 1e-6);
    }
}

/* ------------------------------------------------------------------ planes of every width */

/* Random vectors of the given widths as the part of tensor `index`. */
static void random_planes(struct tensor *part, int32_t index, const uint8_t *width, int32_t rank)
{
    int32_t rows = tensors[index].rows, cols = tensors[index].cols, planes = 0;
    uint8_t left_signs[7 * 7], right_signs[7 * 64];
    float left[7], right[7], row[7], col[64], unused;
    int64_t shape[1];

    for (int32_t v = 0; v < rank; v++) {
        planes += width[v];
        left[v] = 0.01f * (float)(v + 1);
        right[v] = 1.0f / (float)(v + 1);
    }
    for (int32_t i = 0; i < rank * rows; i++)
        left_signs[i] = (uint8_t)(i * 167 + 31 * index);
    for (int32_t i = 0; i < rank * cols; i++)
        right_signs[i] = (uint8_t)(i * 59 + i * i);
    for (int32_t i = 0; i < rows; i++)
        row[i] = 0.2f + 0.1f * (float)i;
    for (int32_t i = 0; i < cols; i++)
        col[i] = 3.0f / (float)(i + 1);
    planes_scales(row, rows, &unused);
    planes_scales(col, cols, &unused);
    shape[0] = (int64_t)planes_bytes(rows, cols, rank, planes);
    *part = tensor_view(malloc((size_t)shape[0]), DTYPE_U8, 1, shape);
    assert_non_null(part->data);
    planes_write(&(struct planes){.rows = rows,
                                  .cols = cols,
                                  .rank = rank,
                                  .width = width,
                                  .left = left,
                                  .right = right,
                                  .row = row,
                                  .col = col,
                                  .left_signs = left_signs,
                                  .right_signs = right_signs},
                 part->data);
}

/* Written to `path`. */
static void write_every_width(void)
{
    const bool changed[COUNT] = {[A] = true, [B] = true, [FROZEN] = true};
    struct tensor part[COUNT][CODEC_MAX_PARTS] = {{{0}}};
    struct artifact_source from = source();
    const struct artifact_content content = {
        .source = &from, .codec = codec_find("graft"), .changed = changed, .part = part};
    int64_t bytes;

    random_planes(&part[A][0], A, (const uint8_t[]){8, 2, 4}, 3);
    random_planes(&part[B][0], B, (const uint8_t[]){7, 6, 5, 4, 3, 2, 1}, 7);
    random_planes(&part[FROZEN][0], FROZEN, NULL, 0); /* a matrix that was given no bits */
    assert_int_equal(artifact_write(&content, path, &bytes, NULL, NULL, NULL), 0);
    for (int32_t t = 0; t < COUNT; t++)
        free(part[t][0].data);
}

static void planes_of_every_width_are_read(void **state)
{
    format_reader_need_python();
    write_base();
    write_every_width();
    compare_with_reader(1e-6);
}

/* Signs of some entries. Written to `path`. */
static void write_sparse(void)
{
    static const int32_t index[] = {A, B}, kept[] = {20, 5};
    const bool changed[COUNT] = {[A] = true, [B] = true};
    struct tensor part[COUNT][CODEC_MAX_PARTS] = {{{0}}};
    struct artifact_source from = source();
    const struct codec *codec = codec_find("bitdelta");
    const struct artifact_content content = {
        .source = &from, .codec = codec, .changed = changed, .part = part};
    float delta[7 * 64];
    int64_t bytes;

    for (int i = 0; i < 7 * 64; i++)
        delta[i] = (float)((i * 59 + 7) % 31 - 15) / 40;
    for (int i = 0; i < 2; i++) {
        const struct artifact_tensor *t = &tensors[index[i]];
        const struct codec_matrix m = {.rows = t->rows, .cols = t->cols, .delta = delta};
        const struct codec_plan plan = {.bytes = 2 * t->rows +
                                                 sparse_signs_bytes(t->rows, t->cols, kept[i])};

        assert_int_equal(codec->compress(&m, &plan, part[index[i]], NULL), 0);
        assert_int_equal(part[index[i]][0].dtype, DTYPE_U8);
    }
    assert_int_equal(artifact_write(&content, path, &bytes, NULL, NULL, NULL), 0);
    for (int i = 0; i < 2; i++)
        for (int p = 0; p < 2; p++)
            free(part[index[i]][p].data);
}

static void signs_of_some_entries_are_read(void **state)
{
    format_reader_need_python();
    write_base();
    write_sparse();
    compare_with_reader(1e-9);
}

/* Halves of either kind, as an adapter may have them. Written to `path`. */
static void write_low_rank(void)
{
    enum { RANK = 3 };
    const bool changed[COUNT] = {[A] = true};
    struct tensor part[COUNT][CODEC_MAX_PARTS] = {{{0}}};
    struct artifact_source from = source();
    const struct artifact_content content = {
        .source = &from, .codec = &codec_lora, .changed = changed, .part = part};
    int32_t rows = tensors[A].rows, cols = tensors[A].cols;
    uint16_t down[RANK * 64], up[7 * RANK];
    float scale = 0.3f;
    int64_t bytes;

    assert_true(rows <= 7 && cols <= 64);
    for (int32_t i = 0; i < RANK * cols; i++)
        down[i] = f32_to_bf16((float)((i * 59 + 7) % 31 - 15) / 40);
    for (int32_t i = 0; i < rows * RANK; i++)
        up[i] = f32_to_f16((float)(i - 4) / 7);
    part[A][LORA_SCALE] = tensor_view(&scale, DTYPE_F32, 1, (int64_t[]){1});
    part[A][LORA_DOWN] = tensor_view(down, DTYPE_BF16, 2, (int64_t[]){RANK, cols});
    part[A][LORA_UP] = tensor_view(up, DTYPE_F16, 2, (int64_t[]){rows, RANK});
    assert_int_equal(artifact_write(&content, path, &bytes, NULL, NULL, NULL), 0);
}

static void low_rank_in_halves_is_read(void **state)
{
    format_reader_need_python();
    write_base();
    write_low_rank();
    compare_with_reader(1e-6);
}

/* The table of the description is the one that the program rounds with. */
static void the_table_of_the_description_is_the_programs(void **state)
{
    char *text, *at;
    size_t len;

    assert_int_equal(file_read_all("api-spec/delta-format.md", 1 << 20, &text, &len, NULL), 0);
    at = strstr(text, "| width | c[0]");
    assert_non_null(at);
    for (int width = 1; width <= PLANES_MAX_WIDTH; width++) {
        char start[24];

        snprintf(start, sizeof(start), "\n| %d | ", width);
        at = strstr(at, start);
        assert_non_null(at);
        at += strlen(start);
        for (int k = 0; k < width; k++) {
            float stated = strtof(at, &at);

            assert_true(stated == planes_coefficients(width)[k]);
            at += k + 1 < width ? strlen(", ") : 0;
        }
        assert_memory_equal(at, " |\n", 3);
        at += strlen(" |");
    }
    free(text);
}

static int make_folder(void **state)
{
    if (mkdtemp(folder) == NULL)
        return -1;
    snprintf(path, sizeof(path), "%s/delta.safetensors", folder);
    snprintf(other_path, sizeof(other_path), "%s/other.safetensors", folder);
    return 0;
}

static int remove_folder(void **state)
{
    return file_remove_tree(folder, NULL);
}

/* Whole and, where a codec can be told to, small; and all that planes can be. Small bitdelta is
 * what write_sparse() makes: of matrices of this size it saves less than a header is estimated by.
 */
static void write_corpus(const char *to)
{
    struct artifact_source from = source();
    struct delta_fixture report;
    char codec[DELTA_FIXTURE_NAME];

    for (int i = 0; delta_fixture_codec(i, codec); i++) {
        snprintf(path, sizeof(path), "%s/%s", to, codec);
        assert_int_equal(delta_fixture_write(&from, codec, 0, "{\"a\":1} ", path, &report, NULL),
                         0);
        if (!delta_fixture_sizes(codec) || strcmp(codec, "bitdelta") == 0)
            continue;
        snprintf(path, sizeof(path), "%s/%s_small", to, codec);
        assert_int_equal(
            delta_fixture_write(&from, codec, report.bytes * 9 / 10, NULL, path, &report, NULL), 0);
    }
    snprintf(path, sizeof(path), "%s/planes", to);
    write_every_width();
    snprintf(path, sizeof(path), "%s/sparse", to);
    write_sparse();
    snprintf(path, sizeof(path), "%s/low_rank", to);
    write_low_rank();
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_written_comes_back),
        cmocka_unit_test(the_same_weights_give_the_same_bytes),
        cmocka_unit_test(another_base_or_model_is_refused),
        cmocka_unit_test(damaged_files_are_refused_by_name),
        cmocka_unit_test(flipped_bits_and_cut_files_do_no_harm),
        cmocka_unit_test(values_that_are_not_finite_are_refused),
        cmocka_unit_test(any_order_is_read_where_all_is_aligned),
        cmocka_unit_test(a_diverged_training_leaves_no_file),
        cmocka_unit_test(a_training_that_changed_nothing_gives_an_empty_delta),
        cmocka_unit_test(version_1_is_read),
        cmocka_unit_test(the_reader_in_the_description_reads_it),
        cmocka_unit_test(planes_of_every_width_are_read),
        cmocka_unit_test(low_rank_in_halves_is_read),
        cmocka_unit_test(signs_of_some_entries_are_read),
        cmocka_unit_test(the_table_of_the_description_is_the_programs),
    };

    if (argc > 1) {
        write_corpus(argv[1]);
        return 0;
    }
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
