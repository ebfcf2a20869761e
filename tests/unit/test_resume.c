/* What an interrupted compression goes on from: it comes back whole, for the same compression
 * alone, and whatever bit of it is another, it is as none. */
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "engine/base/file_io.h"
#include "engine/codec/resume.h"
#include "tests/unit/check.h"

static const struct artifact_tensor tensors[] = {
    {"norm.weight", ARTIFACT_VECTOR, 1, 24},
    {"q.weight", ARTIFACT_MATRIX, 24, 32},
    {"same.weight", ARTIFACT_MATRIX, 24, 32},
    {"down.weight", ARTIFACT_MATRIX, 32, 24},
};
enum { COUNT = sizeof(tensors) / sizeof(tensors[0]), SAME = 2, LENGTH = 7 };

static char folder[] = "/tmp/graft-resume-XXXXXX";
static char out_path[128];
static const struct backend_ops cpu = {.name = "cpu"}, cuda = {.name = "cuda"};
static const struct backend here = {.ops = &cpu, .activation = DTYPE_F32};
static struct thread_pool *pool;

static int read_values(void *context, int32_t index, int64_t from, int64_t count, float *base,
                       float *tuned, struct err *err)
{
    for (int64_t i = 0; i < count; i++) {
        base[i] = 0.5f;
        tuned[i] = base[i] + (index == SAME ? 0 : 0.01f * (float)((from + i) * 7919 % 13 - 6));
    }
    return 0;
}

static const struct artifact_source source = {
    .tensor = tensors,
    .count = COUNT,
    .base_digest = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
    .read = read_values};

/* The last weight of all is another. */
static int read_other_values(void *context, int32_t index, int64_t from, int64_t count, float *base,
                             float *tuned, struct err *err)
{
    int64_t last = (int64_t)tensors[COUNT - 1].rows * tensors[COUNT - 1].cols - 1;

    read_values(context, index, from, count, base, tuned, err);
    if (index == COUNT - 1 && from <= last && last < from + count)
        tuned[last - from] += 0.01f;
    return 0;
}

static struct dataset_example one_example(const void *context, int64_t index)
{
    static const int32_t token[] = {1, 2, 3};
    static const float weight[] = {0, 1, 1};

    return (struct dataset_example){.token = token, .weight = weight, .length = 3};
}

static struct dataset_example other_token(const void *context, int64_t index)
{
    static const int32_t token[] = {1, 2, 4};
    struct dataset_example e = one_example(context, index);

    e.token = token;
    return e;
}

static struct dataset_example other_weight(const void *context, int64_t index)
{
    static const float weight[] = {0, 0, 1};
    struct dataset_example e = one_example(context, index);

    e.weight = weight;
    return e;
}

static const struct trainer_source rows = {.example = one_example, .count = 1};

static struct resume_key usual_key(void)
{
    return (struct resume_key){.source = &source,
                               .codec = codec_find("graft"),
                               .backend = &here,
                               .bytes = 4000,
                               .seed = 3,
                               .steps = 60,
                               .calibration = &rows};
}

static struct resume open_resume(struct resume_key key)
{
    struct resume resume;

    CHECK(resume_open(&resume, out_path, &key, &err));
    return resume;
}

static struct compression *open_compression(void)
{
    const struct compression_options options = {.codec = codec_find("graft"), .pool = pool};
    struct compression *c;

    CHECK(compression_open(&c, &source, &options, &err));
    return c;
}

/* ------------------------------------------------------------------ vectors */

static float held[2][LENGTH];
static float *const vector[] = {held[0], held[1]};
static const int32_t length[] = {LENGTH, LENGTH - 2};
static const struct resume_vectors vectors = {(float **)(uintptr_t)vector, length, 2};

static void fill_vectors(float first)
{
    for (int v = 0; v < 2; v++)
        for (int i = 0; i < LENGTH; i++)
            held[v][i] = first + (float)(10 * v + i);
}

/* The step that such a key finds; then the vectors are those of the file, else as they were. */
static int32_t vectors_found(struct resume_key key)
{
    struct resume resume = open_resume(key);
    int32_t step;

    fill_vectors(100);
    step = resume_load_vectors(&resume, &vectors);
    for (int v = 0; v < 2; v++)
        for (int i = 0; i < length[v]; i++)
            assert_true(held[v][i] == (step ? 1 : 100) + (float)(10 * v + i));
    resume_close(&resume);
    return step;
}

/* ------------------------------------------------------------------ parts */

static const struct resume_facts facts = {.predicted_kl = 0.1,
                                          .calibration_tokens = 17,
                                          .predicted = {.count = 2, .bytes = {9, 4}, .kl = {1, 2}}};

static bool same_parts(const struct compression *a, const struct compression *b)
{
    for (int32_t i = 0; i < COUNT; i++) {
        const struct tensor *of[] = {compression_parts(a, i), compression_parts(b, i)};

        if (!of[0] != !of[1] ||
            (of[0] && memcmp(of[0]->data, of[1]->data, (size_t)compression_part_bytes(a, i)) != 0))
            return false;
    }
    return true;
}

