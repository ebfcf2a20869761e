/* Reader: every declaration is held against the file. Writer: same calls, same bytes; durable. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/base/file_io.h"
#include "engine/base/json_text.h"
#include "engine/base/sha256.h"
#include "engine/safetensors.h"
#include "tests/unit/tiny_model.h"

static char dir[64];

static int make_dir(void **state)
{
    json_text_setup();
    snprintf(dir, sizeof dir, "/tmp/graft-test-XXXXXX");
    return mkdtemp(dir) == NULL;
}

static int remove_dir(void **state)
{
    return file_remove_tree(dir, NULL);
}

static const char *in_dir(const char *name)
{
    static char path[128];

    snprintf(path, sizeof path, "%s/%s", dir, name);
    return path;
}

/* A file of this header and `data_len` zero bytes, through the reader. */
static int read_header(const char *header, size_t data_len, struct err *err)
{
    size_t n = strlen(header);
    unsigned char *bytes = calloc(1, 8 + n + data_len + 1);
    unsigned char *exact;
    struct safetensors *file = NULL;
    int rc;

    memcpy(bytes, &(uint64_t){n}, 8);
    memcpy(bytes + 8, header, n);
    exact = malloc(8 + n + data_len); /* no spare byte: a read behind it is seen by ASan */
    memcpy(exact, bytes, 8 + n + data_len);
    *err = (struct err){0};
    rc = safetensors_open_memory(&file, exact, 8 + n + data_len, "x", err);
    safetensors_free(file);
    free(exact);
    free(bytes);
    return rc;
}

static void refuses(const char *header, size_t data_len, const char *expected)
{
    struct err err;

    assert_int_equal(read_header(header, data_len, &err), -1);
    assert_int_equal(err.kind, ERR_INVALID);
    if (strstr(err.message, expected) == NULL)
        fail_msg("\"%s\" is not in: %s", expected, err.message);
}

static void test_valid_headers_are_read(void **state)
{
    struct err err;

    assert_int_equal(read_header("{}", 0, &err), 0);
    assert_int_equal(
        read_header("{\"a\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]}}", 24,
                    &err),
        0);
    /* Entries in any order, an empty tensor, a scalar, metadata. */
    assert_int_equal(
        read_header("{\"b\":{\"dtype\":\"U8\",\"shape\":[5],\"data_offsets\":[4,9]},"
                    "\"e\":{\"dtype\":\"F16\",\"shape\":[0,7],\"data_offsets\":[4,4]},"
                    "\"__metadata__\":{\"format\":\"pt\"},"
                    "\"a\":{\"dtype\":\"I32\",\"shape\":[],\"data_offsets\":[0,4]}}   ",
                    9, &err),
        0);
}

static void test_what_the_file_does_not_hold_is_refused(void **state)
{
    /* "Declared larger than the file" first: the shape of CVE-2026-7482. */
    refuses("{\"a\":{\"dtype\":\"F32\",\"shape\":[1000],\"data_offsets\":[0,4000]}}", 4,
            "cut short");
    refuses("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4]}}", 4, "by its shape");
    refuses("{\"a\":{\"dtype\":\"U8\",\"shape\":[4611686018427387904,4],\"data_offsets\":[0,0]}}",
            0, "overflows");
    refuses("{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904],\"data_offsets\":[0,0]}}", 0,
            "overflows");
    refuses("{\"a\":{\"dtype\":\"U8\",\"shape\":[0,4611686018427387904,4],\"data_offsets\":[0,0]}}",
            0, "overflows");
    refuses("{\"a\":{\"dtype\":\"U8\",\"shape\":[-1],\"data_offsets\":[0,0]}}", 0, "0 or more");
    refuses("{\"a\":{\"dtype\":\"U8\",\"shape\":[1.5],\"data_offsets\":[0,1]}}", 1, "integers");
    refuses("{\"a\":{\"dtype\":\"U8\",\"shape\":[1,1,1,1,1],\"data_offsets\":[0,1]}}", 1,
            "at most 4");
    refuses("{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[1,0]}}", 1,
            "declared at bytes");
    refuses("{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[-1,0]}}", 1,
            "declared at bytes");
    refuses("{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0]}}", 1, "two integers");
    refuses("{\"a\":{\"dtype\":\"F64\",\"shape\":[1],\"data_offsets\":[0,8]}}", 8, "\"F64\"");
    refuses("{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1],\"x\":1}}", 1,
            "nothing else");
    refuses("{\"a\":3}", 0, "must have");
    refuses("[]", 0, "object");
    refuses("{\"__metadata__\":{\"a\":1}}", 0, "must be a string");
    refuses("{\"__metadata__\":[]}", 0, "must be an object");
    refuses("{\"\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}", 0, "1 to 256 bytes");
    refuses("{\"a\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]},"
            "\"a\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}",
            0, "duplicate");
}

