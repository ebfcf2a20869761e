#include "engine/codec/compression.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/codec/linalg.h"

#define PORTION (1 << 16) /* elements compared at once */

struct compression {
    const struct artifact_source *source;
    struct compression_options options;
    float *const *h, *const *g;             /* [count] or NULL */
    bool *changed;                          /* [count] */
    struct tensor (*part)[CODEC_MAX_PARTS]; /* [count] */
    int32_t *matrix;                        /* [matrices] tensors that go through the codec, the
                                               largest first: neighbours take as long */
    int32_t matrices;
    struct codec_plan *plan; /* [matrices] */
    double **energy;         /* [matrices], owned */
    double *error, *norm;    /* [matrices]: what compression_measure found */
};

/* What some matrices are worked on with, at once. */
struct slot {
    struct compression *c;
    int32_t at; /* in `matrix` */
    float *base, *difference;
    struct err err;
    int rc;
};

struct work {
    struct slot *slot;
    void (*one)(struct slot *slot);
};

static const struct artifact_tensor *tensor_at(const struct compression *c, int32_t at)
{
    return &c->source->tensor[c->matrix[at]];
}

/* ------------------------------------------------------------------ a pass over all matrices */

/* In doubles: the difference and its vectors, statistics and their roots (factor.h), and rounding.
 */
int64_t compression_work_bytes(int64_t rows, int64_t cols)
{
    return 8 * (6 * rows * cols + 3 * (rows * rows + cols * cols));
}

static int read_slot(struct slot *s, struct err *err)
{
    const struct artifact_source *source = s->c->source;
    const struct artifact_tensor *t = tensor_at(s->c, s->at);
    int64_t count = artifact_elements(t);

    if (source->read(source->context, s->c->matrix[s->at], 0, count, s->base, s->difference, err))
        return -1;
    for (int64_t i = 0; i < count; i++)
        s->difference[i] -= s->base[i];
    return 0;
}

static void run_slot(void *context, int64_t task, int worker)
{
    struct work *w = context;
    struct slot *s = &w->slot[task];

    if (s->c->source->any_thread)
        s->rc = read_slot(s, &s->err);
    if (!s->rc)
        w->one(s);
}

/* How many matrices from `at` on may be worked on at once. */
static int32_t wave_at(const struct compression *c, int32_t at)
{
    int32_t threads = thread_pool_threads(c->options.pool), count = 0;
    int64_t bytes = 0;

    while (count < threads && at + count < c->matrices) {
        const struct artifact_tensor *t = tensor_at(c, at + count);

        bytes += compression_work_bytes(t->rows, t->cols);
        if (count > 0 && bytes > COMPRESSION_MEMORY)
            break;
        count++;
    }
    return count;
}

static int run_wave(struct compression *c, struct work *w, int32_t at, int32_t count,
                    struct err *err)
{
    for (int32_t i = 0; i < count; i++) {
        struct slot *s = &w->slot[i];

        s->at = at + i;
        s->rc = 0;
        err_clear(&s->err);
        if (!c->source->any_thread && read_slot(s, err))
            return -1;
    }
    thread_pool_run(c->options.pool, count, run_slot, w);
    for (int32_t i = 0; i < count; i++) {
        struct slot *s = &w->slot[i];

        if (s->rc) {
            if (err)
                *err = s->err;
            return err_prefix(err, "\"%s\"", tensor_at(c, s->at)->name);
        }
    }
    return 0;
}

/* Memory for a matrix of the wave at `at`, where the slot has none yet: later waves are of smaller
 * ones. */
static int open_slot(struct slot *s, struct compression *c, int32_t at, struct err *err)
{
    size_t bytes = (size_t)artifact_elements(tensor_at(c, at)) * sizeof(float);

    s->c = c;
    if (!s->base)
        s->base = malloc(bytes);
    if (!s->difference)
        s->difference = malloc(bytes);
    return s->base && s->difference
               ? 0
               : err_set(err, ERR_NO_MEMORY, "no memory for compressing a fine-tune");
}

static int each_matrix(struct compression *c, const char *stage, void (*one)(struct slot *slot),
                       struct err *err)
{
    int32_t threads = thread_pool_threads(c->options.pool);
    struct work w = {.slot = calloc((size_t)threads, sizeof *w.slot), .one = one};
    int rc = w.slot ? 0 : err_set(err, ERR_NO_MEMORY, "no memory for compressing a fine-tune");

    for (int32_t at = 0, count; !rc && at < c->matrices; at += count) {
        count = wave_at(c, at);
        for (int32_t i = 0; !rc && i < count; i++)
            rc = open_slot(&w.slot[i], c, at, err);
        if (!rc)
            rc = run_wave(c, &w, at, count, err);
        if (!rc)
            rc = stage_tell(&c->options.listener, stage, (double)(at + count) / c->matrices, err);
    }
    for (int32_t i = 0; w.slot && i < threads; i++) {
        free(w.slot[i].base);
        free(w.slot[i].difference);
    }
    free(w.slot);
    return rc;
}

/* ------------------------------------------------------------------ opening */

