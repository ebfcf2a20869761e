#include "engine/cuda/cuda_backend.h"

#include <cassert>
#include <cstdlib>
#include <cstring>

#include "engine/cuda/cuda.h"

/* ------------------------------------------------------------------ memory */

static void *cuda_alloc(struct backend *backend, size_t bytes, struct err *err)
{
    struct device *device = cuda_of(backend)->device;
    void *memory = device_alloc(device, bytes, err);

    if (memory)
        device_fill(device, memory, 0, bytes);
    return memory;
}

static void cuda_free(struct backend *backend, void *memory)
{
    device_free(cuda_of(backend)->device, memory);
}

static void cuda_upload(struct backend *backend, void *to, const void *host, size_t bytes)
{
    device_copy_in(cuda_of(backend)->device, to, host, bytes);
}

static void cuda_download(struct backend *backend, void *host, const void *from, size_t bytes)
{
    device_copy_out(cuda_of(backend)->device, host, from, bytes);
}

static void cuda_memory(struct backend *backend, int64_t *bytes, int64_t *bytes_free)
{
    device_memory(cuda_of(backend)->device, bytes, bytes_free);
}

#define CONVERTED (1 << 18) /* elements that are converted at a time */

/* Elements [from, from + count) of `host` in `dtype`, F32 or BF16. */
static void convert(const struct tensor *host, int64_t from, int64_t count, enum dtype dtype,
                    float *values, uint16_t *halves)
{
    tensor_to_f32(host, from, count, values);
    if (dtype == DTYPE_BF16)
        for (int64_t i = 0; i < count; i++)
            halves[i] = f32_to_bf16(values[i]);
}

static int copy_converted(struct device *device, const struct tensor *host,
                          const struct tensor *out, struct err *err)
{
    int64_t elements = tensor_elements(host), size = dtype_size(out->dtype);
    float *values = (float *)malloc(CONVERTED * sizeof *values);
    uint16_t *halves = (uint16_t *)malloc(CONVERTED * sizeof *halves);

    for (int64_t from = 0; values && halves && from < elements; from += CONVERTED) {
        int64_t count = elements - from < CONVERTED ? elements - from : CONVERTED;

        convert(host, from, count, out->dtype, values, halves);
        device_copy_in(device, (char *)out->data + from * size,
                       out->dtype == DTYPE_BF16 ? (void *)halves : (void *)values,
                       (size_t)(count * size));
    }
    free(halves);
    free(values);
    return values && halves ? 0 : err_set(err, ERR_NO_MEMORY, "no memory to convert a weight");
}

/* Vectors (norms, biases) become F32, matrices what the precision says: kernels and products know
 * one type for weights and activations. */
static int cuda_weight_open(struct backend *backend, const struct tensor *host, struct tensor *out,
                            struct err *err)
{
    struct device *device = cuda_of(backend)->device;
    enum dtype dtype = host->rank == 1 ? DTYPE_F32 : backend->activation;
    size_t bytes = (size_t)tensor_elements(host) * (size_t)dtype_size(dtype);

    *out = tensor_view(nullptr, dtype, host->rank, host->shape);
    if (host->dtype > DTYPE_F16)
        return err_set(err, ERR_INVALID, "weights of dtype %s: F32, F16 or BF16 are known",
                       dtype_name(host->dtype));
    out->data = device_alloc(device, bytes, err);
    if (!out->data)
        return -1;
    if (host->dtype == dtype) {
        device_copy_in(device, out->data, host->data, bytes);
        return 0;
    }
    if (copy_converted(device, host, out, err) == 0)
        return 0;
    device_free(device, out->data);
    out->data = nullptr;
    return -1;
}

static void cuda_weight_close(struct backend *backend, struct tensor *weight)
{
    device_free(cuda_of(backend)->device, weight->data);
    weight->data = nullptr;
}

static int cuda_check(struct backend *backend, struct err *err)
{
    return device_check(cuda_of(backend)->device, err);
}

/* ------------------------------------------------------------------ begin */

#define STAGE_ARRAYS                                                            \
    8 /* of a number for each row, that stages bring in: head and sample need 7 \
       */

/* Pieces of one block of memory, filled on the host, which then goes to the device as a whole. */
struct packer {
    struct cuda *cuda;
    size_t used;
};

template <typename T> static T *piece(struct packer *p, int64_t count, const T **on_device)
{
    T *host = (T *)(p->cuda->staging + p->used);

    *on_device = (const T *)(p->cuda->meta + p->used);
    p->used += ((size_t)count * sizeof(T) + 15) / 16 * 16;
    assert(p->used <= p->cuda->meta_bytes);
    return host;
}

