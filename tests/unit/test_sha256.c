/* sha256.h against the vectors of FIPS 180-4's examples. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/base/sha256.h"

static const struct {
    const char *text, *hex;
} vectors[] = {
    {"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
    {"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
    {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
     "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"},
};

static void known_vectors(void **state)
{
    char hex[SHA256_HEX];

    for (size_t i = 0; i < sizeof vectors / sizeof *vectors; i++) {
        sha256_hex(vectors[i].text, strlen(vectors[i].text), hex);
        assert_string_equal(hex, vectors[i].hex);
    }
}

static void pieces_make_the_whole(void **state)
{
    const char *text = vectors[2].text;
    char hex[SHA256_HEX];

    for (size_t cut = 0; cut <= strlen(text); cut++) {
        struct sha256 *h = sha256_new();

        assert_non_null(h);
        sha256_update(h, text, cut);
        sha256_update(h, text + cut, strlen(text) - cut);
        sha256_final_hex(h, hex);
        assert_string_equal(hex, vectors[2].hex);
        sha256_free(h);
    }
    sha256_free(NULL);
}

static void a_million_letters(void **state)
{
    char hex[SHA256_HEX], block[1000];
    struct sha256 *h = sha256_new();

    assert_non_null(h);
    memset(block, 'a', sizeof block);
    for (int i = 0; i < 1000; i++)
        sha256_update(h, block, sizeof block);
    sha256_final_hex(h, hex);
    assert_string_equal(hex, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
    sha256_free(h);
}

static void hex_is_lower_case_and_whole(void **state)
{
    const unsigned char bytes[] = {0x00, 0x0f, 0xf0, 0xff, 0xab};
    char out[11];

    hex_encode(bytes, sizeof bytes, out);
    assert_string_equal(out, "000ff0ffab");
    hex_encode(bytes, 0, out);
    assert_string_equal(out, "");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(known_vectors),
        cmocka_unit_test(pieces_make_the_whole),
        cmocka_unit_test(a_million_letters),
        cmocka_unit_test(hex_is_lower_case_and_whole),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
