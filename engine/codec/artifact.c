#include "engine/codec/artifact.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/progress.h"
#include "engine/safetensors.h"

struct artifact_entry {
    bool present;
    struct tensor part[CODEC_MAX_PARTS];
};

struct artifact {
    struct safetensors *file;
    const struct codec *codec;
    const struct artifact_tensor *tensor;
    int32_t count;
    struct artifact_entry *entry; /* [count] */
};

/* ------------------------------------------------------------------ what it takes */

static int64_t stored_bytes(const struct artifact *artifact, int32_t index)
{
    const struct tensor *part = artifact_parts(artifact, index);
    int parts = artifact->tensor[index].kind == ARTIFACT_MATRIX ? artifact->codec->part_count : 1;
    int64_t bytes = 0;

    for (int p = 0; part != NULL && p < parts; p++)
        bytes += tensor_elements(&part[p]) * dtype_size(part[p].dtype);
    return bytes;
}

/* Matrices as the codec packs them, embeddings as they lie there, vectors in f32. */
static int64_t packed_bytes(const struct artifact *artifact, int32_t index)
{
    const struct artifact_tensor *tensor = &artifact->tensor[index];
    const struct tensor *part = artifact_parts(artifact, index);
    const struct codec *codec = artifact->codec;

    if (part == NULL)
        return 0;
    if (tensor->kind == ARTIFACT_VECTOR)
        return (int64_t)sizeof(float) * tensor->cols;
    if (tensor->kind == ARTIFACT_EMBEDDING || codec->packed_bytes == NULL)
        return stored_bytes(artifact, index);
    return codec->packed_bytes(part, tensor->rows, tensor->cols);
}

/* Before anything is expanded. */
static int check_growth(const struct artifact *artifact, struct err *err)
{
    int64_t stored = 0, packed = 0;

    for (int32_t i = 0; i < artifact->count; i++) {
        stored += stored_bytes(artifact, i);
        packed += packed_bytes(artifact, i);
    }
    if (packed <= CODEC_FREE_BYTES || packed / CODEC_MAX_GROWTH <= stored)
        return 0;
    return err_set(err, ERR_INVALID,
                   "its %lld KiB would take %lld MiB of memory, more than %d times as much: leave "
                   "out the matrices that have not changed, or store it by another codec",
                   (long long)stored >> 10, (long long)packed >> 20, CODEC_MAX_GROWTH);
}

/* ------------------------------------------------------------------ opening */

static int check_metadata(struct artifact *artifact, const char *name,
                          const struct artifact_expectation *want, struct err *err)
{
    const char *format = safetensors_metadata(artifact->file, "graft.format");
    const char *version = safetensors_metadata(artifact->file, "graft.version");
    const char *base = safetensors_metadata(artifact->file, "graft.base");
    const char *codec = safetensors_metadata(artifact->file, "graft.codec");

    if (format == NULL || strcmp(format, "delta") != 0)
        return err_set(err, ERR_INVALID, "\"%s\" is not a delta: its metadata do not say so", name);
    if (version == NULL || (strcmp(version, "1") != 0 && strcmp(version, ARTIFACT_VERSION) != 0))
        return err_set(
            err, ERR_INVALID,
            "delta \"%s\" has format version %.16s; this program reads versions 1 and %s", name,
            version != NULL ? version : "(none)", ARTIFACT_VERSION);
    if (base == NULL || strcmp(base, want->base_digest) != 0)
        return err_set(err, ERR_INVALID,
                       "delta \"%s\" was grown on another base (%.12s…, this is %.12s…)", name,
                       base != NULL ? base : "unknown", want->base_digest);
    artifact->codec = codec != NULL ? codec_find(codec) : NULL;
    if (artifact->codec == NULL)
        return err_set(err, ERR_INVALID, "delta \"%s\" uses the codec %.32s; known: %s", name,
                       codec != NULL ? codec : "(none)", codec_names());
    return 0;
}

