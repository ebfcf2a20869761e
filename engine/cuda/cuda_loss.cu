/* Final norm, logits, the loss and their gradients, a chunk of trained rows at a time, so that
 * no more than the caller's scratch of logits is ever held. */
#include "engine/cuda/cuda_norm.cuh"

#define SOFTMAX_THREADS 512

/* The rows of one chunk: [count] device memory, and per row of the batch what is asked and told. */
struct loss_rows {
    const int32_t *row;
    int32_t count;
    const int32_t *target; /* or NULL: there is a teacher */
    const float *weight;
    struct loss_margins margins; /* of NULL: none */
    float *nll;
    int32_t *correct;
};

/* ------------------------------------------------------------------ cross-entropy */

/* W logits from place `at`; -inf behind the end. Rows are aligned for W (see softmax). */
template <int W>
static __device__ __forceinline__ void load_logits(float x[W], const float *logit, int32_t at,
                                                   int32_t vocabulary)
{
    if (at >= vocabulary) {
        for (int k = 0; k < W; k++)
            x[k] = -INFINITY;
    } else if (W == 4) {
        float4 four = *reinterpret_cast<const float4 *>(logit + at);

        x[0] = four.x;
        x[1 % W] = four.y;
        x[2 % W] = four.z;
        x[3 % W] = four.w;
    } else {
        x[0] = logit[at];
    }
}

template <int W, typename T>
static __device__ __forceinline__ void store_gradient(T *gradient, int32_t at, const float g[W])
{
    struct alignas(W * sizeof(T)) {
        T value[W];
    } all;

    for (int k = 0; k < W; k++)
        all.value[k] = from_float<T>(g[k]);
    *reinterpret_cast<decltype(all) *>(gradient + at) = all;
}

/* What one thread has seen of a row: its largest logit, the sum of exp(logit - largest), and
 * whether a logit is better than the target's or as good with a lower index. */
struct softmax_part {
    float max, sum;
    bool beaten;
};

template <int W>
static __device__ __forceinline__ softmax_part read_row(const float *logit, int32_t vocabulary,
                                                        int32_t target, float of_target)
{
    softmax_part p = {-INFINITY, 0, false};

    for (int32_t at = threadIdx.x * W; at < vocabulary; at += blockDim.x * W) {
        float x[W], top;

        load_logits<W>(x, logit, at, vocabulary);
        top = p.max;
        for (int k = 0; k < W; k++) {
            top = fmaxf(top, x[k]);
            p.beaten |= x[k] > of_target || (x[k] == of_target && at + k < target);
        }
        if (top > p.max) {
            p.sum *= expf(p.max - top);
            p.max = top;
        }
        for (int k = 0; k < W; k++)
            p.sum += expf(x[k] - p.max);
    }
    return p;
}

/* What the gradient at the logits has of the row's margin: at the best token, and less at the
 * other. Weight 0: nothing. */
struct row_margin {
    float weight;
    int32_t best, other;
};

static __device__ __forceinline__ row_margin margin_of(const struct loss_margins &m, int32_t row,
                                                       const float *logit)
{
    row_margin r = {0, -1, -1};

    if (!m.weight || m.weight[row] == 0)
        return r;
    r.best = m.best[row];
    r.other = m.other[row];
    r.weight = m.weight[row] / fmaxf(1, logit[r.best] - logit[r.other]);
    return r;
}

static __device__ __forceinline__ float margin_at(const row_margin &r, int32_t token)
{
    return (token == r.best ? r.weight : 0.0f) - (token == r.other ? r.weight : 0.0f);
}

/* One block for each row of the chunk, which reads its logits twice: once for the loss, and with
 * `backward` once more to write the gradient over them, as T. Gradients narrower than logits go to
 * the front of the same row, [V] of them, the row's distance staying V floats: they overlap only
 * logits that this turn of the loop or an earlier one has read, hence the barrier. */
