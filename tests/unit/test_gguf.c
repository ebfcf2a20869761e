/* The reader believes nothing: one vector for each way that GGUF readers were broken. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/gguf.h"
#include "tests/unit/gguf_builder.h"

static struct gguf_builder b;

static int start(void **state)
{
    gguf_builder_init(&b);
    return 0;
}

static int finish(void **state)
{
    gguf_builder_release(&b);
    return 0;
}

/* The builder's file is refused with `expected` in the message; NULL: it is read. */
static void expect(const char *expected)
{
    struct gguf *file = NULL;
    struct err err = {0};
    size_t len = 0;
    unsigned char *bytes = gguf_build(&b, &len);
    int rc = gguf_open_memory(&file, bytes, len, "x", &err);

    gguf_free(rc == 0 ? file : NULL);
    free(bytes);
    gguf_builder_release(&b);
    gguf_builder_init(&b);
    if (expected == NULL) {
        if (rc != 0)
            fail_msg("%s", err.message);
        return;
    }
    assert_int_equal(rc, -1);
    assert_int_equal(err.kind, ERR_INVALID);
    if (strstr(err.message, expected) == NULL)
        fail_msg("\"%s\" is not in: %s", expected, err.message);
}

/* One F32 tensor [4] with its 16 bytes. */
static void add_good_tensor(void)
{
    uint64_t offset = gguf_next_offset(&b);

    gguf_add_tensor(&b, "good", 1, (uint64_t[]){4}, GGUF_F32, offset);
    strbuf_add(&b.data, (float[]){1, 2, 3, 4}, 16);
}

static void one_tensor(uint32_t rank, const uint64_t *dims, uint32_t type, uint64_t offset,
                       const char *expected)
{
    gguf_add_tensor(&b, "t", rank, dims, type, offset);
    strbuf_add(&b.data, (char[64]){0}, 64);
    expect(expected);
}

static void test_a_small_file_is_read(void **state)
{
    struct gguf *file = NULL;
    struct gguf_string s;
    struct gguf_array array;
    const unsigned char *at;
    int64_t number = 0;
    double real = 0;
    size_t len = 0;
    unsigned char *bytes;

    gguf_add_u32(&b, "n", 7);
    gguf_add_f32(&b, "f", 0.5f);
    gguf_add_string(&b, "s", "text");
    gguf_add_key(&b, "i8", GGUF_KIND_I8);
    gguf_put_int(&b.entries, 0xff, 1);
    gguf_add_key(&b, "a", GGUF_KIND_ARRAY);
    gguf_put_int(&b.entries, GGUF_KIND_STRING, 4);
    gguf_put_int(&b.entries, 2, 8);
    gguf_put_string(&b.entries, "x");
    gguf_put_string(&b.entries, "yz");
    add_good_tensor();
    bytes = gguf_build(&b, &len);
    assert_int_equal(gguf_open_memory(&file, bytes, len, "x", NULL), 0);
    assert_int_equal(gguf_count(file), 1);
    assert_int_equal(gguf_at(file, 0)->columns, 4);
    assert_ptr_equal(gguf_find(file, "good"), gguf_at(file, 0));
    assert_null(gguf_find(file, "goo"));
    assert_int_equal(gguf_get_int(file, "n", -1, &number, NULL), 0);
    assert_int_equal(number, 7);
    assert_int_equal(gguf_get_int(file, "i8", 0, &number, NULL), 0);
    assert_int_equal(number, -1);
    assert_int_equal(gguf_get_int(file, "none", -3, &number, NULL), 0);
    assert_int_equal(number, -3);
    assert_int_equal(gguf_get_int(file, "s", 0, &number, NULL), -1);
    assert_int_equal(gguf_get_float(file, "f", 0, &real, NULL), 0);
    assert_true(real == 0.5);
    assert_int_equal(gguf_get_float(file, "n", 0, &real, NULL), -1);
    assert_int_equal(gguf_get_string(file, "s", &s, NULL), 0);
    assert_int_equal(s.len, 4);
    assert_int_equal(gguf_get_string(file, "n", &s, NULL), -1);
    assert_int_equal(gguf_get_array(file, "n", &array, NULL), -1);
    assert_int_equal(gguf_get_array(file, "a", &array, NULL), 0);
    assert_int_equal(array.count, 2);
    at = array.data;
    gguf_next_string(&at);
    s = gguf_next_string(&at);
    assert_memory_equal(s.data, "yz", 2);
    gguf_free(file);
    free(bytes);
}

