#include "engine/pretokenizer_unicode.h"

#include <stdlib.h>
#include <string.h>

enum class {
    CLASS_LU,
    CLASS_LL,
    CLASS_LM,
    CLASS_LO,
    CLASS_MN,
    CLASS_MC,
    CLASS_ND,
    CLASS_NO,
    CLASS_PD,
    CLASS_PO,
    CLASS_SM,
    CLASS_SO,
    CLASS_CF,
    CLASS_ND_17, /* a digit for Digits, unassigned for regexes */
    CLASS_NL_17,
};

/* Of three and of four bytes in UTF-8, all assigned before Unicode 14. */
static const char *const stand_in[][2] = {
    [CLASS_LU] = {"\u1e00", "\U00010400"},    [CLASS_LL] = {"\u1e01", "\U00010428"},
    [CLASS_LM] = {"\u1d2c", "\U00016f93"},    [CLASS_LO] = {"\u4e00", "\U00020000"},
    [CLASS_MN] = {"\u20d0", "\U0001d167"},    [CLASS_MC] = {"\u0903", "\U0001d165"},
    [CLASS_ND] = {"\u0966", "\U000104a0"},    [CLASS_NO] = {"\u2460", "\U0001d360"},
    [CLASS_PD] = {"\u2010", "\U00010ead"},    [CLASS_PO] = {"\u2020", "\U00010100"},
    [CLASS_SM] = {"\u2200", "\U0001d6c1"},    [CLASS_SO] = {"\u2100", "\U0001f000"},
    [CLASS_CF] = {"\u2060", "\U0001d173"},    [CLASS_ND_17] = {"\u0966", "\U000104a0"},
    [CLASS_NL_17] = {"\u2160", "\U00010140"},
};

/* Sorted. Made by asking both sides for the category of every code point: tokenizers 0.23
 * (Oniguruma 6.9.10) against PCRE2 10.42. */
