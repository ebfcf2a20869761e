#include <cstddef>

#include <cstdlib>

#include "engine/cuda/cuda_linear.cuh"
#include "engine/cuda/cuda_norm.cuh"
#include "engine/cuda/vector.cuh"

#define THREADS 256
#define OWN(member) offsetof(struct group_layer, member)

static struct linear_call call_of(const struct linear *linear, size_t own, const struct tensor &y)
{
    struct linear_call call = {linear, own, nullptr, y.data};

    return call;
}

static void norm_rows(struct cuda *cuda, const struct norm_call *rest, const struct tensor &x,
                      const struct tensor &n, const struct tensor &rstd)
{
    struct norm_call call = *rest;

    call.x = x.data;
    call.n = n.data;
    call.rstd = data_of<float>(rstd);
    call.own_stride = sizeof(struct group_layer);
    call.count = cuda->batch.rows;
    call.width = (int32_t)x.shape[1];
    cuda_norm(cuda, &call);
}

/* ------------------------------------------------------------------ attn_in, attn_out */

void cuda_attn_in(struct backend *backend, const struct attn_in_args *a)
{
    struct cuda *cuda = cuda_of(backend);
    const struct layer_weights *w = a->weights;
    struct norm_call norm = norm_call();
    const struct linear_call call[] = {
        call_of(&w->q, OWN(q), a->q),
        call_of(&w->k, OWN(k), a->k),
        call_of(&w->v, OWN(v), a->v),
    };

    norm.weight = data_of<const float>(w->attn_norm);
    norm.own = OWN_VECTOR(cuda, a->layer, attn_norm);
    norm.eps = a->config->rms_norm_eps;
    norm_rows(cuda, &norm, a->x, a->n, a->rstd);
    cuda_linear(cuda, a->batch, a->layer, a->n.data, call, 3);
    cuda_rotate(cuda, a);
}

void cuda_attn_out(struct backend *backend, const struct attn_out_args *a)
{
    struct linear_call call = call_of(&a->weights->o, OWN(o), a->y);

    call.residual = a->x.data;
    cuda_linear(cuda_of(backend), a->batch, a->layer, a->attn.data, &call, 1);
}

/* ------------------------------------------------------------------ mlp */

/* act may be gate. */
template <typename T, int WIDE>
static __global__ void silu_kernel(const T *gate, const T *up, T *act, int64_t count)
{
    int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * WIDE;
    float g[WIDE], u[WIDE];

    if (i >= count)
        return;
    load_wide<WIDE>(gate + i, g);
    load_wide<WIDE>(up + i, u);
    UNROLL
    for (int k = 0; k < WIDE; k++)
        g[k] = g[k] * (1.0f / (1.0f + expf(-g[k]))) * u[k];
    store_wide<WIDE>(act + i, g);
}

template <typename T, int WIDE> static void silu_of(struct cuda *cuda, const struct mlp_args *a)
{
    int64_t count = (int64_t)cuda->batch.rows * a->gate.shape[1];

    CUDA_LAUNCH(cuda->device, (silu_kernel<T, WIDE>), (unsigned)ceil_div(count, THREADS * WIDE),
                THREADS, 0, data_of<const T>(a->gate), data_of<const T>(a->up), data_of<T>(a->act),
                count);
}

static void silu(struct cuda *cuda, const struct mlp_args *a)
{
    uintptr_t places = (uintptr_t)a->gate.data | (uintptr_t)a->up.data | (uintptr_t)a->act.data;

    if (a->gate.shape[1] % 8 == 0 && places % 16 == 0)
        WITH_PRECISION(cuda, T, silu_of<T, 8>(cuda, a));
    else
        WITH_PRECISION(cuda, T, silu_of<T, 1>(cuda, a));
}

