#include "engine/cuda/cuda_norm.cuh"
#include "engine/cuda/vector.cuh"

#define THREADS 256
#define SUM_COLUMNS 32 /* of a block that adds up rows */
#define SUM_WARPS 32   /* each with every 32nd row */
#define HEAD_WARPS 8

/* ------------------------------------------------------------------ rows */

/* One block for each row: dx (+)= the gradient through the norm of dn. VECTOR: rows are whole
 * vectors of 8, and so are read. */
template <typename T, bool VECTOR>
static __global__ void norm_backward_kernel(struct norm_backward call)
{
    constexpr int WIDE = VECTOR ? 8 : 1;
    int64_t i = blockIdx.x, r = call.row ? call.row[i] : i;
    const T *x = static_cast<const T *>(call.x) + r * call.width;
    const T *dn = static_cast<const T *>(call.dn) + i * call.width;
    T *dx = static_cast<T *>(call.dx) + r * call.width;
    float squares = 0, along = 0;

    for (int32_t c = threadIdx.x * WIDE; c < call.width; c += THREADS * WIDE) {
        float value[WIDE], d[WIDE], w[WIDE];

        load_wide<WIDE>(x + c, value);
        load_wide<WIDE>(dn + c, d);
        load_wide<WIDE>(call.weight + c, w);
        UNROLL
        for (int k = 0; k < WIDE; k++) {
            squares = fmaf(value[k], value[k], squares);
            along = fmaf(w[k] * d[k], value[k], along);
        }
    }
    float rstd =
        call.known ? call.rstd[i] : 1.0f / sqrtf(block_sum(squares) / (float)call.width + call.eps);
    float back = block_sum(along) * rstd * rstd / (float)call.width;
    if (!call.known && threadIdx.x == 0)
        call.rstd[i] = rstd;
    for (int32_t c = threadIdx.x * WIDE; c < call.width; c += THREADS * WIDE) {
        float value[WIDE], d[WIDE], w[WIDE], sum[WIDE];

        load_wide<WIDE>(x + c, value);
        load_wide<WIDE>(dn + c, d);
        load_wide<WIDE>(call.weight + c, w);
        if (call.add)
            load_wide<WIDE>(dx + c, sum);
        UNROLL
        for (int k = 0; k < WIDE; k++) {
            float g = (w[k] * d[k] - value[k] * back) * rstd;

            sum[k] = call.add ? sum[k] + g : g;
        }
        store_wide<WIDE>(dx + c, sum);
    }
}

/* sum[c] += Σ dy over the rows; with x, Σ dy · x · rstd: what a bias and a norm's weight get. A
 * block has SUM_COLUMNS columns; its warps' sums are added in order. */
template <typename T>
static __global__ void column_sum_kernel(struct norm_backward call, const T *dy, float *sum)
{
    SHARED(float, parts, [SUM_WARPS][SUM_COLUMNS]);
    int32_t lane = threadIdx.x % SUM_COLUMNS, warp = threadIdx.x / SUM_COLUMNS;
    int32_t c = blockIdx.x * SUM_COLUMNS + lane;
    const T *x = static_cast<const T *>(call.x);
    float mine = 0;

    for (int32_t i = warp; c < call.width && i < call.count; i += SUM_WARPS) {
        float d = to_float(dy[(int64_t)i * call.width + c]);

        if (x)
            d *= to_float(x[(int64_t)(call.row ? call.row[i] : i) * call.width + c]) * call.rstd[i];
        mine += d;
    }
    parts[warp][lane] = mine;
    __syncthreads();
    if (warp > 0 || c >= call.width)
        return;
    for (int i = 1; i < SUM_WARPS; i++)
        mine += parts[i][lane];
    sum[c] += mine;
}

template <typename T> static void norm_backward_of(struct cuda *cuda, const struct norm_backward *c)
{
    uintptr_t places = (uintptr_t)c->x | (uintptr_t)c->dn | (uintptr_t)c->dx | (uintptr_t)c->weight;

    if (c->width % 8 == 0 && places % 16 == 0)
        CUDA_LAUNCH(cuda->device, (norm_backward_kernel<T, true>), (unsigned)c->count, THREADS, 0,
                    *c);
    else
        CUDA_LAUNCH(cuda->device, (norm_backward_kernel<T, false>), (unsigned)c->count, THREADS, 0,
                    *c);
    if (c->d_weight)
        CUDA_LAUNCH(cuda->device, column_sum_kernel<T>, (unsigned)ceil_div(c->width, SUM_COLUMNS),
                    SUM_WARPS * 32, 0, *c, static_cast<const T *>(c->dn), c->d_weight);
}

