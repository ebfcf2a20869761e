#include "tests/unit/delta_fixture.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

int delta_fixture_write(const struct artifact_source *source, const char *codec, int64_t bytes,
                        const char *report, const char *path, struct delta_fixture *out,
                        struct err *err)
{
    struct compression_options options = {.codec = codec_find(codec)};
    struct compression *c = NULL;
    double *error = calloc((size_t)source->count + 1, sizeof *error);
    double *norm = calloc((size_t)source->count + 1, sizeof *norm);
    double cost, more_error, more_norm;
    int rc = -1;

    *out = (struct delta_fixture){0};
    if (!error || !norm || thread_pool_open(&options.pool, 2, err))
        goto out;
    if (compression_open(&c, source, &options, err) || compression_decompose(c, NULL, NULL, err) ||
        compression_run(c, bytes ? bytes : INT64_MAX, report ? strlen(report) : 0, &cost, err) ||
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
    const char *at = codec_names();
    size_t len;

    for (; index > 0; index--) {
        at = strstr(at, ", ");
        if (!at)
            return false;
        at += 2;
    }
    len = strcspn(at, ",");
    memcpy(name, at, len);
    name[len] = '\0';
    return true;
}