static void test_gaps_and_overlaps_are_refused(void **state)
{
    refuses("{}", 1, "belong to none");
    refuses("{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}", 3, "belong to none");
    refuses("{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[1,3]}}", 3, "leaves a gap");
    refuses("{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]},"
            "\"b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[1,3]}}",
            3, "overlaps");
    refuses("{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]},"
            "\"b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}",
            2, "overlaps");
}

static void test_lengths_in_front_are_not_believed(void **state)
{
    static const uint64_t lengths[] = {1, 8, 9, UINT64_MAX, UINT64_MAX - 7, (uint64_t)1 << 63};
    unsigned char bytes[16] = {0};
    struct safetensors *file = NULL;
    struct err err;

    for (size_t n = 0; n < 8; n++) {
        err_clear(&err);
        assert_int_equal(safetensors_open_memory(&file, bytes, n, "x", &err), -1);
    }
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        memcpy(bytes, &lengths[i], 8);
        err_clear(&err);
        assert_int_equal(safetensors_open_memory(&file, bytes, sizeof bytes, "x", &err), -1);
        assert_int_equal(err.kind, ERR_INVALID);
    }
    /* A header above the limit, although the file is large enough (sparse). */
    assert_int_equal(
        file_write_durable(in_dir("huge"), &(uint64_t){SAFETENSORS_MAX_HEADER + 1}, 8, NULL), 0);
    assert_int_equal(truncate(in_dir("huge"), SAFETENSORS_MAX_HEADER + 100), 0);
    err_clear(&err);
    assert_int_equal(safetensors_open(&file, in_dir("huge"), &err), -1);
    assert_non_null(strstr(err.message, "at most"));
}

static void test_every_cut_of_a_file_is_refused(void **state)
{
    static const char header[] = "{\"a\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[0,3]}}";
    size_t len = 8 + sizeof header - 1 + 3;
    unsigned char whole[128] = {0};
    struct safetensors *file = NULL;

    memcpy(whole, &(uint64_t){sizeof header - 1}, 8);
    memcpy(whole + 8, header, sizeof header - 1);
    for (size_t n = 0; n < len; n++) {
        unsigned char *cut = malloc(n + 1);

        memcpy(cut, whole, n);
        assert_int_equal(safetensors_open_memory(&file, cut, n, "x", NULL), -1);
        free(cut);
    }
    assert_int_equal(safetensors_open_memory(&file, whole, len, "x", NULL), 0);
    safetensors_free(file);
}

static struct safetensors_writer *start_file(const char *name)
{
    struct safetensors_writer *w = NULL;

    assert_int_equal(safetensors_writer_open(&w, in_dir(name), NULL), 0);
    assert_int_equal(safetensors_writer_metadata(w, "kind", "a \"test\"", NULL), 0);
    assert_int_equal(safetensors_writer_metadata(w, "digest", "0000", NULL), 0);
    assert_int_equal(safetensors_writer_declare(w, "w", DTYPE_F32, 2, (int64_t[]){2, 3}, NULL), 0);
    assert_int_equal(safetensors_writer_declare(w, "b", DTYPE_U8, 1, (int64_t[]){5}, NULL), 0);
    return w;
}

static void finish_file(struct safetensors_writer *w)
{
    float values[6] = {1, 2, 3, 4, 5, 6};
    int64_t bytes = 0;

    assert_int_equal(safetensors_writer_begin(w, NULL), 0);
    assert_int_equal(safetensors_writer_append(w, values, 10, NULL), 0);
    assert_int_equal(safetensors_writer_append(w, (char *)values + 10, 14, NULL), 0);
    assert_int_equal(safetensors_writer_append(w, "hello", 5, NULL), 0);
    assert_int_equal(safetensors_writer_replace_metadata(w, "digest", "abcd", NULL), 0);
    assert_int_equal(safetensors_writer_finish(w, &bytes, NULL), 0);
    safetensors_writer_free(w);
    assert_int_equal(bytes % 64, 29);
}