void cuda_norm_backward(struct cuda *cuda, const struct norm_backward *call)
{
    WITH_PRECISION(cuda, T, norm_backward_of<T>(cuda, call));
}

void cuda_bias_gradient(struct cuda *cuda, const struct tensor &grad, const struct tensor &dy)
{
    struct norm_backward call = norm_backward();

    if (!grad.data)
        return;
    call.count = (int32_t)dy.shape[0];
    call.width = (int32_t)dy.shape[1];
    WITH_PRECISION(cuda, T,
                   CUDA_LAUNCH(cuda->device, column_sum_kernel<T>,
                               (unsigned)ceil_div(call.width, SUM_COLUMNS), SUM_WARPS * 32, 0, call,
                               data_of<const T>(dy), data_of<float>(grad)));
}

/* ------------------------------------------------------------------ heads */

struct heads_call {
    void *d;             /* [rows, heads, head_dim]: gradient behind rope; out: at the product */
    const void *raw;     /* the same shape, before the norm */
    const float *weight; /* [head_dim]; NULL: no norm */
    const float *rope;   /* [rows, head_dim] */
    float *parts;        /* [blocks, head_dim]: sums of d · raw · rstd; NULL: not wanted */
    int32_t items, heads, head_dim;
    float eps;
};

/* A lane's share of a head: pairs lane, lane + 32, …, both halves of each. */
template <int PAIRS> struct head_share {
    float low[PAIRS], high[PAIRS];
};

/* The gradient in front of rope: rope turned back. */
template <typename T, int PAIRS>
static __device__ __forceinline__ void turn_back(const T *d, const float *turn, int32_t half,
                                                 struct head_share<PAIRS> *out)
{
    UNROLL
    for (int i = 0; i < PAIRS; i++) {
        int32_t c = threadIdx.x % 32 + i * 32;
        bool there = c < half;
        float a = there ? to_float(d[c]) : 0, b = there ? to_float(d[c + half]) : 0;
        float cosine = there ? turn[c] : 0, sine = there ? turn[half + c] : 0;

        out->low[i] = a * cosine + b * sine;
        out->high[i] = b * cosine - a * sine;
    }
}

/* Through the norm of one head; adds to its weight's gradient. */
template <typename T, int PAIRS>
static __device__ __forceinline__ void head_norm_backward(const struct heads_call &call,
                                                          const T *raw, struct head_share<PAIRS> *d,
                                                          struct head_share<PAIRS> *grad)
{
    int32_t half = call.head_dim / 2;
    struct head_share<PAIRS> x, wd;
    float squares = 0, along = 0;

    UNROLL
    for (int i = 0; i < PAIRS; i++) {
        int32_t c = threadIdx.x % 32 + i * 32;
        bool there = c < half;

        x.low[i] = there ? to_float(raw[c]) : 0;
        x.high[i] = there ? to_float(raw[c + half]) : 0;
        wd.low[i] = there ? call.weight[c] * d->low[i] : 0;
        wd.high[i] = there ? call.weight[c + half] * d->high[i] : 0;
        squares += x.low[i] * x.low[i] + x.high[i] * x.high[i];
        along += wd.low[i] * x.low[i] + wd.high[i] * x.high[i];
    }
    float rstd = 1.0f / sqrtf(warp_sum(squares) / (float)call.head_dim + call.eps);
    float back = warp_sum(along) * rstd * rstd / (float)call.head_dim;
    UNROLL
    for (int i = 0; i < PAIRS; i++) {
        grad->low[i] += d->low[i] * x.low[i] * rstd;
        grad->high[i] += d->high[i] * x.high[i] * rstd;
        d->low[i] = (wd.low[i] - x.low[i] * back) * rstd;
        d->high[i] = (wd.high[i] - x.high[i] * back) * rstd;
    }
}

/* A warp for each head of each row, in turns: block b has items b · HEAD_WARPS + warp, and then
 * those a whole grid further on. The grid follows from the shapes alone, and so do the parts. */
