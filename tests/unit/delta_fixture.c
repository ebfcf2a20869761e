#include "tests/unit/delta_fixture.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/codec/lora.h"

/* Of a codec that makes no parts: the difference times the identity, which is as low in rank as it
 * gets when it is noise. */
static int lora_parts(const struct artifact_source *source, int32_t index, struct compression *c,
                      struct err *err)
{
    const struct artifact_tensor *t = &source->tensor[index];
    int64_t one = 1, rank = t->rows < t->cols ? t->rows : t->cols,
            count = (int64_t)t->rows * t->cols;
    float scale = 0.5f, *base = malloc((size_t)count * sizeof *base);
    float *tuned = malloc((size_t)count * sizeof *tuned);
    float *identity = calloc((size_t)(rank * rank), sizeof *identity);
    bool wide = t->cols > t->rows;
    int rc = -1;

    if (base && tuned && identity &&
        !source->read(source->context, index, 0, count, base, tuned, err)) {
        for (int64_t i = 0; i < count; i++)
            tuned[i] -= base[i];
        if (codec_check_finite(tuned, t->rows, t->cols, err)) {
            err_prefix(err, "\"%s\"", t->name);
            goto out;
        }
        for (int64_t i = 0; i < rank; i++)
            identity[i * rank + i] = 2;
        rc = compression_set_parts(c, index,
                                   (struct tensor[LORA_PARTS]){
                                       [LORA_SCALE] = tensor_view(&scale, DTYPE_F32, 1, &one),
                                       [LORA_DOWN] = tensor_view(wide ? tuned : identity, DTYPE_F32,
                                                                 2, (int64_t[]){rank, t->cols}),
                                       [LORA_UP] = tensor_view(wide ? identity : tuned, DTYPE_F32,
                                                               2, (int64_t[]){t->rows, rank})},
                                   err);
    }
out:
    free(base);
    free(tuned);
    free(identity);
    return rc;
}

static int make(const struct artifact_source *source, struct compression *c,
                const struct codec *codec, int64_t bytes, size_t report_len, struct err *err)
{
    double cost;

    if (!codec->imports)
        return compression_run(c, bytes ? bytes : INT64_MAX, report_len, &cost, err);
    for (int32_t i = 0; i < source->count; i++)
        if (compression_changed(c, i) && source->tensor[i].kind == ARTIFACT_MATRIX &&
            lora_parts(source, i, c, err))
            return -1;
    return 0;
}

int delta_fixture_write(const struct artifact_source *source, const char *codec, int64_t bytes,
                        const char *report, const char *path, struct delta_fixture *out,
                        struct err *err)
{
    struct compression_options options = {.codec = codec_find(codec)};
    struct compression *c = NULL;
    double *error = calloc((size_t)source->count + 1, sizeof *error);
    double *norm = calloc((size_t)source->count + 1, sizeof *norm);
    double more_error, more_norm;
    int rc = -1;

    *out = (struct delta_fixture){0};
    if (!error || !norm || thread_pool_open(&options.pool, 2, err))
        goto out;
    if (compression_open(&c, source, &options, err) || compression_decompose(c, NULL, NULL, err) ||
        make(source, c, options.codec, bytes, report ? strlen(report) : 0, err) ||
        compression_measure(c, error, norm, err) ||
        compression_write(c, path, report, &out->bytes, &more_error, &more_norm, err))
        goto out;
    for (int32_t i = 0; i < source->count; i++) {
        more_error += error[i];
        more_norm += norm[i];
    }
    out->relative_error = more_norm > 0 ? sqrt(more_error / more_norm) : 0;
    rc = 0;
out:
    compression_free(c);
    thread_pool_free(options.pool);
    free(error);
    free(norm);
    return rc;
}

bool delta_fixture_codec(int index, char name[DELTA_FIXTURE_NAME])
{
    const struct codec *codec = codec_at((size_t)index);

    if (codec)
        snprintf(name, DELTA_FIXTURE_NAME, "%s", codec->name);
    return codec != NULL;
}

bool delta_fixture_maker(int index, char name[DELTA_FIXTURE_NAME])
{
    return delta_fixture_codec(index, name) && !codec_at((size_t)index)->imports;
}

bool delta_fixture_sizes(const char *codec)
{
    return !codec_find(codec)->own_size;
}
