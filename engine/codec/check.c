/* What can be asked of files alone, without an engine: is a delta sound, and of this base? How
 * small can one be? */
#include <stdlib.h>

#include "engine/base/file_io.h"
#include "engine/base_file.h"
#include "engine/codec/artifact.h"
#include "engine/codec/budget.h"
#include "engine/codec/report.h"

static int check(const struct base_file *base, const struct file_map *delta, const char *name,
                 struct err *err)
{
    struct artifact_expectation want = {.base_digest = base_file_info(base)->digest};
    struct artifact_tensor *tensor = NULL;
    struct artifact *artifact = NULL;
    int rc = -1;

    if (artifact_tensors(base_file_config(base), &tensor, &want.count, err) != 0)
        return -1;
    want.tensor = tensor;
    rc = artifact_open_memory(&artifact, delta->data, delta->len, name, &want, err);
    if (rc == 0)
        artifact_free(artifact);
    free(tensor);
    return rc;
}

/* It was imported: whatever is wrong with it now is not the client's fault. */
static int open_base(struct base_file **base, const char *path, struct err *err)
{
    if (base_file_open(base, path, err) == 0)
        return 0;
    if (err != NULL && err->kind == ERR_INVALID)
        err->kind = ERR_INTERNAL;
    return -1;
}

int engine_delta_check(const char *base_path, const char *delta_path, const char *name,
                       struct err *err)
{
    struct base_file *base = NULL;
    struct file_map delta = {0};
    int rc = -1;

    if (open_base(&base, base_path, err) != 0)
        return -1;
    if (file_map_open(&delta, delta_path, err) == 0)
        rc = check(base, &delta, name, err);
    file_map_close(&delta);
    base_file_free(base);
    return rc;
}

static int least(const struct base_file *base, const struct codec *codec, bool embeddings,
                 struct budget *out, struct err *err)
{
    struct artifact_source source = {0};
    struct artifact_content content = {.source = &source, .codec = codec};
    struct artifact_tensor *tensor = NULL;
    bool *changed;
    int rc = -1;

    if (artifact_tensors(base_file_config(base), &tensor, &source.count, err) != 0)
        return -1;
    source.tensor = tensor;
    changed = calloc((size_t)source.count, sizeof *changed);
    for (int32_t i = 0; changed != NULL && i < source.count; i++)
        changed[i] = embeddings || tensor[i].kind != ARTIFACT_EMBEDDING;
    content.changed = changed;
    rc = changed != NULL ? budget_measure(&content, report_room(source.count), out, err)
                         : err_set(err, ERR_NO_MEMORY, "no memory for a list of tensors");
    free(changed);
    free(tensor);
    return rc;
}

int engine_delta_least(const char *base_path, const char *codec, bool embeddings,
                       struct engine_delta_size *out, struct err *err)
{
    const struct codec *found = codec_find(codec != NULL ? codec : codec_default());
    struct base_file *base = NULL;
    struct budget budget;
    int rc;

    if (found == NULL)
        return err_set(err, ERR_INVALID, "there is no codec \"%.32s\": %s", codec, codec_names());
    if (found->imports)
        return err_set(err, ERR_INVALID,
                       "the codec %s has the size of what it imports: %s can be asked for one",
                       codec, codec_makers());
    if (open_base(&base, base_path, err) != 0)
        return -1;
    rc = least(base, found, embeddings, &budget, err);
    if (rc == 0) {
        out->bytes = budget.least;
        out->ratio = (double)base_file_info(base)->bytes_16bit / (double)budget.least;
    }
    base_file_free(base);
    return rc;
}
