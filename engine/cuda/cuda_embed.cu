#include <cstdlib>

#include "engine/cuda/cuda_delta.cuh"

#define THREADS 128

/* ------------------------------------------------------------------ rope */

/* One thread for each row and frequency: rope[r] = cosines, then sines. The angle is rounded to
 * float as the reference implementation does, its cosine and sine are then as exact as the CPU's.
 */
static __global__ void rope_kernel(struct cuda_batch batch, const float *inv_freq, int32_t half,
                                   float magnitude, float *rope)
{
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    int64_t r = i / half, f = i % half;

    if (r >= batch.rows)
        return;
    float angle = (float)batch.position[r] * inv_freq[f];
    rope[r * 2 * half + f] = (float)cos((double)angle) * magnitude;
    rope[r * 2 * half + half + f] = (float)sin((double)angle) * magnitude;
}

void cuda_rope(struct cuda *cuda, const struct begin_args *args, const float *inv_freq)
{
    int32_t half = (int32_t)args->inv_freq.shape[0];
    int64_t blocks = ceil_div((int64_t)cuda->batch.rows * half, THREADS);

    CUDA_LAUNCH(cuda->device, rope_kernel, dim3((unsigned)blocks), THREADS, 0, cuda->batch,
                inv_freq, half, args->rope_magnitude, data_of<float>(args->rope));
}

/* ------------------------------------------------------------------ embed */

/* One block for each row. */
template <typename T>
static __global__ void embed_kernel(struct cuda_batch batch, const T *embed, T *x, int32_t width)
{
    int64_t r = blockIdx.x, token = batch.token[r];
    int32_t group = batch.row_group[r];

    for (int32_t c = threadIdx.x; c < width; c += blockDim.x) {
        float value = to_float(embed[token * width + c]);

        if (group >= 0 && !delta_is_empty(batch.outer[group].embed))
            value += delta_value(batch.outer[group].embed, (int32_t)token, c);
        x[r * width + c] = from_float<T>(value);
    }
}

void cuda_embed(struct backend *backend, const struct embed_args *a)
{
    struct cuda *cuda = cuda_of(backend);
    unsigned rows = (unsigned)a->batch->rows;

    WITH_PRECISION(cuda, T,
                   CUDA_LAUNCH(cuda->device, embed_kernel<T>, rows, THREADS, 0, cuda->batch,
                               data_of<const T>(a->embed), data_of<T>(a->x),
                               (int32_t)a->embed.shape[1]));
}

/* ------------------------------------------------------------------ embed backward */

/* order: rows sorted by token, rows of a token ascending. The thread block at the first row of a
 * token adds all its rows, in order; the other blocks have nothing to do. */
template <typename T>
static __global__ void embed_backward_kernel(const int32_t *token, const int32_t *order,
                                             int32_t rows, const T *dx, float *d_embed,
                                             int32_t width)
{
    int32_t first = blockIdx.x, last = first + 1, own = token[order[first]];

    if (first > 0 && token[order[first - 1]] == own)
        return;
    while (last < rows && token[order[last]] == own)
        last++;
    for (int32_t c = threadIdx.x; c < width; c += blockDim.x) {
        float sum = d_embed[(int64_t)own * width + c];

        for (int32_t i = first; i < last; i++)
            sum += to_float(dx[(int64_t)order[i] * width + c]);
        d_embed[(int64_t)own * width + c] = sum;
    }
}

void cuda_embed_backward(struct backend *backend, const struct embed_backward_args *a)
{
    struct cuda *cuda = cuda_of(backend);

    if (!a->d_embed.data)
        return;
    WITH_PRECISION(cuda, T,
                   CUDA_LAUNCH(cuda->device, embed_backward_kernel<T>, (unsigned)cuda->batch.rows,
                               THREADS, 0, cuda->batch.token, cuda->batch.order, cuda->batch.rows,
                               data_of<const T>(a->dx), data_of<float>(a->d_embed),
                               (int32_t)a->dx.shape[1]));
}