static int find_changed(struct compression *c, int32_t index, float *base, float *tuned,
                        struct err *err)
{
    const struct artifact_source *source = c->source;
    int64_t total = artifact_elements(&source->tensor[index]);

    for (int64_t from = 0; from < total && !c->changed[index]; from += PORTION) {
        int64_t count = total - from < PORTION ? total - from : PORTION;

        if (source->read(source->context, index, from, count, base, tuned, err))
            return -1;
        c->changed[index] = memcmp(base, tuned, (size_t)count * sizeof *base) != 0;
    }
    return 0;
}

static int find_all_changed(struct compression *c, struct err *err)
{
    float *base = malloc(PORTION * sizeof *base), *tuned = malloc(PORTION * sizeof *tuned);
    int rc = 0;

    if (!base || !tuned)
        rc = err_set(err, ERR_NO_MEMORY, "no memory for compressing a fine-tune");
    for (int32_t i = 0; !rc && i < c->source->count; i++) {
        rc = find_changed(c, i, base, tuned, err);
        if (c->changed[i] && c->source->tensor[i].kind == ARTIFACT_MATRIX)
            c->matrix[c->matrices++] = i;
        if (!rc)
            rc = stage_tell(&c->options.listener, "read", (double)(i + 1) / c->source->count, err);
    }
    free(base);
    free(tuned);
    return rc;
}

static void sort_matrices(struct compression *c)
{
    for (int32_t i = 1; i < c->matrices; i++) { /* stable: equals stay in the model's order */
        int32_t moved = c->matrix[i], to = i;

        for (; to > 0 && artifact_elements(&c->source->tensor[c->matrix[to - 1]]) <
                             artifact_elements(&c->source->tensor[moved]);
             to--)
            c->matrix[to] = c->matrix[to - 1];
        c->matrix[to] = moved;
    }
}

static struct codec_matrix matrix_of(const struct slot *s)
{
    const struct artifact_tensor *t = tensor_at(s->c, s->at);
    const struct compression *c = s->c;
    int32_t index = c->matrix[s->at];

    return (struct codec_matrix){
        .rows = t->rows,
        .cols = t->cols,
        .delta = s->difference,
        .h = c->h && c->options.codec->inputs ? c->h[index] : NULL,
        .g = c->g && c->options.codec->gradients ? c->g[index] : NULL,
    };
}

static void decompose_one(struct slot *s)
{
    struct codec_matrix m = matrix_of(s);

    s->rc = s->c->options.codec->energy(&m, s->c->energy[s->at], &s->err);
}

static int open_plans(struct compression *c, struct err *err)
{
    c->plan = calloc((size_t)c->matrices + 1, sizeof *c->plan);
    c->energy = calloc((size_t)c->matrices + 1, sizeof *c->energy);
    c->error = calloc((size_t)c->matrices + 1, sizeof *c->error);
    c->norm = calloc((size_t)c->matrices + 1, sizeof *c->norm);
    if (!c->plan || !c->energy || !c->error || !c->norm)
        return err_set(err, ERR_NO_MEMORY, "no memory to plan %d matrices", c->matrices);
    for (int32_t i = 0; i < c->matrices; i++) {
        const struct artifact_tensor *t = tensor_at(c, i);
        struct codec_plan *p = &c->plan[i];

        p->rows = t->rows;
        p->cols = t->cols;
        p->rank = t->rows < t->cols ? t->rows : t->cols;
        p->width = calloc((size_t)p->rank, 1);
        c->energy[i] = calloc((size_t)p->rank, sizeof(double));
        p->energy = c->options.codec->energy ? c->energy[i] : NULL;
        if (!p->width || !c->energy[i])
            return err_set(err, ERR_NO_MEMORY, "no memory to plan %d matrices", c->matrices);
    }
    return 0;
}

int compression_decompose(struct compression *c, float *const *h, float *const *g, struct err *err)
{
    c->h = h;
    c->g = g;
    return c->options.codec->energy ? each_matrix(c, "decompose", decompose_one, err) : 0;
}

int compression_open(struct compression **out, const struct artifact_source *source,
                     const struct compression_options *options, struct err *err)
{
    struct compression *c = calloc(1, sizeof *c);
    size_t count = (size_t)source->count;

    *out = NULL;
    linalg_one_thread();
    if (!c)
        return err_set(err, ERR_NO_MEMORY, "no memory for compressing a fine-tune");
    c->source = source;
    c->options = *options;
    c->changed = calloc(count + 1, sizeof *c->changed);
    c->part = calloc(count + 1, sizeof *c->part);
    c->matrix = calloc(count + 1, sizeof *c->matrix);
    if (!c->changed || !c->part || !c->matrix) {
        err_set(err, ERR_NO_MEMORY, "no memory for compressing a fine-tune");
        goto fail;
    }
    if (find_all_changed(c, err))
        goto fail;
    sort_matrices(c);
    if (open_plans(c, err))
        goto fail;
    *out = c;
    return 0;
fail:
    compression_free(c);
    return -1;
}

static void free_parts(struct compression *c, int32_t index)
{
    for (int p = 0; p < CODEC_MAX_PARTS; p++)
        free(c->part[index][p].data);
    memset(c->part[index], 0, sizeof c->part[index]);
}