void cuda_mlp(struct backend *backend, const struct mlp_args *a)
{
    struct cuda *cuda = cuda_of(backend);
    const struct layer_weights *w = a->weights;
    struct norm_call norm = norm_call();
    const struct linear_call in[] = {
        call_of(&w->gate, OWN(gate), a->gate),
        call_of(&w->up, OWN(up), a->up),
    };
    struct linear_call out = call_of(&w->down, OWN(down), a->y);

    norm.weight = data_of<const float>(w->mlp_norm);
    norm.own = OWN_VECTOR(cuda, a->layer, mlp_norm);
    norm.eps = a->config->rms_norm_eps;
    norm_rows(cuda, &norm, a->x, a->n, a->rstd);
    cuda_linear(cuda, a->batch, a->layer, a->n.data, in, 2);
    silu(cuda, a);
    out.residual = a->x.data;
    cuda_linear(cuda, a->batch, a->layer, a->act.data, &out, 1);
}

/* ------------------------------------------------------------------ head */

static int compare_u64(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return x < y ? -1 : x > y;
}

/* The chosen rows by group, on the device: entry i is a number from 0 to count - 1. */
static const int32_t *order_rows(struct cuda *cuda, const struct head_args *a, int32_t *grouped)
{
    const char *at = (const char *)cuda->batch.row_group;
    /* begin's copy on the host */
    const int32_t *group = (const int32_t *)(cuda->staging + (at - cuda->meta));
    int32_t *order = (int32_t *)(cuda->order + a->count);

    *grouped = 0;
    for (int32_t i = 0; i < a->count; i++) {
        cuda->order[i] = (uint64_t)(uint32_t)group[a->row[i]] << 32 | (uint32_t)i;
        *grouped += group[a->row[i]] >= 0;
    }
    qsort(cuda->order, (size_t)a->count, sizeof *cuda->order, compare_u64);
    for (int32_t i = 0; i < a->count; i++)
        order[i] = (int32_t)(uint32_t)cuda->order[i];
    return (const int32_t *)cuda_bring(cuda, order, (size_t)a->count * sizeof *order);
}

static void head_serve(struct cuda *cuda, const struct head_args *a, const int32_t *row)
{
    struct linear_job job = linear_job();

    job.count = 1;
    job.x = a->n.data;
    job.in = (int32_t)a->head.shape[1];
    job.rows = a->count;
    job.order = order_rows(cuda, a, &job.grouped);
    job.row = row;
    job.own_stride = sizeof(struct group_outer);
    job.wide = true;
    job.matrix[0].w = a->head.data;
    job.matrix[0].own = cuda->batch.groups
                            ? (const char *)cuda->batch.outer + offsetof(struct group_outer, head)
                            : nullptr;
    job.matrix[0].y = a->logits.data;
    job.matrix[0].out = (int32_t)a->head.shape[0];
    cuda_linear_serve(cuda, &job);
}

static void head_train(struct cuda *cuda, const struct head_args *a)
{
    struct gemm g = gemm();

    g.transpose_b = true;
    g.m = a->count;
    g.n = (int32_t)a->head.shape[0];
    g.k = (int32_t)a->head.shape[1];
    g.dtype = cuda->activation;
    g.c_dtype = DTYPE_F32;
    g.a = a->n.data;
    g.b = a->head.data;
    g.c = a->logits.data;
    g.lda = g.ldb = g.k;
    g.ldc = g.n;
    gemm_run(cuda->gemm, &g);
}

void cuda_head(struct backend *backend, const struct head_args *a)
{
    struct cuda *cuda = cuda_of(backend);
    struct norm_call norm = norm_call();

    if (a->count == 0 || device_failed(cuda->device))
        return;
    norm.x = a->x.data;
    norm.n = a->n.data;
    norm.weight = data_of<const float>(a->final_norm);
    norm.own = cuda->batch.groups
                   ? (const char *)cuda->batch.outer + offsetof(struct group_outer, final_norm)
                   : nullptr;
    norm.own_stride = sizeof(struct group_outer);
    norm.row = (const int32_t *)cuda_bring(cuda, a->row, (size_t)a->count * sizeof *a->row);
    norm.count = a->count;
    norm.width = (int32_t)a->x.shape[1];
    norm.eps = a->config->rms_norm_eps;
    cuda_norm(cuda, &norm);
    if (a->batch->serving)
        head_serve(cuda, a, norm.row);
    else
        head_train(cuda, a);
}