/* Does such a key find parts? Then they are those that were `made`. */
static bool parts_found(struct resume_key key, const struct compression *made)
{
    struct resume resume = open_resume(key);
    struct compression *c = open_compression();
    struct resume_facts known;
    bool found;

    CHECK(resume_load_parts(&resume, &source, c, &known, &found, &err));
    if (found) {
        assert_true(same_parts(c, made));
        assert_true(known.predicted_kl == facts.predicted_kl);
        assert_int_equal(known.calibration_tokens, facts.calibration_tokens);
        assert_int_equal(known.predicted.count, 2);
        assert_true(known.predicted.bytes[1] == 4 && known.predicted.kl[1] == 2);
    }
    compression_free(c);
    resume_close(&resume);
    return found;
}

/* What was made and kept, by the usual key. */
static struct compression *keep_all(void)
{
    struct resume resume = open_resume(usual_key());
    struct compression *c = open_compression();
    double cost;

    CHECK(compression_decompose(c, NULL, NULL, &err));
    CHECK(compression_run(c, usual_key().bytes, 0, &cost, &err));
    CHECK(resume_save_parts(&resume, c, &facts, &err));
    fill_vectors(1);
    CHECK(resume_save_vectors(&resume, &vectors, 30, &err));
    resume_close(&resume);
    return c;
}

/* ------------------------------------------------------------------ */

static void it_comes_back(void **state)
{
    struct compression *made = keep_all();
    struct resume resume;

    assert_true(parts_found(usual_key(), made));
    assert_int_equal(vectors_found(usual_key()), 30);
    resume = open_resume(usual_key());
    resume_remove(&resume);
    resume_close(&resume);
    assert_false(parts_found(usual_key(), made));
    assert_int_equal(vectors_found(usual_key()), 0);
    compression_free(made);
}

/* Of other weights, rows or options; and begun on one kind of device, in one precision, it would
 * end with the bits of neither. */
static void another_compression_begins_anew(void **state)
{
    const struct backend bf16 = {.ops = &cpu, .activation = DTYPE_BF16};
    const struct backend device = {.ops = &cuda, .activation = DTYPE_F32};
    enum { KEYS = 10 };
    const struct trainer_source more = {.example = one_example, .count = 2},
                                token = {.example = other_token, .count = 1},
                                weight = {.example = other_weight, .count = 1};
    struct artifact_source tuned = source;
    struct compression *made = keep_all();
    struct resume_key key[KEYS];

    tuned.read = read_other_values;
    for (int i = 0; i < KEYS; i++)
        key[i] = usual_key();
    key[0].backend = &bf16;
    key[1].backend = &device;
    key[2].codec = codec_find("bitdelta");
    key[3].bytes++;
    key[4].seed++;
    key[5].steps++;
    key[6].source = &tuned;
    key[7].calibration = &more;
    key[8].calibration = &token;
    key[9].calibration = &weight;
    for (int i = 0; i < KEYS; i++) {
        assert_false(parts_found(key[i], made));
        assert_int_equal(vectors_found(key[i]), 0);
    }
    assert_true(parts_found(usual_key(), made));
    compression_free(made);
}

/* Each byte of a file with a bit that is another: what is found is none, or what was kept (a blank,
 * the part of a tensor that nothing is taken from). How many are none. */
static int flip_all(const char *ending, const struct compression *made)
{
    char path[160], *data;
    size_t len;
    int none = 0, fd;

    snprintf(path, sizeof path, "%s.%s", out_path, ending);
    CHECK(file_read_all(path, 1 << 20, &data, &len, &err));
    fd = open(path, O_WRONLY);
    for (size_t i = 0; i < len; i++) {
        char flipped = (char)(data[i] ^ 1 << i % 8);

        assert_int_equal(pwrite(fd, &flipped, 1, (off_t)i), 1);
        none += made ? !parts_found(usual_key(), made) : vectors_found(usual_key()) == 0;
        assert_int_equal(pwrite(fd, &data[i], 1, (off_t)i), 1);
    }
    close(fd);
    free(data);
    return none;
}

static void a_flipped_bit_is_as_none(void **state)
{
    struct compression *made = keep_all();
    int64_t bytes = 0;

    for (int32_t i = 0; i < COUNT; i++)
        bytes += compression_part_bytes(made, i);
    assert_true(flip_all("undistilled", made) >= bytes);
    assert_true(flip_all("scales", NULL) >= (length[0] + length[1]) * (int)sizeof(float));
    assert_true(parts_found(usual_key(), made));
    assert_int_equal(vectors_found(usual_key()), 30);
    compression_free(made);
}

static int setup(void **state)
{
    if (mkdtemp(folder) == NULL)
        return -1;
    snprintf(out_path, sizeof out_path, "%s/out.delta", folder);
    return thread_pool_open(&pool, 1, NULL);
}

static int teardown(void **state)
{
    thread_pool_free(pool);
    return file_remove_tree(folder, NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(it_comes_back),
        cmocka_unit_test(another_compression_begins_anew),
        cmocka_unit_test(a_flipped_bit_is_as_none),
    };

    return cmocka_run_group_tests(tests, setup, teardown);
}
