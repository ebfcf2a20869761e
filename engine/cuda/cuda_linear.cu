#include "engine/cuda/cuda_linear.cuh"

#include "engine/cuda/cuda_linear_tile.cuh"
#include "engine/cuda/cuda_planes.cuh"

#define FEW_ROWS 128 /* up to here weights are used faster than they come */

/* ------------------------------------------------------------------ rows and outputs */

/* Fills `columns`: the block's rows in the order of their groups. */
template <int TILES, bool OWN>
static __device__ __forceinline__ void
find_columns(const struct linear_job &job, const struct linear_matrix &matrix,
             const struct cuda_batch &batch, struct linear_columns *columns)
{
    int32_t i = threadIdx.x, at = blockIdx.x * TILES * 8 + i;

    if (i < TILES * 8) {
        int32_t index = at < job.rows ? job.order[at] : -1, group = -1;

        if (OWN && index >= 0)
            group = batch.row_group[job.row ? job.row[index] : index];
        columns->index[i] = index;
        columns->group[i] = group;
        columns->delta[i] =
            group < 0
                ? delta_view()
                : *reinterpret_cast<const struct delta_view *>(matrix.own + group * job.own_stride);
    }
    __syncthreads();
    if (!OWN)
        return;
    if (i < TILES * 8) {
        int leader = i % 8;

        while (leader > 0 && columns->group[i / 8 * 8 + leader - 1] == columns->group[i])
            leader--;
        columns->leader[i] = delta_is_empty(columns->delta[i]) ? -1 : leader;
    }
    if (i < TILES) {
        unsigned signs = 0, more = 0, dense = 0, planes = 0;

        for (int k = 0; k < 8; k++) {
            int at = i * 8 + k;
            bool leads = (k == 0 || columns->group[at - 1] != columns->group[at]) &&
                         !delta_is_empty(columns->delta[at]);

            signs |= (unsigned)(leads && columns->delta[at].bits) << k;
            more |= (unsigned)(leads && columns->delta[at].more) << k;
            dense |= (unsigned)(leads && columns->delta[at].dense) << k;
            planes |= (unsigned)(leads && columns->delta[at].planes) << k;
        }
        columns->signs[i] = signs;
        columns->more[i] = more;
        columns->dense[i] = dense;
        columns->planes[i] = planes;
    }
    __syncthreads();
}

/* Where sum i of tile j belongs: a column of the block, an output of the 16. */
static __device__ __forceinline__ int column_of(int j, int i)
{
    return j * 8 + threadIdx.x % 4 * 2 + i % 2;
}
static __device__ __forceinline__ int output_of(int i)
{
    return threadIdx.x % 32 / 4 + i / 2 * 8;
}

/* A sum of a part, its delta scaled and added. */
template <int TILES, bool OWN>
static __device__ __forceinline__ float part_of(const struct linear_columns &columns, int32_t tile,
                                                const struct linear_sums<TILES> &sums, int j, int i)
{
    float sum = sums.base[j][i];

    if (OWN && columns.leader[column_of(j, i)] >= 0) {
        const struct delta_view &d = columns.delta[column_of(j, i)];

        sum = fmaf(d.scale ? d.scale[tile * 16 + output_of(i)] : 1.0f, sums.own[j][i], sum);
    }
    return sum;
}

static __device__ __forceinline__ float
bias_of(const struct linear_job &job, const struct linear_matrix &matrix, int32_t group, int32_t o)
{
    const float *bias = matrix.bias;

    if (group >= 0 && job.own_bias) {
        const struct group_linear *own =
            reinterpret_cast<const struct group_linear *>(matrix.own + group * job.own_stride);

        bias = own->bias ? own->bias : bias;
    }
    return bias ? bias[o] : 0.0f;
}

/* What factors add to output o of row `index`. */
static __device__ __forceinline__ float factored_of(const struct linear_job &job,
                                                    const struct linear_matrix &matrix,
                                                    const struct delta_view &d, int32_t index,
                                                    int32_t o)
{
    const float *sums = matrix.sums + index * job.sums_stride;
    float sum = 0;

    for (int32_t v = 0; v < d.rank; v++)
        sum = fmaf(delta_number(d.left, d.left_dtype, (int64_t)v * d.rows + o), sums[v], sum);
    return sum;
}