template <int W, typename T>
static __global__ void loss_softmax_kernel(struct loss_rows rows, float *logits, int32_t vocabulary,
                                           bool backward)
{
    float *logit = logits + (int64_t)blockIdx.x * vocabulary;
    T *gradient = reinterpret_cast<T *>(logit);
    int32_t row = rows.row[blockIdx.x], target = rows.target[row];
    float of_target = logit[target], weight = rows.weight[row];
    row_margin margin = margin_of(rows.margins, row, logit);
    softmax_part p = read_row<W>(logit, vocabulary, target, of_target);
    float max = block_max(p.max);
    bool beaten = block_max(p.beaten ? 1.0f : 0.0f) > 0;
    float sum = block_sum(p.sum * expf(p.max - max));

    if (threadIdx.x == 0) {
        rows.nll[row] = logf(sum) + max - of_target;
        rows.correct[row] = !beaten;
    }
    if (!backward)
        return;
    for (int32_t from = 0; from < vocabulary; from += blockDim.x * W) {
        int32_t at = from + threadIdx.x * W;
        float x[W];

        load_logits<W>(x, logit, at, vocabulary);
        for (int k = 0; k < W; k++)
            x[k] = expf(x[k] - max) * (weight / sum) - (at + k == target ? weight : 0.0f) +
                   margin_at(margin, at + k);
        if (sizeof(T) < sizeof(float))
            __syncthreads();
        if (at < vocabulary)
            store_gradient<W>(gradient, at, x);
    }
}

/* ------------------------------------------------------------------ the distance to a teacher */

/* Of a row, or of what one thread has seen of it. `best` is the place of the largest logit, the
 * first of equal ones; a float has room for 16 million. */
struct row_softmax {
    float max, sum, best;
};

template <int W>
static __device__ __forceinline__ row_softmax softmax_of(const float *logit, int32_t vocabulary)
{
    row_softmax p = {-INFINITY, 0, (float)vocabulary}, row;

    for (int32_t at = threadIdx.x * W; at < vocabulary; at += blockDim.x * W) {
        float x[W], before = p.max;

        load_logits<W>(x, logit, at, vocabulary);
        for (int k = 0; k < W; k++)
            if (x[k] > p.max) {
                p.max = x[k];
                p.best = (float)(at + k);
            }
        if (p.max > before)
            p.sum *= expf(before - p.max);
        for (int k = 0; k < W; k++)
            p.sum += expf(x[k] - p.max);
    }
    row.max = block_max(p.max);
    row.best = -block_max(p.max == row.max ? -p.best : -INFINITY);
    row.sum = block_sum(p.sum * expf(p.max - row.max));
    return row;
}

/* exp(-d) - 1 + d without its cancellation, for |d| at most 1/2. */
static __device__ __forceinline__ float exp_excess(float d)
{
    float e = -1.0f / 5040 + d * (1.0f / 40320);

    e = 1.0f / 720 + d * e;
    e = -1.0f / 120 + d * e;
    e = 1.0f / 24 + d * e;
    e = -1.0f / 6 + d * e;
    return d * d * (0.5f + d * e);
}

/* One block for each row, which reads both rows of logits twice: for their softmax, and for
 * KL = Σ p_teacher · (exp(-d) - 1 + d) with d = log p_teacher - log p, whose terms are not negative
 * (cpu/kernels.h says more). The gradient goes where loss_softmax_kernel puts it, and waits as
 * there.
 */
template <int W, typename T>
static __global__ void loss_teacher_kernel(struct loss_rows rows, float *logits,
                                           const float *teacher_logits, int32_t vocabulary,
                                           bool backward)
{
    float *logit = logits + (int64_t)blockIdx.x * vocabulary;
    const float *teacher = teacher_logits + (int64_t)blockIdx.x * vocabulary;
    T *gradient = reinterpret_cast<T *>(logit);
    int32_t row = rows.row[blockIdx.x];
    float weight = rows.weight[row], kl = 0;
    row_softmax model = softmax_of<W>(logit, vocabulary);
    row_softmax of_teacher = softmax_of<W>(teacher, vocabulary);
    float shift = (of_teacher.max - model.max) + logf(of_teacher.sum / model.sum);

    for (int32_t from = 0; from < vocabulary; from += blockDim.x * W) {
        int32_t at = from + threadIdx.x * W;
        float x[W], y[W];

        load_logits<W>(x, logit, at, vocabulary);
        load_logits<W>(y, teacher, at, vocabulary);
        for (int k = 0; k < W && at < vocabulary; k++) {
            float d = (y[k] - x[k]) - shift, p = expf(x[k] - model.max) / model.sum;
            float p_teacher = expf(y[k] - of_teacher.max) / of_teacher.sum;
            bool near = fabsf(d) <= 0.5f;
            float excess = exp_excess(near ? d : 0.0f);

            kl += near ? p_teacher * excess : p_teacher * (d - 1) + p;
            x[k] = weight * (near ? p_teacher * (excess - d) : p - p_teacher);
        }
        if (sizeof(T) < sizeof(float))
            __syncthreads();
        if (backward && at < vocabulary)
            store_gradient<W>(gradient, at, x);
    }
    kl = block_sum(kl);
    if (threadIdx.x == 0) {
        rows.nll[row] = kl;
        rows.correct[row] = model.best == of_teacher.best && model.best < (float)vocabulary;
    }
}