static const struct {
    uint32_t first, last;
    enum class class;
} ranges[] = {
    /* clang-format off */
    {0x00897, 0x00897, CLASS_MN}, {0x00cf3, 0x00cf3, CLASS_MC}, {0x00ece, 0x00ece, CLASS_MN},
    {0x0180e, 0x0180e, CLASS_CF}, {0x01b4e, 0x01b4f, CLASS_PO}, {0x01b7f, 0x01b7f, CLASS_PO},
    {0x01c89, 0x01c89, CLASS_LU}, {0x01c8a, 0x01c8a, CLASS_LL}, {0x02427, 0x02429, CLASS_SO},
    {0x02ffc, 0x02fff, CLASS_SO}, {0x031e4, 0x031e5, CLASS_SO}, {0x031ef, 0x031ef, CLASS_SO},
    {0x0a7cb, 0x0a7cc, CLASS_LU}, {0x0a7cd, 0x0a7cd, CLASS_LL}, {0x0a7da, 0x0a7da, CLASS_LU},
    {0x0a7db, 0x0a7db, CLASS_LL}, {0x0a7dc, 0x0a7dc, CLASS_LU}, {0x105c0, 0x105f3, CLASS_LO},
    {0x10d40, 0x10d49, CLASS_ND}, {0x10d4a, 0x10d4d, CLASS_LO}, {0x10d4e, 0x10d4e, CLASS_LM},
    {0x10d4f, 0x10d4f, CLASS_LO}, {0x10d50, 0x10d65, CLASS_LU}, {0x10d69, 0x10d6d, CLASS_MN},
    {0x10d6e, 0x10d6e, CLASS_PD}, {0x10d6f, 0x10d6f, CLASS_LM}, {0x10d70, 0x10d85, CLASS_LL},
    {0x10d8e, 0x10d8f, CLASS_SM}, {0x10ec2, 0x10ec4, CLASS_LO}, {0x10efc, 0x10eff, CLASS_MN},
    {0x1123f, 0x11240, CLASS_LO}, {0x11241, 0x11241, CLASS_MN}, {0x11380, 0x11389, CLASS_LO},
    {0x1138b, 0x1138b, CLASS_LO}, {0x1138e, 0x1138e, CLASS_LO}, {0x11390, 0x113b5, CLASS_LO},
    {0x113b7, 0x113b7, CLASS_LO}, {0x113b8, 0x113ba, CLASS_MC}, {0x113bb, 0x113c0, CLASS_MN},
    {0x113c2, 0x113c2, CLASS_MC}, {0x113c5, 0x113c5, CLASS_MC}, {0x113c7, 0x113ca, CLASS_MC},
    {0x113cc, 0x113cd, CLASS_MC}, {0x113ce, 0x113ce, CLASS_MN}, {0x113cf, 0x113cf, CLASS_MC},
    {0x113d0, 0x113d0, CLASS_MN}, {0x113d1, 0x113d1, CLASS_LO}, {0x113d2, 0x113d2, CLASS_MN},
    {0x113d3, 0x113d3, CLASS_LO}, {0x113d4, 0x113d5, CLASS_PO}, {0x113d7, 0x113d8, CLASS_PO},
    {0x113e1, 0x113e2, CLASS_MN}, {0x116d0, 0x116e3, CLASS_ND}, {0x1171e, 0x1171e, CLASS_MC},
    {0x11b00, 0x11b09, CLASS_PO}, {0x11bc0, 0x11be0, CLASS_LO}, {0x11be1, 0x11be1, CLASS_PO},
    {0x11bf0, 0x11bf9, CLASS_ND}, {0x11de0, 0x11de9, CLASS_ND_17}, {0x11f00, 0x11f01, CLASS_MN},
    {0x11f02, 0x11f02, CLASS_LO}, {0x11f03, 0x11f03, CLASS_MC}, {0x11f04, 0x11f10, CLASS_LO},
    {0x11f12, 0x11f33, CLASS_LO}, {0x11f34, 0x11f35, CLASS_MC}, {0x11f36, 0x11f3a, CLASS_MN},
    {0x11f3e, 0x11f3f, CLASS_MC}, {0x11f40, 0x11f40, CLASS_MN}, {0x11f41, 0x11f41, CLASS_MC},
    {0x11f42, 0x11f42, CLASS_MN}, {0x11f43, 0x11f4f, CLASS_PO}, {0x11f50, 0x11f59, CLASS_ND},
    {0x11f5a, 0x11f5a, CLASS_MN}, {0x1342f, 0x1342f, CLASS_LO}, {0x13439, 0x1343f, CLASS_CF},
    {0x13440, 0x13440, CLASS_MN}, {0x13441, 0x13446, CLASS_LO}, {0x13447, 0x13455, CLASS_MN},
    {0x13460, 0x143fa, CLASS_LO}, {0x16100, 0x1611d, CLASS_LO}, {0x1611e, 0x16129, CLASS_MN},
    {0x1612a, 0x1612c, CLASS_MC}, {0x1612d, 0x1612f, CLASS_MN}, {0x16130, 0x16139, CLASS_ND},
    {0x16d40, 0x16d42, CLASS_LM}, {0x16d43, 0x16d6a, CLASS_LO}, {0x16d6b, 0x16d6c, CLASS_LM},
    {0x16d6d, 0x16d6f, CLASS_PO}, {0x16d70, 0x16d79, CLASS_ND}, {0x16ff4, 0x16ff6, CLASS_NL_17},
    {0x18cff, 0x18cff, CLASS_LO}, {0x1b132, 0x1b132, CLASS_LO}, {0x1b155, 0x1b155, CLASS_LO},
    {0x1cc00, 0x1ccef, CLASS_SO}, {0x1ccf0, 0x1ccf9, CLASS_ND}, {0x1cd00, 0x1ceb3, CLASS_SO},
    {0x1d2c0, 0x1d2d3, CLASS_NO}, {0x1df25, 0x1df2a, CLASS_LL}, {0x1e030, 0x1e06d, CLASS_LM},
    {0x1e08f, 0x1e08f, CLASS_MN}, {0x1e4d0, 0x1e4ea, CLASS_LO}, {0x1e4eb, 0x1e4eb, CLASS_LM},
    {0x1e4ec, 0x1e4ef, CLASS_MN}, {0x1e4f0, 0x1e4f9, CLASS_ND}, {0x1e5d0, 0x1e5ed, CLASS_LO},
    {0x1e5ee, 0x1e5ef, CLASS_MN}, {0x1e5f0, 0x1e5f0, CLASS_LO}, {0x1e5f1, 0x1e5fa, CLASS_ND},
    {0x1e5ff, 0x1e5ff, CLASS_PO}, {0x1f6dc, 0x1f6dc, CLASS_SO}, {0x1f774, 0x1f776, CLASS_SO},
    {0x1f77b, 0x1f77f, CLASS_SO}, {0x1f7d9, 0x1f7d9, CLASS_SO}, {0x1f8b2, 0x1f8bb, CLASS_SO},
    {0x1f8c0, 0x1f8c1, CLASS_SO}, {0x1fa75, 0x1fa77, CLASS_SO}, {0x1fa87, 0x1fa89, CLASS_SO},
    {0x1fa8f, 0x1fa8f, CLASS_SO}, {0x1faad, 0x1faaf, CLASS_SO}, {0x1fabb, 0x1fabf, CLASS_SO},
    {0x1fac6, 0x1fac6, CLASS_SO}, {0x1face, 0x1facf, CLASS_SO}, {0x1fada, 0x1fadc, CLASS_SO},
    {0x1fadf, 0x1fadf, CLASS_SO}, {0x1fae8, 0x1fae9, CLASS_SO}, {0x1faf7, 0x1faf8, CLASS_SO},
    {0x1fbcb, 0x1fbef, CLASS_SO}, {0x2b739, 0x2b739, CLASS_LO}, {0x2ebf0, 0x2ee5d, CLASS_LO},
    {0x31350, 0x323af, CLASS_LO},
    /* clang-format on */
};