/* Output e of a block's [rows][16]: with bias and residual, rounded. */
template <typename T, bool OWN>
static __device__ __forceinline__ void
put(const struct linear_job &job, const struct linear_matrix &matrix,
    const struct linear_columns &columns, int32_t tile, int e, float sum)
{
    int32_t o = tile * 16 + e % 16, index = columns.index[e / 16];
    int64_t at = (int64_t)index * matrix.out + o;

    if (index < 0 || o >= matrix.out)
        return;
    if (OWN && job.sums_stride)
        sum += factored_of(job, matrix, columns.delta[e / 16], index, o);
    sum += bias_of(job, matrix, columns.group[e / 16], o);
    if (matrix.residual)
        sum += to_float(static_cast<const T *>(matrix.residual)[at]);
    if (job.wide)
        static_cast<float *>(matrix.y)[at] = sum;
    else
        static_cast<T *>(matrix.y)[at] = from_float<T>(sum);
}

static __device__ __forceinline__ struct linear_matrix matrix_of(const struct linear_job &job,
                                                                 int32_t tile)
{
    return matrix_at(job, (job.count > 1 && tile >= job.matrix[1].first_tile) +
                              (job.count > 2 && tile >= job.matrix[2].first_tile));
}

/* ------------------------------------------------------------------ few rows */

/* One block for 16 outputs of one of the matrices and TILES · 8 rows; each warp has a part of the
 * columns. */
template <typename T, int TILES, bool OWN, bool ALIGNED>
static __global__ void __launch_bounds__(THREADS, 2)
    linear_kernel(struct linear_job job, struct cuda_batch batch)
{
    SHARED(struct linear_columns, columns, );
    DYNAMIC_SHARED(uint4, stages); /* in turn the weights' stages and the parts */
    int warp = threadIdx.x / 32;
    int32_t number = blockIdx.y, chunks = (job.in + CHUNK - 1) / CHUNK;
    struct linear_matrix matrix = matrix_of(job, number);
    int32_t tile = number - matrix.first_tile;
    struct linear_sums<TILES> sums = {};

    struct linear_range range = {&columns,
                                 job.x,
                                 matrix.w,
                                 job.in,
                                 matrix.out,
                                 tile,
                                 part_end(chunks, warp - 1),
                                 part_end(chunks, warp)};
    uint4 *stage = stages + warp * STAGES * 128;
    if (sizeof(T) == 2 && ALIGNED)
        start_staged(range, stage);
    find_columns<TILES, OWN>(job, matrix, batch, &columns);
    add_range<TILES, OWN, ALIGNED>(static_cast<const T *>(nullptr), range, stage, &sums);
    if (OWN && job.sums_stride)
        add_planes<T, TILES>({&columns, matrix.sums, job.sums_stride, tile, warp}, &sums);
    __syncthreads();
    float *part = reinterpret_cast<float *>(stages);
    UNROLL
    for (int i = 0; i < TILES * 4; i++)
        part[warp * TILES * 128 + column_of(i / 4, i % 4) * 16 + output_of(i % 4)] =
            part_of<TILES, OWN>(columns, tile, sums, i / 4, i % 4);
    __syncthreads();
    for (int e = threadIdx.x; e < TILES * 128; e += THREADS) {
        float sum = 0;

        for (int s = 0; s < SPLIT; s++)
            sum += part[s * TILES * 128 + e];
        put<T, OWN>(job, matrix, columns, tile, e, sum);
    }
}

template <typename T, int TILES, bool OWN, bool ALIGNED>
static void launch(struct cuda *cuda, const struct linear_job *job)
{
    dim3 grid((unsigned)ceil_div(job->rows, TILES * 8), (unsigned)job->tiles);
    size_t stages = sizeof(T) == 2 && ALIGNED ? SPLIT * STAGES * 128 * sizeof(uint4) : 0;
    size_t parts = SPLIT * TILES * 128 * sizeof(float);

    CUDA_LAUNCH(cuda->device, (linear_kernel<T, TILES, OWN, ALIGNED>), grid, THREADS,
                stages > parts ? stages : parts, *job, cuda->batch);
}

