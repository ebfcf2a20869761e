#include "engine/cuda/cuda_delta.cuh"

#include <cmath>
#include <cstdlib>
#include <cstring>

struct packed_delta {
    struct delta_view view;
    void *memory; /* on the device: bits and scales, factors, or the dense values */
    int64_t bytes;
};

struct delta_view cuda_delta_view(const struct packed_delta *packed)
{
    return packed ? packed->view : delta_view();
}

/* One set of signs, from rows of words to tiles. */
static void pack_bits(const struct delta_tensor *delta, const uint32_t *from, unsigned *to)
{
    int64_t row_words = ceil_div(delta->cols, 32);

    for (int32_t r = 0; r < delta->rows; r++, from += row_words)
        for (int32_t c = 0; c < delta->cols; c++)
            to[delta_word(delta->cols, r, c)] |= (from[c / 32] >> c % 32 & 1) << delta_bit(r, c);
}

/* Bits, then scales, in one block of host memory. */
static char *pack_signs(const struct delta_tensor *delta, int64_t words, int64_t scales)
{
    int64_t sets = delta->more_bits ? 2 : 1;
    char *host = (char *)calloc(1, (size_t)(sets * words + scales) * 4);
    unsigned *bits = (unsigned *)host;
    float *scale = (float *)(host + sets * words * 4);

    if (!host)
        return nullptr;
    pack_bits(delta, delta->bits, bits);
    if (delta->more_bits)
        pack_bits(delta, delta->more_bits, bits + words);
    for (int32_t r = 0; r < delta->rows; r++)
        scale[r] = delta->scale[delta->scale_count == 1 ? 0 : r] / (float)sets;
    return host;
}

static int upload(struct device *device, struct packed_delta *packed, const void *host,
                  struct err *err)
{
    packed->memory = device_alloc(device, (size_t)packed->bytes, err);
    if (!packed->memory)
        return -1;
    device_copy_in(device, packed->memory, host, (size_t)packed->bytes);
    return 0;
}

static int place_signs(struct device *device, struct packed_delta *packed,
                       const struct delta_tensor *delta, struct err *err)
{
    int64_t blocks = ceil_div(delta->rows, DELTA_TILE_ROWS);
    int64_t words = blocks * ceil_div(delta->cols, DELTA_TILE_COLS) * 32;
    int64_t sets = delta->more_bits ? 2 : 1;
    char *host = pack_signs(delta, words, blocks * DELTA_TILE_ROWS);
    int status;

    if (!host)
        return err_set(err, ERR_NO_MEMORY, "no memory for a delta of %d by %d", delta->rows,
                       delta->cols);
    packed->bytes = (sets * words + blocks * DELTA_TILE_ROWS) * 4;
    status = upload(device, packed, host, err);
    packed->view.bits = (const unsigned *)packed->memory;
    packed->view.more = sets > 1 ? (const unsigned *)packed->memory + words : nullptr;
    packed->view.scale = (const float *)packed->memory + sets * words;
    free(host);
    return status;
}

static int place_dense(struct device *device, struct packed_delta *packed,
                       const struct delta_tensor *delta, struct err *err)
{
    packed->bytes = (int64_t)delta->rows * delta->cols * dtype_size(delta->dense.dtype);
    packed->view.dtype = delta->dense.dtype;
    if (upload(device, packed, delta->dense.data, err))
        return -1;
    packed->view.dense = packed->memory;
    return 0;
}

/* ------------------------------------------------------------------ planes */

static bool sign_at(const uint32_t *bits, int64_t words, int64_t row, int64_t bit)
{
    return bits[row * words + bit / 32] >> bit % 32 & 1;
}

static void add_outer(const float *left, const float *right, int32_t rows, int32_t cols, float *to)
{
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++)
            to[r * cols + c] += left[r] * right[c];
}

