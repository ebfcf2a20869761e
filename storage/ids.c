#include "storage/ids.h"

#include <openssl/rand.h>
#include <stdio.h>
#include <string.h>

#define ID_RANDOM_CHARACTERS 24

static const char base62[] = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

int id_random(size_t count, char *out, struct err *err)
{
    unsigned char bytes[64];
    size_t have = 0, used = 0;

    for (size_t i = 0; i < count;) {
        if (used == have) {
            if (RAND_bytes(bytes, sizeof bytes) != 1)
                return err_set(err, ERR_INTERNAL, "the random generator failed");
            have = sizeof bytes;
            used = 0;
        }
        /* Of the 256 values of a byte, 248 = 4 · 62 map evenly; the rest are thrown away. */
        if (bytes[used] < 248)
            out[i++] = base62[bytes[used] % 62];
        used++;
    }
    out[count] = '\0';
    return 0;
}

int id_new(const char *prefix, char out[ID_SIZE], struct err *err)
{
    char random[ID_RANDOM_CHARACTERS + 1];

    if (id_random(ID_RANDOM_CHARACTERS, random, err) != 0)
        return -1;
    snprintf(out, ID_SIZE, "%s%s", prefix, random);
    return 0;
}

bool id_has_shape(const char *prefix, const char *text)
{
    size_t n = strlen(prefix);

    return strncmp(text, prefix, n) == 0 && strlen(text + n) == ID_RANDOM_CHARACTERS &&
           strspn(text + n, base62) == ID_RANDOM_CHARACTERS;
}
