#include <assert.h>
#include <cblas.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/cpu/cpu.h"

#define SYMMETRIC_BLOCK 192 /* rows and columns of a task of a symmetric product */
#define STRIP 24            /* rows of A that stay in L1 while the columns pass by */
#define TILE_COLS 48        /* where columns are cut */

/* A task is a block of C: fixed by the shapes, so that every element is summed in one order
 * whatever the number of threads. */
struct grid {
    int64_t rows, cols; /* tasks along each side */
    int32_t unit;       /* columns are cut at multiples of this */
};

struct gemm_run {
    struct cpu *cpu;
    const struct gemm *gemm;
    int count;
    struct grid grid[GEMM_MAX];
    int64_t first[GEMM_MAX + 1]; /* task numbers */
};

static struct grid grid_of(const struct cpu *cpu, const struct gemm *g)
{
    if (g->symmetric)
        return (struct grid){ceil_div(g->m, SYMMETRIC_BLOCK), ceil_div(g->n, SYMMETRIC_BLOCK),
                             TILE_COLS};
    if (cpu->blas && g->b_dtype == DTYPE_F32)
        return (struct grid){ceil_div(g->m, 256), ceil_div(g->n, 384), 16};
    if (g->kind == GEMM_NT)
        return (struct grid){ceil_div(g->m, CPU_ROW_BLOCK), ceil_div(g->n, CPU_ROW_BLOCK), 16};
    /* Packing is paid for by rows: many rows, few columns; but enough tasks for many cores. */
    int32_t width = g->n >= 8 * CPU_GEMM_COLS ? CPU_GEMM_COLS : CPU_GEMM_COLS / 2;
    return (struct grid){ceil_div(g->m, 512), ceil_div(g->n, width), TILE_COLS};
}

static void block_blas(const struct gemm *g, struct span r, struct span c)
{
    const float *a = g->kind == GEMM_TN ? g->a + r.from : g->a + r.from * g->lda;
    const float *b = (const float *)g->b + (g->kind == GEMM_NT ? c.from * g->ldb : c.from);

    cblas_sgemm(CblasRowMajor, g->kind == GEMM_TN ? CblasTrans : CblasNoTrans,
                g->kind == GEMM_NT ? CblasTrans : CblasNoTrans, r.to - r.from, c.to - c.from, g->k,
                1.0f, a, (int)g->lda, b, (int)g->ldb, g->add ? 1.0f : 0.0f,
                g->c + r.from * g->ldc + c.from, (int)g->ldc);
}

static void block_dot(const struct cpu *cpu, const struct gemm *g, struct span r, struct span c)
{
    cpu->k->dot(&(struct dot_args){
        .x = g->a + r.from * g->lda,
        .ldx = g->lda,
        .rows = r.to - r.from,
        .w = (const char *)g->b + c.from * g->ldb * dtype_size(g->b_dtype),
        .dtype = g->b_dtype,
        .ldw = g->ldb,
        .outs = c.to - c.from,
        .n = g->k,
        .y = g->c + r.from * g->ldc + c.from,
        .ldy = g->ldc,
        .add = g->add,
    });
}

/* Rows [k0, k0 + k) and columns of the span, as f32, padded with zeros to sixteens. */
static int32_t pack_columns(const struct gemm *g, int32_t k0, int32_t k, struct span c, float *to)
{
    int32_t width = c.to - c.from, padded = (width + 15) / 16 * 16;
    struct tensor b = {.data = (void *)(uintptr_t)g->b, .dtype = g->b_dtype};

    for (int32_t i = 0; i < k; i++, to += padded) {
        tensor_to_f32(&b, (k0 + i) * g->ldb + c.from, width, to);
        memset(to + width, 0, (size_t)(padded - width) * sizeof *to);
    }
    return padded;
}

/* Rows [row, row + rows) of a transposed A, columns of g->a far apart, for the same k: strips of
 * STRIP of them, each [k][rows of the strip]. */
