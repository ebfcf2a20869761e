#include "engine/codec/sparse_signs.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

#define HEADER 12 /* u32 kept, u64 seed */

struct header {
    uint32_t kept;
    uint64_t seed;
};

static struct header header_of(const void *data)
{
    struct header h;

    memcpy(&h.kept, data, 4);
    memcpy(&h.seed, (const char *)data + 4, 8);
    return h;
}

/* Bits of a row. */
static int64_t row_bits(int32_t cols, int32_t kept)
{
    int32_t rest = cols % 32;

    return (int64_t)(cols / 32) * kept + (rest < kept ? rest : kept);
}

int64_t sparse_signs_bytes(int32_t rows, int32_t cols, int32_t kept)
{
    return HEADER + (rows * row_bits(cols, kept) + 7) / 8;
}

/* 32 random bits of entry i. */
static uint32_t draw(uint64_t seed, uint64_t i)
{
    uint64_t z = (seed + i) * 0x9e3779b97f4a7c15u;

    return (uint32_t)((z ^ z >> 32) * 0xd6e8feb86659fd93u >> 32);
}

/* Is column c kept, where `left` of its group's are yet to be? Each that is to come is as likely to
 * be one of them (selection sampling, Knuth, The Art of Computer Programming 2, 3.4.2). */
static bool is_kept(const struct header *h, int32_t cols, int32_t row, int32_t c, uint32_t left)
{
    uint64_t to_come = (uint64_t)(32 - c % 32 < cols - c ? 32 - c % 32 : cols - c);

    return draw(h->seed, (uint64_t)row * (uint64_t)cols + (uint64_t)c) * to_come >> 32 < left;
}

/* Another mask for each matrix, the same for the same one. */
static uint64_t seed_of(const float *delta, int64_t count)
{
    uint64_t hash = 0xcbf29ce484222325u;

    for (int64_t i = 0; i < count && i < 256; i++) {
        uint32_t bits;

        memcpy(&bits, &delta[i], sizeof bits);
        hash = (hash ^ bits) * 0x100000001b3u;
    }
    return hash;
}

void sparse_signs_write(const float *delta, int32_t rows, int32_t cols, int32_t kept, void *out,
                        double *mean)
{
    struct header h = {(uint32_t)kept, seed_of(delta, (int64_t)rows * cols)};
    unsigned char *bit = (unsigned char *)out + HEADER;
    int64_t at = 0;

    memset(out, 0, (size_t)sparse_signs_bytes(rows, cols, kept));
    memcpy(out, &h.kept, 4);
    memcpy((char *)out + 4, &h.seed, 8);
    for (int32_t r = 0; r < rows; r++) {
        const float *row = delta + (int64_t)r * cols;
        uint32_t left = 0;

        mean[r] = 0;
        for (int32_t c = 0; c < cols; c++) {
            left = c % 32 ? left : h.kept;
            if (!is_kept(&h, cols, r, c, left))
                continue;
            left--;
            mean[r] += fabs((double)row[c]);
            bit[at / 8] |= (unsigned char)((row[c] >= 0) << at % 8);
            at++;
        }
        mean[r] /= (double)row_bits(cols, kept);
    }
}

int sparse_signs_accept(const void *data, int64_t bytes, int32_t rows, int32_t cols,
                        struct err *err)
{
    struct header h;

    if (bytes < HEADER)
        return err_set(err, ERR_INVALID, "\"sign\" is shorter than its header");
    h = header_of(data);
    if (h.kept < 1 || h.kept > SPARSE_SIGNS_MOST)
        return err_set(err, ERR_INVALID, "\"sign\" keeps %u of 32 columns: it must be 1 to %d",
                       h.kept, SPARSE_SIGNS_MOST);
    if (bytes != sparse_signs_bytes(rows, cols, (int32_t)h.kept))
        return err_set(err, ERR_INVALID, "\"sign\" has %lld bytes, not %lld", (long long)bytes,
                       (long long)sparse_signs_bytes(rows, cols, (int32_t)h.kept));
    return 0;
}

void sparse_signs_row(const void *data, int32_t cols, int32_t row, int8_t *sign)
{
    struct header h = header_of(data);
    const unsigned char *bit = (const unsigned char *)data + HEADER;
    int64_t at = row * row_bits(cols, (int32_t)h.kept);
    uint32_t left = 0;

    for (int32_t c = 0; c < cols; c++) {
        left = c % 32 ? left : h.kept;
        sign[c] = 0;
        if (!is_kept(&h, cols, row, c, left))
            continue;
        left--;
        sign[c] = bit[at / 8] >> at % 8 & 1 ? 1 : -1;
        at++;
    }
}
