#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/cpu/cpu.h"

/* Row-major bits as struct sign_args wants them; counts what they take. */
static uint32_t *pack_bits(struct packed_delta *packed, const uint32_t *bits, int32_t rows,
                           int32_t cols)
{
    int64_t words = ceil_div(cols, 32), blocks = ceil_div(rows, 16);
    size_t bytes = (size_t)(blocks * words * 16) * sizeof(uint32_t);
    uint32_t *out = aligned_alloc(64, bytes);

    if (!out)
        return NULL;
    memset(out, 0, bytes);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t w = 0; w < words; w++)
            out[(r / 16 * words + w) * 16 + r % 16] = bits[r * words + w];
    packed->bytes += (int64_t)bytes;
    return out;
}

static void *pack_copy(struct packed_delta *packed, const void *from, size_t bytes)
{
    void *out = malloc(bytes);

    if (!out)
        return NULL;
    memcpy(out, from, bytes);
    packed->bytes += (int64_t)bytes;
    return out;
}

static int pack_signs(struct packed_delta *packed, const struct delta_tensor *delta)
{
    packed->bits = pack_bits(packed, delta->bits, delta->rows, delta->cols);
    packed->scale = malloc((size_t)delta->rows * sizeof(float));
    if (!packed->bits || !packed->scale)
        return -1;
    packed->bytes += (int64_t)delta->rows * (int64_t)sizeof(float);
    if (delta->more_bits) {
        packed->more_bits = pack_bits(packed, delta->more_bits, delta->rows, delta->cols);
        if (!packed->more_bits)
            return -1;
    }
    for (int64_t r = 0; r < delta->rows; r++)
        packed->scale[r] =
            delta->scale[delta->scale_count == 1 ? 0 : r] * (delta->more_bits ? 0.5f : 1.0f);
    return 0;
}

static int pack_tensor(struct packed_delta *packed, const struct tensor *from, struct tensor *out)
{
    size_t bytes = (size_t)tensor_elements(from) * (size_t)dtype_size(from->dtype);
    void *data = pack_copy(packed, from->data, bytes);

    if (!data)
        return -1;
    *out = tensor_view(data, from->dtype, 2, from->shape);
    return 0;
}

static int pack_planes(struct packed_delta *packed, const struct delta_tensor *delta)
{
    const struct delta_planes *p = &delta->planes;
    size_t sums = (size_t)p->planes * sizeof(float);

    packed->inner = p->planes;
    packed->bits = pack_bits(packed, p->left_bits, delta->rows, p->planes);
    packed->right_bits = pack_bits(packed, p->right_bits, p->planes, delta->cols);
    packed->scale = pack_copy(packed, p->row_scale, (size_t)delta->rows * sizeof(float));
    packed->col_scale = pack_copy(packed, p->col_scale, (size_t)delta->cols * sizeof(float));
    packed->right_scale = pack_copy(packed, p->right_scale, sums);
    packed->left_scale = pack_copy(packed, p->left_scale, sums);
    packed->vector = pack_copy(packed, p->vector, (size_t)p->planes * sizeof(int32_t));
    return packed->bits && packed->right_bits && packed->scale && packed->col_scale &&
                   packed->right_scale && packed->left_scale && packed->vector
               ? 0
               : -1;
}

static int pack_parts(struct packed_delta *packed, const struct delta_tensor *delta)
{
    switch (delta->kind) {
    case DELTA_SIGN:
        return pack_signs(packed, delta);
    case DELTA_PLANES:
        return pack_planes(packed, delta);
    case DELTA_FACTORS:
        packed->inner = (int32_t)delta->factors.right.shape[0];
        packed->factor = delta->factors.scale;
        return pack_tensor(packed, &delta->factors.left, &packed->dense) ||
                       pack_tensor(packed, &delta->factors.right, &packed->right)
                   ? -1
                   : 0;
    default:
        return pack_tensor(packed, &delta->dense, &packed->dense);
    }
}

static int grow(float **memory, size_t rows, int32_t *have, int32_t want)
{
    int32_t width = (want + 15) / 16 * 16;
    float *larger;

    if (width <= *have)
        return 0;
    larger = aligned_alloc(64, rows * (size_t)width * sizeof *larger);
    if (!larger)
        return -1;
    free(*memory);
    *memory = larger;
    *have = width;
    return 0;
}