/* ------------------------------------------------------------------ many rows */

/* One block for 128 outputs and 64 rows; each warp has 16 outputs over all columns. It adds up the
 * same parts in the same order, one after another. planes: all but the part; without sums there are
 * none. */
template <bool OWN>
static __device__ __forceinline__ void add_wide(const struct linear_range &all,
                                                struct planes_part planes, uint4 *stages,
                                                float total[WIDE_TILES * 4])
{
    uint4 *rows = stages, *w = stages + WIDE_STAGES * WIDE_X +
                               threadIdx.x / 32 * WIDE_STAGES * 128 + threadIdx.x % 32;
    struct linear_sums<WIDE_TILES> sums = {};
    unsigned word[8] = {};
    int32_t chunk = 0;

    if (OWN)
        load_words(all, 0, 0, word);
    for (int32_t ahead = 0; ahead < WIDE_STAGES - 1; ahead++) {
        stage_x(all, ahead, THREADS, rows + ahead * WIDE_X);
        stage_chunk(all, ahead, w + ahead * 128);
        copy_commit();
    }
    ROLLED
    for (planes.part = 0; planes.part < SPLIT; planes.part++) {
        ROLLED
        for (; chunk < part_end(all.to, planes.part); chunk++) {
            int s = chunk % WIDE_STAGES, free = (chunk + WIDE_STAGES - 1) % WIDE_STAGES;

            copy_wait<WIDE_STAGES - 2>();
            __syncthreads(); /* all have their copies, and are done with the chunk before */
            stage_x(all, chunk + WIDE_STAGES - 1, THREADS, rows + free * WIDE_X);
            stage_chunk(all, chunk + WIDE_STAGES - 1, w + free * 128);
            copy_commit();
            uint4 piece[4] = {w[s * 128], w[s * 128 + 32], w[s * 128 + 64], w[s * 128 + 96]};
            add_wide_chunk<OWN>(all, piece, rows + s * WIDE_X, chunk, word, &sums);
        }
        if (OWN && planes.sums)
            add_planes<bf16, WIDE_TILES>(planes, &sums);
        UNROLL
        for (int i = 0; i < WIDE_TILES * 4; i++) {
            total[i] += part_of<WIDE_TILES, OWN>(*all.columns, all.tile, sums, i / 4, i % 4);
            sums.base[i / 4][i % 4] = sums.own[i / 4][i % 4] = 0;
        }
    }
    copy_wait<0>();
}

template <bool OWN>
static __global__ void __launch_bounds__(THREADS, OWN ? 1 : 2)
    linear_wide_kernel(struct linear_job job, struct cuda_batch batch)
{
    SHARED(struct linear_columns, columns, );
    DYNAMIC_SHARED(uint4, stages);
    int warp = threadIdx.x / 32;
    int32_t number = blockIdx.y * SPLIT, chunks = (job.in + CHUNK - 1) / CHUNK;
    struct linear_matrix matrix = matrix_of(job, number);
    int32_t tile = number - matrix.first_tile + warp;
    bool there = tile * 16 < matrix.out; /* else its work is thrown away */
    float total[WIDE_TILES * 4] = {};

    find_columns<WIDE_TILES, OWN>(job, matrix, batch, &columns);
    struct linear_range all = {&columns,         job.x, matrix.w, job.in, matrix.out,
                               there ? tile : 0, 0,     chunks};
    add_wide<OWN>(all,
                  {&columns, job.sums_stride ? matrix.sums : nullptr, job.sums_stride, all.tile, 0},
                  stages, total);
    __syncthreads();
    float *part = reinterpret_cast<float *>(stages) + warp * WIDE_TILES * 128;
    UNROLL
    for (int i = 0; i < WIDE_TILES * 4; i++)
        part[column_of(i / 4, i % 4) * 16 + output_of(i % 4)] = total[i];
    __syncwarp();
    for (int e = threadIdx.x % 32; there && e < WIDE_TILES * 128; e += 32)
        put<bf16, OWN>(job, matrix, columns, tile, e, part[e]);
}

