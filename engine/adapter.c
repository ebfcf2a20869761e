#include "engine/adapter.h"

#include <stddef.h>
#include <stdlib.h>

#include "engine/base/progress.h"
#include "engine/base_file.h"
#include "engine/codec/artifact.h"
#include "engine/engine_parts.h"
#include "engine/model.h"

struct engine_delta {
    struct adapter adapter;
    struct backend *backend;
    struct packed_delta **packed; /* [packed_count], owned */
    int32_t packed_count;
    void **memory; /* [memory_count]: vectors in the backend's memory, owned */
    int32_t memory_count;
    int64_t bytes;
};

/* Where an adapter keeps what belongs to a tensor of a layer. */
struct place {
    size_t weight; /* offset in struct layer_weights */
    size_t part;   /* offset in struct adapter_layer */
    bool matrix;   /* a packed delta; else a replaced vector */
};

#define PLACE_LINEAR(name)                                                                      \
    {offsetof(struct layer_weights, name.w), offsetof(struct adapter_layer, name.delta), true}, \
    {                                                                                           \
        offsetof(struct layer_weights, name.b), offsetof(struct adapter_layer, name.b), false   \
    }
#define PLACE_VECTOR(name)                                                                \
    {                                                                                     \
        offsetof(struct layer_weights, name), offsetof(struct adapter_layer, name), false \
    }

static const struct place places[] = {
    PLACE_LINEAR(q),      PLACE_LINEAR(k),      PLACE_LINEAR(v),        PLACE_LINEAR(o),
    PLACE_LINEAR(gate),   PLACE_LINEAR(up),     PLACE_LINEAR(down),     PLACE_VECTOR(attn_norm),
    PLACE_VECTOR(q_norm), PLACE_VECTOR(k_norm), PLACE_VECTOR(mlp_norm),
};

struct loading {
    struct engine_delta *delta;
    const struct engine *engine;
    const struct model_config *config;
    struct model_weights *weights; /* the base's; only addresses of its fields are used */
    const struct artifact_tensor *tensor;
    const struct artifact *artifact;
    float *base, *diff; /* the longest vector */
};

static int pack(struct loading *l, const struct delta_tensor *view, const struct packed_delta **out,
                struct err *err)
{
    struct engine_delta *delta = l->delta;
    struct packed_delta *packed;

    if (delta->backend->ops->delta_pack(delta->backend, view, &packed, err) != 0)
        return -1;
    delta->packed[delta->packed_count++] = packed;
    delta->bytes += delta->backend->ops->delta_bytes(packed);
    *out = packed;
    return 0;
}

static int load_matrix(struct loading *l, int32_t index, const struct packed_delta **out,
                       struct err *err)
{
    const struct artifact_tensor *t = &l->tensor[index];
    const struct tensor *part = artifact_parts(l->artifact, index);
    struct delta_tensor view;
    void *memory;
    int rc;

    if (artifact_codec(l->artifact)->view(part, t->rows, t->cols, &view, &memory, err) != 0)
        return -1;
    if ((view.kind == DELTA_PLANES && view.planes.rank == 0) ||
        (view.kind == DELTA_FACTORS && view.factors.left.shape[1] == 0))
        rc = 0; /* a matrix that was given no bits stays the base's */
    else
        rc = pack(l, &view, out, err);
    free(memory);
    return rc;
}

static int load_embedding(struct loading *l, int32_t index, const struct packed_delta **out,
                          struct err *err)
{
    const struct artifact_tensor *t = &l->tensor[index];
    struct delta_tensor view = {.kind = DELTA_DENSE,
                                .rows = t->rows,
                                .cols = t->cols,
                                .dense = *artifact_parts(l->artifact, index)};

    return pack(l, &view, out, err);
}

/* base + difference, in f32. */
static int load_vector(struct loading *l, int32_t index, struct tensor *out, struct err *err)
{
    const struct artifact_tensor *t = &l->tensor[index];
    struct engine_delta *delta = l->delta;
    int64_t shape[1] = {t->cols};
    size_t bytes = (size_t)t->cols * sizeof(float);
    struct tensor host;
    void *memory;

    if (!base_file_tensor(l->engine->base, t->name, &host))
        return err_set(err, ERR_INTERNAL, "the base has no tensor \"%s\"", t->name);
    tensor_to_f32(&host, 0, t->cols, l->base);
    if (artifact_expand(l->artifact, index, l->diff, err) != 0)
        return -1;
    for (int32_t i = 0; i < t->cols; i++)
        l->base[i] += l->diff[i];
    memory = delta->backend->ops->alloc(delta->backend, bytes, err);
    if (memory == NULL)
        return -1;
    delta->memory[delta->memory_count++] = memory;
    delta->bytes += (int64_t)bytes;
    delta->backend->ops->upload(delta->backend, memory, l->base, bytes);
    *out = tensor_view(memory, DTYPE_F32, 1, shape);
    /* l->base is read by the upload until it has been waited for. */
    return backend_check(delta->backend, err);
}

