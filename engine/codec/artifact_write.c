/* The writing half of artifact.h.
 *
 * Order in the file: first the first part of every matrix (the large one, of the widest type), then
 * the other parts, then the 16-bit differences, so that every tensor is aligned whatever the
 * shapes. The first parts stream to the file as they are made; the others, which are small, wait in
 * memory. */
#include "engine/codec/artifact.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "engine/base/version.h"
#include "engine/safetensors.h"

#define PORTION (1 << 16) /* elements read at once where a whole tensor is not needed */

struct writing {
    const struct artifact_source *source;
    struct safetensors_writer *file;
    bool *changed;             /* [count] */
    float *base, *tuned;       /* the largest matrix, at least PORTION */
    float *expanded;           /* the same */
    void *first;               /* the largest first part */
    char *rest;                /* the other parts of all matrices, back to back */
    size_t rest_len, rest_cap; /* filled; all of them */
    double error, norm;        /* sums of squares: expanded - tuned, tuned - base */
};

static size_t part_bytes(const struct artifact_source *source, int32_t index, int part)
{
    const struct artifact_tensor *t = &source->tensor[index];
    struct tensor view = source->codec->layout(part, t->rows, t->cols);

    return (size_t)tensor_elements(&view) * (size_t)dtype_size(view.dtype);
}

static int64_t elements_of(const struct artifact_tensor *t)
{
    return (int64_t)t->rows * t->cols;
}

static int find_changed(struct writing *w, int32_t index, struct err *err)
{
    int64_t total = elements_of(&w->source->tensor[index]);

    for (int64_t from = 0; from < total && !w->changed[index]; from += PORTION) {
        int64_t count = total - from < PORTION ? total - from : PORTION;

        if (w->source->read(w->source->context, index, from, count, w->base, w->tuned, err) != 0)
            return -1;
        w->changed[index] = memcmp(w->base, w->tuned, (size_t)count * sizeof(float)) != 0;
    }
    return 0;
}

static int take_memory(struct writing *w, struct err *err)
{
    const struct artifact_source *source = w->source;
    size_t largest = PORTION, first = 1;

    for (int32_t i = 0; i < source->count; i++) {
        if (source->tensor[i].kind != ARTIFACT_MATRIX)
            continue;
        if ((size_t)elements_of(&source->tensor[i]) > largest)
            largest = (size_t)elements_of(&source->tensor[i]);
        if (part_bytes(source, i, 0) > first)
            first = part_bytes(source, i, 0);
        for (int p = 1; p < source->codec->part_count; p++)
            w->rest_cap += part_bytes(source, i, p);
    }
    w->changed = calloc((size_t)source->count + 1, sizeof(*w->changed));
    w->base = malloc(largest * sizeof(float));
    w->tuned = malloc(largest * sizeof(float));
    w->expanded = malloc(largest * sizeof(float));
    w->first = malloc(first);
    w->rest = malloc(w->rest_cap + 1);
    if (w->changed == NULL || w->base == NULL || w->tuned == NULL || w->expanded == NULL ||
        w->first == NULL || w->rest == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory for compressing a fine-tune");
    return 0;
}

static int declare_part(struct writing *w, int32_t index, int part, struct err *err)
{
    const struct artifact_tensor *t = &w->source->tensor[index];
    struct tensor view = w->source->codec->layout(part, t->rows, t->cols);
    char name[MODEL_NAME_MAX + 16];

    snprintf(name, sizeof(name), "%s.%s", t->name, w->source->codec->suffix[part]);
    return safetensors_writer_declare(w->file, name, view.dtype, view.rank, view.shape, err);
}

static int declare_diff(struct writing *w, int32_t index, struct err *err)
{
    const struct artifact_tensor *t = &w->source->tensor[index];
    int64_t shape[2] = {t->rows, t->cols};
    char name[MODEL_NAME_MAX + 16];

    snprintf(name, sizeof(name), "%s.diff", t->name);
    if (t->kind == ARTIFACT_VECTOR)
        return safetensors_writer_declare(w->file, name, DTYPE_F16, 1, shape + 1, err);
    return safetensors_writer_declare(w->file, name, DTYPE_F16, 2, shape, err);
}

static int declare(struct writing *w, struct err *err)
{
    const struct artifact_source *source = w->source;
    const char *meta[][2] = {
        {"graft.format", "delta"},
        {"graft.version", ARTIFACT_VERSION},
        {"graft.base", source->base_digest},
        {"graft.codec", source->codec->name},
        {"graft.created_by", "graft " GRAFT_VERSION},
    };

    for (size_t i = 0; i < sizeof(meta) / sizeof(meta[0]); i++) {
        if (safetensors_writer_metadata(w->file, meta[i][0], meta[i][1], err) != 0)
            return -1;
    }
    for (int p = 0; p < source->codec->part_count; p++) {
        for (int32_t i = 0; i < source->count; i++) {
            if (w->changed[i] && source->tensor[i].kind == ARTIFACT_MATRIX &&
                declare_part(w, i, p, err) != 0)
                return -1;
        }
    }
    for (int32_t i = 0; i < source->count; i++) {
        if (w->changed[i] && source->tensor[i].kind != ARTIFACT_MATRIX &&
            declare_diff(w, i, err) != 0)
            return -1;
    }
    return safetensors_writer_begin(w->file, err);
}

/* Adds ‖expanded - delta‖² and ‖delta‖². */
static void measure(struct writing *w, const float *delta, const float *expanded, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        double wrong = (double)expanded[i] - delta[i];

        w->error += wrong * wrong;
        w->norm += (double)delta[i] * delta[i];
    }
}

