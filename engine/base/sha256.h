/* sha256.h: SHA-256 (FIPS 180-4) by OpenSSL, streaming and at once. */
#ifndef GRAFT_BASE_SHA256_H
#define GRAFT_BASE_SHA256_H

#include <stddef.h>

#define SHA256_BYTES 32
#define SHA256_HEX 65 /* 64 lower-case hex digits and a NUL */

struct sha256; /* opaque; one thread at a time */

struct sha256 *sha256_new(void); /* NULL when out of memory */
void sha256_update(struct sha256 *h, const void *data, size_t len);
void sha256_final_hex(struct sha256 *h, char hex[SHA256_HEX]); /* h may not be updated after */
void sha256_free(struct sha256 *h);                            /* NULL is fine */

void sha256_hex(const void *data, size_t len, char hex[SHA256_HEX]);
void hex_encode(const unsigned char *bytes, size_t len, char *out); /* 2·len + 1 bytes */

#endif
