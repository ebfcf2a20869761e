#include "engine/base/sha256.h"

#include <assert.h>
#include <openssl/evp.h>
#include <stdlib.h>

struct sha256 {
    EVP_MD_CTX *ctx;
};

void hex_encode(const unsigned char *bytes, size_t len, char *out)
{
    static const char digit[] = "0123456789abcdef";

    for (size_t i = 0; i < len; i++) {
        out[2 * i] = digit[bytes[i] >> 4];
        out[2 * i + 1] = digit[bytes[i] & 15];
    }
    out[2 * len] = '\0';
}

struct sha256 *sha256_new(void)
{
    struct sha256 *h = malloc(sizeof *h);

    if (h == NULL)
        return NULL;
    h->ctx = EVP_MD_CTX_new();
    if (h->ctx == NULL || EVP_DigestInit_ex(h->ctx, EVP_sha256(), NULL) != 1) {
        sha256_free(h);
        return NULL;
    }
    return h;
}

void sha256_update(struct sha256 *h, const void *data, size_t len)
{
    int ok = EVP_DigestUpdate(h->ctx, data, len);

    assert(ok == 1);
    (void)ok;
}

void sha256_final_hex(struct sha256 *h, char hex[SHA256_HEX])
{
    unsigned char bytes[SHA256_BYTES];
    unsigned int n = 0;
    int ok = EVP_DigestFinal_ex(h->ctx, bytes, &n);

    assert(ok == 1 && n == SHA256_BYTES);
    (void)ok;
    hex_encode(bytes, SHA256_BYTES, hex);
}

void sha256_free(struct sha256 *h)
{
    if (h == NULL)
        return;
    EVP_MD_CTX_free(h->ctx);
    free(h);
}

void sha256_hex(const void *data, size_t len, char hex[SHA256_HEX])
{
    unsigned char bytes[SHA256_BYTES];
    unsigned int n = 0;
    int ok = EVP_Digest(data, len, bytes, &n, EVP_sha256(), NULL);

    assert(ok == 1 && n == SHA256_BYTES);
    (void)ok;
    hex_encode(bytes, SHA256_BYTES, hex);
}
