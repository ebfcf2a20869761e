/* engine_bench_apply: what one row through a delta costs on the CPU, beside one row through an F32
 * matrix of the same shape, by the functions that serve. As in serving, each matrix is read and
 * then its delta; between two uses of one, more memory passes through the caches than they hold. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/base/clock.h"
#include "engine/base/rng.h"
#include "engine/bench.h"
#include "engine/bench_delta.h"
#include "engine/cpu/cpu.h"
#include "engine/cpu/cpu_backend.h"

#define ROTATION_MIN ((int64_t)256 << 20) /* bytes of all matrices */
#define ROTATION_MAX ((int64_t)1 << 30)
#define SECONDS 2.0
#define MIN_RUNS 31
#define MAX_RUNS (1 << 16)

struct apply_bench {
    const struct engine_bench_apply_options *o;
    const struct cpu_kernels *kernels;
    struct backend backend;
    struct bench_delta delta;
    struct packed_delta **packed; /* [matrices] the same difference, each in memory of its own */
    float *weight;                /* [matrices, rows, cols] */
    float *x, *y;
    int32_t matrices;
    double *dense, *apply; /* [MAX_RUNS] s */
    int32_t runs;
    double compress_seconds;
};

static int find_kernels(struct apply_bench *b, struct err *err)
{
    const struct cpu_kernels *const *k = cpu_kernels_usable();

    b->kernels = *k;
    if (!b->o->kernels)
        return 0;
    for (; *k; k++)
        if (strcmp((*k)->name, b->o->kernels) == 0) {
            b->kernels = *k;
            return 0;
        }
    return err_set(err, ERR_INVALID, "this processor has no kernels \"%.16s\"", b->o->kernels);
}

static int64_t level3_bytes(void)
{
    long bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);

    return bytes > 0 ? bytes : 0;
}

/* As many matrices as are twice the last cache together: on a machine that shares it with others,
 * much of that is not ours. */
static int32_t matrices_of(const struct engine_bench_apply_options *o)
{
    int64_t each = (int64_t)o->rows * o->cols * (int64_t)sizeof(float), want = 2 * level3_bytes();

    if (o->rotation_bytes > 0)
        return (int32_t)ceil_div(o->rotation_bytes, each) + 1;
    want = want < ROTATION_MIN ? ROTATION_MIN : want > ROTATION_MAX ? ROTATION_MAX : want;
    return (int32_t)ceil_div(want, each) + 1;
}

static int open_bench(struct apply_bench *b, const struct codec *codec, struct err *err)
{
    const struct engine_bench_apply_options *o = b->o;
    size_t each = (size_t)o->rows * (size_t)o->cols;
    double began = clock_now();

    if (find_kernels(b, err) ||
        cpu_backend_open(&b->backend, o->threads, b->kernels, DTYPE_F32, err) ||
        bench_delta_make(&b->delta, codec, o->rows, o->cols, o->ratio, err))
        return -1;
    b->compress_seconds = clock_now() - began;
    b->matrices = matrices_of(o);
    b->packed = calloc((size_t)b->matrices, sizeof *b->packed);
    b->weight = malloc((size_t)b->matrices * each * sizeof *b->weight);
    b->x = malloc((size_t)o->cols * sizeof *b->x);
    b->y = calloc((size_t)o->rows, sizeof *b->y);
    b->dense = malloc(MAX_RUNS * sizeof *b->dense);
    b->apply = malloc(MAX_RUNS * sizeof *b->apply);
    if (!b->packed || !b->weight || !b->x || !b->y || !b->dense || !b->apply)
        return err_set(err, ERR_NO_MEMORY, "no memory for %d matrices of %d by %d", b->matrices,
                       o->rows, o->cols);
    for (size_t i = 0; i < each; i++)
        b->weight[i] = (float)(rng_at(3, 0, i) >> 40) * 0x1p-24f - 0.5f;
    for (int32_t i = 0; i < o->cols; i++)
        b->x[i] = b->weight[i];
    for (int32_t m = 0; m < b->matrices; m++) {
        if (m > 0)
            memcpy(b->weight + (size_t)m * each, b->weight, each * sizeof *b->weight);
        if (cpu_delta_pack(&b->backend, &b->delta.tensor, &b->packed[m], err))
            return -1;
    }
    return 0;
}

