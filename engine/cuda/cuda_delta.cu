#include "engine/cuda/cuda_delta.cuh"

#include <cstdlib>
#include <cstring>

struct packed_delta {
    struct delta_view view;
    void *memory; /* on the device: bits and scales, or the dense values */
    int64_t bytes;
};

struct delta_view cuda_delta_view(const struct packed_delta *packed)
{
    return packed ? packed->view : delta_view();
}

/* Bits, then scales, in one block of host memory. */
static char *pack_signs(const struct delta_tensor *delta, int64_t words, int64_t scales)
{
    char *host = (char *)calloc(1, (size_t)(words + scales) * 4);
    unsigned *bits = (unsigned *)host;
    float *scale = (float *)(host + words * 4);
    int64_t row_words = ceil_div(delta->cols, 32);

    if (!host)
        return nullptr;
    for (int32_t r = 0; r < delta->rows; r++) {
        const uint32_t *from = delta->bits + r * row_words;

        for (int32_t c = 0; c < delta->cols; c++)
            bits[delta_word(delta->cols, r, c)] |= (from[c / 32] >> c % 32 & 1) << delta_bit(r, c);
        scale[r] = delta->scale[delta->scale_count == 1 ? 0 : r];
    }
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
    char *host = pack_signs(delta, words, blocks * DELTA_TILE_ROWS);
    int status;

    if (!host)
        return err_set(err, ERR_NO_MEMORY, "no memory for a delta of %d by %d", delta->rows,
                       delta->cols);
    packed->bytes = (words + blocks * DELTA_TILE_ROWS) * 4;
    status = upload(device, packed, host, err);
    packed->view.bits = (const unsigned *)packed->memory;
    packed->view.scale = (const float *)packed->memory + words;
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

static int check(const struct delta_tensor *delta, struct err *err)
{
    if (delta->rows < 1 || delta->cols < 1)
        return err_set(err, ERR_INVALID, "delta: a matrix of %d by %d", delta->rows, delta->cols);
    if (delta->kind != DELTA_SIGN && delta->kind != DELTA_DENSE)
        return err_set(err, ERR_UNAVAILABLE,
                       "delta: the CUDA backend has no product for factored differences");
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
    struct device *device = cuda_of(backend)->device;
    struct packed_delta *packed;

    *out = nullptr;
    if (check(delta, err))
        return -1;
    packed = (struct packed_delta *)calloc(1, sizeof *packed);
    if (!packed)
        return err_set(err, ERR_NO_MEMORY, "no memory for a delta");
    packed->view.rows = delta->rows;
    packed->view.cols = delta->cols;
    if (delta->kind == DELTA_SIGN ? place_signs(device, packed, delta, err)
                                  : place_dense(device, packed, delta, err)) {
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
        copy->view.scale =
            (const float *)(memory + ((const char *)packed->view.scale - (char *)packed->memory));
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