/* Room for a batch of this shape: grows when a batch is larger than all before it. */
static int make_room(struct cuda *cuda, const struct begin_args *a, struct err *err)
{
    const struct batch *b = a->batch;
    size_t rows = (size_t)b->rows, docs = (size_t)b->docs, groups = (size_t)b->segments.count;
    size_t layers = groups ? (size_t)a->config->layers : 0;
    size_t bytes = 4 * (6 * rows + 3 * docs + groups + 2 * (rows + docs) + STAGE_ARRAYS * rows) +
                   groups * (layers * sizeof(struct group_layer) + sizeof(struct group_outer)) +
                   4 * (size_t)a->inv_freq.shape[0] + 16 * 16;

    if (bytes > cuda->meta_bytes) {
        free(cuda->staging);
        device_free(cuda->device, cuda->meta);
        cuda->meta_bytes = 0;
        cuda->staging = (char *)malloc(2 * bytes);
        cuda->meta = (char *)device_alloc(cuda->device, 2 * bytes, err);
        if (!cuda->staging || !cuda->meta)
            return err_set(err, ERR_NO_MEMORY, "no memory for a batch of %d rows", b->rows);
        cuda->meta_bytes = 2 * bytes;
    }
    if (b->rows > cuda->order_rows) {
        free(cuda->order);
        cuda->order_rows = 0;
        /* For twice the rows: of each what is sorted, and behind all of those what came of it. */
        cuda->order = (uint64_t *)malloc(2 * rows * (sizeof *cuda->order + sizeof(int32_t)));
        if (!cuda->order)
            return err_set(err, ERR_NO_MEMORY, "no memory for a batch of %d rows", b->rows);
        cuda->order_rows = 2 * b->rows;
    }
    return 0;
}

static int compare_u64(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return x < y ? -1 : x > y;
}

static void place_rows(struct packer *p, const struct batch *b)
{
    struct cuda *cuda = p->cuda;
    struct cuda_batch *d = &cuda->batch;
    size_t bytes = (size_t)b->rows * sizeof(int32_t);

    memcpy(piece(p, b->rows, &d->token), b->token, bytes);
    memcpy(piece(p, b->rows, &d->position), b->position, bytes);
    if (b->serving)
        return;
    int32_t *order = piece(p, b->rows, &d->order);
    for (int32_t r = 0; r < b->rows; r++)
        cuda->order[r] = (uint64_t)b->token[r] << 32 | (uint32_t)r;
    qsort(cuda->order, (size_t)b->rows, sizeof *cuda->order, compare_u64);
    for (int32_t r = 0; r < b->rows; r++)
        order[r] = (int32_t)(uint32_t)cuda->order[r];
}

static void place_docs(struct packer *p, const struct batch *b)
{
    struct cuda_batch *d = &p->cuda->batch;
    int32_t *cu_seqlens = piece(p, b->docs + 1, &d->cu_seqlens);
    int32_t *row_doc = piece(p, b->rows, &d->row_doc), tiles = 0;
    int64_t most = b->docs + b->rows / CUDA_QUERY_TILE;
    int32_t *tile_doc = piece(p, most, &d->tile_doc), *tile_from = piece(p, most, &d->tile_from);

    memcpy(cu_seqlens, b->cu_seqlens, (size_t)(b->docs + 1) * sizeof *cu_seqlens);
    for (int32_t doc = 0; doc < b->docs; doc++) {
        for (int32_t r = cu_seqlens[doc]; r < cu_seqlens[doc + 1]; r++)
            row_doc[r] = doc;
        for (int32_t r = cu_seqlens[doc]; r < cu_seqlens[doc + 1]; r += CUDA_QUERY_TILE) {
            tile_doc[tiles] = doc;
            tile_from[tiles++] = r;
        }
    }
    d->tiles = tiles;
    if (!b->slot)
        return;
    int32_t *slot = piece(p, b->docs, &d->slot), *past = piece(p, b->docs, &d->past);
    for (int32_t doc = 0; doc < b->docs; doc++) {
        slot[doc] = b->slot[doc].slot;
        past[doc] = b->slot[doc].past;
    }
}

/* ------------------------------------------------------------------ groups */

static struct group_linear linear_of(const struct adapter_linear *l)
{
    struct group_linear g;

    g.delta = cuda_delta_view(l->delta);
    g.bias = data_of<const float>(l->b);
    return g;
}

static struct group_layer layer_of(const struct adapter_layer *l)
{
    struct group_layer g;