void compression_free(struct compression *c)
{
    if (!c)
        return;
    for (int32_t i = 0; c->plan && i < c->matrices; i++)
        free(c->plan[i].width);
    for (int32_t i = 0; c->energy && i < c->matrices; i++)
        free(c->energy[i]);
    for (int32_t i = 0; c->part && i < c->source->count; i++)
        free_parts(c, i);
    free(c->plan);
    free(c->energy);
    free(c->error);
    free(c->norm);
    free(c->matrix);
    free(c->part);
    free(c->changed);
    free(c);
}

/* ------------------------------------------------------------------ parts */

static void compress_one(struct slot *s)
{
    struct codec_matrix m = matrix_of(s);
    struct compression *c = s->c;
    int32_t index = c->matrix[s->at];

    free_parts(c, index);
    s->rc = c->options.codec->compress(&m, &c->plan[s->at], c->part[index], &s->err);
}

static struct artifact_content content_of(const struct compression *c, const char *report)
{
    return (struct artifact_content){.source = c->source,
                                     .codec = c->options.codec,
                                     .changed = c->changed,
                                     .part = c->part,
                                     .report = report};
}

int compression_budget(const struct compression *c, size_t report_len, struct budget *out,
                       struct err *err)
{
    struct artifact_content content = content_of(c, NULL);

    return budget_measure(&content, report_len, out, err);
}

int compression_check(const struct compression *c, int64_t bytes, size_t report_len,
                      struct err *err)
{
    struct artifact_content content = content_of(c, NULL);

    return budget_check(&content, report_len, bytes, err);
}

int compression_predict(struct compression *c, int64_t bytes, size_t report_len, double *cost,
                        struct err *err)
{
    struct artifact_content content = content_of(c, NULL);
    int64_t overhead = artifact_overhead(&content, report_len);

    *cost = NAN;
    return compression_check(c, bytes, report_len, err) ||
                   c->options.codec->allot(c->plan, c->matrices, bytes - overhead, cost, err)
               ? -1
               : 0;
}

int compression_run(struct compression *c, int64_t bytes, size_t report_len, double *cost,
                    struct err *err)
{
    return compression_predict(c, bytes, report_len, cost, err)
               ? -1
               : each_matrix(c, "compress", compress_one, err);
}

bool compression_changed(const struct compression *c, int32_t index)
{
    return c->changed[index];
}

struct tensor *compression_parts(const struct compression *c, int32_t index)
{
    return c->part[index][0].data ? c->part[index] : NULL;
}

int compression_set_parts(struct compression *c, int32_t index, const struct tensor part[],
                          struct err *err)
{
    if (!c->changed[index] || c->source->tensor[index].kind != ARTIFACT_MATRIX)
        return err_set(err, ERR_INVALID, "\"%s\" did not change: nothing is stored of it",
                       c->source->tensor[index].name);
    free_parts(c, index);
    for (int p = 0; p < c->options.codec->part_count; p++) {
        size_t bytes = (size_t)tensor_elements(&part[p]) * (size_t)dtype_size(part[p].dtype);

        c->part[index][p] = part[p];
        c->part[index][p].data = malloc(bytes + 1);
        if (!c->part[index][p].data)
            return err_set(err, ERR_NO_MEMORY, "no memory for the parts of a matrix");
        memcpy(c->part[index][p].data, part[p].data, bytes);
    }
    return 0;
}

int64_t compression_part_bytes(const struct compression *c, int32_t index)
{
    int64_t bytes = 0;

    for (int p = 0; p < c->options.codec->part_count; p++)
        if (c->part[index][p].data)
            bytes += tensor_elements(&c->part[index][p]) * dtype_size(c->part[index][p].dtype);
    return bytes;
}

static void measure_one(struct slot *s)
{
    const struct artifact_tensor *t = tensor_at(s->c, s->at);

    double error = 0, norm = 0;

    s->rc = s->c->options.codec->expand(s->c->part[s->c->matrix[s->at]], t->rows, t->cols, s->base,
                                        &s->err);
    for (int64_t i = 0; !s->rc && i < artifact_elements(t); i++) {
        double wrong = (double)s->base[i] - (double)s->difference[i];

        error += wrong * wrong;
        norm += (double)s->difference[i] * (double)s->difference[i];
    }
    s->c->error[s->at] = error;
    s->c->norm[s->at] = norm;
}

int compression_measure(struct compression *c, double *error, double *norm, struct err *err)
{
    memset(error, 0, (size_t)c->source->count * sizeof *error);
    memset(norm, 0, (size_t)c->source->count * sizeof *norm);
    if (each_matrix(c, "compare", measure_one, err))
        return -1;
    for (int32_t i = 0; i < c->matrices; i++) {
        error[c->matrix[i]] = c->error[i];
        norm[c->matrix[i]] = c->norm[i];
    }
    return 0;
}

int compression_write(const struct compression *c, const char *path, const char *report,
                      int64_t *bytes, double *error, double *norm, struct err *err)
{
    struct artifact_content content = content_of(c, report);

    return artifact_write(&content, path, bytes, error, norm, err);
}