/* ------------------------------------------------------------------ a chunk */

template <int W, typename T>
static void loss_of_width(struct cuda *cuda, const struct head_loss_args *a,
                          const struct loss_rows &rows)
{
    int32_t vocabulary = (int32_t)a->head.shape[0];
    unsigned blocks = (unsigned)rows.count;
    float *logits = data_of<float>(a->logits);
    bool backward = a->dx.data != nullptr;

    if (a->teacher_x.data)
        CUDA_LAUNCH(cuda->device, (loss_teacher_kernel<W, T>), blocks, SOFTMAX_THREADS, 0, rows,
                    logits, data_of<const float>(a->teacher_logits), vocabulary, backward);
    else
        CUDA_LAUNCH(cuda->device, (loss_softmax_kernel<W, T>), blocks, SOFTMAX_THREADS, 0, rows,
                    logits, vocabulary, backward);
}

template <typename T>
static void loss(struct cuda *cuda, const struct head_loss_args *a, const struct loss_rows &rows)
{
    if (a->head.shape[0] % 4 == 0)
        loss_of_width<4, T>(cuda, a, rows);
    else
        loss_of_width<1, T>(cuda, a, rows);
}

struct reader { /* who turns the last rows into logits: the model or its teacher */
    struct tensor x, norm, head, logits;
};

static void norm_forward(struct cuda *cuda, const struct head_loss_args *a,
                         const struct reader &reader, const struct loss_rows &rows)
{
    struct norm_call norm = {};

    norm.x = reader.x.data;
    norm.n = a->n.data;
    norm.weight = data_of<const float>(reader.norm);
    norm.row = rows.row;
    norm.count = rows.count;
    norm.width = (int32_t)a->x.shape[1];
    norm.eps = a->config->rms_norm_eps;
    cuda_norm(cuda, &norm);
}

static void logits_product(struct cuda *cuda, const struct head_loss_args *a,
                           const struct reader &reader, int32_t count)
{
    struct gemm g = {};

    g.transpose_b = true;
    g.m = count;
    g.n = (int32_t)reader.head.shape[0];
    g.k = (int32_t)reader.head.shape[1];
    g.dtype = cuda->activation;
    g.c_dtype = DTYPE_F32;
    g.a = a->n.data;
    g.b = reader.head.data;
    g.c = reader.logits.data;
    g.lda = g.ldb = g.k;
    g.ldc = g.n;
    gemm_run(cuda->gemm, &g);
}

static void read_chunk(struct cuda *cuda, const struct head_loss_args *a,
                       const struct reader &reader, const struct loss_rows &rows)
{
    norm_forward(cuda, a, reader, rows);
    logits_product(cuda, a, reader, rows.count);
}

/* dn = dlogits · head and d_head += dlogitsᵀ · n. */
static void gradient_products(struct cuda *cuda, const struct head_loss_args *a, int32_t count)
{
    int32_t vocabulary = (int32_t)a->head.shape[0], width = (int32_t)a->head.shape[1];
    struct gemm g = {};

    g.m = count;
    g.n = width;
    g.k = vocabulary;
    g.dtype = g.c_dtype = cuda->activation;
    g.a = a->logits.data;
    g.b = a->head.data;
    g.c = a->dn.data;
    g.lda = vocabulary * (int64_t)(sizeof(float) / (size_t)dtype_size(cuda->activation));
    g.ldb = g.ldc = width;
    gemm_run(cuda->gemm, &g);
    if (!a->d_head.data)
        return;
    g.transpose_a = true;
    g.m = vocabulary;
    g.k = count;
    g.c_dtype = DTYPE_F32;
    g.b = a->n.data;
    g.c = a->d_head.data;
    g.add = true;
    gemm_run(cuda->gemm, &g);
}