enum { RANGES = sizeof ranges / sizeof *ranges };

/* The range that holds `c`, or -1. */
static int range_of(uint32_t c)
{
    int low = 0, high = RANGES - 1;

    while (low <= high) {
        int middle = (low + high) / 2;

        if (c < ranges[middle].first)
            high = middle - 1;
        else if (c > ranges[middle].last)
            low = middle + 1;
        else
            return middle;
    }
    return -1;
}

/* What to put in place of the character of `bytes` bytes (3 or 4) at `p`; NULL: leave it. */
static const char *replacement(const unsigned char *p, int bytes, enum pretokenizer_unicode version)
{
    uint32_t c = bytes == 3
                     ? (p[0] & 15u) << 12 | (p[1] & 63u) << 6 | (p[2] & 63u)
                     : (p[0] & 7u) << 18 | (p[1] & 63u) << 12 | (p[2] & 63u) << 6 | (p[3] & 63u);
    int i = range_of(c);

    if (i < 0 || (ranges[i].class >= CLASS_ND_17 && version == PRETOKENIZER_UNICODE_REGEX))
        return NULL;
    return stand_in[ranges[i].class][bytes - 3];
}

int pretokenizer_stand_ins(const char *text, size_t len, enum pretokenizer_unicode version,
                           char **out, struct err *err)
{
    const unsigned char *p = (const unsigned char *)text;

    *out = NULL;
    for (size_t i = 0; i < len;) {
        int bytes = p[i] < 0x80 ? 1 : p[i] < 0xe0 ? 2 : p[i] < 0xf0 ? 3 : 4;
        const char *other = bytes >= 3 ? replacement(p + i, bytes, version) : NULL;

        if (other != NULL && *out == NULL) {
            *out = malloc(len);
            if (*out == NULL)
                return err_set(err, ERR_NO_MEMORY, "out of memory");
            memcpy(*out, text, len);
        }
        if (other != NULL)
            memcpy(*out + i, other, (size_t)bytes);
        i += (size_t)bytes;
    }
    return 0;
}