static void test_every_cut_of_a_file_is_refused(void **state)
{
    struct gguf *file = NULL;
    size_t len = 0;
    unsigned char *bytes;

    gguf_add_u32(&b, "general.alignment", 32);
    gguf_add_string(&b, "s", "text");
    add_good_tensor();
    bytes = gguf_build(&b, &len);
    for (size_t n = 0; n < len; n++) {
        unsigned char *cut = malloc(n + (n == 0));

        memcpy(cut, bytes, n);
        assert_int_equal(gguf_open_memory(&file, cut, n, "x", NULL), -1);
        free(cut);
    }
    assert_int_equal(gguf_open_memory(&file, bytes, len, "x", NULL), 0);
    gguf_free(file);
    free(bytes);
}

static void test_counts_are_not_believed(void **state)
{
    static const uint64_t counts[] = {1, 65537, UINT32_MAX, UINT64_MAX, UINT64_MAX / 2 + 1};

    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        b.entry_count = counts[i]; /* the shape of CVE-2024-23605 */
        expect("metadata keys, more than");
        b.tensor_count = counts[i];
        expect("tensors, more than");
    }
}

static void test_string_and_array_lengths_are_not_believed(void **state)
{
    static const uint64_t lengths[] = {
        5, UINT32_MAX, UINT64_MAX, UINT64_MAX - 7, UINT64_MAX / 8 + 2, (uint64_t)1 << 61};

    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        /* CVE-2024-21802 and its family: a length that wraps when 1 is added. */
        gguf_put_int(&b.entries, lengths[i], 8);
        strbuf_add(&b.entries, "keykeykeykey", lengths[i] == 5 ? 4 : 12);
        b.entry_count = 1;
        expect(lengths[i] == 5 ? "more than" : "declares");
        gguf_add_key(&b, "s", GGUF_KIND_STRING);
        gguf_put_int(&b.entries, lengths[i], 8);
        strbuf_add(&b.entries, "abcd", 4);
        expect("only 4 follow");
        gguf_add_key(&b, "a", GGUF_KIND_ARRAY);
        gguf_put_int(&b.entries, GGUF_KIND_U64, 4);
        gguf_put_int(&b.entries, lengths[i], 8);
        strbuf_add(&b.entries, (char[32]){0}, 32);
        expect("more than the file has bytes for");
        gguf_add_key(&b, "a", GGUF_KIND_ARRAY);
        gguf_put_int(&b.entries, GGUF_KIND_STRING, 4);
        gguf_put_int(&b.entries, lengths[i], 8);
        strbuf_add(&b.entries, (char[32]){0}, 32);
        expect("more than the file has bytes for");
    }
}

static void test_kinds_and_versions_are_checked(void **state)
{
    struct gguf *file = NULL;
    size_t len = 0;
    unsigned char *bytes;

    gguf_add_key(&b, "k", GGUF_KIND_COUNT);
    expect("no sensible name or kind");
    gguf_add_key(&b, "a", GGUF_KIND_ARRAY); /* arrays of arrays would nest without end */
    gguf_put_int(&b.entries, GGUF_KIND_ARRAY, 4);
    gguf_put_int(&b.entries, 1, 8);
    expect("is not supported");
    gguf_add_u32(&b, "twice", 1);
    gguf_add_u32(&b, "twice", 2);
    expect("there twice");

    add_good_tensor();
    bytes = gguf_build(&b, &len);
    for (int version = 0; version < 256; version++) {
        bytes[4] = (unsigned char)version;
        if (version == 2 || version == 3) {
            assert_int_equal(gguf_open_memory(&file, bytes, len, "x", NULL), 0);
            gguf_free(file);
        } else {
            assert_int_equal(gguf_open_memory(&file, bytes, len, "x", NULL), -1);
        }
    }
    bytes[0] = 'g';
    assert_int_equal(gguf_open_memory(&file, bytes, len, "x", NULL), -1);
    free(bytes);
}

