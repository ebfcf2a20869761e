#include "engine/cuda/device.h"
#include "engine/cuda/ptx.cuh"
#include "engine/cuda/shim/shim_control.h"

#include <cstring>

#define THREADS 256

/* Each kernel counts its wrong values in wrong[thread of the grid]. */

static __global__ void sums_kernel(int *wrong)
{
    int i = threadIdx.x, n = blockDim.x, block = blockIdx.x;
    float sum = block_sum((float)(i + block)), again = block_sum(2.0f);
    float largest = block_max((float)(i ^ 37)), smaller = block_max((float)(i / 2));

    wrong[block * n + i] = (sum != (float)(n * (n - 1) / 2 + n * block)) +
                           (again != 2.0f * (float)n) + (largest != (float)(n - 1)) +
                           (smaller != (float)((n - 1) / 2));
}

static __global__ void shuffles_kernel(int *wrong)
{
    int lane = threadIdx.x % 32, bad = 0;

    bad += __shfl_sync(WARP, lane * 3, 5) != 15;
    bad += __shfl_sync(WARP, lane, 9, 8) != (lane & ~7) + 1;
    bad += __shfl_xor_sync(WARP, (float)lane, 6) != (float)(lane ^ 6);
    bad += __shfl_down_sync(WARP, lane, 4) != (lane + 4 < 32 ? lane + 4 : lane);
    bad += __shfl_up_sync(WARP, lane, 3, 16) != (lane % 16 >= 3 ? lane - 3 : lane);
    bad += __ballot_sync(WARP, lane % 3 == 0) != 0x49249249u;
    bad += __any_sync(WARP, lane == 31) != 1;
    bad += __all_sync(WARP, lane < 31) != 0;
    wrong[blockIdx.x * blockDim.x + threadIdx.x] = bad;
}

/* A 16 x 16 block is transposed; `written` false: nobody writes it. */
static __global__ void shared_kernel(int *wrong, bool written)
{
    SHARED(float, tile, [16][17]);
    DYNAMIC_SHARED(float, more);
    int x = threadIdx.x % 16, y = threadIdx.x / 16;

    if (written) {
        tile[y][x] = (float)(y * 100 + x);
        more[y * 16 + x] = (float)threadIdx.x;
    }
    __syncthreads();
    wrong[blockIdx.x * blockDim.x + threadIdx.x] =
        (tile[x][y] != (float)(x * 100 + y)) + (more[x * 16 + y] != (float)(x * 16 + y));
    __syncthreads();
    if (written)
        tile[y][x] = 0; /* overwrites what another thread reads */
}

static __device__ float mma_value(int row, int column)
{
    return (float)((row * 7 + column * 3) % 11 - 5) * 0.25f;
}

/* One warp: C = A·B with A [16, 16] and B [16, 8], read from shared memory by ldmatrix. */
static __global__ void mma_kernel(int *wrong)
{
    SHARED(bf16, a, [16 * 16]);
    SHARED(bf16, b, [16 * 16]); /* [k, n], the columns behind 8 are a second B */
    int lane = threadIdx.x % 32;
    unsigned af[4], bf[4];
    float c[2][4] = {{1, 1, 1, 1}, {1, 1, 1, 1}};
    int bad = 0;

    for (int i = lane; i < 256; i += 32) {
        a[i] = from_float<bf16>(mma_value(i / 16, i % 16));
        b[i] = from_float<bf16>(mma_value(i % 16 + 3, i / 16));
    }
    __syncwarp();
    ldmatrix_x4(af, a + lane % 16 * 16 + lane / 16 * 8);
    ldmatrix_x4_trans(bf, b + lane % 16 * 16 + lane / 16 * 8);
    mma_bf16(c[0], af, bf);
    mma_bf16(c[1], af, bf + 2);
    for (int half = 0; half < 2; half++)
        for (int i = 0; i < 4; i++) {
            int row = lane / 4 + i / 2 * 8, column = half * 8 + lane % 4 * 2 + i % 2;
            float want = 1;

            for (int k = 0; k < 16; k++)
                want += mma_value(row, k) * mma_value(column + 3, k);
            bad += c[half][i] != want;
        }
    wrong[threadIdx.x] = bad;
}

