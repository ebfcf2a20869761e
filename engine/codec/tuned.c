#include "engine/codec/tuned.h"

#include <stdlib.h>
#include <string.h>

#include "engine/codec/lora.h"
#include "engine/engine_parts.h"
#include "engine/twin.h"

#define PORTION ((int64_t)1 << 16) /* elements that are added at once */

struct tuned {
    struct engine *engine;
    struct artifact_tensor *tensor; /* [count] of the base */
    int32_t count;
    struct twin twin;
    struct peft *adapter;  /* instead of a twin */
    struct tensor *merged; /* [count] base + product of what is adapted, data owned */
    struct model *model;   /* of them and the base; NULL: not runnable */
};

static int base_tensor(const struct tuned *t, int32_t index, struct tensor *out, struct err *err)
{
    if (!base_file_tensor(t->engine->base, t->tensor[index].name, out))
        return err_set(err, ERR_INTERNAL, "the base has no tensor %s", t->tensor[index].name);
    return 0;
}

/* ------------------------------------------------------------------ base + product */

/* In the precision of the backend: as any other tuned model would be there. */
static int merge(struct tuned *t, int32_t index, float *value, float *product, struct err *err)
{
    const struct artifact_tensor *of = &t->tensor[index];
    struct tensor base, *to = &t->merged[index];
    int64_t total = (int64_t)of->rows * of->cols;
    bool half = t->engine->backend->activation == DTYPE_BF16;

    if (base_tensor(t, index, &base, err))
        return -1;
    *to = tensor_view(malloc((size_t)total * (half ? 2 : 4)), half ? DTYPE_BF16 : DTYPE_F32,
                      base.rank, base.shape);
    if (!to->data)
        return err_set(err, ERR_NO_MEMORY, "no memory to add an adapter to its base");
    for (int64_t from = 0; from < total; from += PORTION) {
        int64_t count = total - from < PORTION ? total - from : PORTION;

        tensor_to_f32(&base, from, count, value);
        lora_product(peft_parts(t->adapter, index), from, count, product);
        for (int64_t i = 0; i < count; i++) {
            if (half)
                ((uint16_t *)to->data)[from + i] = f32_to_bf16(value[i] + product[i]);
            else
                ((float *)to->data)[from + i] = value[i] + product[i];
        }
    }
    return 0;
}

static bool find_merged(const void *context, const char *name, struct tensor *out)
{
    const struct tuned *t = context;

    for (int32_t i = 0; i < t->count; i++)
        if (t->merged[i].data && strcmp(t->tensor[i].name, name) == 0) {
            *out = t->merged[i];
            return true;
        }
    return base_file_tensor(t->engine->base, name, out);
}

static int open_merged(struct tuned *t, struct err *err)
{
    const struct model_source source = {
        .config = base_file_config(t->engine->base), .tensor = find_merged, .context = t};
    float *value = malloc(PORTION * sizeof *value), *product = malloc(PORTION * sizeof *product);
    int rc = -1;

    t->merged = calloc((size_t)t->count + 1, sizeof *t->merged);
    if (!value || !product || !t->merged) {
        err_set(err, ERR_NO_MEMORY, "no memory to add an adapter to its base");
        goto out;
    }
    for (int32_t i = 0; i < t->count; i++)
        if (peft_parts(t->adapter, i) && merge(t, i, value, product, err))
            goto out;
    rc = model_open_source(&t->model, t->engine->backend, &source, err);
out:
    free(value);
    free(product);
    return rc;
}

/* ------------------------------------------------------------------ opening */

int tuned_open(struct tuned **out, struct engine *engine, const char *path, bool runnable,
               struct err *err)
{
    struct tuned *t = calloc(1, sizeof *t);
    int rc;

    *out = NULL;
    if (!t)
        return err_set(err, ERR_NO_MEMORY, "no memory for a tuned model");
    t->engine = engine;
    rc = artifact_tensors_of_model(engine->model, &t->tensor, &t->count, err);
    if (!rc && peft_is_adapter(path)) {
        rc = peft_open(&t->adapter, path, t->tensor, t->count, err);
        if (!rc && runnable)
            rc = open_merged(t, err);
    } else if (!rc) {
        rc = twin_open(&t->twin, engine, path, "tuned", err);
    }
    if (rc)
        tuned_free(t);
    else
        *out = t;
    return rc;
}

void tuned_free(struct tuned *t)
{
    if (!t)
        return;
    model_free(t->model);
    for (int32_t i = 0; t->merged && i < t->count; i++)
        free(t->merged[i].data);
    free(t->merged);
    peft_free(t->adapter);
    twin_close(&t->twin);
    free(t->tensor);
    free(t);
}

/* ------------------------------------------------------------------ reading */

/* What was read may go: two models need not be in memory for one to be compressed. */
static int read_file(const struct base_file *file, const char *name, int64_t from, int64_t count,
                     float *out, struct err *err)
{
    struct tensor host;

    if (!base_file_tensor(file, name, &host))
        return err_set(err, ERR_INTERNAL, "a model has no tensor %s", name);
    tensor_to_f32(&host, from, count, out);
    base_file_done_with(file, name);
    return 0;
}

/* Of an adapter the difference itself: base + product - base would be rounded to the base's size.
 */
int tuned_read(void *context, int32_t index, int64_t from, int64_t count, float *base, float *tuned,
               struct err *err)
{
    const struct tuned *t = context;

    if (t->adapter) {
        const struct tensor *part = peft_parts(t->adapter, index);

        memset(base, 0, (size_t)count * sizeof *base);
        memset(tuned, 0, (size_t)count * sizeof *tuned);
        if (part)
            lora_product(part, from, count, tuned);
        return 0;
    }
    return read_file(t->engine->base, t->tensor[index].name, from, count, base, err) ||
                   read_file(t->twin.file, t->tensor[index].name, from, count, tuned, err)
               ? -1
               : 0;
}

const struct model_weights *tuned_weights(const struct tuned *t)
{
    const struct model *model = t->adapter ? t->model : t->twin.model;

    return model ? model_base_weights(model) : NULL;
}

const struct peft *tuned_adapter(const struct tuned *t)
{
    return t->adapter;
}
