#include "engine/tensor.h"

#include <assert.h>
#include <string.h>

static const struct {
    const char *name;
    int size;
} dtypes[DTYPE_COUNT] = {
    [DTYPE_F32] = {"F32", 4}, [DTYPE_BF16] = {"BF16", 2}, [DTYPE_F16] = {"F16", 2},
    [DTYPE_I8] = {"I8", 1},   [DTYPE_U8] = {"U8", 1},     [DTYPE_I32] = {"I32", 4},
};

int dtype_size(enum dtype dtype)
{
    return dtypes[dtype].size;
}

const char *dtype_name(enum dtype dtype)
{
    return dtypes[dtype].name;
}

struct tensor tensor_view(void *data, enum dtype dtype, int rank, const int64_t *shape)
{
    struct tensor t = {.data = data, .dtype = dtype, .rank = rank};
    int64_t stride = 1;

    assert(rank >= 1 && rank <= TENSOR_MAX_RANK);
    for (int i = rank - 1; i >= 0; i--) {
        t.shape[i] = shape[i];
        t.stride[i] = stride;
        stride *= shape[i];
    }
    return t;
}

int64_t tensor_elements(const struct tensor *t)
{
    int64_t n = 1;

    for (int i = 0; i < t->rank; i++)
        n *= t->shape[i];
    return n;
}

static float bits_to_f32(uint32_t bits)
{
    float f;

    memcpy(&f, &bits, sizeof f);
    return f;
}

static uint32_t f32_to_bits(float value)
{
    uint32_t bits;

    memcpy(&bits, &value, sizeof bits);
    return bits;
}

float bf16_to_f32(uint16_t bits)
{
    return bits_to_f32((uint32_t)bits << 16);
}

uint16_t f32_to_bf16(float value)
{
    uint32_t x = f32_to_bits(value);

    if ((x & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)(x >> 16 | 0x40);
    return (uint16_t)((x + 0x7fffu + (x >> 16 & 1)) >> 16);
}

float f16_to_f32(uint16_t bits)
{
    uint32_t sign = (uint32_t)(bits & 0x8000u) << 16;
    uint32_t exponent = bits >> 10 & 31;
    uint32_t mantissa = bits & 0x3ffu;

    if (exponent == 31)
        return bits_to_f32(sign | 0x7f800000u | mantissa << 13);
    if (exponent != 0)
        return bits_to_f32(sign | (exponent + 112) << 23 | mantissa << 13);
    /* Zero and subnormals: the mantissa counts steps of 2^-24, exact in f32. */
    return bits_to_f32(sign | f32_to_bits((float)mantissa * 0x1p-24f));
}

uint16_t f32_to_f16(float value)
{
    uint32_t x = f32_to_bits(value);
    uint16_t sign = (uint16_t)(x >> 16 & 0x8000u);
    uint32_t a = x & 0x7fffffffu;

    if (a > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00u);
    if (a >= 0x477ff000u) /* 65520 and up rounds to infinity */
        return (uint16_t)(sign | 0x7c00u);
    if (a < 0x38800000u) /* below 2^-14: adding 0.5 rounds to steps of 2^-24 */
        return (uint16_t)(sign | (uint16_t)(f32_to_bits(bits_to_f32(a) + 0.5f) - 0x3f000000u));
    return (uint16_t)(sign | (uint16_t)((a - 0x38000000u + 0xfffu + (a >> 13 & 1)) >> 13));
}

void tensor_to_f32(const struct tensor *t, int64_t from, int64_t count, float *out)
{
    const uint16_t *half = (const uint16_t *)t->data + from;

    switch (t->dtype) {
    case DTYPE_F32:
        memcpy(out, (const float *)t->data + from, (size_t)count * sizeof *out);
        return;
    case DTYPE_BF16:
        for (int64_t i = 0; i < count; i++)
            out[i] = bf16_to_f32(half[i]);
        return;
    case DTYPE_F16:
        for (int64_t i = 0; i < count; i++)
            out[i] = f16_to_f32(half[i]);
        return;
    default:
        assert(!"tensor_to_f32: not a float type");
    }
}
