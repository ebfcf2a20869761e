#include "engine/codec/lossless.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

#define LEVEL 6         /* zlib's own middle */
#define FLUSH_BYTES 512 /* of values, which then have 5 bytes of the stream at least */
#define FLUSH_ROOM 4096 /* more than so many values ever deflate to */

static size_t raw_bytes(int32_t rows, int32_t cols)
{
    return 4 * (size_t)rows * (size_t)cols;
}

static int allot(struct codec_plan *plan, int32_t count, int64_t bytes, double *cost,
                 struct err *err)
{
    int64_t most = 0;

    for (int32_t i = 0; i < count; i++) {
        plan[i].bytes = (int64_t)compressBound(raw_bytes(plan[i].rows, plan[i].cols));
        most += plan[i].bytes;
    }
    *cost = 0;
    return bytes >= most ? 0
                         : err_set(err, ERR_INVALID,
                                   "lossless has the size that comes of it, up to %lld bytes here: "
                                   "ask for none, or for the codec graft",
                                   (long long)most);
}

/* Byte k of value i to place k·count + i, and back. */
static void split(const float *value, size_t count, unsigned char *plane)
{
    for (size_t i = 0; i < count; i++) {
        unsigned char byte[4];

        memcpy(byte, &value[i], sizeof byte);
        for (size_t k = 0; k < 4; k++)
            plane[k * count + i] = byte[k];
    }
}

static void join(const unsigned char *plane, size_t count, float *value)
{
    for (size_t i = 0; i < count; i++) {
        unsigned char byte[4];

        for (size_t k = 0; k < 4; k++)
            byte[k] = plane[k * count + i];
        memcpy(&value[i], byte, sizeof byte);
    }
}

/* Almost nothing changed, and the stream would be smaller than a reader believes. */
static bool too_small(uLongf size, size_t raw)
{
    return raw > CODEC_MAX_GROWTH * (size_t)size;
}

/* As compress2, flushed so often that it is large enough. */
static int deflate_flushed(unsigned char *out, uLongf *size, const unsigned char *plane, size_t raw)
{
    z_stream z = {.next_out = out};
    int rc = deflateInit(&z, LEVEL);

    for (size_t at = 0; rc == Z_OK && at < raw; at += FLUSH_BYTES) {
        size_t left = raw - at, room = *size - z.total_out;

        z.next_in = (unsigned char *)plane + at;
        z.avail_in = (uInt)(left < FLUSH_BYTES ? left : FLUSH_BYTES);
        z.avail_out = (uInt)(room < FLUSH_ROOM ? room : FLUSH_ROOM);
        rc = deflate(&z, left > FLUSH_BYTES ? Z_SYNC_FLUSH : Z_FINISH);
    }
    *size = z.total_out;
    deflateEnd(&z);
    return rc == Z_STREAM_END ? Z_OK : Z_MEM_ERROR;
}

static int compress_matrix(const struct codec_matrix *m, const struct codec_plan *plan,
                           struct tensor part[], struct err *err)
{
    size_t raw = raw_bytes(m->rows, m->cols);
    uLongf bound = compressBound(raw), size = bound;
    unsigned char *plane = malloc(raw), *out = malloc(size);
    int64_t shape[1];
    int rc = -1, status;

    part[0] = (struct tensor){.data = out};
    if (!plane || !out) {
        err_set(err, ERR_NO_MEMORY, "no memory for the difference of a matrix");
        goto done;
    }
    if (codec_check_finite(m->delta, m->rows, m->cols, err))
        goto done;
    split(m->delta, raw / 4, plane);
    status = compress2(out, &size, plane, raw, LEVEL);
    if (status == Z_OK && too_small(size, raw)) {
        size = bound;
        status = deflate_flushed(out, &size, plane, raw);
    }
    if (status != Z_OK) {
        err_set(err, ERR_NO_MEMORY, "no memory to deflate a matrix");
        goto done;
    }
    shape[0] = (int64_t)size;
    part[0] = tensor_view(out, DTYPE_U8, 1, shape);
    out = realloc(out, size); /* parts are held until all are made */
    if (out)
        part[0].data = out;
    rc = 0;
done:
    free(plane);
    return rc;
}

static int bad(struct err *err, const char *what)
{
    return err_set(err, ERR_INVALID, "\"deflated\": %s", what);
}

/* Exactly rows · cols values, all finite, and nothing behind the stream. */
static int expand(const struct tensor part[], int32_t rows, int32_t cols, float *delta,
                  struct err *err)
{
    size_t raw = raw_bytes(rows, cols);
    unsigned char *plane = malloc(raw);
    uLongf size = raw;
    uLong taken = (uLong)part[0].shape[0];
    int rc = -1;

    if (!plane)
        return err_set(err, ERR_NO_MEMORY, "no memory for the difference of a matrix");
    if (uncompress2(plane, &size, part[0].data, &taken) != Z_OK || size != raw ||
        taken != (uLong)part[0].shape[0]) {
        bad(err, "it is not a zlib stream of so many values");
        goto done;
    }
    join(plane, raw / 4, delta);
    for (size_t i = 0; i < raw / 4; i++)
        if (!isfinite(delta[i])) {
            bad(err, "it holds a value that is not finite");
            goto done;
        }
    rc = 0;
done:
    free(plane);
    return rc;
}

static int accept(const struct tensor part[], int32_t rows, int32_t cols, struct err *err)
{
    float *delta;
    int rc;

    if (part[0].dtype != DTYPE_U8 || part[0].rank != 1)
        return bad(err, "it is not a U8 tensor of one dimension");
    delta = malloc(raw_bytes(rows, cols));
    if (!delta)
        return err_set(err, ERR_NO_MEMORY, "no memory for the difference of a matrix");
    rc = expand(part, rows, cols, delta, err);
    free(delta);
    return rc;
}

static int view(const struct tensor part[], int32_t rows, int32_t cols, struct delta_tensor *out,
                void **memory, struct err *err)
{
    int64_t shape[2] = {rows, cols};

    *memory = malloc(raw_bytes(rows, cols));
    if (!*memory)
        return err_set(err, ERR_NO_MEMORY, "no memory for the difference of a matrix");
    if (expand(part, rows, cols, *memory, err)) {
        free(*memory);
        *memory = NULL;
        return -1;
    }
    *out = (struct delta_tensor){.kind = DELTA_DENSE,
                                 .rows = rows,
                                 .cols = cols,
                                 .dense = tensor_view(*memory, DTYPE_F32, 2, shape)};
    return 0;
}

static int64_t packed_bytes(const struct tensor part[], int32_t rows, int32_t cols)
{
    return (int64_t)raw_bytes(rows, cols);
}

const struct codec codec_lossless = {
    .name = "lossless",
    .part_count = 1,
    .suffix = {"deflated"},
    .own_size = true,
    .allot = allot,
    .compress = compress_matrix,
    .accept = accept,
    .expand = expand,
    .view = view,
    .packed_bytes = packed_bytes,
};
