#include "engine/codec/groups.h"

#include <math.h>
#include <string.h>

#include "engine/tensor.h"

#define SHRINKS 12 /* ranges that are tried: 1, 0.95, … of all values */

/* ------------------------------------------------------------------ one group */

static struct group grid(double low, double high, int width)
{
    struct group g = {.top = (uint8_t)((1u << width) - 1)};
    double zero;

    g.scale = f16_to_f32(f32_to_f16((float)((high - low) / g.top)));
    if (!(g.scale > 0))
        g.scale = f16_to_f32(1); /* the smallest there is */
    zero = round(-low / (double)g.scale);
    g.zero = (uint8_t)(zero < 0 ? 0 : zero > g.top ? g.top : zero);
    return g;
}

uint8_t group_code(const struct group *g, double x, double *value)
{
    double code = rint(x / (double)g->scale) + g->zero;

    code = code < 0 ? 0 : code > g->top ? g->top : code;
    *value = (code - g->zero) * (double)g->scale;
    return (uint8_t)code;
}

bool group_of(struct group *out, const double *x, int64_t step, int32_t count, int width)
{
    double low = 0, high = 0, least = INFINITY;

    for (int64_t i = 0; i < count; i++) {
        low = fmin(low, x[i * step]);
        high = fmax(high, x[i * step]);
    }
    for (int s = 0; s < SHRINKS; s++) {
        double share = 1 - 0.05 * s, error = 0;
        struct group g = grid(low * share, high * share, width);

        if (!isfinite(g.scale))
            continue;
        for (int64_t i = 0; i < count; i++) {
            double value;

            group_code(&g, x[i * step], &value);
            error += (x[i * step] - value) * (x[i * step] - value);
        }
        if (error < least) {
            least = error;
            *out = g;
        }
    }
    return least < INFINITY;
}

/* ------------------------------------------------------------------ bytes */

int32_t groups_count(int32_t n)
{
    return (n + GROUPS_SIZE - 1) / GROUPS_SIZE;
}

size_t groups_bytes(int32_t n, int width)
{
    size_t groups = (size_t)groups_count(n);

    return 2 * groups + ((groups + (size_t)n) * (size_t)width + 7) / 8;
}

/* Code `at` of a stream; widths are at most 8, so it lies in two bytes at most. */
static void put_code(unsigned char *stream, size_t at, int width, unsigned code)
{
    size_t bit = at * (size_t)width;

    stream[bit / 8] |= (unsigned char)(code << (bit % 8));
    if (bit % 8 + (size_t)width > 8)
        stream[bit / 8 + 1] |= (unsigned char)(code >> (8 - bit % 8));
}

static unsigned get_code(const unsigned char *stream, size_t at, int width)
{
    size_t bit = at * (size_t)width;
    unsigned code = (unsigned)stream[bit / 8] >> (bit % 8);

    if (bit % 8 + (size_t)width > 8)
        code |= (unsigned)stream[bit / 8 + 1] << (8 - bit % 8);
    return code & ((1u << width) - 1);
}

void groups_write(const struct group *group, const uint8_t *code, int32_t n, int width, void *out)
{
    size_t groups = (size_t)groups_count(n);
    unsigned char *stream = (unsigned char *)out + 2 * groups;

    memset(out, 0, groups_bytes(n, width));
    for (size_t g = 0; g < groups; g++) {
        uint16_t half = f32_to_f16(group[g].scale);

        memcpy((char *)out + 2 * g, &half, sizeof half);
        put_code(stream, g, width, group[g].zero);
    }
    for (size_t i = 0; i < (size_t)n; i++)
        put_code(stream, groups + i, width, code[i]);
}

static float scale_at(const void *data, int32_t group)
{
    uint16_t half;

    memcpy(&half, (const char *)data + 2 * group, sizeof half);
    return f16_to_f32(half);
}

void groups_read(const void *data, int32_t n, int width, float *out, int64_t step)
{
    int32_t groups = groups_count(n);
    const unsigned char *stream = (const unsigned char *)data + 2 * groups;

    for (int32_t i = 0; i < n; i++) {
        int32_t g = i / GROUPS_SIZE;
        int zero = (int)get_code(stream, (size_t)g, width);
        int code = (int)get_code(stream, (size_t)groups + (size_t)i, width);

        out[i * step] = (float)(code - zero) * scale_at(data, g);
    }
}

int groups_valid(const void *data, int32_t n)
{
    for (int32_t g = 0; g < groups_count(n); g++) {
        uint16_t half;

        memcpy(&half, (const char *)data + 2 * g, sizeof half);
        if (half >= 0x7c00)
            return 0;
    }
    return 1;
}
