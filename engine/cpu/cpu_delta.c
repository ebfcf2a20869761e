#include <stdlib.h>
#include <string.h>

#include "engine/cpu/cpu.h"

static int pack_signs(struct packed_delta *packed, const struct delta_tensor *delta)
{
    int64_t words = ceil_div(delta->cols, 32), blocks = ceil_div(delta->rows, 16);

    packed->bytes = blocks * words * 16 * (int64_t)sizeof(uint32_t) +
                    (int64_t)delta->rows * (int64_t)sizeof(float);
    packed->bits = aligned_alloc(64, (size_t)(blocks * words * 16) * sizeof(uint32_t));
    packed->scale = malloc((size_t)delta->rows * sizeof(float));
    if (!packed->bits || !packed->scale)
        return -1;
    memset(packed->bits, 0, (size_t)(blocks * words * 16) * sizeof(uint32_t));
    for (int64_t r = 0; r < delta->rows; r++) {
        for (int64_t w = 0; w < words; w++)
            packed->bits[(r / 16 * words + w) * 16 + r % 16] = delta->bits[r * words + w];
        packed->scale[r] = delta->scale[delta->scale_count == 1 ? 0 : r];
    }
    return 0;
}

static int pack_dense(struct packed_delta *packed, const struct delta_tensor *delta)
{
    const int64_t shape[2] = {delta->rows, delta->cols};
    size_t bytes =
        (size_t)delta->rows * (size_t)delta->cols * (size_t)dtype_size(delta->dense.dtype);
    void *data = malloc(bytes);

    if (!data)
        return -1;
    memcpy(data, delta->dense.data, bytes);
    packed->dense = tensor_view(data, delta->dense.dtype, 2, shape);
    packed->bytes = (int64_t)bytes;
    return 0;
}

int cpu_delta_pack(struct backend *backend, const struct delta_tensor *delta,
                   struct packed_delta **out, struct err *err)
{
    struct packed_delta *packed = NULL;

    *out = NULL;
    if (delta->rows < 1 || delta->cols < 1)
        return err_set(err, ERR_INVALID, "delta: a matrix of %d by %d", delta->rows, delta->cols);
    if (delta->kind == DELTA_SIGN && delta->scale_count != 1 && delta->scale_count != delta->rows)
        return err_set(err, ERR_INVALID, "delta: %d scales for %d rows", delta->scale_count,
                       delta->rows);
    if (delta->kind == DELTA_DENSE && delta->dense.dtype > DTYPE_F16)
        return err_set(err, ERR_INVALID, "delta: a dense difference of dtype %s",
                       dtype_name(delta->dense.dtype));
    packed = calloc(1, sizeof *packed);
    if (!packed)
        return err_set(err, ERR_NO_MEMORY, "no memory for a delta");
    packed->kind = delta->kind;
    packed->rows = delta->rows;
    packed->cols = delta->cols;
    if (delta->kind == DELTA_SIGN ? pack_signs(packed, delta) : pack_dense(packed, delta)) {
        cpu_delta_free(backend, packed);
        return err_set(err, ERR_NO_MEMORY, "no memory for a delta of %d by %d", delta->rows,
                       delta->cols);
    }
    *out = packed;
    return 0;
}

void cpu_delta_free(struct backend *backend, struct packed_delta *packed)
{
    if (!packed)
        return;
    free(packed->bits);
    free(packed->scale);
    free(packed->dense.data);
    free(packed);
}

int64_t cpu_delta_bytes(const struct packed_delta *packed)
{
    return packed->bytes;
}

void cpu_delta_apply(const struct cpu *cpu, const struct packed_delta *delta, const float *x,
                     float *y, struct span outs)
{
    if (delta->kind == DELTA_SIGN) {
        cpu->k->sign(&(struct sign_args){
            .x = x,
            .rows = delta->rows,
            .cols = delta->cols,
            .bits = delta->bits,
            .scale = delta->scale,
            .from = outs.from / 16,
            .to = (int32_t)ceil_div(outs.to, 16),
            .y = y,
        });
        return;
    }
    const struct tensor *d = &delta->dense;
    cpu->k->dot(&(struct dot_args){
        .x = x,
        .ldx = delta->cols,
        .rows = 1,
        .w = (const char *)d->data + (int64_t)outs.from * delta->cols * dtype_size(d->dtype),
        .dtype = d->dtype,
        .ldw = delta->cols,
        .outs = outs.to - outs.from,
        .n = delta->cols,
        .y = y + outs.from,
        .ldy = delta->rows,
        .add = true,
    });
}

void cpu_delta_add_row(const struct packed_delta *delta, int32_t row, float *y)
{
    if (delta->kind == DELTA_SIGN) {
        int64_t words = ceil_div(delta->cols, 32);
        const uint32_t *bits = delta->bits + row / 16 * words * 16 + row % 16;

        for (int32_t c = 0; c < delta->cols; c++)
            y[c] += bits[c / 32 * 16] >> c % 32 & 1 ? delta->scale[row] : -delta->scale[row];
        return;
    }
    for (int32_t c = 0; c < delta->cols; c += 64) {
        int32_t n = delta->cols - c < 64 ? delta->cols - c : 64;
        float part[64];

        tensor_to_f32(&delta->dense, (int64_t)row * delta->cols + c, n, part);
        for (int32_t i = 0; i < n; i++)
            y[c + i] += part[i];
    }
}