/* Finds <tensor><suffix>, and counts what was found. */
static const struct tensor *find_part(const struct artifact *artifact, int32_t index,
                                      const char *suffix, int64_t *found)
{
    char name[MODEL_NAME_MAX + 16];
    const struct safetensors_tensor *part;

    snprintf(name, sizeof(name), "%s.%s", artifact->tensor[index].name, suffix);
    part = safetensors_find(artifact->file, name);
    *found += part != NULL;
    return part != NULL ? &part->view : NULL;
}

static int find_matrix(struct artifact *artifact, int32_t index, int64_t *found, struct err *err)
{
    const struct codec *codec = artifact->codec;
    struct artifact_entry *entry = &artifact->entry[index];
    int parts = 0;

    for (int p = 0; p < codec->part_count; p++) {
        const struct tensor *part = find_part(artifact, index, codec->suffix[p], found);

        if (part != NULL) {
            entry->part[p] = *part;
            parts++;
        }
    }
    entry->present = parts > 0;
    if (parts == 0 || parts == codec->part_count)
        return 0;
    return err_set(err, ERR_INVALID, "\"%s\" has %d of the %d parts of codec %s",
                   artifact->tensor[index].name, parts, codec->part_count, codec->name);
}

static void find_diff(struct artifact *artifact, int32_t index, int64_t *found)
{
    const struct tensor *part = find_part(artifact, index, "diff", found);

    if (part == NULL)
        return;
    artifact->entry[index].part[0] = *part;
    artifact->entry[index].present = true;
}

static int find_entries(struct artifact *artifact, struct err *err)
{
    int64_t found = 0;

    for (int32_t i = 0; i < artifact->count; i++) {
        if (artifact->tensor[i].kind != ARTIFACT_MATRIX)
            find_diff(artifact, i, &found);
        else if (find_matrix(artifact, i, &found, err) != 0)
            return -1;
    }
    if (found != safetensors_count(artifact->file))
        return err_set(err, ERR_INVALID,
                       "%lld of its %lld tensors belong to no tensor of this base",
                       (long long)(safetensors_count(artifact->file) - found),
                       (long long)safetensors_count(artifact->file));
    return 0;
}

static int accept_diff(const struct artifact_tensor *tensor, const struct tensor *part,
                       struct err *err)
{
    int rank = tensor->kind == ARTIFACT_VECTOR ? 1 : 2;
    const uint16_t *value = part->data;

    if (part->dtype != DTYPE_F16 || part->rank != rank || part->shape[rank - 1] != tensor->cols ||
        (rank == 2 && part->shape[0] != tensor->rows))
        return err_set(err, ERR_INVALID, "\"%s.diff\" is not an F16 tensor of its base's shape",
                       tensor->name);
    for (int64_t i = 0; i < artifact_elements(tensor); i++) {
        if ((value[i] & 0x7c00) == 0x7c00)
            return err_set(err, ERR_INVALID, "\"%s.diff\" holds a value that is not finite",
                           tensor->name);
    }
    return 0;
}

/* May take minutes, where a codec has to unpack each matrix to know whether it is sound. */
static int accept_entries(const struct artifact *artifact, struct err *err)
{
    for (int32_t i = 0; i < artifact->count; i++) {
        const struct artifact_tensor *tensor = &artifact->tensor[i];
        const struct tensor *part = artifact_parts(artifact, i);

        if (part == NULL)
            continue;
        if (tensor->kind != ARTIFACT_MATRIX) {
            if (accept_diff(tensor, part, err) != 0)
                return -1;
        } else if (artifact->codec->accept(part, tensor->rows, tensor->cols, err) != 0) {
            return err_prefix(err, "\"%s\"", tensor->name);
        }
        progress_tick();
    }
    return 0;
}

