#include "engine/codec/resume.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/codec/report.h"
#include "engine/safetensors.h"

#define PORTION (1 << 16) /* floats that are read at once */

/* ------------------------------------------------------------------ identity */

static int digest_weights(struct sha256 *h, const struct artifact_source *source, struct err *err)
{
    float *base = malloc(PORTION * sizeof *base), *tuned = malloc(PORTION * sizeof *tuned);
    int rc = 0;

    if (!base || !tuned)
        rc = err_set(err, ERR_NO_MEMORY, "no memory for a digest");
    for (int32_t i = 0; !rc && i < source->count; i++) {
        int64_t total = (int64_t)source->tensor[i].rows * source->tensor[i].cols;

        for (int64_t from = 0; !rc && from < total; from += PORTION) {
            int64_t count = total - from < PORTION ? total - from : PORTION;

            rc = source->read(source->context, i, from, count, base, tuned, err);
            if (!rc)
                sha256_update(h, tuned, (size_t)count * sizeof *tuned);
        }
    }
    free(base);
    free(tuned);
    return rc;
}

static int digest(char hex[SHA256_HEX], const struct resume_key *key, struct err *err)
{
    const struct trainer_source *rows = key->calibration;
    struct sha256 *h = sha256_new();
    char text[256];
    int rc;

    if (!h)
        return err_set(err, ERR_NO_MEMORY, "no memory for a digest");
    snprintf(text, sizeof text, "graft compression 5|%s|%s|%s|%s|%lld|%lld|%d|",
             key->source->base_digest, key->codec->name, key->backend->ops->name,
             dtype_name(key->backend->activation), (long long)key->bytes, (long long)key->seed,
             key->steps);
    sha256_update(h, text, strlen(text));
    for (int64_t i = 0; i < rows->count; i++) {
        struct dataset_example e = rows->example(rows->context, i);

        sha256_update(h, &e.length, sizeof e.length);
        sha256_update(h, e.token, (size_t)e.length * sizeof *e.token);
        sha256_update(h, e.weight, (size_t)e.length * sizeof *e.weight);
    }
    rc = digest_weights(h, key->source, err);
    sha256_final_hex(h, hex);
    sha256_free(h);
    return rc;
}

int resume_open(struct resume *resume, const char *out_path, const struct resume_key *key,
                struct err *err)
{
    *resume = (struct resume){.tensors = key->source->count};
    if (asprintf(&resume->undistilled, "%s.undistilled", out_path) < 0)
        resume->undistilled = NULL;
    if (asprintf(&resume->scales, "%s.scales", out_path) < 0)
        resume->scales = NULL;
    if (!resume->undistilled || !resume->scales)
        return err_set(err, ERR_NO_MEMORY, "no memory for the name of a file");
    return digest(resume->identity, key, err);
}

void resume_close(struct resume *resume)
{
    free(resume->undistilled);
    free(resume->scales);
    *resume = (struct resume){0};
}

void resume_remove(const struct resume *resume)
{
    unlink(resume->undistilled);
    unlink(resume->scales);
}

/* ------------------------------------------------------------------ parts */

#define DIGEST "sha256" /* of what else is known, and of the parts */

static int digest_parts(const struct resume *resume, const struct compression *compression,
                        const json_t *known, char hex[SHA256_HEX], struct err *err)
{
    char *text = json_dumps(known, JSON_COMPACT | JSON_SORT_KEYS);
    struct sha256 *h = sha256_new();
    int rc = -1;

    if (!text || !h) {
        err_set(err, ERR_NO_MEMORY, "no memory for a digest");
        goto out;
    }
    sha256_update(h, text, strlen(text));
    for (int32_t i = 0; i < resume->tensors; i++) {
        const struct tensor *part = compression_parts(compression, i);

        for (int p = 0; part && p < CODEC_MAX_PARTS && part[p].data; p++)
            sha256_update(h, part[p].data,
                          (size_t)tensor_elements(&part[p]) * (size_t)dtype_size(part[p].dtype));
    }
    sha256_final_hex(h, hex);
    rc = 0;
out:
    sha256_free(h);
    free(text);
    return rc;
}

