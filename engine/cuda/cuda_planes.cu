#include "engine/cuda/cuda_planes.cuh"

#define BLOCK_TILES (DELTA_BLOCK / DELTA_TILE_ROWS)
#define PITCH 68 /* floats from row to row of a part: the lanes of a warp write to 32 banks */

/* A block of planes, for up to eight rows. */
struct planes_block {
    const unsigned *word;   /* [BLOCK_TILES][chunks][32 lanes] */
    const float *col_scale; /* [chunks · 64] */
    int32_t in, chunks;
};

/* ------------------------------------------------------------------ bf16 */

/* Eight numbers, scaled, in two bf16 each. */
static __device__ __forceinline__ void split_scaled(const uint4 &x, const float4 scale[2],
                                                    uint4 *high, uint4 *low)
{
    const unsigned pair[4] = {x.x, x.y, x.z, x.w};
    const float by[8] = {scale[0].x, scale[0].y, scale[0].z, scale[0].w,
                         scale[1].x, scale[1].y, scale[1].z, scale[1].w};
    unsigned to[2][4];

    UNROLL
    for (int i = 0; i < 4; i++) {
        float2 two = unpack_bf16(pair[i]);
        float a = two.x * by[2 * i], b = two.y * by[2 * i + 1];
        bf16 high_a = from_float<bf16>(a), high_b = from_float<bf16>(b);

        to[0][i] = pack_bf16(high_a, high_b);
        to[1][i] = pack_bf16(from_float<bf16>(a - to_float(high_a)),
                             from_float<bf16>(b - to_float(high_b)));
    }
    *high = make_uint4(to[0][0], to[0][1], to[0][2], to[0][3]);
    *low = make_uint4(to[1][0], to[1][1], to[1][2], to[1][3]);
}

/* A chunk on its way: what comes next is sent for before what is there is worked on. */
struct planes_ahead {
    unsigned word[BLOCK_TILES];
    uint4 x[2];
    float4 scale[4];
};

template <bool ALIGNED>
static __device__ __forceinline__ struct planes_ahead
load_chunk(const struct planes_block &b, const bf16 *row, int32_t chunk, int32_t to)
{
    struct planes_ahead ahead = {};

    if (chunk >= to)
        return ahead;
    UNROLL
    for (int q = 0; q < BLOCK_TILES; q++)
        ahead.word[q] = b.word[((int64_t)q * b.chunks + chunk) * 32 + threadIdx.x % 32];
    UNROLL
    for (int h = 0; h < 2; h++) {
        int32_t c = chunk * CHUNK + 32 * h + (int32_t)threadIdx.x % 4 * 8;

        ahead.x[h] = row ? load_piece<ALIGNED>(row, c, b.in) : make_uint4(0, 0, 0, 0);
        ahead.scale[2 * h] = *reinterpret_cast<const float4 *>(b.col_scale + c);
        ahead.scale[2 * h + 1] = *reinterpret_cast<const float4 *>(b.col_scale + c + 4);
    }
    return ahead;
}

/* The part of a warp: sums of the planes for eight rows, whose indices the first lanes have. */
template <bool ALIGNED>
static __device__ __forceinline__ void add_right(const bf16 *x, const struct planes_block &b,
                                                 int32_t indices, int part,
                                                 float sums[BLOCK_TILES][4])
{
    int32_t index = __shfl_sync(WARP, indices, threadIdx.x % 32 / 4), to = part_end(b.chunks, part);
    const bf16 *row = index < 0 ? nullptr : x + (int64_t)index * b.in;
    struct planes_ahead now = load_chunk<ALIGNED>(b, row, part_end(b.chunks, part - 1), to);

    ROLLED
    for (int32_t chunk = part_end(b.chunks, part - 1); chunk < to; chunk++) {
        struct planes_ahead next = load_chunk<ALIGNED>(b, row, chunk + 1, to);
        struct split_row split;

        split_scaled(now.x[0], now.scale, &split.high[0], &split.low[0]);
        split_scaled(now.x[1], now.scale + 2, &split.high[1], &split.low[1]);
        UNROLL
        for (int q = 0; q < BLOCK_TILES; q++)
            add_split(sums[q], now.word[q], split);
        now = next;
    }
}

/* Sum `at` of a block. */
static __device__ __forceinline__ void put_sum(const bf16 *, float *sums, int at, float value)
{
    bf16 *to = reinterpret_cast<bf16 *>(sums), high = from_float<bf16>(value);

    to[at] = high;
    to[DELTA_BLOCK + at] = from_float<bf16>(value - to_float(high));
}

/* ------------------------------------------------------------------ float */

template <bool ALIGNED>
static __device__ __forceinline__ void add_right(const float *x, const struct planes_block &b,
                                                 int32_t indices, int part,
                                                 float sums[BLOCK_TILES][4])
{
    int lane = threadIdx.x % 32, g = lane / 4;
    int32_t to = min(part_end(b.chunks, part) * CHUNK, b.in);
    const float *row[2];

    UNROLL
    for (int k = 0; k < 2; k++) {
        int32_t index = __shfl_sync(WARP, indices, lane % 4 * 2 + k);

        row[k] = index < 0 ? nullptr : x + (int64_t)index * b.in;
    }
    for (int32_t c = part_end(b.chunks, part - 1) * CHUNK; c < to; c += 4) {
        float4 scale = *reinterpret_cast<const float4 *>(b.col_scale + c);

        UNROLL
        for (int k = 0; k < 2; k++) {
            float4 four = load_four<ALIGNED>(row[k], c, b.in);

            four =
                make_float4(four.x * scale.x, four.y * scale.y, four.z * scale.z, four.w * scale.w);
            UNROLL
            for (int q = 0; q < BLOCK_TILES; q++) {
                /* of the lane that has columns c to c + 3 of plane g */
                unsigned word =
                    b.word[((int64_t)q * b.chunks + c / CHUNK) * 32 + g * 4 + c % 32 / 8];

                sums[q][k] = signed_four(four, word, delta_bit(g, c), sums[q][k]);
                sums[q][2 + k] = signed_four(four, word, delta_bit(g + 8, c), sums[q][2 + k]);
            }
        }
    }
}

