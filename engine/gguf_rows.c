/* Rows of every tensor type, as f32. */
#include <string.h>

#include "engine/gguf.h"
#include "engine/tensor.h"

enum {
    BLOCK = 32, /* elements of a quantised block */
    Q4_1_BYTES = 20,
    Q8_0_BYTES = 34,
};

static uint16_t half_bits(const unsigned char *p)
{
    return (uint16_t)(p[0] | p[1] << 8);
}

static float half_at(const unsigned char *p)
{
    return f16_to_f32(half_bits(p));
}

static void q4_1_to_f32(const unsigned char *p, int64_t columns, float *out)
{
    for (int64_t i = 0; i < columns; i += BLOCK, p += Q4_1_BYTES) {
        float d = half_at(p), m = half_at(p + 2);

        for (int j = 0; j < BLOCK / 2; j++) {
            float low = d * (float)(p[4 + j] & 15), high = d * (float)(p[4 + j] >> 4);

            out[i + j] = low + m;
            out[i + j + BLOCK / 2] = high + m;
        }
    }
}

static void q8_0_to_f32(const unsigned char *p, int64_t columns, float *out)
{
    for (int64_t i = 0; i < columns; i += BLOCK, p += Q8_0_BYTES) {
        float d = half_at(p);

        for (int j = 0; j < BLOCK; j++)
            out[i + j] = d * (float)(int8_t)p[2 + j];
    }
}

void gguf_row_to_f32(const struct gguf_tensor *tensor, int64_t row, float *out)
{
    const unsigned char *p = tensor->data + row * tensor->row_bytes;

    switch (tensor->type) {
    case GGUF_F32:
        memcpy(out, p, (size_t)tensor->row_bytes);
        return;
    case GGUF_F16:
        for (int64_t i = 0; i < tensor->columns; i++)
            out[i] = half_at(p + 2 * i);
        return;
    case GGUF_BF16:
        for (int64_t i = 0; i < tensor->columns; i++)
            out[i] = bf16_to_f32(half_bits(p + 2 * i));
        return;
    case GGUF_Q4_1:
        q4_1_to_f32(p, tensor->columns, out);
        return;
    case GGUF_Q8_0:
        q8_0_to_f32(p, tensor->columns, out);
        return;
    }
}