static void pack_rows(const struct gemm *g, int32_t row, int32_t rows, int32_t k0, int32_t k,
                      float *to)
{
    const float *a = g->a + k0 * g->lda + row;
    int32_t whole = rows / STRIP * STRIP, rest = rows - whole;

    for (int32_t i = 0; i < k; i++, a += g->lda) {
        for (int32_t s = 0; s < whole; s += STRIP)
            memcpy(to + s * k + i * STRIP, a + s, STRIP * sizeof *to);
        memcpy(to + whole * k + i * rest, a + whole, (size_t)rest * sizeof *to);
    }
}

/* Of a strip that begins with `row`: columns of the block that lie below the diagonal. */
static int32_t columns_below(const struct gemm *g, int32_t row, struct span c)
{
    int32_t below = g->symmetric && row > c.from ? (row - c.from) / TILE_COLS * TILE_COLS : 0;

    return below < c.to - c.from ? below : c.to - c.from;
}

/* Rows of the block against its packed columns; o has what they share. */
static void outer_strips(const struct cpu *cpu, const struct gemm *g, struct span r, struct span c,
                         int32_t k0, const struct outer_args *shared, float *rows)
{
    struct outer_args o = *shared;

    for (int32_t row = r.from; row < r.to; row += STRIP) {
        int32_t part = (row - r.from) % CPU_GEMM_ROWS, below = columns_below(g, row, c);

        o.rows = r.to - row < STRIP ? r.to - row : STRIP;
        if (g->kind == GEMM_TN) {
            if (part == 0)
                pack_rows(g, row, r.to - row < CPU_GEMM_ROWS ? r.to - row : CPU_GEMM_ROWS, k0, o.k,
                          rows);
            o.a = rows + part * o.k;
            o.k_step = o.rows;
        } else {
            o.a = g->a + row * g->lda + k0;
        }
        o.b = shared->b + below;
        o.c = g->c + row * g->ldc + c.from + below;
        o.cols = shared->cols - below;
        if (o.cols > 0)
            cpu->k->outer(&o);
    }
}

static void block_outer(const struct cpu *cpu, const struct gemm *g, struct span r, struct span c,
                        struct cpu_scratch *scratch)
{
    assert(c.to - c.from <= CPU_GEMM_COLS);
    for (int32_t k0 = 0; k0 < g->k; k0 += CPU_GEMM_K) {
        int32_t k = g->k - k0 < CPU_GEMM_K ? g->k - k0 : CPU_GEMM_K;
        struct outer_args o = {
            .row_step = g->kind == GEMM_TN ? 1 : g->lda,
            .k_step = 1,
            .b = scratch->pack,
            .ldb = pack_columns(g, k0, k, c, scratch->pack),
            .cols = c.to - c.from,
            .k = k,
            .ldc = g->ldc,
            .add = g->add || k0 > 0,
        };

        outer_strips(cpu, g, r, c, k0, &o, scratch->rows);
    }
}

static void gemm_task(void *context, int64_t task, int worker)
{
    const struct gemm_run *run = context;
    struct cpu *cpu = run->cpu;
    int i = 0;

    while (task >= run->first[i + 1])
        i++;
    const struct gemm *g = &run->gemm[i];
    const struct grid *grid = &run->grid[i];
    task -= run->first[i];
    /* Neighbours share columns: what was packed or read of B is warm. */
    struct span c = span_part(g->n, grid->unit, grid->cols, task / grid->rows);
    struct span r = span_part(g->m, 8, grid->rows, task % grid->rows);

    if (r.from >= r.to || c.from >= c.to || (g->symmetric && c.to <= r.from))
        return;
    if (cpu->blas && g->b_dtype == DTYPE_F32)
        block_blas(g, r, c);
    else if (g->kind == GEMM_NT)
        block_dot(cpu, g, r, c);
    else
        block_outer(cpu, g, r, c, &cpu->scratch[worker]);
}