static __device__ __forceinline__ void put_sum(const float *, float *sums, int at, float value)
{
    sums[at] = value;
}

/* ------------------------------------------------------------------ the kernel */

/* The rows of run `slot` of a tile of eight rows in the order: neighbours of one group. Lane i gets
 * the index of row i % 8 where it is one of them, else -1; returns the group, -1: no such run. */
static __device__ __forceinline__ int32_t find_rows(const struct linear_job &job,
                                                    const struct cuda_batch &batch, int32_t tile,
                                                    int32_t slot, int32_t *index)
{
    int32_t lane = threadIdx.x % 32, at = tile * 8 + lane % 8, group = -1;

    *index = -1;
    if (at < job.grouped) {
        *index = job.order[at];
        group = batch.row_group[job.row ? job.row[*index] : *index];
    }
    int32_t before = __shfl_up_sync(WARP, group, 1);
    unsigned leads = __ballot_sync(WARP, lane < 8 && group >= 0 && (lane == 0 || group != before));

    for (int32_t i = 0; i < slot; i++)
        leads &= leads - 1;
    if (!leads)
        return -1;
    int32_t own = __shfl_sync(WARP, group, __ffs((int)leads) - 1);

    if (group != own)
        *index = -1;
    return own;
}

/* The joined sum of plane `plane` of the block, for one row: of its vector's planes, all parts. */
static __device__ __forceinline__ float join(const struct delta_plane *block, int plane,
                                             const float *part)
{
    float sum = 0;

    for (int q = block[plane].first, end = q + block[plane].count; q < end; q++) {
        float right = 0;

        UNROLL
        for (int s = 0; s < SPLIT; s++)
            right += part[s * 8 * PITCH + q];
        sum = fmaf(block[q].right, right, sum);
    }
    return block[plane].left * sum;
}

/* One thread block for a run of rows, a block of planes and a matrix: each warp has a part of the
 * columns. A run is of one tenant, so that tenants that decode do not wait for each other's bits.
 */
template <typename T, bool ALIGNED>
static __global__ void __launch_bounds__(THREADS, 2)
    planes_kernel(struct linear_job job, struct cuda_batch batch, int32_t slots)
{
    SHARED(float, part, [SPLIT * 8 * PITCH]);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int32_t first = blockIdx.y * DELTA_BLOCK, indices;
    int32_t group = find_rows(job, batch, blockIdx.x / slots, blockIdx.x % slots, &indices);
    struct linear_matrix matrix = matrix_at(job, blockIdx.z);
    float sums[BLOCK_TILES][4] = {};

    if (group < 0)
        return;
    const struct delta_view &d =
        *reinterpret_cast<const struct delta_view *>(matrix.own + group * job.own_stride);
    if (first >= d.planes)
        return;
    const struct delta_plane *block = d.plane + first;
    struct planes_block b = {static_cast<const unsigned *>(d.right) + delta_word(job.in, first, 0),
                             d.col_scale, job.in, (job.in + CHUNK - 1) / CHUNK};
    add_right<ALIGNED>(static_cast<const T *>(job.x), b, indices, warp, sums);
    UNROLL
    for (int i = 0; i < BLOCK_TILES * 4; i++)
        part[(warp * 8 + lane % 4 * 2 + i % 2) * PITCH + i / 4 * 16 + lane / 4 + i % 4 / 2 * 8] =
            sums[i / 4][i % 4];
    __syncthreads();
    for (int e = threadIdx.x; e < 8 * DELTA_BLOCK; e += THREADS) {
        int32_t index = __shfl_sync(WARP, indices, e / DELTA_BLOCK);

        if (index >= 0)
            put_sum(static_cast<const T *>(nullptr), matrix.sums + index * job.sums_stride + first,
                    e % DELTA_BLOCK, join(block, e % DELTA_BLOCK, part + e / DELTA_BLOCK * PITCH));
    }
}

template <typename T, bool ALIGNED>
static void launch(struct cuda *cuda, const struct linear_job *job)
{
    int32_t slots = cuda->batch.groups < 8 ? cuda->batch.groups : 8; /* runs of eight rows */
    dim3 grid((unsigned)(ceil_div(job->grouped, 8) * slots), (unsigned)(cuda->planes / DELTA_BLOCK),
              (unsigned)job->count);

    CUDA_LAUNCH(cuda->device, (planes_kernel<T, ALIGNED>), grid, THREADS, 0, *job, cuda->batch,
                slots);
}

void cuda_planes(struct cuda *cuda, const struct linear_job *job)
{
    int64_t row = job->in * dtype_size(cuda->activation);

    if (((uintptr_t)job->x | (uintptr_t)row) % 16 == 0)
        WITH_PRECISION(cuda, T, launch<T, true>(cuda, job));
    else
        WITH_PRECISION(cuda, T, launch<T, false>(cuda, job));
}
