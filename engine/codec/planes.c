#include "engine/codec/planes.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/tensor.h"

/* Found by minimising the expected squared error of a unit Gaussian over all c_k. */
static const float coefficients[PLANES_MAX_WIDTH][PLANES_MAX_WIDTH] = {
    {0.79788f},
    {0.98161f, 0.52882f},
    {1.15787f, 0.60698f, 0.30104f},
    {1.33062f, 0.68567f, 0.33887f, 0.16956f},
    {1.49877f, 0.76389f, 0.37752f, 0.18879f, 0.09442f},
    {1.60712f, 0.87209f, 0.43249f, 0.21636f, 0.11147f, 0.05371f},
    {1.70695f, 0.98383f, 0.48945f, 0.24916f, 0.12188f, 0.06093f, 0.03047f},
    {1.66351f, 1.16962f, 0.57787f, 0.29762f, 0.14875f, 0.07452f, 0.03697f, 0.01856f},
};

static const double losses[PLANES_MAX_WIDTH + 1] = {
    1, 0.36338, 0.11748, 0.036943, 0.011411, 0.003464, 0.0010303, 0.00029451, 0.000078034};

const float *planes_coefficients(int width)
{
    assert(width >= 1 && width <= PLANES_MAX_WIDTH);
    return coefficients[width - 1];
}

double planes_loss(int width)
{
    assert(width >= 0 && width <= PLANES_MAX_WIDTH);
    return losses[width];
}

/* Sign by sign, the largest first, is nearest where each c_k is at least the sum of those behind
 * it; where it is not (width 8), or by rounding, its neighbours are tried too. */
unsigned planes_nearest(int width, float x, float *value)
{
    const float *c = planes_coefficients(width);
    unsigned best = 0;
    float best_value = INFINITY;

    for (int first = 0; first < 2; first++) {
        float sum = first ? c[0] : -c[0];
        unsigned signs = (unsigned)first;

        for (int k = 1; k < width; k++) {
            bool plus = x >= sum;

            sum += plus ? c[k] : -c[k];
            signs |= (unsigned)plus << k;
        }
        if (fabsf(x - sum) < fabsf(x - best_value)) {
            best = signs;
            best_value = sum;
        }
    }
    *value = best_value;
    return best;
}

/* ------------------------------------------------------------------ layout */

static size_t words_of(int32_t n)
{
    return ((size_t)n + 31) / 32;
}

struct layout {
    size_t width, left, right, row, col, signs, end;
};

static struct layout layout_of(int32_t rows, int32_t cols, int32_t rank, int32_t planes)
{
    struct layout l;

    l.width = 12;
    l.left = l.width + (size_t)rank;
    l.right = l.left + 2 * (size_t)rank;
    l.row = l.right + 2 * (size_t)rank;
    l.col = l.row + (size_t)rows;
    l.signs = (l.col + (size_t)cols + 3) / 4 * 4;
    l.end = l.signs + 4 * (size_t)planes * (words_of(rows) + words_of(cols));
    return l;
}

size_t planes_bytes(int32_t rows, int32_t cols, int32_t rank, int32_t planes)
{
    return layout_of(rows, cols, rank, planes).end;
}

static void put_u32(char *to, uint32_t value)
{
    memcpy(to, &value, sizeof value);
}

static uint32_t get_u32(const char *from)
{
    uint32_t value;

    memcpy(&value, from, sizeof value);
    return value;
}

static void put_f16(char *to, float value)
{
    uint16_t half = f32_to_f16(value);

    memcpy(to, &half, sizeof half);
}

static float get_f16(const char *from)
{
    uint16_t half;

    memcpy(&half, from, sizeof half);
    return f16_to_f32(half);
}

/* ------------------------------------------------------------------ scales */

#define SCALE_STEPS 16 /* of a row or column scale, in a power of 2 */

static float scale_of(float top, unsigned code)
{
    return top * exp2f(-(float)code / SCALE_STEPS);
}

static unsigned code_of(float top, float scale)
{
    float code = scale > 0 ? roundf(-SCALE_STEPS * log2f(scale / top)) : 255;

    return code < 0 ? 0 : code > 255 ? 255 : (unsigned)code;
}

void planes_scales(float *scale, int32_t count, float *top)
{
    *top = 0;
    for (int32_t i = 0; i < count; i++)
        *top = scale[i] > *top ? scale[i] : *top;
    *top = f16_to_f32(f32_to_f16(*top));
    if (!(*top > 0))
        *top = 1;
    for (int32_t i = 0; i < count; i++)
        scale[i] = scale_of(*top, code_of(*top, scale[i]));
}