void cpu_gemm(struct cpu *cpu, const struct gemm *gemm, int count)
{
    struct gemm_run run = {.cpu = cpu, .gemm = gemm, .count = count};

    assert(count <= GEMM_MAX);
    for (int i = 0; i < count; i++) {
        run.grid[i] = grid_of(cpu, &gemm[i]);
        run.first[i + 1] = run.first[i] + run.grid[i].rows * run.grid[i].cols;
    }
    thread_pool_run(cpu->pool, run.first[count], gemm_task, &run);
}

/* ------------------------------------------------------------------ self-check */

static void gemm_plainly(const struct gemm *g, double *c, double *bound)
{
    for (int32_t i = 0; i < g->m; i++)
        for (int32_t j = 0; j < g->n; j++) {
            double sum = 0, size = 0;

            for (int32_t k = 0; k < g->k; k++) {
                double a = g->kind == GEMM_TN ? g->a[k * g->lda + i] : g->a[i * g->lda + k];
                const float *b = g->b;
                double p = a * (double)(g->kind == GEMM_NT ? b[j * g->ldb + k] : b[k * g->ldb + j]);

                sum += p;
                size += fabs(p);
            }
            if (g->add)
                sum += (double)g->c[i * g->ldc + j];
            c[i * g->n + j] = sum;
            bound[i * g->n + j] = size + 1;
        }
}

static int check_one(struct cpu *cpu, struct gemm g, float *memory, struct err *err)
{
    int64_t a_size = (int64_t)g.m * g.k, b_size = (int64_t)g.k * g.n, c_size = (int64_t)g.m * g.n;
    double *want = malloc((size_t)c_size * 2 * sizeof *want);
    int rc = -1;

    if (!want)
        return err_set(err, ERR_NO_MEMORY, "no memory for the check of the products");
    for (int64_t i = 0; i < a_size + b_size + c_size; i++)
        memory[i] = (float)((i * 7919 + 13) % 2003) / 1001.5f - 1.0f;
    g.a = memory;
    g.b = memory + a_size;
    g.c = memory + a_size + b_size;
    g.lda = g.kind == GEMM_TN ? g.m : g.k;
    g.ldb = g.kind == GEMM_NT ? g.k : g.n;
    g.ldc = g.n;
    gemm_plainly(&g, want, want + c_size);
    cpu_gemm(cpu, &g, 1);
    for (int64_t i = 0; i < c_size; i++)
        if (!(fabs((double)g.c[i] - want[i]) <= 1e-5 * want[c_size + i])) {
            err_set(err, ERR_UNAVAILABLE,
                    "%s multiplies matrices wrongly on this processor (%dx%dx%d, kind %d): %s",
                    cpu->blas ? "the installed OpenBLAS" : cpu->k->name, g.m, g.n, g.k, (int)g.kind,
                    cpu->blas ? "set OPENBLAS_CORETYPE=Haswell, or install a newer libopenblas"
                              : "report this as a bug");
            goto out;
        }
    rc = 0;
out:
    free(want);
    return rc;
}

int cpu_gemm_check(struct cpu *cpu, struct err *err)
{
    static const int32_t shape[][3] = {
        {1, 1, 1}, {7, 5, 3}, {64, 64, 64}, {33, 100, 17}, {130, 49, 300}, {96, 256, 64},
    };
    float *memory = malloc(sizeof *memory * 130 * 1024);
    int rc = -1;

    if (!memory)
        return err_set(err, ERR_NO_MEMORY, "no memory for the check of the products");
    for (size_t i = 0; i < sizeof shape / sizeof shape[0]; i++)
        for (int kind = GEMM_NT; kind <= GEMM_TN; kind++)
            for (int add = 0; add < 2; add++)
                if (check_one(cpu,
                              (struct gemm){.kind = (enum gemm_kind)kind,
                                            .m = shape[i][0],
                                            .n = shape[i][1],
                                            .k = shape[i][2],
                                            .b_dtype = DTYPE_F32,
                                            .add = add},
                              memory, err))
                    goto out;
    rc = 0;
out:
    free(memory);
    return rc;
}