template <typename T, int PAIRS>
static __global__ void heads_backward_kernel(struct heads_call call)
{
    SHARED(float, sums, [HEAD_WARPS][PAIRS * 64]);
    int32_t half = call.head_dim / 2, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    struct head_share<PAIRS> grad = {};

    for (int32_t i = blockIdx.x * HEAD_WARPS + warp; i < call.items; i += gridDim.x * HEAD_WARPS) {
        int64_t at = (int64_t)i * call.head_dim;
        T *to = static_cast<T *>(call.d) + at;
        struct head_share<PAIRS> d;

        turn_back<T, PAIRS>(to, call.rope + (int64_t)(i / call.heads) * call.head_dim, half, &d);
        if (call.weight)
            head_norm_backward<T, PAIRS>(call, static_cast<const T *>(call.raw) + at, &d, &grad);
        UNROLL
        for (int k = 0; k < PAIRS; k++) {
            int32_t c = lane + k * 32;

            if (c >= half)
                continue;
            to[c] = from_float<T>(d.low[k]);
            to[c + half] = from_float<T>(d.high[k]);
        }
    }
    if (!call.parts)
        return;
    UNROLL
    for (int k = 0; k < PAIRS; k++) {
        sums[warp][lane + k * 32] = grad.low[k];
        sums[warp][PAIRS * 32 + lane + k * 32] = grad.high[k];
    }
    __syncthreads();
    for (int32_t c = threadIdx.x; c < call.head_dim; c += HEAD_WARPS * 32) {
        int32_t from = c < half ? c : PAIRS * 32 + c - half;
        float sum = 0;

        for (int w = 0; w < HEAD_WARPS; w++)
            sum += sums[w][from];
        call.parts[(int64_t)blockIdx.x * call.head_dim + c] = sum;
    }
}

/* grad += the parts, in order: one thread for each weight. */
static __global__ void head_parts_kernel(const float *parts, int32_t count, int32_t head_dim,
                                         float *grad)
{
    int32_t c = blockIdx.x * blockDim.x + threadIdx.x;
    float sum = 0;

    if (c >= head_dim)
        return;
    for (int32_t i = 0; i < count; i++)
        sum += parts[(int64_t)i * head_dim + c];
    grad[c] += sum;
}

template <typename T>
static void launch_heads(struct cuda *cuda, const struct heads_call &call, unsigned blocks)
{
    if (call.head_dim <= 64)
        CUDA_LAUNCH(cuda->device, (heads_backward_kernel<T, 1>), blocks, HEAD_WARPS * 32, 0, call);
    else if (call.head_dim <= 128)
        CUDA_LAUNCH(cuda->device, (heads_backward_kernel<T, 2>), blocks, HEAD_WARPS * 32, 0, call);
    else if (call.head_dim <= 256)
        CUDA_LAUNCH(cuda->device, (heads_backward_kernel<T, 4>), blocks, HEAD_WARPS * 32, 0, call);
    else
        CUDA_LAUNCH(cuda->device, (heads_backward_kernel<T, 8>), blocks, HEAD_WARPS * 32, 0, call);
}

void cuda_heads_backward(struct cuda *cuda, const struct heads_backward *a)
{
    struct heads_call call = heads_call();
    float *grad = data_of<float>(a->d_weight);
    int64_t blocks;

    call.d = a->d.data;
    call.raw = a->raw.data;
    call.weight = data_of<const float>(a->weight);
    call.rope = data_of<const float>(a->rope);
    call.head_dim = (int32_t)a->rope.shape[1];
    call.heads = (int32_t)(a->d.shape[1] / call.head_dim);
    call.items = (int32_t)a->d.shape[0] * call.heads;
    call.eps = a->eps;
    if (call.weight && grad)
        call.parts = cuda->head_parts;
    blocks = ceil_div(call.items, HEAD_WARPS);
    if (blocks > CUDA_HEAD_PARTS)
        blocks = CUDA_HEAD_PARTS;
    WITH_PRECISION(cuda, T, launch_heads<T>(cuda, call, (unsigned)blocks));
    if (call.parts)
        CUDA_LAUNCH(cuda->device, head_parts_kernel, (unsigned)ceil_div(call.head_dim, 32), 32, 0,
                    call.parts, (int32_t)blocks, call.head_dim, grad);
}
