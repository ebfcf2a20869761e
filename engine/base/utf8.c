#include "engine/base/utf8.h"

#include <string.h>

size_t utf8_length(unsigned char lead)
{
    if (lead < 0x80)
        return 1;
    if (lead >= 0xc2 && lead <= 0xdf)
        return 2;
    if (lead >= 0xe0 && lead <= 0xef)
        return 3;
    return lead >= 0xf0 && lead <= 0xf4 ? 4 : 0;
}

bool utf8_may_follow(unsigned char lead, size_t at, unsigned char c)
{
    unsigned char low = 0x80, high = 0xbf;

    if (at == 1) {
        if (lead == 0xe0)
            low = 0xa0;
        else if (lead == 0xed)
            high = 0x9f;
        else if (lead == 0xf0)
            low = 0x90;
        else if (lead == 0xf4)
            high = 0x8f;
    }
    return c >= low && c <= high;
}

/* Bytes of the whole character at s, 0 where there is none. */
static size_t character(const char *s, size_t len)
{
    size_t n = len > 0 ? utf8_length((unsigned char)s[0]) : 0;

    if (n > len)
        return 0;
    for (size_t k = 1; k < n; k++) {
        if (!utf8_may_follow((unsigned char)s[0], k, (unsigned char)s[k]))
            return 0;
    }
    return n;
}

bool utf8_valid(const char *s, size_t len)
{
    for (size_t i = 0; i < len;) {
        size_t n = character(s + i, len - i);

        if (n == 0)
            return false;
        i += n;
    }
    return true;
}

void utf8_scrub(char *s)
{
    size_t len = strlen(s);

    for (size_t i = 0; i < len;) {
        size_t n = character(s + i, len - i);

        if (n == 0) {
            s[i] = '?';
            n = 1;
        }
        i += n;
    }
}