/* The tensor's place in the adapter, by the address of its place in the weights. */
static int load_layer_tensor(struct loading *l, int32_t index, const char *at, struct err *err)
{
    const char *first = (const char *)l->weights->layer;
    size_t layer = (size_t)(at - first) / sizeof(struct layer_weights);
    size_t offset = (size_t)(at - first) % sizeof(struct layer_weights);

    for (size_t i = 0; i < sizeof(places) / sizeof(places[0]); i++) {
        char *part = (char *)&l->delta->adapter.layer[layer] + places[i].part;

        if (places[i].weight != offset)
            continue;
        return places[i].matrix
                   ? load_matrix(l, index, (const struct packed_delta **)(void *)part, err)
                   : load_vector(l, index, (struct tensor *)(void *)part, err);
    }
    return err_set(err, ERR_INTERNAL, "no place for \"%s\" in an adapter", l->tensor[index].name);
}

static int load_tensor(struct loading *l, int32_t index, struct err *err)
{
    struct adapter *adapter = &l->delta->adapter;
    const struct tensor *t;
    char name[MODEL_NAME_MAX];

    if (artifact_parts(l->artifact, index) == NULL)
        return 0;
    t = model_tensor(l->engine->model, l->weights, index, name);
    if (t == &l->weights->final_norm)
        return load_vector(l, index, &adapter->final_norm, err);
    if (t == &l->weights->head)
        return load_embedding(l, index, &adapter->head, err);
    if (t == &l->weights->embed) {
        if (load_embedding(l, index, &adapter->embed, err) != 0)
            return -1;
        if (l->config->tied_embeddings)
            adapter->head = adapter->embed;
        return 0;
    }
    return load_layer_tensor(l, index, (const char *)t, err);
}

static int take_memory(struct loading *l, int32_t count, struct err *err)
{
    int32_t longest = 1;

    for (int32_t i = 0; i < count; i++) {
        const struct artifact_tensor *t = &l->tensor[i];
        if (t->kind == ARTIFACT_VECTOR && t->cols > longest)
            longest = t->cols;
    }
    l->base = malloc((size_t)longest * sizeof(float));
    l->diff = malloc((size_t)longest * sizeof(float));
    l->delta->packed = calloc((size_t)count, sizeof(*l->delta->packed));
    l->delta->memory = calloc((size_t)count, sizeof(*l->delta->memory));
    l->delta->adapter.layer = calloc((size_t)l->config->layers, sizeof(*l->delta->adapter.layer));
    if (l->base == NULL || l->diff == NULL || l->delta->packed == NULL ||
        l->delta->memory == NULL || l->delta->adapter.layer == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory for a delta");
    return 0;
}

int engine_delta_open(struct engine_delta **out, struct engine *engine, const char *path,
                      struct err *err)
{
    struct engine_delta *delta = calloc(1, sizeof(*delta));
    struct artifact_tensor *tensor = NULL;
    struct artifact *artifact = NULL;
    struct loading l = {.delta = delta, .engine = engine};
    struct artifact_expectation want = {.base_digest = engine_info(engine)->digest};
    int rc = -1;

    if (delta == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory for a delta");
    delta->backend = engine->backend;
    l.config = model_get_config(engine->model);
    l.weights = (struct model_weights *)model_base_weights(engine->model);
    if (artifact_tensors_of_model(engine->model, &tensor, &want.count, err) != 0)
        goto out;
    l.tensor = want.tensor = tensor;
    if (artifact_open(&artifact, path, &want, err) != 0)
        goto out;
    l.artifact = artifact;
    if (take_memory(&l, want.count, err) != 0)
        goto out;
    for (int32_t i = 0; i < want.count; i++) {
        if (load_tensor(&l, i, err) != 0)
            goto out;
        progress_tick();
    }
    *out = delta;
    delta = NULL;
    rc = 0;
out:
    engine_delta_free(delta);
    artifact_free(artifact);
    free(tensor);
    free(l.base);
    free(l.diff);
    return rc;
}

int engine_delta_measure(const struct engine *engine, const char *path,
                         struct engine_delta_memory *out, struct err *err)
{
    struct artifact_expectation want = {.base_digest = engine_info(engine)->digest};
    struct artifact_tensor *tensor = NULL;
    int rc;

    if (artifact_tensors_of_model(engine->model, &tensor, &want.count, err) != 0)
        return -1;
    want.tensor = tensor;
    rc = artifact_measure(path, &want, out, err);
    free(tensor);
    return rc;
}

void engine_delta_free(struct engine_delta *delta)
{
    if (delta == NULL)
        return;
    for (int32_t i = 0; i < delta->packed_count; i++)
        delta->backend->ops->delta_free(delta->backend, delta->packed[i]);
    for (int32_t i = 0; i < delta->memory_count; i++)
        delta->backend->ops->free(delta->backend, delta->memory[i]);
    free(delta->packed);
    free(delta->memory);
    free(delta->adapter.layer);
    free(delta);
}

int64_t engine_delta_bytes(const struct engine_delta *delta)
{
    return delta->bytes;
}

const struct adapter *engine_delta_adapter(const struct engine_delta *delta)
{
    return delta != NULL ? &delta->adapter : NULL;
}