static void expand_planes(const struct delta_tensor *delta, float *left, float *right, float *to)
{
    const struct delta_planes *p = &delta->planes;

    for (int32_t first = 0, next; first < p->planes; first = next) {
        for (next = first; next < p->planes && p->vector[next] == p->vector[first];)
            next++;
        memset(left, 0, (size_t)delta->rows * sizeof *left);
        memset(right, 0, (size_t)delta->cols * sizeof *right);
        for (int32_t plane = first; plane < next; plane++) {
            float ls = p->left_scale[plane], rs = p->right_scale[plane];

            for (int32_t r = 0; r < delta->rows; r++)
                left[r] += sign_at(p->left_bits, ceil_div(p->planes, 32), r, plane) ? ls : -ls;
            for (int32_t c = 0; c < delta->cols; c++)
                right[c] += sign_at(p->right_bits, ceil_div(delta->cols, 32), plane, c) ? rs : -rs;
        }
        for (int32_t r = 0; r < delta->rows; r++)
            left[r] *= p->row_scale[r];
        for (int32_t c = 0; c < delta->cols; c++)
            right[c] *= p->col_scale[c];
        add_outer(left, right, delta->rows, delta->cols, to);
    }
}

/* Planes have no kernel of their own yet: they are expanded once, when they are packed, to the
 * precision, and served as dense ones are. Right, and sixteen times the memory. */
static int place_expanded(struct cuda *cuda, struct packed_delta *packed,
                          const struct delta_tensor *delta, struct err *err)
{
    int64_t count = (int64_t)delta->rows * delta->cols;
    float *value = (float *)calloc((size_t)count, sizeof *value);
    float *left = (float *)malloc((size_t)delta->rows * sizeof *left);
    float *right = (float *)malloc((size_t)delta->cols * sizeof *right);
    struct delta_tensor dense = *delta;
    int status = -1;

    if (!value || !left || !right) {
        err_set(err, ERR_NO_MEMORY, "no memory for a delta of %d by %d", delta->rows, delta->cols);
        goto out;
    }
    expand_planes(delta, left, right, value);
    if (cuda->activation == DTYPE_BF16) /* in place: a half lies in front of what is still read */
        for (int64_t i = 0; i < count; i++) {
            uint16_t half = f32_to_bf16(value[i]);

            memcpy((char *)value + i * 2, &half, sizeof half);
        }
    dense.dense = tensor_view(value, cuda->activation, 1, &count);
    status = place_dense(cuda->device, packed, &dense, err);
out:
    free(right);
    free(left);
    free(value);
    return status;
}

/* ------------------------------------------------------------------ factors */

/* Neighbouring outputs read neighbouring numbers: [rank, rows]. */
static void transpose(const struct tensor *left, char *to)
{
    int64_t rows = left->shape[0], rank = left->shape[1], size = dtype_size(left->dtype);

    for (int64_t r = 0; r < rows; r++)
        for (int64_t v = 0; v < rank; v++)
            memcpy(to + (v * rows + r) * size, (const char *)left->data + (r * rank + v) * size,
                   (size_t)size);
}

static int place_factors(struct device *device, struct packed_delta *packed,
                         const struct delta_tensor *delta, struct err *err)
{
    const struct tensor *left = &delta->factors.left, *right = &delta->factors.right;
    int64_t left_bytes = ceil_div(tensor_elements(left) * dtype_size(left->dtype), 16) * 16;
    int64_t right_bytes = tensor_elements(right) * dtype_size(right->dtype);
    char *host = (char *)calloc(1, (size_t)(left_bytes + right_bytes));
    int status;

    if (!host)
        return err_set(err, ERR_NO_MEMORY, "no memory for a delta of %d by %d", delta->rows,
                       delta->cols);
    transpose(left, host);
    memcpy(host + left_bytes, right->data, (size_t)right_bytes);
    packed->bytes = left_bytes + right_bytes;
    status = upload(device, packed, host, err);
    packed->view.left = packed->memory;
    packed->view.right = (const char *)packed->memory + left_bytes;
    packed->view.left_dtype = left->dtype;
    packed->view.right_dtype = right->dtype;
    packed->view.rank = (int32_t)right->shape[0];
    packed->view.factor = delta->factors.scale;
    free(host);
    return status;
}

/* ------------------------------------------------------------------ packing */

static int check_factors(const struct delta_tensor *delta, struct err *err)
{
    const struct tensor *left = &delta->factors.left, *right = &delta->factors.right;

    if (left->rank != 2 || right->rank != 2 || left->shape[0] != delta->rows ||
        right->shape[1] != delta->cols || left->shape[1] != right->shape[0] || left->shape[1] < 1 ||
        left->dtype > DTYPE_F16 || right->dtype > DTYPE_F16)
        return err_set(err, ERR_INVALID, "delta: factors that do not fit a matrix of %d by %d",
                       delta->rows, delta->cols);
    if (!std::isfinite(delta->factors.scale) || delta->factors.scale == 0)
        return err_set(err, ERR_INVALID, "delta: factors with a scale of %g",
                       (double)delta->factors.scale);
    return 0;
}