template <bool OWN> static void launch_wide(struct cuda *cuda, const struct linear_job *job)
{
    dim3 grid((unsigned)ceil_div(job->rows, WIDE_TILES * 8), (unsigned)(job->tiles / SPLIT));
    size_t shared = WIDE_STAGES * (WIDE_X + SPLIT * 128) * sizeof(uint4);

    CUDA_LAUNCH(cuda->device, linear_wide_kernel<OWN>, grid, THREADS, shared, *job, cuda->batch);
}

/* ------------------------------------------------------------------ factors */

/* One block for a row of a group, SPLIT vectors and a matrix: each warp has a vector. */
template <typename T>
static __global__ void __launch_bounds__(THREADS)
    factor_kernel(struct linear_job job, struct cuda_batch batch)
{
    int32_t index = job.order[blockIdx.x], v = blockIdx.y * SPLIT + threadIdx.x / 32,
            lane = threadIdx.x % 32;
    int32_t group = batch.row_group[job.row ? job.row[index] : index];
    struct linear_matrix matrix = matrix_at(job, blockIdx.z);
    float sum = 0;

    const struct delta_view &d =
        *reinterpret_cast<const struct delta_view *>(matrix.own + group * job.own_stride);
    const T *x = static_cast<const T *>(job.x) + (int64_t)index * job.in;
    if (v >= d.rank)
        return;
    UNROLL_BY(4)
    for (int32_t c = lane; c < job.in; c += 32)
        sum = fmaf(to_float(x[c]), delta_number(d.right, d.right_dtype, (int64_t)v * job.in + c),
                   sum);
    sum = warp_sum(sum);
    if (lane == 0)
        matrix.sums[index * job.sums_stride + v] = d.factor * sum;
}

/* Numbers that are kept of a row and matrix; a multiple of 16 bytes. */
static int64_t sums_width(const struct cuda *cuda)
{
    return cuda->rank > cuda->planes ? ceil_div(cuda->rank, 4) * 4 : cuda->planes;
}

int cuda_linear_room(struct cuda *cuda, struct err *err)
{
    size_t bytes = (size_t)(cuda->batch.rows * LINEAR_MATRICES * sums_width(cuda)) * sizeof(float);

    if (bytes <= cuda->sums_bytes)
        return 0;
    device_free(cuda->device, cuda->sums);
    cuda->sums_bytes = 0;
    cuda->sums = (float *)device_alloc(cuda->device, 2 * bytes, err);
    if (!cuda->sums)
        return -1;
    cuda->sums_bytes = 2 * bytes;
    return 0;
}

/* Before the products: the sums that their outputs add. */
static void bring_down(struct cuda *cuda, struct linear_job *job)
{
    dim3 grid((unsigned)job->grouped, (unsigned)ceil_div(cuda->rank, SPLIT), (unsigned)job->count);

    job->sums_stride = job->count * sums_width(cuda);
    for (int i = 0; i < job->count; i++)
        job->matrix[i].sums = cuda->sums + i * sums_width(cuda);
    if (cuda->rank)
        WITH_PRECISION(
            cuda, T,
            CUDA_LAUNCH(cuda->device, factor_kernel<T>, grid, THREADS, 0, *job, cuda->batch));
    if (cuda->planes)
        cuda_planes(cuda, job);
}

/* ------------------------------------------------------------------ serving */

/* The fewer the rows, the smaller the block: an output's bits are the same in all. With deltas a
 * block has 32 rows at most, so that two fit on a multiprocessor; two that share weights run at the
 * same time, and the second finds them in the L2 cache. */
template <typename T, bool OWN>
static void launch_for_rows(struct cuda *cuda, const struct linear_job *job, bool aligned)
{
    if (!aligned)
        launch<T, 2, OWN, false>(cuda, job);
    else if (job->rows <= 8)
        launch<T, 1, OWN, true>(cuda, job);
    else if (job->rows <= 16)
        launch<T, 2, OWN, true>(cuda, job);
    else if (job->rows <= 32 || OWN)
        launch<T, 4, OWN, true>(cuda, job);
    else
        launch<T, OWN ? 4 : 8, OWN, true>(cuda, job);
}

