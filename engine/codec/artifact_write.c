/* The writing half of artifact.h.
 *
 * Order in the file: parts by the size of their elements, the widest first, so that every tensor is
 * aligned whatever the shapes; among those of one size by part, then by matrix; the 16-bit
 * differences behind the 16-bit parts. */
#include "engine/codec/artifact.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/progress.h"
#include "engine/base/version.h"
#include "engine/safetensors.h"

#define REPORT_KEY "graft.report"
#define PORTION (1 << 16) /* elements of a difference that are held at once */

struct writing {
    const struct artifact_content *content;
    struct safetensors_writer *file;
    float *base, *tuned; /* [PORTION] */
    uint16_t *half;      /* [PORTION] */
    double error, norm;
};

static bool is_difference(const struct artifact_content *c, int32_t index)
{
    return c->changed[index] && c->source->tensor[index].kind != ARTIFACT_MATRIX;
}

static int declare_part(struct writing *w, int32_t index, int p, struct err *err)
{
    const struct artifact_content *c = w->content;
    const struct tensor *part = &c->part[index][p];
    char name[MODEL_NAME_MAX + 16];

    snprintf(name, sizeof(name), "%s.%s", c->source->tensor[index].name, c->codec->suffix[p]);
    return safetensors_writer_declare(w->file, name, part->dtype, part->rank, part->shape, err);
}

static int append_part(struct writing *w, int32_t index, int p, struct err *err)
{
    const struct tensor *part = &w->content->part[index][p];

    progress_tick(); /* the disk may be slow */
    return safetensors_writer_append(
        w->file, part->data, (size_t)tensor_elements(part) * (size_t)dtype_size(part->dtype), err);
}

static int declare_difference(struct writing *w, int32_t index, struct err *err)
{
    const struct artifact_tensor *t = &w->content->source->tensor[index];
    int64_t shape[2] = {t->rows, t->cols};
    bool vector = t->kind == ARTIFACT_VECTOR;
    char name[MODEL_NAME_MAX + 16];

    snprintf(name, sizeof(name), "%s.diff", t->name);
    return safetensors_writer_declare(w->file, name, DTYPE_F16, vector ? 1 : 2, shape + vector,
                                      err);
}

static int append_difference(struct writing *w, int32_t index, struct err *err)
{
    const struct artifact_source *source = w->content->source;
    const struct artifact_tensor *t = &source->tensor[index];

    for (int64_t from = 0; from < artifact_elements(t); from += PORTION) {
        int64_t count =
            artifact_elements(t) - from < PORTION ? artifact_elements(t) - from : PORTION;

        if (source->read(source->context, index, from, count, w->base, w->tuned, err) != 0)
            return -1;
        for (int64_t i = 0; i < count; i++) {
            float difference = w->tuned[i] - w->base[i];
            double wrong;

            w->half[i] = f32_to_f16(difference);
            wrong = (double)f16_to_f32(w->half[i]) - (double)difference;
            if (!isfinite(wrong))
                return err_set(err, ERR_INVALID,
                               "\"%s\" has changed by %g: the training has diverged, lower the "
                               "learning rate",
                               t->name, (double)difference);
            w->error += wrong * wrong;
            w->norm += (double)difference * (double)difference;
        }
        progress_tick();
        if (safetensors_writer_append(w->file, w->half, (size_t)count * sizeof(*w->half), err) != 0)
            return -1;
    }
    return 0;
}

/* Calls `part` and `difference` for everything in the file's order. */
static int in_order(struct writing *w, int (*part)(struct writing *, int32_t, int, struct err *),
                    int (*difference)(struct writing *, int32_t, struct err *), struct err *err)
{
    const struct artifact_content *c = w->content;

    for (int size = 4; size > 0; size /= 2) {
        for (int p = 0; p < c->codec->part_count; p++)
            for (int32_t i = 0; i < c->source->count; i++)
                if (artifact_is_matrix(c, i) && dtype_size(c->part[i][p].dtype) == size &&
                    part(w, i, p, err) != 0)
                    return -1;
        for (int32_t i = 0; i < c->source->count; i++)
            if (size == 2 && is_difference(c, i) && difference(w, i, err) != 0)
                return -1;
    }
    return 0;
}

static int declare_metadata(struct writing *w, struct err *err)
{
    const struct artifact_content *c = w->content;
    const char *meta[][2] = {
        {"graft.format", "delta"},
        {"graft.version", ARTIFACT_VERSION},
        {"graft.base", c->source->base_digest},
        {"graft.codec", c->codec->name},
        {"graft.created_by", "graft " GRAFT_VERSION},
        {REPORT_KEY, c->report},
    };

    for (size_t i = 0; i < sizeof(meta) / sizeof(meta[0]); i++) {
        if (meta[i][1] != NULL &&
            safetensors_writer_metadata(w->file, meta[i][0], meta[i][1], err) != 0)
            return -1;
    }
    return 0;
}

static int write_all(struct writing *w, const char *path, int64_t *bytes, struct err *err)
{
    w->base = malloc(PORTION * sizeof(*w->base));
    w->tuned = malloc(PORTION * sizeof(*w->tuned));
    w->half = malloc(PORTION * sizeof(*w->half));
    if (w->base == NULL || w->tuned == NULL || w->half == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory for writing a delta");
    if (safetensors_writer_open(&w->file, path, err) != 0 || declare_metadata(w, err) != 0 ||
        in_order(w, declare_part, declare_difference, err) != 0 ||
        safetensors_writer_begin(w->file, err) != 0 ||
        in_order(w, append_part, append_difference, err) != 0)
        return -1;
    return safetensors_writer_finish(w->file, bytes, err);
}

int artifact_write(const struct artifact_content *content, const char *path, int64_t *bytes,
                   double *error, double *norm, struct err *err)
{
    struct writing w = {.content = content};
    int rc = write_all(&w, path, bytes, err);

    if (error != NULL)
        *error = w.error;
    if (norm != NULL)
        *norm = w.norm;
    safetensors_writer_free(w.file);
    free(w.base);
    free(w.tuned);
    free(w.half);
    return rc;
}

int artifact_set_report(const char *path, const char *report, struct err *err)
{
    return safetensors_patch_metadata(path, REPORT_KEY, report, err);
}

/* "<name>.<suffix>":{"dtype":"F16","shape":[12345678],"data_offsets":[1234567890,1234567890]}, */
#define DECLARATION_BYTES 78
#define METADATA_BYTES 300

int64_t artifact_overhead(const struct artifact_content *c, size_t report_len)
{
    int64_t bytes = METADATA_BYTES + (int64_t)report_len;

    for (int32_t i = 0; i < c->source->count; i++) {
        const struct artifact_tensor *t = &c->source->tensor[i];
        int64_t declaration = DECLARATION_BYTES + (int64_t)strlen(t->name);

        if (artifact_is_matrix(c, i))
            for (int p = 0; p < c->codec->part_count; p++)
                bytes += declaration + (int64_t)strlen(c->codec->suffix[p]);
        else if (is_difference(c, i))
            bytes += declaration + 2 * artifact_elements(t);
    }
    return bytes;
}