static void test_alignment_is_bounded(void **state)
{
    static const uint32_t bad[] = {0, 1, 4, 3, 33, 131072, 0x80000000u, UINT32_MAX};

    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        gguf_add_u32(&b, "general.alignment", bad[i]);
        add_good_tensor();
        expect("power of two");
    }
    gguf_add_string(&b, "general.alignment", "32");
    add_good_tensor();
    expect("must be an integer");
}

static void test_shapes_are_checked(void **state)
{
    static const uint64_t huge = (uint64_t)1 << 40;

    one_tensor(1, (uint64_t[]){16}, GGUF_F32, 0, NULL);
    one_tensor(1, (uint64_t[]){17}, GGUF_F32, 0, "does not fit"); /* CVE-2026-7482's shape */
    one_tensor(0, NULL, GGUF_F32, 0, "0 dimensions");
    one_tensor(5, (uint64_t[]){1, 1, 1, 1, 1}, GGUF_F32, 0, "5 dimensions");
    one_tensor(2, (uint64_t[]){0, 4}, GGUF_F32, 0, "dimension of 0"); /* a division by ne */
    one_tensor(2, (uint64_t[]){4, 0}, GGUF_F32, 0, "dimension of 0");
    one_tensor(1, (uint64_t[]){UINT64_MAX}, GGUF_F32, 0, "dimension of 0, or more");
    /* Products that wrap to little: CVE-2025-53630, CVE-2026-27940, CVE-2026-33298. */
    one_tensor(2, (uint64_t[]){(uint64_t)1 << 32, (uint64_t)1 << 32}, GGUF_F32, 0, "64 bits count");
    one_tensor(4, (uint64_t[]){huge, huge, huge, huge}, GGUF_F32, 0, "64 bits count");
    one_tensor(2, (uint64_t[]){huge, (uint64_t)1 << 22}, GGUF_F32, 0, "does not fit");
    one_tensor(1, (uint64_t[]){32}, GGUF_Q8_0, 0, NULL);
    one_tensor(1, (uint64_t[]){33}, GGUF_Q8_0, 0, "multiple of 32");
    one_tensor(1, (uint64_t[]){16}, GGUF_Q4_1, 0, "multiple of 32");
}

static void test_offsets_are_checked(void **state)
{
    static const uint64_t bad[] = {96, 1024, UINT64_MAX - 31, (uint64_t)1 << 63};

    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        one_tensor(1, (uint64_t[]){8}, GGUF_F32, bad[i], "does not fit");
    one_tensor(1, (uint64_t[]){8}, GGUF_F32, 4, "not aligned");
    gguf_add_tensor(&b, "a", 1, (uint64_t[]){12}, GGUF_F32, 0);
    gguf_add_tensor(&b, "b", 1, (uint64_t[]){4}, GGUF_F32, 32);
    strbuf_add(&b.data, (char[64]){0}, 64);
    expect("overlap");
}

