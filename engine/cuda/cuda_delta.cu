#include "engine/cuda/cuda_delta.cuh"

#include <cstdlib>
#include <cstring>

struct packed_delta {
    struct delta_view view;
    void *memory; /* on the device: all that the view points to */
    int64_t bytes;
};

struct delta_view cuda_delta_view(const struct packed_delta *packed)
{
    return packed ? packed->view : delta_view();
}

/* Bit 0 of `bit`, into tiles that are zero there. */
static void pack_bit(int32_t cols, int32_t r, int32_t c, uint32_t bit, unsigned *to)
{
    to[delta_word(cols, r, c)] |= (bit & 1) << delta_bit(r, c);
}

/* One set of signs, from rows of words to tiles. */
static void pack_bits(const struct delta_tensor *delta, const uint32_t *from, unsigned *to)
{
    int64_t row_words = ceil_div(delta->cols, 32);

    for (int32_t r = 0; r < delta->rows; r++, from += row_words)
        for (int32_t c = 0; c < delta->cols; c++)
            pack_bit(delta->cols, r, c, from[c / 32] >> c % 32, to);
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

static int32_t vector_end(const struct delta_planes *p, int32_t plane)
{
    int32_t end = plane + 1;

    while (end < p->planes && p->vector[end] == p->vector[plane])
        end++;
    return end;
}

/* The place of each plane; returns of how many blocks. A vector that would lie in two blocks
 * begins the second: of the widths that there are, few planes pad. */
static int32_t find_places(const struct delta_planes *p, int32_t *place)
{
    int32_t used = 0;

    for (int32_t first = 0, end; first < p->planes; first = end) {
        end = vector_end(p, first);
        if (used % DELTA_BLOCK + end - first > DELTA_BLOCK)
            used = (int32_t)ceil_div(used, DELTA_BLOCK) * DELTA_BLOCK;
        for (int32_t i = first; i < end; i++)
            place[i] = used++;
    }
    return (int32_t)ceil_div(used, DELTA_BLOCK);
}

/* Where things lie in the block of memory: left signs at 0. All begin at multiples of 16 bytes. */
struct planes_layout {
    int64_t right, scale, col_scale, plane, end;
};

static struct planes_layout layout_of(const struct delta_tensor *delta, int32_t blocks)
{
    int64_t rows = ceil_div(delta->rows, DELTA_TILE_ROWS) * DELTA_TILE_ROWS;
    int64_t cols = ceil_div(delta->cols, DELTA_TILE_COLS) * DELTA_TILE_COLS;
    int64_t planes = (int64_t)blocks * DELTA_BLOCK;
    struct planes_layout l;

    l.right = rows * planes / 8;
    l.scale = l.right + planes * cols / 8;
    l.col_scale = l.scale + rows * 4;
    l.plane = l.col_scale + cols * 4;
    l.end = l.plane + planes * (int64_t)sizeof(struct delta_plane);
    return l;
}

static void pack_planes(const struct delta_tensor *delta, const int32_t *place, int32_t blocks,
                        struct planes_layout l, char *host)
{
    const struct delta_planes *p = &delta->planes;
    int64_t right_words = ceil_div(delta->cols, 32), left_words = ceil_div(p->planes, 32);
    struct delta_plane *plane = (struct delta_plane *)(host + l.plane);

    for (int32_t i = 0, first = 0; i < p->planes; i++) {
        first = p->vector[i] == p->vector[first] ? first : i;
        plane[place[i]].left = p->left_scale[i];
        plane[place[i]].right = p->right_scale[i];
        plane[place[i]].first = (uint16_t)(place[first] % DELTA_BLOCK);
        plane[place[i]].count = (uint16_t)(vector_end(p, i) - first);
        for (int32_t c = 0; c < delta->cols; c++)
            pack_bit(delta->cols, place[i], c, p->right_bits[i * right_words + c / 32] >> c % 32,
                     (unsigned *)(host + l.right));
    }
    for (int32_t r = 0; r < delta->rows; r++)
        for (int32_t i = 0; i < p->planes; i++)
            pack_bit(blocks * DELTA_BLOCK, r, place[i],
                     p->left_bits[r * left_words + i / 32] >> i % 32, (unsigned *)host);
    memcpy(host + l.scale, p->row_scale, (size_t)delta->rows * sizeof(float));
    memcpy(host + l.col_scale, p->col_scale, (size_t)delta->cols * sizeof(float));
}

static int place_planes(struct device *device, struct packed_delta *packed,
                        const struct delta_tensor *delta, struct err *err)
{
    int32_t *place = (int32_t *)malloc((size_t)delta->planes.planes * sizeof *place);
    int32_t blocks = place ? find_places(&delta->planes, place) : 0;
    struct planes_layout l = layout_of(delta, blocks);
    char *host = place ? (char *)calloc(1, (size_t)l.end) : nullptr, *memory;
    int status;

    if (!host) {
        free(place);
        return err_set(err, ERR_NO_MEMORY, "no memory for a delta of %d by %d", delta->rows,
                       delta->cols);
    }
    pack_planes(delta, place, blocks, l, host);
    packed->bytes = l.end;
    status = upload(device, packed, host, err);
    memory = (char *)packed->memory;
    packed->view.planes = blocks * DELTA_BLOCK;
    packed->view.left = memory;
    packed->view.right = memory + l.right;
    packed->view.scale = (const float *)(memory + l.scale);
    packed->view.col_scale = (const float *)(memory + l.col_scale);
    packed->view.plane = (const struct delta_plane *)(memory + l.plane);
    free(host);
    free(place);
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

int cuda_delta_pack(struct backend *backend, const struct delta_tensor *delta,
                    struct packed_delta **out, struct err *err)
{
    struct device *device = cuda_of(backend)->device;
    struct packed_delta *packed;
    int status;

    *out = nullptr;
    if (delta_tensor_check(delta, err))
        return -1;
    packed = (struct packed_delta *)calloc(1, sizeof *packed);
    if (!packed)
        return err_set(err, ERR_NO_MEMORY, "no memory for a delta");
    packed->view.rows = delta->rows;
    packed->view.cols = delta->cols;
    if (delta->kind == DELTA_SIGN)
        status = place_signs(device, packed, delta, err);
    else if (delta->kind == DELTA_DENSE)
        status = place_dense(device, packed, delta, err);
    else if (delta->kind == DELTA_FACTORS)
        status = place_factors(device, packed, delta, err);
    else
        status = place_planes(device, packed, delta, err);
    if (status) {
        cuda_delta_free(backend, packed);
        return -1;
    }
    *out = packed;
    return 0;
}

/* The same place in another delta's memory; NULL stays NULL. */
template <typename T>
static void move(T **at, const struct packed_delta *from, const struct packed_delta *to)
{
    if (*at)
        *at = (T *)((const char *)to->memory + ((const char *)*at - (const char *)from->memory));
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
    move(&copy->view.bits, packed, copy);
    move(&copy->view.scale, packed, copy);
    move(&copy->view.more, packed, copy);
    move(&copy->view.dense, packed, copy);
    move(&copy->view.left, packed, copy);
    move(&copy->view.right, packed, copy);
    move(&copy->view.plane, packed, copy);
    move(&copy->view.col_scale, packed, copy);
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