/* The scratch of logits has been used up when rstd goes there. */
static void norm_back(struct cuda *cuda, const struct head_loss_args *a,
                      const struct loss_rows &rows)
{
    struct norm_backward call = {};

    call.x = a->x.data;
    call.weight = data_of<const float>(a->final_norm);
    call.dn = a->dn.data;
    call.dx = a->dx.data;
    call.rstd = data_of<float>(a->logits);
    call.d_weight = data_of<float>(a->d_final_norm);
    call.row = rows.row;
    call.count = rows.count;
    call.width = (int32_t)a->x.shape[1];
    call.eps = a->config->rms_norm_eps;
    cuda_norm_backward(cuda, &call);
}

template <typename T>
static void run_chunk(struct cuda *cuda, const struct head_loss_args *a,
                      const struct loss_rows &rows)
{
    if (a->teacher_x.data)
        read_chunk(cuda, a, {a->teacher_x, a->teacher_norm, a->teacher_head, a->teacher_logits},
                   rows);
    read_chunk(cuda, a, {a->x, a->final_norm, a->head, a->logits}, rows); /* last: backward's n */
    loss<T>(cuda, a, rows);
    if (!a->dx.data)
        return;
    gradient_products(cuda, a, rows.count);
    norm_back(cuda, a, rows);
}

/* ------------------------------------------------------------------ the stage */

/* The rows that have a weight, in begin's scratch of row numbers. */
static int32_t list_rows(struct cuda *cuda, const struct head_loss_args *a, int32_t **list)
{
    int32_t *row = reinterpret_cast<int32_t *>(cuda->order), count = 0;

    for (int32_t r = 0; r < a->batch->rows; r++)
        if (a->weight[r] != 0)
            row[count++] = r;
    *list = row;
    return count;
}

/* The arguments that a kernel would take for something else. */
static bool check_args(struct cuda *cuda, const struct head_loss_args *a)
{
    const struct tensor *strange = a->head.dtype != cuda->activation ? &a->head
                                   : a->teacher_x.data && a->teacher_head.dtype != cuda->activation
                                       ? &a->teacher_head
                                       : nullptr;

    if (strange)
        device_fail(cuda->device, ERR_INTERNAL, "head_loss: a head of dtype %s",
                    dtype_name(strange->dtype));
    else if (a->margins && a->teacher_x.data)
        device_fail(cuda->device, ERR_INTERNAL, "head_loss: both margins and a teacher");
    return !device_failed(cuda->device);
}

/* NULL stays NULL. */
template <typename N> static const N *bring(struct cuda *cuda, const N *host, size_t count)
{
    return host ? static_cast<const N *>(cuda_bring(cuda, host, count * sizeof *host)) : nullptr;
}

static struct loss_margins bring_margins(struct cuda *cuda, const struct loss_margins *m,
                                         size_t rows)
{
    struct loss_margins none = {};

    return m ? (struct loss_margins){bring(cuda, m->best, rows), bring(cuda, m->other, rows),
                                     bring(cuda, m->weight, rows)}
             : none;
}

void cuda_head_loss(struct backend *backend, const struct head_loss_args *a)
{
    struct cuda *cuda = cuda_of(backend);
    size_t rows = (size_t)a->batch->rows;
    int32_t chunk = (int32_t)a->n.shape[0], count, *list;

    if (device_failed(cuda->device) || !check_args(cuda, a))
        return;
    device_fill(cuda->device, a->nll.data, 0, rows * sizeof(float));
    device_fill(cuda->device, a->correct.data, 0, rows * sizeof(int32_t));
    if (a->dx.data)
        device_fill(cuda->device, a->dx.data, 0,
                    rows * (size_t)a->x.shape[1] * (size_t)dtype_size(a->dx.dtype));
    count = list_rows(cuda, a, &list);

    struct loss_rows all = {
        bring(cuda, list, (size_t)count),
        count,
        bring(cuda, a->teacher_x.data ? nullptr : a->target, rows),
        bring(cuda, a->weight, rows),
        bring_margins(cuda, a->margins, rows),
        data_of<float>(a->nll),
        data_of<int32_t>(a->correct),
    };
    for (int32_t from = 0; from < count; from += chunk) {
        struct loss_rows part = all;

        part.row += from;
        part.count = count - from < chunk ? count - from : chunk;
        WITH_PRECISION(cuda, T, run_chunk<T>(cuda, a, part));
    }
}