static int files_in_dir(void)
{
    DIR *d = opendir(dir);
    int n = 0;

    for (struct dirent *e = readdir(d); e != NULL; e = readdir(d))
        n += e->d_name[0] != '.';
    closedir(d);
    return n;
}

static void test_what_is_written_is_read(void **state)
{
    struct safetensors *file = NULL;
    const struct safetensors_tensor *t;
    char first[65], second[65];
    float values[6];

    finish_file(start_file("one"));
    assert_int_equal(safetensors_open(&file, in_dir("one"), NULL), 0);
    assert_int_equal(safetensors_count(file), 2);
    assert_string_equal(safetensors_metadata(file, "kind"), "a \"test\"");
    assert_string_equal(safetensors_metadata(file, "digest"), "abcd");
    assert_null(safetensors_metadata(file, "none"));
    assert_null(safetensors_find(file, "none"));
    assert_int_equal(safetensors_check_aligned(file, NULL), 0);
    t = safetensors_find(file, "w");
    assert_int_equal(t->view.shape[1], 3);
    tensor_to_f32(&t->view, 0, 6, values);
    assert_true(values[0] == 1 && values[5] == 6);
    t = safetensors_find(file, "b");
    assert_memory_equal(t->view.data, "hello", 5);
    assert_ptr_equal(safetensors_at(file, 1), t);
    safetensors_done_with(file, t);
    assert_memory_equal(t->view.data, "hello", 5);
    safetensors_free(file);

    assert_int_equal(file_sha256(in_dir("one"), first, NULL, NULL), 0);
    finish_file(start_file("two"));
    assert_int_equal(file_sha256(in_dir("two"), second, NULL, NULL), 0);
    assert_string_equal(first, second);
}

static void test_an_unfinished_file_leaves_no_trace(void **state)
{
    struct safetensors_writer *w;
    int before = files_in_dir();

    w = start_file("unfinished");
    assert_int_equal(safetensors_writer_begin(w, NULL), 0);
    assert_int_equal(safetensors_writer_append(w, "abc", 3, NULL), 0);
    assert_int_equal(safetensors_writer_finish(w, NULL, NULL), -1); /* bytes are missing */
    assert_int_equal(files_in_dir(), before + 1);
    safetensors_writer_free(w);
    assert_int_equal(files_in_dir(), before);
}

static void test_wrong_use_of_the_writer_is_an_error(void **state)
{
    struct safetensors_writer *w = start_file("wrong");
    int64_t one = 1;

    assert_int_equal(safetensors_writer_metadata(w, "kind", "again", NULL), -1);
    assert_int_equal(safetensors_writer_metadata(w, "bad", "\xff", NULL), -1);
    assert_int_equal(safetensors_writer_declare(w, "w", DTYPE_U8, 1, &one, NULL), -1);
    assert_int_equal(safetensors_writer_declare(w, "f", DTYPE_F32, 1, &one, NULL), -1); /* at 29 */
    assert_int_equal(safetensors_writer_append(w, "x", 1, NULL), -1);
    assert_int_equal(safetensors_writer_begin(w, NULL), 0);
    assert_int_equal(safetensors_writer_declare(w, "late", DTYPE_U8, 1, &one, NULL), -1);
    assert_int_equal(safetensors_writer_append(w, (char[40]){0}, 40, NULL), -1);
    assert_int_equal(safetensors_writer_replace_metadata(w, "digest", "longer", NULL), -1);
    safetensors_writer_free(w);
}

/* ------------------------------------------------------------------ a value in its place */

static char *bytes_of(const char *name, size_t *len)
{
    char *data = NULL;

    assert_int_equal(file_read_all(in_dir(name), 1 << 16, &data, len, NULL), 0);
    return data;
}

static void expect_bytes(const char *name, const char *want, size_t want_len)
{
    size_t len = 0;
    char *data = bytes_of(name, &len);

    assert_int_equal(len, want_len);
    assert_memory_equal(data, want, len);
    free(data);
}

static void patch_refused(const char *name, const char *key, const char *value,
                          const char *expected)
{
    size_t len = 0;
    char *before = bytes_of(name, &len);
    struct err err = {0};

    assert_int_equal(safetensors_patch_metadata(in_dir(name), key, value, &err), -1);
    assert_int_equal(err.kind, ERR_INVALID);
    if (strstr(err.message, in_dir(name)) == NULL || strstr(err.message, expected) == NULL)
        fail_msg("\"%s\" and \"%s\" are not both in: %s", in_dir(name), expected, err.message);
    expect_bytes(name, before, len);
    free(before);
}