static int grow_scratch(struct cpu *cpu, const struct packed_delta *packed)
{
    struct cpu_delta_scratch *s = &cpu->delta;
    int32_t width = packed->inner > packed->cols ? packed->inner : packed->cols;

    if (packed->inner == 0)
        return 0;
    if (grow(&s->sums, CPU_DELTA_CALLS, &s->inner, packed->inner))
        return -1;
    return grow(&s->operand, (size_t)thread_pool_threads(cpu->pool), &s->width, width);
}

int cpu_delta_pack(struct backend *backend, const struct delta_tensor *delta,
                   struct packed_delta **out, struct err *err)
{
    struct packed_delta *packed = NULL;

    *out = NULL;
    if (delta_tensor_check(delta, err))
        return -1;
    packed = calloc(1, sizeof *packed);
    if (!packed)
        return err_set(err, ERR_NO_MEMORY, "no memory for a delta");
    packed->kind = delta->kind;
    packed->rows = delta->rows;
    packed->cols = delta->cols;
    if (pack_parts(packed, delta) || grow_scratch(cpu_of(backend), packed)) {
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
    free(packed->more_bits);
    free(packed->scale);
    free(packed->dense.data);
    free(packed->right.data);
    free(packed->right_bits);
    free(packed->right_scale);
    free(packed->left_scale);
    free(packed->col_scale);
    free(packed->vector);
    free(packed);
}

int64_t cpu_delta_bytes(const struct packed_delta *packed)
{
    return packed->bytes;
}

static bool bit_of(const uint32_t *bits, int64_t words, int32_t row, int32_t col)
{
    return bits[(row / 16 * words + col / 32) * 16 + row % 16] >> col % 32 & 1;
}

static void add_plane_row(const struct packed_delta *d, int32_t row, float *y)
{
    int64_t words = ceil_div(d->cols, 32), left_words = ceil_div(d->inner, 32);

    for (int32_t c = 0; c < d->cols; c++) {
        float sum = 0;

        for (int32_t p = 0, v; p < d->inner;) {
            float left = 0, right = 0;

            for (v = d->vector[p]; p < d->inner && d->vector[p] == v; p++) {
                left += bit_of(d->bits, left_words, row, p) ? d->left_scale[p] : -d->left_scale[p];
                right +=
                    bit_of(d->right_bits, words, p, c) ? d->right_scale[p] : -d->right_scale[p];
            }
            sum += left * right;
        }
        y[c] += d->scale[row] * sum * d->col_scale[c];
    }
}

static void add_factor_row(const struct packed_delta *d, int32_t row, float *y)
{
    for (int32_t c = 0; c < d->cols; c += 64) {
        int32_t n = d->cols - c < 64 ? d->cols - c : 64;
        float part[64], sum[64] = {0}, left;

        for (int32_t k = 0; k < d->inner; k++) {
            tensor_to_f32(&d->dense, (int64_t)row * d->inner + k, 1, &left);
            tensor_to_f32(&d->right, (int64_t)k * d->cols + c, n, part);
            for (int32_t i = 0; i < n; i++)
                sum[i] = fmaf(left, part[i], sum[i]);
        }
        for (int32_t i = 0; i < n; i++)
            y[c + i] += d->factor * sum[i];
    }
}

void cpu_delta_add_row(const struct packed_delta *delta, int32_t row, float *y)
{
    if (delta->kind == DELTA_SIGN) {
        int64_t words = ceil_div(delta->cols, 32);
        int64_t first = row / 16 * words * 16 + row % 16;
        float scale = delta->scale[row];

        for (int32_t c = 0; c < delta->cols; c++) {
            int64_t word = first + c / 32 * 16;
            float value = delta->bits[word] >> c % 32 & 1 ? scale : -scale;

            if (delta->more_bits) /* the two together: exactly twice the scale, or nothing */
                value += delta->more_bits[word] >> c % 32 & 1 ? scale : -scale;
            y[c] += value;
        }
        return;
    }
    if (delta->kind == DELTA_PLANES || delta->kind == DELTA_FACTORS) {
        (delta->kind == DELTA_PLANES ? add_plane_row : add_factor_row)(delta, row, y);
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