static void test_types_and_names_are_checked(void **state)
{
    char longer[300];

    one_tensor(1, (uint64_t[]){32}, 12, 0, "type Q4_K (12)");
    one_tensor(1, (uint64_t[]){32}, 4, 0, "type Q4_2 (4)");
    one_tensor(1, (uint64_t[]){32}, 99, 0, "type unknown (99)");
    one_tensor(1, (uint64_t[]){32}, UINT32_MAX, 0, "type unknown");
    add_good_tensor();
    add_good_tensor();
    expect("there twice");
    memset(longer, 'n', sizeof longer - 1);
    longer[sizeof longer - 1] = '\0';
    gguf_add_tensor(&b, longer, 1, (uint64_t[]){1}, GGUF_F32, 0);
    strbuf_add(&b.data, (char[4]){0}, 4);
    expect("1 to 256 bytes");
    gguf_add_tensor(&b, "", 1, (uint64_t[]){1}, GGUF_F32, 0);
    strbuf_add(&b.data, (char[4]){0}, 4);
    expect("1 to 256 bytes");
}

static void test_rows_expand_exactly(void **state)
{
    /* d = 0.5, m = -1; then d = 0.25: as IEEE halves. */
    static const unsigned char q4_1[20] = {0x00, 0x38, 0x00, 0xbc, 0x10, 0xf2};
    static const unsigned char q8_0[34] = {0x00, 0x34, 0x01, 0xff, 0x80, 0x7f};
    static const uint16_t half[2] = {0x3c00, 0xc000}, brain[2] = {0x3f80, 0xc000};
    struct gguf *file = NULL;
    float out[32];
    size_t len = 0;
    unsigned char *bytes;

    gguf_add_tensor(&b, "q4", 1, (uint64_t[]){32}, GGUF_Q4_1, gguf_next_offset(&b));
    strbuf_add(&b.data, q4_1, sizeof q4_1);
    gguf_add_tensor(&b, "q8", 1, (uint64_t[]){32}, GGUF_Q8_0, gguf_next_offset(&b));
    strbuf_add(&b.data, q8_0, sizeof q8_0);
    gguf_add_tensor(&b, "f16", 2, (uint64_t[]){1, 2}, GGUF_F16, gguf_next_offset(&b));
    strbuf_add(&b.data, half, sizeof half);
    gguf_add_tensor(&b, "bf16", 1, (uint64_t[]){2}, GGUF_BF16, gguf_next_offset(&b));
    strbuf_add(&b.data, brain, sizeof brain);
    bytes = gguf_build(&b, &len);
    assert_int_equal(gguf_open_memory(&file, bytes, len, "x", NULL), 0);
    gguf_row_to_f32(gguf_find(file, "q4"), 0, out);
    assert_true(out[0] == -1 && out[16] == -0.5f && out[1] == 0 && out[17] == 6.5f);
    assert_true(out[2] == -1 && out[31] == -1);
    gguf_row_to_f32(gguf_find(file, "q8"), 0, out);
    assert_true(out[0] == 0.25f && out[1] == -0.25f && out[2] == -32 && out[3] == 31.75f);
    gguf_row_to_f32(gguf_find(file, "f16"), 1, out);
    assert_true(out[0] == -2);
    gguf_row_to_f32(gguf_find(file, "bf16"), 0, out);
    assert_true(out[0] == 1 && out[1] == -2);
    gguf_free(file);
    free(bytes);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_a_small_file_is_read, start, finish),
        cmocka_unit_test_setup_teardown(test_every_cut_of_a_file_is_refused, start, finish),
        cmocka_unit_test_setup_teardown(test_counts_are_not_believed, start, finish),
        cmocka_unit_test_setup_teardown(test_string_and_array_lengths_are_not_believed, start,
                                        finish),
        cmocka_unit_test_setup_teardown(test_kinds_and_versions_are_checked, start, finish),
        cmocka_unit_test_setup_teardown(test_alignment_is_bounded, start, finish),
        cmocka_unit_test_setup_teardown(test_shapes_are_checked, start, finish),
        cmocka_unit_test_setup_teardown(test_offsets_are_checked, start, finish),
        cmocka_unit_test_setup_teardown(test_types_and_names_are_checked, start, finish),
        cmocka_unit_test_setup_teardown(test_rows_expand_exactly, start, finish),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