static void expect_metadata(const char *name, const char *key, const char *want)
{
    struct safetensors *file = NULL;

    assert_int_equal(safetensors_open(&file, in_dir(name), NULL), 0);
    assert_string_equal(safetensors_metadata(file, key), want);
    safetensors_free(file);
}

static void put_file(const char *name, const char *header, size_t data_len)
{
    size_t n = strlen(header);
    char *bytes = calloc(1, 8 + n + data_len);

    memcpy(bytes, &(uint64_t){n}, 8);
    memcpy(bytes + 8, header, n);
    assert_int_equal(file_write_durable(in_dir(name), bytes, 8 + n + data_len, NULL), 0);
    free(bytes);
}

/* Without blanks in the header a value has the room of the one before: "a \"test\"" takes ten bytes
 * between its quotes, and so may others. */
static void test_metadata_is_patched_in_its_place(void **state)
{
    static const char header[] =
        "{\"__metadata__\":{\"kind\":\"a \\\"test\\\"\",\"digest\":\"abcd\"},"
        "\"w\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[0,3]}}";
    static const char *const fits[] = {"x",
                                       "",
                                       "0123456789",
                                       "12345678",
                                       "\\\\\\\\\\",
                                       "\"\"\"\"\"",
                                       "\xc3\xbc\xe2\x82\xac\xf0\x9f\x98\x80x",
                                       "\n\x01",
                                       "a \"test\""};
    static const char *const too_long[] = {"0123456789a", "\\\\\\\\\\\\", "012345678\"",
                                           "\xc3\xbc\xe2\x82\xac\xf0\x9f\x98\x80xy", "\x01\x01"};
    size_t len = 0, now_len = 0;
    char *whole, *now, room[32];

    snprintf(room, sizeof room, "room for %zu", sizeof header - 1);
    put_file("patched", header, 3);
    whole = bytes_of("patched", &len);
    for (size_t i = 0; i < sizeof fits / sizeof *fits; i++) {
        assert_int_equal(safetensors_patch_metadata(in_dir("patched"), "kind", fits[i], NULL), 0);
        expect_metadata("patched", "kind", fits[i]);
        expect_metadata("patched", "digest", "abcd");
        now = bytes_of("patched", &now_len);
        assert_int_equal(now_len, len);
        assert_memory_equal(now + len - 3, whole + len - 3, 3);
        free(now);
        for (size_t k = 0; k < sizeof too_long / sizeof *too_long; k++)
            patch_refused("patched", "kind", too_long[k], room);
    }
    expect_bytes("patched", whole, len); /* the last value is the first one again */
    free(whole);
    patch_refused("patched", "none", "x", "\"none\"");
    patch_refused("patched", "w", "x", "\"w\""); /* a tensor */
    patch_refused("patched", "dtype", "x", "\"dtype\"");
    patch_refused("patched", "kind", "\xff", "UTF-8");
}

/* As the writer makes them; the tensors' bytes stay, and what the writer says of them. */
static void test_a_written_file_is_patched(void **state)
{
    size_t len = 0, now_len = 0;
    char *whole, *now;

    finish_file(start_file("patched"));
    whole = bytes_of("patched", &len);
    assert_int_equal(safetensors_patch_metadata(in_dir("patched"), "kind", "new", NULL), 0);
    expect_metadata("patched", "kind", "new");
    expect_metadata("patched", "digest", "abcd");
    now = bytes_of("patched", &now_len);
    assert_int_equal(now_len, len);
    assert_memory_equal(now + len - 29, whole + len - 29, 29);
    free(now);
    assert_int_equal(safetensors_patch_metadata(in_dir("patched"), "kind", "a \"test\"", NULL), 0);
    expect_bytes("patched", whole, len);
    free(whole);
}

