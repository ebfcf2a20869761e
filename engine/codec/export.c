/* engine_delta_apply: base and delta as one model, in a directory that other programs load. Until
 * it is complete it is a draft beside its place (NAME.PID.draft): what is at the place is whole. */
#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/base/file_io.h"
#include "engine/base_file.h"
#include "engine/codec/artifact.h"
#include "engine/engine_parts.h"
#include "engine/safetensors.h"

#define MAX_FILE (256 << 20) /* of a file that is copied */

/* What belongs to a model beside its weights. */
static const char *const copied[] = {
    "generation_config.json", "tokenizer.json",      "tokenizer_config.json",
    "tokenizer.model",        "vocab.json",          "merges.txt",
    "added_tokens.json",      "chat_template.jinja", "special_tokens_map.json",
};

struct exporting {
    const struct engine *engine;
    const struct artifact *artifact;
    const struct artifact_tensor *tensor;
    int32_t count;
    float *base, *difference; /* the largest tensor */
};

/* ------------------------------------------------------------------ weights */

static int append_tensor(const struct exporting *e, int32_t index,
                         struct safetensors_writer *writer, struct err *err)
{
    const struct artifact_tensor *t = &e->tensor[index];
    int64_t elements = artifact_elements(t);
    struct tensor host;

    if (!base_file_tensor(e->engine->base, t->name, &host))
        return err_set(err, ERR_INTERNAL, "the base has no tensor %s", t->name);
    tensor_to_f32(&host, 0, elements, e->base);
    if (artifact_expand(e->artifact, index, e->difference, err))
        return -1;
    for (int64_t i = 0; i < elements; i++)
        e->base[i] += e->difference[i];
    return safetensors_writer_append(writer, e->base, (size_t)elements * sizeof *e->base, err);
}

static int write_weights(const struct exporting *e, const char *path, struct err *err)
{
    struct safetensors_writer *writer;
    int rc = -1;

    if (safetensors_writer_open(&writer, path, err))
        return -1;
    if (safetensors_writer_metadata(writer, "format", "pt", err)) /* transformers asks for it */
        goto out;
    for (int32_t i = 0; i < e->count; i++) {
        int64_t shape[2] = {e->tensor[i].rows, e->tensor[i].cols};
        bool vector = e->tensor[i].kind == ARTIFACT_VECTOR;

        if (safetensors_writer_declare(writer, e->tensor[i].name, DTYPE_F32, vector ? 1 : 2,
                                       shape + vector, err))
            goto out;
    }
    if (safetensors_writer_begin(writer, err))
        goto out;
    for (int32_t i = 0; i < e->count; i++)
        if (append_tensor(e, i, writer, err))
            goto out;
    rc = safetensors_writer_finish(writer, NULL, err);
out:
    safetensors_writer_free(writer);
    return rc;
}

/* ------------------------------------------------------------------ the other files */

static int copy_file(const char *from_dir, const char *to_dir, const char *name, struct err *err)
{
    char from[ENGINE_PATH_MAX], to[ENGINE_PATH_MAX], *data;
    size_t len;
    int rc;

    snprintf(from, sizeof from, "%s/%s", from_dir, name);
    snprintf(to, sizeof to, "%s/%s", to_dir, name);
    if (access(from, F_OK) != 0)
        return 0;
    if (file_read_all(from, MAX_FILE, &data, &len, err))
        return -1;
    rc = file_write_durable(to, data, len, err);
    free(data);
    return rc;
}

/* The weights are F32 now, whatever they were. */
static int write_config(const char *from_dir, const char *to_dir, struct err *err)
{
    char from[ENGINE_PATH_MAX], to[ENGINE_PATH_MAX], *text = NULL;
    json_error_t why;
    json_t *config;
    int rc = -1;

    snprintf(from, sizeof from, "%s/config.json", from_dir);
    snprintf(to, sizeof to, "%s/config.json", to_dir);
    config = json_load_file(from, 0, &why);
    if (!config || json_object_set_new(config, "torch_dtype", json_string("float32"))) {
        json_decref(config);
        return err_set(err, ERR_INVALID, "\"%s\" can not be read: %s", from, why.text);
    }
    json_object_del(config, "dtype");
    text = json_dumps(config, JSON_INDENT(2));
    if (text)
        rc = file_write_durable(to, text, strlen(text), err);
    else
        err_set(err, ERR_NO_MEMORY, "no memory for a configuration");
    free(text);
    json_decref(config);
    return rc;
}