/* Takes over `file`; of its values, none is read. */
static int open_header(struct artifact **out, struct safetensors *file, const char *name,
                       const struct artifact_expectation *want, struct err *err)
{
    struct artifact *artifact = calloc(1, sizeof(*artifact));

    if (artifact == NULL) {
        safetensors_free(file);
        return err_set(err, ERR_NO_MEMORY, "out of memory for a delta");
    }
    artifact->file = file;
    artifact->tensor = want->tensor;
    artifact->count = want->count;
    artifact->entry = calloc((size_t)want->count, sizeof(*artifact->entry));
    if (artifact->entry == NULL) {
        err_set(err, ERR_NO_MEMORY, "out of memory for a delta");
        goto fail;
    }
    if (check_metadata(artifact, name, want, err) != 0)
        goto fail;
    if (safetensors_check_aligned(file, err) != 0 || find_entries(artifact, err) != 0 ||
        check_growth(artifact, err) != 0) {
        err_prefix(err, "delta \"%s\"", name);
        goto fail;
    }
    *out = artifact;
    return 0;
fail:
    artifact_free(artifact);
    return -1;
}

/* Takes over `file`. */
static int open_file(struct artifact **out, struct safetensors *file, const char *name,
                     const struct artifact_expectation *want, struct err *err)
{
    struct artifact *artifact;

    if (open_header(&artifact, file, name, want, err) != 0)
        return -1;
    if (accept_entries(artifact, err) != 0) {
        err_prefix(err, "delta \"%s\"", name);
        artifact_free(artifact);
        return -1;
    }
    *out = artifact;
    return 0;
}

int artifact_open(struct artifact **out, const char *path, const struct artifact_expectation *want,
                  struct err *err)
{
    struct safetensors *file;

    if (safetensors_open(&file, path, err) != 0)
        return -1;
    return open_file(out, file, path, want, err);
}

int artifact_open_memory(struct artifact **out, const void *data, size_t len, const char *name,
                         const struct artifact_expectation *want, struct err *err)
{
    struct safetensors *file;

    if (safetensors_open_memory(&file, data, len, name, err) != 0)
        return -1;
    return open_file(out, file, name, want, err);
}

void artifact_free(struct artifact *artifact)
{
    if (artifact == NULL)
        return;
    safetensors_free(artifact->file);
    free(artifact->entry);
    free(artifact);
}

int artifact_measure(const char *path, const struct artifact_expectation *want,
                     struct engine_delta_memory *out, struct err *err)
{
    struct safetensors *file;
    struct artifact *artifact;
    int64_t largest = 0;

    if (safetensors_open(&file, path, err) != 0 ||
        open_header(&artifact, file, path, want, err) != 0)
        return -1;
    out->bytes = 0;
    for (int32_t i = 0; i < artifact->count; i++) {
        int64_t bytes = packed_bytes(artifact, i);

        out->bytes += bytes;
        largest = bytes > largest ? bytes : largest;
    }
    out->opening_bytes = out->bytes + largest;
    artifact_free(artifact);
    return 0;
}

/* ------------------------------------------------------------------ reading */

const struct codec *artifact_codec(const struct artifact *artifact)
{
    return artifact->codec;
}

const struct tensor *artifact_parts(const struct artifact *artifact, int32_t index)
{
    return artifact->entry[index].present ? artifact->entry[index].part : NULL;
}

int artifact_expand(const struct artifact *artifact, int32_t index, float *out, struct err *err)
{
    const struct artifact_tensor *tensor = &artifact->tensor[index];
    const struct tensor *part = artifact_parts(artifact, index);
    int64_t elements = artifact_elements(tensor);

    if (part != NULL && tensor->kind == ARTIFACT_MATRIX)
        return artifact->codec->expand(part, tensor->rows, tensor->cols, out, err);
    if (part == NULL)
        memset(out, 0, (size_t)elements * sizeof(*out));
    else
        tensor_to_f32(part, 0, elements, out);
    return 0;
}

const char *artifact_report(const struct artifact *artifact)
{
    return safetensors_metadata(artifact->file, "graft.report");
}