/* Other writers put metadata last, blanks anywhere, escapes into keys, and braces into values. */
static void test_metadata_is_found_however_it_is_spelt(void **state)
{
    static const char before[] =
        "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},\"kind\":{\"dtype\":\"U8\","
        "\"shape\":[0],\"data_offsets\":[1,1]} ,\n\"__metad\\u0061ta__\" : { \"x\" :\"}kind\\\\\","
        "\"y\":\"\\\"kind\\\":\\\"no\\\"\", \"k\\u0069nd\" :\n\t\"old\"\t \n} } ";
    struct safetensors *file = NULL;

    put_file("spelt", before, 1);
    assert_int_equal(safetensors_patch_metadata(in_dir("spelt"), "kind", "n{\"", NULL), 0);
    expect_metadata("spelt", "kind", "n{\"");
    expect_metadata("spelt", "x", "}kind\\");
    expect_metadata("spelt", "y", "\"kind\":\"no\"");
    assert_int_equal(safetensors_open(&file, in_dir("spelt"), NULL), 0);
    assert_int_equal(safetensors_count(file), 2);
    assert_int_equal(safetensors_find(file, "a")->bytes, 1);
    assert_int_equal(safetensors_find(file, "kind")->bytes, 0);
    safetensors_free(file);
}

static void test_only_a_sound_file_is_patched(void **state)
{
    static const char header[] = "{\"__metadata__\":{\"kind\":\"old\"},"
                                 "\"a\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[0,3]}}";
    size_t len = 0;
    struct err err = {0};
    char *whole;

    put_file("sound", header, 3);
    whole = bytes_of("sound", &len);
    for (size_t n = 0; n < len; n++) {
        assert_int_equal(file_write_durable(in_dir("cut"), whole, n, NULL), 0);
        patch_refused("cut", "kind", "new", "");
    }
    free(whole);
    put_file("cut", "{}", 0);
    patch_refused("cut", "kind", "new", "\"kind\"");
    put_file("cut", "{\"__metadata__\":{\"kind\":3}}", 0);
    patch_refused("cut", "kind", "3", "must be a string");
    assert_int_equal(safetensors_patch_metadata(in_dir("absent"), "kind", "new", &err), -1);
    assert_non_null(strstr(err.message, in_dir("absent")));
    assert_int_equal(access(in_dir("absent"), F_OK), -1);
    assert_int_equal(safetensors_patch_metadata(in_dir("sound"), "kind", "new", NULL), 0);
    expect_metadata("sound", "kind", "new");
}

/* ------------------------------------------------------------------ models of tests */

static void test_tiny_models_are_what_their_header_says(void **state)
{
    struct tiny_model model = {.seed = 7};
    struct safetensors *file = NULL;
    const struct safetensors_tensor *t;
    char path[192];
    struct err err = {0};

    snprintf(path, sizeof path, "%s/tiny", dir);
    if (tiny_model_write(path, &model, &err) != 0)
        fail_msg("%s", err.message);
    snprintf(path, sizeof path, "%s/tiny/model.safetensors", dir);
    assert_int_equal(safetensors_open(&file, path, NULL), 0);
    assert_int_equal(safetensors_count(file), 2 + 2 * 9);
    t = safetensors_find(file, "model.layers.1.mlp.down_proj.weight");
    assert_int_equal(t->view.shape[0], 64);
    assert_int_equal(t->view.shape[1], 128);
    /* Two values worked out by hand with the Python form of the formula. */
    assert_true(((float *)t->view.data)[0] == 0x1.348bp-3f);
    assert_true(tiny_model_value("model.norm.weight", 3, 64, 7) == 0x1.01ff7cp+0f);
    safetensors_free(file);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_valid_headers_are_read),
        cmocka_unit_test(test_what_the_file_does_not_hold_is_refused),
        cmocka_unit_test(test_gaps_and_overlaps_are_refused),
        cmocka_unit_test(test_lengths_in_front_are_not_believed),
        cmocka_unit_test(test_every_cut_of_a_file_is_refused),
        cmocka_unit_test(test_what_is_written_is_read),
        cmocka_unit_test(test_an_unfinished_file_leaves_no_trace),
        cmocka_unit_test(test_wrong_use_of_the_writer_is_an_error),
        cmocka_unit_test(test_metadata_is_patched_in_its_place),
        cmocka_unit_test(test_a_written_file_is_patched),
        cmocka_unit_test(test_metadata_is_found_however_it_is_spelt),
        cmocka_unit_test(test_only_a_sound_file_is_patched),
        cmocka_unit_test(test_tiny_models_are_what_their_header_says),
    };

    return cmocka_run_group_tests(tests, make_dir, remove_dir);
}