static int write_directory(const struct exporting *e, const char *base_dir, const char *out_dir,
                           struct err *err)
{
    char path[ENGINE_PATH_MAX];

    if (mkdir(out_dir, 0777) != 0)
        return err_set_errno(err, errno, "the directory \"%s\" can not be made", out_dir);
    if (write_config(base_dir, out_dir, err))
        return -1;
    for (size_t i = 0; i < sizeof copied / sizeof copied[0]; i++)
        if (copy_file(base_dir, out_dir, copied[i], err))
            return -1;
    snprintf(path, sizeof path, "%s/model.safetensors", out_dir);
    return write_weights(e, path, err);
}

/* At `place`, where nothing is; or nothing is made there. */
static int place_directory(const struct exporting *e, const char *base_dir, const char *place,
                           struct err *err)
{
    char *draft;
    int rc = -1;

    if (asprintf(&draft, "%s.%ld.draft", place, (long)getpid()) < 0)
        return err_set(err, ERR_NO_MEMORY, "no memory for the name of a directory");
    if (file_remove_tree(draft, err)) /* of one that had our number and was killed */
        goto out;
    if (write_directory(e, base_dir, draft, err))
        goto out;
    if (rename(draft, place) != 0) {
        err_set_errno(err, errno, "rename to %s", place);
        goto out;
    }
    rc = file_sync_parent(place, err);
out:
    if (rc)
        file_remove_tree(draft, NULL);
    free(draft);
    return rc;
}

/* *place: `out_dir` without slashes behind it, malloc'ed. */
static int check_directories(const char *base_dir, const char *out_dir, char **place,
                             struct err *err)
{
    char config[ENGINE_PATH_MAX];
    size_t len = strlen(out_dir);
    struct stat st;

    /* The longest names behind a directory are its draft's ending and that of a copied file. */
    if (strlen(base_dir) > ENGINE_PATH_MAX - 96 || len > ENGINE_PATH_MAX - 96)
        return err_set(err, ERR_INVALID, "the path of a directory is too long");
    while (len > 1 && out_dir[len - 1] == '/')
        len--;
    *place = strndup(out_dir, len);
    if (!*place)
        return err_set(err, ERR_NO_MEMORY, "no memory for the name of a directory");
    if (lstat(*place, &st) == 0)
        return err_set(err, ERR_INVALID, "the directory \"%s\" can not be made: %s", *place,
                       strerror(EEXIST));
    snprintf(config, sizeof config, "%s/config.json", base_dir);
    if (access(config, R_OK) != 0)
        return err_set(err, ERR_INVALID,
                       "\"%s\" is not the Hugging Face directory of the base: it has no readable "
                       "config.json",
                       base_dir);
    return 0;
}

int engine_delta_apply(const char *base_dir, const char *delta_path, const char *out_dir,
                       struct err *err)
{
    const struct engine_options options = {.device = "cpu", .precision = ENGINE_PRECISION_F32};
    struct exporting e = {0};
    struct artifact_expectation want = {0};
    struct artifact_tensor *tensor = NULL;
    struct artifact *artifact = NULL;
    struct engine *engine = NULL;
    char *place = NULL;
    int64_t largest = 1;
    int rc = -1;

    if (check_directories(base_dir, out_dir, &place, err) ||
        engine_open_model(&engine, base_dir, &options, err) ||
        artifact_tensors_of_model(engine->model, &tensor, &want.count, err))
        goto out;
    want.tensor = tensor;
    want.base_digest = engine_info(engine)->digest;
    if (artifact_open(&artifact, delta_path, &want, err))
        goto out;
    for (int32_t i = 0; i < want.count; i++) {
        int64_t elements = artifact_elements(&tensor[i]);

        largest = elements > largest ? elements : largest;
    }
    e = (struct exporting){.engine = engine,
                           .artifact = artifact,
                           .tensor = tensor,
                           .count = want.count,
                           .base = malloc((size_t)largest * sizeof(float)),
                           .difference = malloc((size_t)largest * sizeof(float))};
    if (e.base && e.difference)
        rc = place_directory(&e, base_dir, place, err);
    else
        err_set(err, ERR_NO_MEMORY, "no memory for a tensor of %lld values", (long long)largest);
out:
    free(e.base);
    free(e.difference);
    artifact_free(artifact);
    free(tensor);
    engine_free(engine);
    free(place);
    return rc;
}