    g.q = linear_of(&l->q);
    g.k = linear_of(&l->k);
    g.v = linear_of(&l->v);
    g.o = linear_of(&l->o);
    g.gate = linear_of(&l->gate);
    g.up = linear_of(&l->up);
    g.down = linear_of(&l->down);
    g.attn_norm = data_of<const float>(l->attn_norm);
    g.q_norm = data_of<const float>(l->q_norm);
    g.k_norm = data_of<const float>(l->k_norm);
    g.mlp_norm = data_of<const float>(l->mlp_norm);
    return g;
}

static void count_sums(struct cuda *cuda, const struct delta_view *d)
{
    cuda->rank = d->rank > cuda->rank ? d->rank : cuda->rank;
    cuda->planes = d->planes > cuda->planes ? d->planes : cuda->planes;
}

/* The most of all deltas that products read. */
static void count_all_sums(struct cuda *cuda, const struct group_layer *layer,
                           const struct group_outer *outer, int32_t groups)
{
    cuda->rank = cuda->planes = 0;
    for (int64_t i = 0; i < (int64_t)cuda->layers * groups; i++) {
        const struct group_layer *l = &layer[i];
        const struct group_linear *own[] = {&l->q, &l->k, &l->v, &l->o, &l->gate, &l->up, &l->down};

        for (const struct group_linear *g : own)
            count_sums(cuda, &g->delta);
    }
    for (int32_t g = 0; g < groups; g++)
        count_sums(cuda, &outer[g].head);
}

/* The group of a segment: its adapter's first segment made it. -1: the base. */
static int32_t group_of(const struct row_segments *s, int32_t segment, const int32_t *group,
                        int32_t groups)
{
    if (!s->adapter[segment])
        return -1;
    for (int32_t before = 0; before < segment; before++)
        if (s->adapter[before] == s->adapter[segment])
            return group[before];
    return groups;
}

static void place_groups(struct packer *p, const struct batch *b)
{
    const struct row_segments *s = &b->segments;
    struct cuda_batch *d = &p->cuda->batch;
    int32_t layers = p->cuda->layers, groups = 0, rows = 0;
    int32_t *row_group = piece(p, b->rows, &d->row_group);
    int32_t *group_row = piece(p, b->rows, &d->group_row);
    int32_t *group_start = piece(p, s->count + 1, &d->group_start);
    struct group_outer *outer = piece(p, s->count, &d->outer);
    /* group_start serves as the list of each segment's group until the groups are known. */
    int32_t *segment_group = group_start;

    memset(row_group, 0xff, (size_t)b->rows * sizeof *row_group);
    for (int32_t i = 0; i < s->count; i++) {
        int32_t g = segment_group[i] = group_of(s, i, segment_group, groups);

        for (int32_t r = s->start[i]; r < s->start[i + 1]; r++)
            row_group[r] = g;
        if (g < groups)
            continue;
        outer[g].final_norm = data_of<const float>(s->adapter[i]->final_norm);
        outer[g].embed = cuda_delta_view(s->adapter[i]->embed);
        outer[g].head = cuda_delta_view(s->adapter[i]->head);
        groups++;
    }
    struct group_layer *layer = piece(p, (int64_t)layers * groups, &d->layer);
    for (int32_t i = 0, g = 0; i < s->count; i++) {
        if (segment_group[i] != g)
            continue;
        for (int32_t l = 0; l < layers; l++)
            layer[(int64_t)l * groups + g] = layer_of(&s->adapter[i]->layer[l]);
        g++;
    }
    for (int32_t g = 0; g < groups; g++) {
        group_start[g] = rows;
        for (int32_t r = 0; r < b->rows; r++)
            if (row_group[r] == g)
                group_row[rows++] = r;
    }
    group_start[groups] = p->cuda->grouped = rows;
    for (int32_t r = 0; r < b->rows; r++)
        if (row_group[r] < 0)
            group_row[rows++] = r;
    d->groups = groups;
    count_all_sums(p->cuda, layer, outer, groups);
}

/* A token for each sequence: many small launches, the same at the next step. What differs between
 * steps lies in the batch's block of memory. */
static bool decodes(const struct batch *b)
{
    return b->serving && b->slot && b->docs == b->rows;
}