/* base becomes tuned - base. */
static int read_delta(struct writing *w, int32_t index, int64_t from, int64_t count,
                      struct err *err)
{
    if (w->source->read(w->source->context, index, from, count, w->base, w->tuned, err) != 0)
        return -1;
    for (int64_t i = 0; i < count; i++)
        w->base[i] = w->tuned[i] - w->base[i];
    return 0;
}

static int write_matrix(struct writing *w, int32_t index, struct err *err)
{
    const struct artifact_tensor *t = &w->source->tensor[index];
    const struct codec *codec = w->source->codec;
    void *part[CODEC_MAX_PARTS] = {w->first};
    struct tensor view[CODEC_MAX_PARTS];

    if (read_delta(w, index, 0, elements_of(t), err) != 0)
        return -1;
    for (int p = 0; p < codec->part_count; p++) {
        view[p] = codec->layout(p, t->rows, t->cols);
        if (p > 0) {
            part[p] = w->rest + w->rest_len;
            w->rest_len += part_bytes(w->source, index, p);
        }
        view[p].data = part[p];
    }
    if (codec->compress(w->base, t->rows, t->cols, part, err) != 0)
        return err_prefix(err, "\"%s\"", t->name);
    codec->expand(view, t->rows, t->cols, w->expanded);
    measure(w, w->base, w->expanded, elements_of(t));
    return safetensors_writer_append(w->file, w->first, part_bytes(w->source, index, 0), err);
}

static int write_diff(struct writing *w, int32_t index, struct err *err)
{
    const struct artifact_tensor *t = &w->source->tensor[index];
    uint16_t *half = (uint16_t *)w->tuned; /* tuned is used up by read_delta */

    for (int64_t from = 0; from < elements_of(t); from += PORTION) {
        int64_t count = elements_of(t) - from < PORTION ? elements_of(t) - from : PORTION;

        if (read_delta(w, index, from, count, err) != 0)
            return -1;
        for (int64_t i = 0; i < count; i++) {
            half[i] = f32_to_f16(w->base[i]);
            w->expanded[i] = f16_to_f32(half[i]);
            if (!isfinite(w->expanded[i]))
                return err_set(err, ERR_INVALID,
                               "\"%s\" has changed by %g: the training has diverged, lower the "
                               "learning rate",
                               t->name, (double)w->base[i]);
        }
        measure(w, w->base, w->expanded, count);
        if (safetensors_writer_append(w->file, half, (size_t)count * sizeof(*half), err) != 0)
            return -1;
    }
    return 0;
}

/* The other parts lie in `rest` matrix by matrix; the file wants them part by part. */
static int write_rest(struct writing *w, struct err *err)
{
    const struct artifact_source *source = w->source;

    for (int part = 1; part < source->codec->part_count; part++) {
        const char *at = w->rest;

        for (int32_t i = 0; i < source->count; i++) {
            if (!w->changed[i] || source->tensor[i].kind != ARTIFACT_MATRIX)
                continue;
            for (int p = 1; p < source->codec->part_count; p++) {
                size_t bytes = part_bytes(source, i, p);

                if (p == part && safetensors_writer_append(w->file, at, bytes, err) != 0)
                    return -1;
                at += bytes;
            }
        }
    }
    return 0;
}

static int write_all(struct writing *w, const char *path, int64_t *bytes, struct err *err)
{
    const struct artifact_source *source = w->source;

    if (take_memory(w, err) != 0)
        return -1;
    for (int32_t i = 0; i < source->count; i++) {
        if (find_changed(w, i, err) != 0)
            return -1;
    }
    if (safetensors_writer_open(&w->file, path, err) != 0 || declare(w, err) != 0)
        return -1;
    for (int32_t i = 0; i < source->count; i++) {
        if (w->changed[i] && source->tensor[i].kind == ARTIFACT_MATRIX &&
            write_matrix(w, i, err) != 0)
            return -1;
    }
    if (write_rest(w, err) != 0)
        return -1;
    for (int32_t i = 0; i < source->count; i++) {
        if (w->changed[i] && source->tensor[i].kind != ARTIFACT_MATRIX &&
            write_diff(w, i, err) != 0)
            return -1;
    }
    return safetensors_writer_finish(w->file, bytes, err);
}

int artifact_write(const struct artifact_source *source, const char *path,
                   struct engine_delta_report *report, struct err *err)
{
    struct writing w = {.source = source};
    struct timespec from, to;
    int64_t bytes = 0;
    int rc;

    clock_gettime(CLOCK_MONOTONIC, &from);
    rc = write_all(&w, path, &bytes, err);
    clock_gettime(CLOCK_MONOTONIC, &to);
    if (rc == 0) {
        *report = (struct engine_delta_report){
            .bytes = bytes,
            .relative_error = w.norm > 0 ? sqrt(w.error / w.norm) : 0,
            .seconds =
                (double)(to.tv_sec - from.tv_sec) + (double)(to.tv_nsec - from.tv_nsec) * 1e-9,
        };
        snprintf(report->codec, sizeof(report->codec), "%s", source->codec->name);
    }
    safetensors_writer_free(w.file);
    free(w.changed);
    free(w.base);
    free(w.tuned);
    free(w.expanded);
    free(w.first);
    free(w.rest);
    return rc;
}