/* ------------------------------------------------------------------ writing */

static void write_scales(const float *scale, int32_t count, char *top_at, char *codes)
{
    float top = 0;

    for (int32_t i = 0; i < count; i++)
        top = scale[i] > top ? scale[i] : top;
    /* The largest stored scale may be a step below the top: any top of the same grid will do. */
    top = f16_to_f32(f32_to_f16(top));
    put_f16(top_at, top);
    for (int32_t i = 0; i < count; i++)
        codes[i] = (char)code_of(top, scale[i]);
}

static void write_signs(const uint8_t *signs, int32_t count, int k, char *to)
{
    for (size_t w = 0; w < words_of(count); w++) {
        uint32_t word = 0;

        for (int32_t i = (int32_t)w * 32; i < count && i < (int32_t)w * 32 + 32; i++)
            word |= (uint32_t)(signs[i] >> k & 1) << (i % 32);
        put_u32(to + 4 * w, word);
    }
}

void planes_write(const struct planes *p, void *out)
{
    int32_t planes = 0;
    char *data = out;

    for (int32_t v = 0; v < p->rank; v++)
        planes += p->width[v];
    struct layout l = layout_of(p->rows, p->cols, p->rank, planes);
    memset(data, 0, l.signs);
    put_u32(data, (uint32_t)p->rank);
    put_u32(data + 4, (uint32_t)planes);
    write_scales(p->row, p->rows, data + 8, data + l.row);
    write_scales(p->col, p->cols, data + 10, data + l.col);
    data += l.signs;
    for (int32_t v = 0; v < p->rank; v++) {
        ((char *)out)[l.width + (size_t)v] = (char)p->width[v];
        put_f16((char *)out + l.left + 2 * (size_t)v, p->left[v]);
        put_f16((char *)out + l.right + 2 * (size_t)v, p->right[v]);
        for (int k = 0; k < p->width[v]; k++) {
            write_signs(p->left_signs + (size_t)v * (size_t)p->rows, p->rows, k, data);
            data += 4 * words_of(p->rows);
            write_signs(p->right_signs + (size_t)v * (size_t)p->cols, p->cols, k, data);
            data += 4 * words_of(p->cols);
        }
    }
}

/* ------------------------------------------------------------------ reading */

static int bad(struct err *err, const char *what)
{
    return err_set(err, ERR_INVALID, "\"planes\": %s", what);
}

static bool is_scale(const char *at)
{
    uint16_t half;

    memcpy(&half, at, sizeof half);
    return half < 0x7c00; /* finite, not negative */
}

int planes_accept(const void *bytes, size_t size, int32_t rows, int32_t cols, struct err *err)
{
    const char *data = bytes;
    uint64_t sum = 0;
    uint32_t rank, planes;
    struct layout l;

    if (size < 12)
        return bad(err, "it is too short");
    rank = get_u32(data);
    planes = get_u32(data + 4);
    if (rank > (uint32_t)(rows < cols ? rows : cols) || planes > PLANES_MAX_WIDTH * rank)
        return bad(err, "it has more vectors than such a matrix");
    l = layout_of(rows, cols, (int32_t)rank, (int32_t)planes);
    if (size != l.end)
        return bad(err, "its size is not that of its vectors");
    for (uint32_t v = 0; v < rank; v++) {
        unsigned width = (unsigned char)data[l.width + v];

        if (width < 1 || width > PLANES_MAX_WIDTH)
            return bad(err, "a vector has no width from 1 to 8");
        if (!is_scale(data + l.left + 2 * v) || !is_scale(data + l.right + 2 * v))
            return bad(err, "a vector's scale is negative or not finite");
        sum += width;
    }
    if (sum != planes)
        return bad(err, "the widths of its vectors do not add up");
    if (!is_scale(data + 8) || !is_scale(data + 10))
        return bad(err, "a largest scale is negative or not finite");
    return 0;
}

/* One block of memory behind all of a view. */
struct view_memory {
    int32_t *vector;
    uint32_t *right, *left;
    float *right_scale, *left_scale, *row, *col;
};