static int check_planes(const struct delta_tensor *delta, struct err *err)
{
    const struct delta_planes *p = &delta->planes;

    for (int32_t i = 0; i < p->planes; i++)
        if (p->vector[i] < 0 || p->vector[i] >= p->rank ||
            (i > 0 && p->vector[i] < p->vector[i - 1]))
            return err_set(err, ERR_INVALID, "delta: plane %d belongs to vector %d of %d", i,
                           p->vector[i], p->rank);
    return 0;
}

static int check(const struct delta_tensor *delta, struct err *err)
{
    if (delta->rows < 1 || delta->cols < 1)
        return err_set(err, ERR_INVALID, "delta: a matrix of %d by %d", delta->rows, delta->cols);
    if (delta->kind == DELTA_FACTORS)
        return check_factors(delta, err);
    if (delta->kind == DELTA_PLANES)
        return check_planes(delta, err);
    if (delta->kind == DELTA_SIGN && delta->scale_count != 1 && delta->scale_count != delta->rows)
        return err_set(err, ERR_INVALID, "delta: %d scales for %d rows", delta->scale_count,
                       delta->rows);
    if (delta->kind == DELTA_DENSE && delta->dense.dtype > DTYPE_F16)
        return err_set(err, ERR_INVALID, "delta: a dense difference of dtype %s",
                       dtype_name(delta->dense.dtype));
    return 0;
}

int cuda_delta_pack(struct backend *backend, const struct delta_tensor *delta,
                    struct packed_delta **out, struct err *err)
{
    struct cuda *cuda = cuda_of(backend);
    struct packed_delta *packed;
    int status;

    *out = nullptr;
    if (check(delta, err))
        return -1;
    packed = (struct packed_delta *)calloc(1, sizeof *packed);
    if (!packed)
        return err_set(err, ERR_NO_MEMORY, "no memory for a delta");
    packed->view.rows = delta->rows;
    packed->view.cols = delta->cols;
    if (delta->kind == DELTA_SIGN)
        status = place_signs(cuda->device, packed, delta, err);
    else if (delta->kind == DELTA_DENSE)
        status = place_dense(cuda->device, packed, delta, err);
    else if (delta->kind == DELTA_FACTORS)
        status = place_factors(cuda->device, packed, delta, err);
    else
        status = place_expanded(cuda, packed, delta, err);
    if (status) {
        cuda_delta_free(backend, packed);
        return -1;
    }
    *out = packed;
    return 0;
}

int cuda_delta_clone(struct backend *backend, const struct packed_delta *packed,
                     struct packed_delta **out, struct err *err)
{
    struct device *device = cuda_of(backend)->device;
    struct packed_delta *copy = (struct packed_delta *)malloc(sizeof *copy);
    char *memory;

    *out = nullptr;
    if (!copy)
        return err_set(err, ERR_NO_MEMORY, "no memory for a delta");
    memory = (char *)device_alloc(device, (size_t)packed->bytes, err);
    if (!memory) {
        free(copy);
        return -1;
    }
    device_copy(device, memory, packed->memory, (size_t)packed->bytes);
    *copy = *packed;
    copy->memory = memory;
    if (packed->view.bits) {
        copy->view.bits = (const unsigned *)memory;
        if (packed->view.more)
            copy->view.more = copy->view.bits + (packed->view.more - packed->view.bits);
        copy->view.scale =
            (const float *)(memory + ((const char *)packed->view.scale - (char *)packed->memory));
    } else if (packed->view.rank) {
        copy->view.left = memory;
        copy->view.right =
            memory + ((const char *)packed->view.right - (const char *)packed->memory);
    } else {
        copy->view.dense = memory;
    }
    *out = copy;
    return 0;
}

void cuda_delta_free(struct backend *backend, struct packed_delta *packed)
{
    if (!packed)
        return;
    device_free(cuda_of(backend)->device, packed->memory);
    free(packed);
}

int64_t cuda_delta_bytes(const struct packed_delta *packed)
{
    return packed->bytes;
}
