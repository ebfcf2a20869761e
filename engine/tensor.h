/* tensor.h: a view of numbers in memory: pointer, type, shape, strides. A view owns nothing.
 *
 * Row-major is the rule: stride[rank-1] == 1 and rows without gaps unless a stage says otherwise.
 * `data` is in the memory of the backend that made it; only host tensors (base files, artifacts,
 * the CPU backend's) may be read by CPU code. */
#ifndef GRAFT_TENSOR_H
#define GRAFT_TENSOR_H

#include <stdint.h>

#define TENSOR_MAX_RANK 4

enum dtype {
    DTYPE_F32,
    DTYPE_BF16,
    DTYPE_F16,
    DTYPE_I8,
    DTYPE_U8,
    DTYPE_I32,
    DTYPE_COUNT,
};

struct tensor {
    void *data; /* NULL: absent (an optional bias, say) */
    enum dtype dtype;
    int rank;
    int64_t shape[TENSOR_MAX_RANK];
    int64_t stride[TENSOR_MAX_RANK]; /* in elements */
};

/* Bytes of one element. */
int dtype_size(enum dtype dtype);
/* Name as safetensors spells it: "F32", "BF16", … */
const char *dtype_name(enum dtype dtype);
/* Contiguous row-major view. */
struct tensor tensor_view(void *data, enum dtype dtype, int rank, const int64_t *shape);
int64_t tensor_elements(const struct tensor *t);
/* Elements [from, from + count) of a contiguous host tensor as f32 (F32, BF16, F16 only). */
void tensor_to_f32(const struct tensor *t, int64_t from, int64_t count, float *out);

float bf16_to_f32(uint16_t bits);
uint16_t f32_to_bf16(float value); /* round to nearest even; NaN stays NaN */
float f16_to_f32(uint16_t bits);
uint16_t f32_to_f16(float value); /* round to nearest even; overflow becomes infinity */

#endif