static char *view_memory(int32_t rows, int32_t cols, int32_t planes, struct view_memory *m)
{
    size_t words = (size_t)planes * (2 + 1 + words_of(cols)) + (size_t)rows * words_of(planes) +
                   (size_t)rows + (size_t)cols;
    char *memory = calloc(words + 1, 4), *at = memory;

    if (!memory)
        return NULL;
    m->vector = (int32_t *)(void *)at;
    m->right = (uint32_t *)(void *)(at += 4 * (size_t)planes);
    m->left = (uint32_t *)(void *)(at += 4 * (size_t)planes * words_of(cols));
    m->right_scale = (float *)(void *)(at += 4 * (size_t)rows * words_of(planes));
    m->left_scale = (float *)(void *)(at += 4 * (size_t)planes);
    m->row = (float *)(void *)(at += 4 * (size_t)planes);
    m->col = (float *)(void *)(at + 4 * (size_t)rows);
    return memory;
}

/* Plane p's left signs become bit p of every row. */
static void turn_left(const char *signs, int32_t rows, int32_t planes, int32_t p, uint32_t *left)
{
    for (int32_t r = 0; r < rows; r++) {
        uint32_t bit = get_u32(signs + 4 * (size_t)(r / 32)) >> (r % 32) & 1;

        left[(size_t)r * words_of(planes) + (size_t)p / 32] |= bit << (p % 32);
    }
}

int planes_view(const void *bytes, int32_t rows, int32_t cols, struct delta_tensor *out,
                void **memory, struct err *err)
{
    const char *data = bytes;
    int32_t rank = (int32_t)get_u32(data), planes = (int32_t)get_u32(data + 4);
    struct layout l = layout_of(rows, cols, rank, planes);
    const char *signs = data + l.signs;
    struct view_memory m;

    *memory = view_memory(rows, cols, planes, &m);
    if (!*memory)
        return err_set(err, ERR_NO_MEMORY, "no memory for a delta of %d planes", planes);
    for (int32_t v = 0, p = 0; v < rank; v++) {
        int width = (unsigned char)data[l.width + (size_t)v];
        const float *c = planes_coefficients(width);

        for (int k = 0; k < width; k++, p++) {
            m.vector[p] = v;
            m.left_scale[p] = c[k] * get_f16(data + l.left + 2 * (size_t)v);
            m.right_scale[p] = c[k] * get_f16(data + l.right + 2 * (size_t)v);
            turn_left(signs, rows, planes, p, m.left);
            signs += 4 * words_of(rows);
            memcpy(m.right + (size_t)p * words_of(cols), signs, 4 * words_of(cols));
            signs += 4 * words_of(cols);
        }
    }
    for (int32_t r = 0; r < rows; r++)
        m.row[r] = scale_of(get_f16(data + 8), (unsigned char)data[l.row + (size_t)r]);
    for (int32_t c = 0; c < cols; c++)
        m.col[c] = scale_of(get_f16(data + 10), (unsigned char)data[l.col + (size_t)c]);
    *out = (struct delta_tensor){.kind = DELTA_PLANES,
                                 .rows = rows,
                                 .cols = cols,
                                 .planes = {.planes = planes,
                                            .rank = rank,
                                            .vector = m.vector,
                                            .right_bits = m.right,
                                            .left_bits = m.left,
                                            .right_scale = m.right_scale,
                                            .left_scale = m.left_scale,
                                            .row_scale = m.row,
                                            .col_scale = m.col}};
    return 0;
}

int32_t planes_rank(const void *bytes)
{
    return (int32_t)get_u32(bytes);
}

int32_t planes_scale_count(const void *bytes, int32_t rows, int32_t cols)
{
    return planes_rank(bytes) + rows + cols;
}

void planes_read_scales(const void *bytes, int32_t rows, int32_t cols, float *scale)
{
    const char *data = bytes;
    int32_t rank = planes_rank(bytes);
    struct layout l = layout_of(rows, cols, rank, 0);

    for (int32_t v = 0; v < rank; v++)
        *scale++ = get_f16(data + l.left + 2 * (size_t)v);
    for (int32_t r = 0; r < rows; r++)
        *scale++ = scale_of(get_f16(data + 8), (unsigned char)data[l.row + (size_t)r]);
    for (int32_t c = 0; c < cols; c++)
        *scale++ = scale_of(get_f16(data + 10), (unsigned char)data[l.col + (size_t)c]);
}

void planes_write_scales(void *bytes, int32_t rows, int32_t cols, const float *scale)
{
    char *data = bytes;
    int32_t rank = planes_rank(bytes);
    struct layout l = layout_of(rows, cols, rank, 0);

    for (int32_t v = 0; v < rank; v++)
        put_f16(data + l.left + 2 * (size_t)v, scale[v]);
    write_scales(scale + rank, rows, data + 8, data + l.row);
    write_scales(scale + rank + rows, cols, data + 10, data + l.col);
}