/* Two groups in flight, then three numbers each from another thread's piece. */
static __global__ void copy_kernel(int *wrong, const float *from)
{
    SHARED(float4, stage, [2][THREADS]);
    int i = threadIdx.x, n = blockDim.x, bad = 0;

    copy_async_16(&stage[0][i], from + i * 4);
    copy_commit();
    copy_async_16(&stage[1][i], from + (n + i) * 4, i % 2 == 0);
    copy_commit();
    copy_wait<1>();
    __syncthreads();
    bad += stage[0][n - 1 - i].y != (float)((n - 1 - i) * 4 + 1);
    copy_wait<0>();
    __syncthreads();
    bad += stage[1][n - 1 - i].z != ((n - 1 - i) % 2 ? 0.0f : (float)((n + n - 1 - i) * 4 + 2));
    wrong[i] = bad;
}

static __global__ void numbers_kernel(int *wrong)
{
    int i = threadIdx.x, bad = 0;
    float x = (float)(i - 128) / 64.0f;
    unsigned a = 0x12345678u * (unsigned)i, b = 0x9abcdef1u + (unsigned)i, c = ~a * 77u;

    bad += to_float(from_float<bf16>(x)) != x;
    bad += to_float(from_float<f16>(x)) != x;
    bad += to_float(from_float<bf16>(1.00390625f)) != 1.0f; /* half way: to even */
    bad += to_float(from_float<bf16>(1.01171875f)) != 1.015625f;
    bad += to_float(from_float<bf16>(NAN)) == to_float(from_float<bf16>(NAN));
    bad += lop3<(0xf0 & 0xcc) | 0xaa>(a, b, c) != ((a & b) | c);
    bad += lop3<(0xf0 ^ 0xcc) & 0xff & ~0xaa>(a, b, c) != ((a ^ b) & ~c);
    wrong[i] = bad;
}

static void launch(struct device *d, enum shim_self_test test, int *wrong, const float *numbers)
{
    switch (test) {
    case SHIM_TEST_SUMS:
        CUDA_LAUNCH(d, sums_kernel, 3, THREADS, 0, wrong);
        break;
    case SHIM_TEST_SHUFFLES:
        CUDA_LAUNCH(d, shuffles_kernel, 3, THREADS, 0, wrong);
        break;
    case SHIM_TEST_SHARED:
        CUDA_LAUNCH(d, shared_kernel, 3, THREADS, 1024, wrong, true);
        break;
    case SHIM_TEST_UNWRITTEN:
        CUDA_LAUNCH(d, shared_kernel, 3, THREADS, 1024, wrong, false);
        break;
    case SHIM_TEST_MMA:
        CUDA_LAUNCH(d, mma_kernel, 1, 32, 0, wrong);
        break;
    case SHIM_TEST_COPY:
        CUDA_LAUNCH(d, copy_kernel, 1, THREADS, 0, wrong, numbers);
        break;
    default:
        CUDA_LAUNCH(d, numbers_kernel, 1, THREADS, 0, wrong);
    }
}

int64_t shim_self_test(enum shim_self_test test)
{
    static int wrong[3 * THREADS];
    static float number[2 * THREADS * 4];
    struct device *d = nullptr;
    int *on_device = nullptr;
    float *numbers = nullptr;
    int64_t sum = -1;
    struct err err = {};

    for (int i = 0; i < 2 * THREADS * 4; i++)
        number[i] = (float)i;
    if (device_open(&d, 0, &err))
        return -1;
    on_device = (int *)device_alloc(d, sizeof wrong, &err);
    numbers = (float *)device_alloc(d, sizeof number, &err);
    if (!on_device || !numbers)
        goto out;
    device_fill(d, on_device, 0, sizeof wrong);
    device_copy_in(d, numbers, number, sizeof number);
    launch(d, test, on_device, numbers);
    device_copy_out(d, wrong, on_device, sizeof wrong);
    if (device_check(d, &err))
        goto out;
    sum = 0;
    for (int i = 0; i < 3 * THREADS; i++)
        sum += wrong[i];
out:
    device_free(d, numbers);
    device_free(d, on_device);
    device_close(d);
    return sum;
}