static void close_bench(struct apply_bench *b)
{
    for (int32_t m = 0; b->packed && m < b->matrices; m++)
        cpu_delta_free(&b->backend, b->packed[m]);
    free(b->packed);
    free(b->weight);
    free(b->x);
    free(b->y);
    free(b->dense);
    free(b->apply);
    bench_delta_free(&b->delta);
    if (b->backend.ops)
        backend_close(&b->backend);
}

/* One matrix, then its delta. */
static void run_once(struct apply_bench *b, int32_t m, double *dense, double *apply)
{
    const struct batch batch = {.rows = 1, .serving = true};
    const int64_t shape[2] = {b->o->rows, b->o->cols};
    const struct linear linear = {
        .w = tensor_view(b->weight + (int64_t)m * shape[0] * shape[1], DTYPE_F32, 2, shape)};
    double began = clock_now(), middle;

    cpu_linear(cpu_of(&b->backend), &batch, 0,
               &(struct linear_call){.linear = &linear, .x = b->x, .y = b->y}, 1);
    middle = clock_now();
    cpu_delta_apply(cpu_of(&b->backend),
                    &(struct cpu_delta_call){.delta = b->packed[m], .x = b->x, .y = b->y}, 1);
    *dense = middle - began;
    *apply = clock_now() - middle;
}

static void measure(struct apply_bench *b)
{
    double ignored, began;

    for (int32_t m = 0; m < b->matrices; m++)
        run_once(b, m, &ignored, &ignored);
    began = clock_now();
    for (int32_t i = 0; i < MAX_RUNS && (i < MIN_RUNS || clock_now() - began < SECONDS); i++) {
        run_once(b, i % b->matrices, &b->dense[i], &b->apply[i]);
        b->runs = i + 1;
    }
}

static int report(struct apply_bench *b, char *json, size_t size, struct err *err)
{
    const struct engine_bench_apply_options *o = b->o;
    /* bench_median sorts: the first is the best, which says more where others use the machine. */
    double weights = (double)o->rows * o->cols, dense = bench_median(b->dense, b->runs),
           apply = bench_median(b->apply, b->runs);
    int64_t bytes = cpu_delta_bytes(b->packed[0]);
    int n = snprintf(
        json, size,
        "{\"what\": \"graft apply\", \"rows\": %d, \"cols\": %d, \"codec\": \"%s\", "
        "\"kernels\": \"%s\", \"threads\": %d, \"stored_bytes\": %lld, \"stored_ratio\": %.2f, "
        "\"bytes\": %lld, \"s\": %.3e, \"gb_per_s\": %.4g, \"f32_s\": %.3e, "
        "\"f32_gb_per_s\": %.4g, \"times_f32\": %.4g, \"s_best\": %.3e, \"f32_s_best\": %.3e, "
        "\"matrices\": %d, "
        "\"rotation_bytes\": %lld, \"l3_bytes\": %lld, \"runs\": %d, \"compress_s\": %.2f}",
        o->rows, o->cols, b->delta.codec->name, b->kernels->name, b->backend.threads,
        (long long)b->delta.bytes, 2 * weights / (double)b->delta.bytes, (long long)bytes, apply,
        (double)bytes / apply / 1e9, dense, 4 * weights / dense / 1e9, dense / apply, b->apply[0],
        b->dense[0], b->matrices,
        (long long)(b->matrices * (4 * (int64_t)o->rows * o->cols + bytes)),
        (long long)level3_bytes(), b->runs, b->compress_seconds);

    if (n < 0 || (size_t)n >= size)
        return err_set(err, ERR_INTERNAL, "the bench's line needs %d bytes", n + 1);
    return 0;
}

int engine_bench_apply(const struct engine_bench_apply_options *o, char *json, size_t json_size,
                       struct err *err)
{
    struct apply_bench b = {.o = o};
    const struct codec *codec = codec_find(o->codec);
    int rc = -1;

    if (!codec)
        return err_set(err, ERR_INVALID, "there is no codec \"%.32s\": %s", o->codec,
                       codec_names());
    if (o->rows < 16 || o->rows > 16384 || o->cols < 16 || o->cols > 16384 ||
        (o->ratio != 0 && !(o->ratio >= 1 && o->ratio <= 1024)))
        return err_set(err, ERR_INVALID,
                       "bench apply: 16 to 16384 rows and columns, a ratio of 1 to 1024");
    if (open_bench(&b, codec, err) == 0) {
        measure(&b);
        rc = report(&b, json, json_size, err);
    }
    close_bench(&b);
    return rc;
}