int resume_save_parts(const struct resume *resume, const struct compression *compression,
                      const struct resume_facts *facts, struct err *err)
{
    json_t *object =
        json_pack("{s:s, s:o, s:I, s:o}", "resume", resume->identity, "predicted_kl",
                  isfinite(facts->predicted_kl) ? json_real(facts->predicted_kl) : json_null(),
                  "calibration_tokens", (json_int_t)facts->calibration_tokens, "predicted",
                  report_points(&facts->predicted));
    char hex[SHA256_HEX], *report = NULL;
    int64_t bytes;
    int rc = -1;

    if (digest_parts(resume, compression, object, hex, err))
        goto out;
    json_object_set_new(object, DIGEST, json_string(hex));
    report = json_dumps(object, JSON_COMPACT); /* every number to its last bit */
    if (report)
        rc = compression_write(compression, resume->undistilled, report, &bytes, NULL, NULL, err);
    else
        err_set(err, ERR_NO_MEMORY, "no memory for what is known of a compression");
out:
    free(report);
    json_decref(object);
    return rc;
}

/* What is known of the parts in a file, if they are these; or NULL. */
static json_t *read_known(const char *report, const char *identity)
{
    json_t *known = report ? json_loads(report, 0, NULL) : NULL;
    const char *whose = json_string_value(json_object_get(known, "resume"));

    if (whose && strcmp(whose, identity) == 0)
        return known;
    json_decref(known);
    return NULL;
}

static void read_facts(const json_t *known, struct resume_facts *facts)
{
    const json_t *predicted = json_object_get(known, "predicted_kl");

    facts->predicted_kl = json_is_number(predicted) ? json_number_value(predicted) : NAN;
    facts->calibration_tokens = json_integer_value(json_object_get(known, "calibration_tokens"));
    report_read_points(json_object_get(known, "predicted"), &facts->predicted);
}

static int take_parts(const struct artifact *artifact, const struct artifact_source *source,
                      struct compression *compression, struct err *err)
{
    for (int32_t i = 0; i < source->count; i++) {
        const struct tensor *part = artifact_parts(artifact, i);

        if (part && source->tensor[i].kind == ARTIFACT_MATRIX &&
            compression_changed(compression, i) && compression_set_parts(compression, i, part, err))
            return -1;
    }
    return 0;
}

/* *whole: they are what was written. */
static int check_parts(const struct resume *resume, const struct compression *compression,
                       json_t *known, bool *whole, struct err *err)
{
    const char *digest = json_string_value(json_object_get(known, DIGEST));
    char want[SHA256_HEX], hex[SHA256_HEX];

    snprintf(want, sizeof want, "%s", digest ? digest : "");
    json_object_del(known, DIGEST);
    if (digest_parts(resume, compression, known, hex, err))
        return -1;
    *whole = strcmp(want, hex) == 0;
    return 0;
}

int resume_load_parts(const struct resume *resume, const struct artifact_source *source,
                      struct compression *compression, struct resume_facts *facts, bool *found,
                      struct err *err)
{
    const struct artifact_expectation want = {source->tensor, source->count, source->base_digest};
    struct artifact *artifact;
    json_t *known;
    int rc = 0;

    *found = false;
    if (access(resume->undistilled, R_OK) != 0 ||
        artifact_open(&artifact, resume->undistilled, &want, NULL) != 0)
        return 0;
    known = read_known(artifact_report(artifact), resume->identity);
    if (known) {
        read_facts(known, facts);
        rc = take_parts(artifact, source, compression, err) ||
                     check_parts(resume, compression, known, found, err)
                 ? -1
                 : 0;
    }
    json_decref(known);
    artifact_free(artifact);
    return rc;
}

/* ------------------------------------------------------------------ vectors */