static void cuda_begin(struct backend *backend, const struct begin_args *a)
{
    struct cuda *cuda = cuda_of(backend);
    struct packer p = {cuda, 0};
    int64_t half = a->inv_freq.shape[0];
    struct err err = {};
    const float *inv_freq;

    device_flush(cuda->device);
    if (device_failed(cuda->device))
        return;
    if (make_room(cuda, a, &err) || cuda_attention_room(cuda, a, &err)) {
        device_fail(cuda->device, err.kind, "%s", err.message);
        return;
    }
    cuda->batch = cuda_batch();
    cuda->batch.rows = a->batch->rows;
    cuda->batch.docs = a->batch->docs;
    cuda->layers = a->config->layers;
    memcpy(piece(&p, half, &inv_freq), a->inv_freq.data, (size_t)half * sizeof(float));
    place_rows(&p, a->batch);
    place_docs(&p, a->batch);
    place_groups(&p, a->batch);
    if (cuda_linear_room(cuda, &err)) {
        device_fail(cuda->device, err.kind, "%s", err.message);
        return;
    }
    device_copy_in(cuda->device, cuda->meta, cuda->staging, p.used);
    cuda->meta_used = p.used;
    if (decodes(a->batch))
        device_hold(cuda->device);
    cuda_rope(cuda, a, inv_freq);
}

void *cuda_bring(struct cuda *cuda, const void *host, size_t bytes)
{
    char *to = cuda->meta + cuda->meta_used;

    assert(cuda->meta_used + bytes <= cuda->meta_bytes || device_failed(cuda->device));
    if (device_failed(cuda->device))
        return nullptr;
    device_copy_ahead(cuda->device, to, host, bytes); /* nothing before it knows of this place */
    cuda->meta_used += (bytes + 15) / 16 * 16;
    return to;
}

/* ------------------------------------------------------------------ the table */

static void cuda_close(struct backend *backend)
{
    struct cuda *cuda = cuda_of(backend);

    if (!cuda)
        return;
    gemm_close(cuda->gemm);
    if (cuda->device) {
        device_free(cuda->device, cuda->meta);
        device_free(cuda->device, cuda->norm_parts);
        device_free(cuda->device, cuda->head_parts);
        device_free(cuda->device, cuda->partial);
        device_free(cuda->device, cuda->sums);
    }
    device_close(cuda->device);
    free(cuda->order);
    free(cuda->staging);
    free(cuda);
}

static struct backend_ops make_table()
{
    struct backend_ops ops = backend_ops();

    ops.name = "cuda";
    ops.close = cuda_close;
    ops.check = cuda_check;
    ops.alloc = cuda_alloc;
    ops.free = cuda_free;
    ops.upload = cuda_upload;
    ops.download = cuda_download;
    ops.memory = cuda_memory;
    ops.weight_open = cuda_weight_open;
    ops.weight_close = cuda_weight_close;
    ops.delta_pack = cuda_delta_pack;
    ops.delta_free = cuda_delta_free;
    ops.delta_bytes = cuda_delta_bytes;
    ops.begin = cuda_begin;
    ops.embed = cuda_embed;
    ops.embed_backward = cuda_embed_backward;
    ops.attn_in = cuda_attn_in;
    ops.attn_out = cuda_attn_out;
    ops.mlp = cuda_mlp;
    ops.head = cuda_head;
    ops.sample = cuda_sample;
    ops.head_loss = cuda_head_loss;
    ops.mlp_backward = cuda_mlp_backward;
    ops.attn_out_backward = cuda_attn_out_backward;
    ops.attn_in_backward = cuda_attn_in_backward;
    ops.gram = cuda_gram;
    ops.gradient_norm = cuda_gradient_norm;
    ops.adamw = cuda_adamw;
    ops.attention = cuda_attention;
    ops.attention_backward = cuda_attention_backward;
    return ops;
}

unsigned long cuda_backend_layout(void)
{
    return cuda_backend_layout_here();
}

int cuda_backend_open(struct backend *backend, const struct cuda_options *options, struct err *err)
{
    static const struct backend_ops ops = make_table();
    struct cuda *cuda = (struct cuda *)calloc(1, sizeof *cuda);

    memset(backend, 0, sizeof *backend);
    if (!cuda)
        return err_set(err, ERR_NO_MEMORY, "no memory for the cuda backend");
    backend->ops = &ops;
    backend->state = cuda;
    backend->threads = 1;
    backend->activation = cuda->activation = options->precision;
    if (device_open(&cuda->device, options->ordinal, err) ||
        gemm_open(&cuda->gemm, cuda->device, err))
        goto fail;
    cuda->norm_parts = (double *)device_alloc(cuda->device, CUDA_NORM_PARTS * sizeof(double), err);
    if (!cuda->norm_parts)
        goto fail;
    cuda->head_parts =
        (float *)device_alloc(cuda->device, CUDA_HEAD_PARTS * CUDA_MAX_HEAD * sizeof(float), err);
    if (!cuda->head_parts)
        goto fail;
    return 0;
fail:
    cuda_close(backend);
    memset(backend, 0, sizeof *backend);
    return -1;
}