void cuda_linear_serve(struct cuda *cuda, struct linear_job *job)
{
    int64_t row = job->in * dtype_size(cuda->activation);
    uintptr_t places = (uintptr_t)job->x | (uintptr_t)row;
    bool own = cuda->batch.groups > 0, many;
    int32_t unit; /* tiles of a block, which is of one matrix */

    if (own && sums_width(cuda) && job->grouped)
        bring_down(cuda, job);
    for (int i = 0; i < job->count; i++)
        places |= (uintptr_t)job->matrix[i].w;
    many = job->rows > FEW_ROWS && cuda->activation == DTYPE_BF16 && places % 16 == 0;
    unit = many ? SPLIT : 1;
    job->tiles = 0;
    for (int i = 0; i < job->count; i++) {
        job->matrix[i].first_tile = job->tiles;
        job->tiles += (int32_t)ceil_div(job->matrix[i].out, 16 * unit) * unit;
    }
    if (many)
        own ? launch_wide<true>(cuda, job) : launch_wide<false>(cuda, job);
    else if (own)
        WITH_PRECISION(cuda, T, launch_for_rows<T, true>(cuda, job, places % 16 == 0));
    else
        WITH_PRECISION(cuda, T, launch_for_rows<T, false>(cuda, job, places % 16 == 0));
}

static void serve(struct cuda *cuda, int32_t layer, const void *x, const struct linear_call *call,
                  int count)
{
    struct linear_job job = linear_job();
    const char *own = (const char *)(cuda->batch.layer + (int64_t)layer * cuda->batch.groups);

    job.count = count;
    job.x = x;
    job.in = (int32_t)call->linear->w.shape[1];
    job.rows = cuda->batch.rows;
    job.order = cuda->batch.group_row;
    job.grouped = cuda->grouped;
    job.own_stride = sizeof(struct group_layer);
    job.own_bias = true;
    for (int i = 0; i < count; i++) {
        struct linear_matrix *m = &job.matrix[i];

        m->w = call[i].linear->w.data;
        m->bias = data_of<const float>(call[i].linear->b);
        m->own = cuda->batch.groups ? own + call[i].own : nullptr;
        m->residual = call[i].residual;
        m->y = call[i].y;
        m->out = (int32_t)call[i].linear->w.shape[0];
    }
    cuda_linear_serve(cuda, &job);
}

/* ------------------------------------------------------------------ training */

/* What a product is added to: y = residual + bias, where there are such. */
template <typename T>
static __global__ void linear_start_kernel(const T *residual, const float *bias, T *y,
                                           int64_t count, int32_t out)
{
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;

    if (i >= count)
        return;
    y[i] = from_float<T>((residual ? to_float(residual[i]) : 0.0f) + (bias ? bias[i % out] : 0.0f));
}

template <typename T> static void start(struct cuda *cuda, const struct linear_call *call)
{
    const float *bias = data_of<const float>(call->linear->b);
    int32_t out = (int32_t)call->linear->w.shape[0];
    int64_t count = (int64_t)cuda->batch.rows * out;

    if (bias || (call->residual && call->residual != call->y))
        CUDA_LAUNCH(cuda->device, linear_start_kernel<T>, (unsigned)ceil_div(count, THREADS),
                    THREADS, 0, static_cast<const T *>(call->residual), bias,
                    static_cast<T *>(call->y), count, out);
}

static void train(struct cuda *cuda, const void *x, const struct linear_call *call)
{
    const struct tensor *w = &call->linear->w;
    struct gemm g = gemm();

    WITH_PRECISION(cuda, T, start<T>(cuda, call));
    g.transpose_b = true;
    g.m = cuda->batch.rows;
    g.n = (int32_t)w->shape[0];
    g.k = (int32_t)w->shape[1];
    g.dtype = g.c_dtype = cuda->activation;
    g.a = x;
    g.b = w->data;
    g.c = call->y;
    g.lda = g.ldb = w->shape[1];
    g.ldc = w->shape[0];
    g.add = call->residual || call->linear->b.data;
    gemm_run(cuda->gemm, &g);
}

void cuda_linear(struct cuda *cuda, const struct batch *batch, int32_t layer, const void *x,
                 const struct linear_call *call, int count)
{
    if (batch->serving) {
        serve(cuda, layer, x, call, count);
        return;
    }
    for (int i = 0; i < count; i++)
        train(cuda, x, &call[i]);
}