static const float *vector_in(const struct safetensors *file, int32_t i, int32_t length)
{
    const struct safetensors_tensor *t;
    char name[16];

    snprintf(name, sizeof name, "%d", i);
    t = safetensors_find(file, name);
    return t && t->view.dtype == DTYPE_F32 && t->view.rank == 1 && t->view.shape[0] == length
               ? t->view.data
               : NULL;
}

/* Of the step and the vectors: of those in `file`, which has them all, or (NULL) of those held. */
static int digest_vectors(const struct resume_vectors *v, const struct safetensors *file,
                          const char *step, char hex[SHA256_HEX], struct err *err)
{
    struct sha256 *h = sha256_new();

    if (!h)
        return err_set(err, ERR_NO_MEMORY, "no memory for a digest");
    sha256_update(h, step, strlen(step));
    for (int32_t i = 0; i < v->count; i++)
        sha256_update(h, file ? vector_in(file, i, v->length[i]) : v->vector[i],
                      (size_t)v->length[i] * sizeof(float));
    sha256_final_hex(h, hex);
    sha256_free(h);
    return 0;
}

static int write_vectors(struct safetensors_writer *file, const struct resume *resume,
                         const struct resume_vectors *v, int32_t step, struct err *err)
{
    char text[32], hex[SHA256_HEX];

    snprintf(text, sizeof text, "%d", step);
    if (digest_vectors(v, NULL, text, hex, err) ||
        safetensors_writer_metadata(file, "graft.resume", resume->identity, err) ||
        safetensors_writer_metadata(file, "graft.step", text, err) ||
        safetensors_writer_metadata(file, "graft.sha256", hex, err))
        return -1;
    for (int32_t i = 0; i < v->count; i++) {
        int64_t shape[1] = {v->length[i]};

        snprintf(text, sizeof text, "%d", i);
        if (safetensors_writer_declare(file, text, DTYPE_F32, 1, shape, err))
            return -1;
    }
    if (safetensors_writer_begin(file, err))
        return -1;
    for (int32_t i = 0; i < v->count; i++)
        if (safetensors_writer_append(file, v->vector[i], (size_t)v->length[i] * sizeof(float),
                                      err))
            return -1;
    return safetensors_writer_finish(file, NULL, err);
}

int resume_save_vectors(const struct resume *resume, const struct resume_vectors *vectors,
                        int32_t step, struct err *err)
{
    struct safetensors_writer *file;
    int rc;

    if (safetensors_writer_open(&file, resume->scales, err))
        return -1;
    rc = write_vectors(file, resume, vectors, step, err);
    safetensors_writer_free(file);
    return rc;
}

static int32_t step_in(const struct safetensors *file, const struct resume *resume,
                       const struct resume_vectors *v)
{
    const char *whose = safetensors_metadata(file, "graft.resume");
    const char *step = safetensors_metadata(file, "graft.step");
    const char *digest = safetensors_metadata(file, "graft.sha256");
    char hex[SHA256_HEX];

    if (!whose || !step || !digest || strcmp(whose, resume->identity) != 0 ||
        safetensors_check_aligned(file, NULL) != 0)
        return 0;
    for (int32_t i = 0; i < v->count; i++)
        if (!vector_in(file, i, v->length[i]))
            return 0;
    if (digest_vectors(v, file, step, hex, NULL) || strcmp(digest, hex) != 0)
        return 0;
    return (int32_t)strtol(step, NULL, 10);
}

int32_t resume_load_vectors(const struct resume *resume, const struct resume_vectors *v)
{
    struct safetensors *file;
    int32_t step;

    if (access(resume->scales, R_OK) != 0 || safetensors_open(&file, resume->scales, NULL) != 0)
        return 0;
    step = step_in(file, resume, v);
    for (int32_t i = 0; step > 0 && i < v->count; i++)
        memcpy(v->vector[i], vector_in(file, i, v->length[i]),
               (size_t)v->length[i] * sizeof(float));
    safetensors_free(file);
    return step;
}
