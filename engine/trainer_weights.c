/* A trainer's weights: its own copies of what it trains, the fine-tune it continues from, and how
 * the codecs read them. */
#include <stdlib.h>
#include <string.h>

#include "engine/base_file.h"
#include "engine/codec/artifact.h"
#include "engine/trainer_state.h"

/* ------------------------------------------------------------------ copies of the base */

/* Tensor `index` of weights or gradients; the tied head follows embed. */
static struct tensor *tensor_at(const struct engine_trainer *t, const struct model_weights *weights,
                                int32_t index)
{
    char name[MODEL_NAME_MAX];

    return model_tensor(t->engine->model, (struct model_weights *)(uintptr_t)weights, index, name);
}

static bool is_trained(const struct engine_trainer *t, int32_t index)
{
    return t->options.train_embeddings || !model_tensor_is_embedding(t->engine->model, index);
}

static int64_t padded(int64_t elements) /* each tensor begins on a cache line */
{
    return (elements + 15) / 16 * 16;
}

#define PORTION 4096 /* elements that are moved at a time */

/* Values to the backend's memory: floats to `to`, and where there is a copy, its BF16. */
static void put(struct engine_trainer *t, float *to, uint16_t *copy, int64_t at, const float *value,
                int64_t count)
{
    struct backend *b = t->engine->backend;
    uint16_t half[PORTION];

    b->ops->upload(b, to + at, value, (size_t)count * sizeof *value);
    if (!copy)
        return;
    for (int64_t i = 0; i < count; i++)
        half[i] = f32_to_bf16(value[i]);
    b->ops->upload(b, copy + at, half, (size_t)count * sizeof *half);
}

/* Tensor `index` of the base, with `difference` (or NULL: none) added, to the backend's memory. */
static int put_tensor(struct engine_trainer *t, int32_t index, const float *difference, float *to,
                      uint16_t *copy, struct err *err)
{
    const struct model_weights *base = model_base_weights(t->engine->model);
    char name[MODEL_NAME_MAX];
    struct tensor host;
    float part[PORTION];

    model_tensor(t->engine->model, (struct model_weights *)(uintptr_t)base, index, name);
    if (!base_file_tensor(t->engine->base, name, &host))
        return err_set(err, ERR_INTERNAL, "the base has no tensor %s", name);
    for (int64_t i = 0, n = tensor_elements(&host); i < n; i += PORTION) {
        int64_t count = n - i < PORTION ? n - i : PORTION;

        tensor_to_f32(&host, i, count, part);
        for (int64_t k = 0; difference && k < count; k++)
            part[k] += difference[i + k];
        put(t, to, copy, i, part, count);
    }
    base_file_done_with(t->engine->base, name);
    return backend_check(t->engine->backend, err);
}

static int open_blocks(struct engine_trainer *t, struct err *err)
{
    struct backend *b = t->engine->backend;
    float **block[] = {&t->w, &t->g, &t->m, &t->v};

    for (size_t i = 0; i < sizeof block / sizeof block[0]; i++) {
        *block[i] = b->ops->alloc(b, (size_t)t->parameters * sizeof(float), err);
        if (!*block[i])
            return err_prefix(err, "training %lld weights", (long long)t->parameters);
    }
    if (b->activation != DTYPE_BF16)
        return 0;
    t->copy = b->ops->alloc(b, (size_t)t->parameters * sizeof *t->copy, err);
    return t->copy ? 0 : err_prefix(err, "training %lld weights", (long long)t->parameters);
}

/* Where tensor `index`, which is trained, begins in the blocks. */
static int64_t place_of(const struct engine_trainer *t, int32_t index)
{
    int64_t at = 0;

    for (int32_t i = 0; i < index; i++)
        if (is_trained(t, i))
            at += padded(tensor_elements(tensor_at(t, &t->weights, i)));
    return at;
}

static struct tensor block_view(const struct tensor *like, float *block, int64_t at)
{
    return tensor_view(block + at, DTYPE_F32, like->rank, like->shape);
}

static int open_parameters(struct engine_trainer *t, struct err *err)
{
    struct model *model = t->engine->model;
    int32_t count = model_tensor_count(model);
    int64_t at = 0;

    t->parameter = calloc((size_t)count, sizeof *t->parameter);
    if (!t->parameter)
        return err_set(err, ERR_NO_MEMORY, "no memory for %d tensors", count);
    t->parameters = trainer_weights_count(t);
    if (open_blocks(t, err))
        return -1;
    for (int32_t i = 0; i < count; i++) {
        struct tensor *w = tensor_at(t, &t->weights, i), *g = tensor_at(t, &t->grads, i);
        struct parameter *p = &t->parameter[t->parameter_count];

        if (!is_trained(t, i)) {
            *w = *tensor_at(t, model_base_weights(model), i);
            continue;
        }
        p->w = block_view(w, t->w, at);
        p->g = block_view(w, t->g, at);
        p->m = block_view(w, t->m, at);
        p->v = block_view(w, t->v, at);
        if (t->copy && w->rank == 2)
            p->copy = tensor_view(t->copy + at, DTYPE_BF16, w->rank, w->shape);
        if (put_tensor(t, i, NULL, p->w.data, p->copy.data, err))
            return -1;
        *w = p->copy.data ? p->copy : p->w;
        *g = p->g;
        p->decay = w->rank == 2;
        at += padded(tensor_elements(w));
        t->parameter_count++;
    }
    return 0;
}

static void tie_heads(struct engine_trainer *t)
{
    if (!model_get_config(t->engine->model)->tied_embeddings)
        return;
    t->weights.head = t->weights.embed;
    t->grads.head = t->grads.embed;
}

/* ------------------------------------------------------------------ continuing a fine-tune */

/* An embedding that the start delta changed but this job does not train gets values of its own. */
static int thaw_embedding(struct engine_trainer *t, int32_t index, const float *difference,
                          struct err *err)
{
    struct backend *b = t->engine->backend;
    struct tensor *w = tensor_at(t, &t->weights, index);
    int64_t n = padded(tensor_elements(w)), at = index == 0 ? 0 : n,
            count = model_get_config(t->engine->model)->tied_embeddings ? 1 : 2;
    bool bf16 = b->activation == DTYPE_BF16;

    if (!t->frozen)
        t->frozen = b->ops->alloc(b, (size_t)(n * count) * sizeof(float), err);
    if (t->frozen && bf16 && !t->frozen_copy)
        t->frozen_copy = b->ops->alloc(b, (size_t)(n * count) * sizeof(uint16_t), err);
    if (!t->frozen || (bf16 && !t->frozen_copy))
        return -1;
    *w = bf16 ? tensor_view(t->frozen_copy + at, DTYPE_BF16, w->rank, w->shape)
              : block_view(w, t->frozen, at);
    return put_tensor(t, index, difference, t->frozen + at, bf16 ? t->frozen_copy + at : NULL, err);
}

static int add_difference(struct engine_trainer *t, const struct artifact *artifact, int32_t index,
                          float *difference, struct err *err)
{
    int64_t at = place_of(t, index);

    if (!artifact_parts(artifact, index))
        return 0;
    if (artifact_expand(artifact, index, difference, err))
        return -1;
    if (!is_trained(t, index))
        return thaw_embedding(t, index, difference, err);
    return put_tensor(t, index, difference, t->w + at, t->copy ? t->copy + at : NULL, err);
}

static int add_start_delta(struct engine_trainer *t, const char *path, struct err *err)
{
    struct artifact_tensor *tensor = NULL;
    struct artifact_expectation want = {.base_digest = base_file_info(t->engine->base)->digest};
    struct artifact *artifact = NULL;
    float *difference = NULL;
    int64_t largest = 0;
    int rc = -1;

    if (artifact_tensors_of_model(t->engine->model, &tensor, &want.count, err))
        return -1;
    want.tensor = tensor;
    if (artifact_open(&artifact, path, &want, err))
        goto out;
    for (int32_t i = 0; i < want.count; i++) {
        int64_t n = (int64_t)tensor[i].rows * tensor[i].cols;

        largest = n > largest ? n : largest;
    }
    difference = malloc((size_t)largest * sizeof *difference);
    if (!difference) {
        err_set(err, ERR_NO_MEMORY, "no memory for the delta that training continues from");
        goto out;
    }
    for (int32_t i = 0; i < want.count; i++)
        if (add_difference(t, artifact, i, difference, err))
            goto out;
    rc = 0;
out:
    free(difference);
    artifact_free(artifact);
    free(tensor);
    return rc;
}
/* ------------------------------------------------------------------ open, close, read */

int64_t trainer_weights_count(const struct engine_trainer *t)
{
    int64_t count = 0;

    for (int32_t i = 0; i < model_tensor_count(t->engine->model); i++)
        if (is_trained(t, i))
            count += padded(tensor_elements(tensor_at(t, &t->weights, i)));
    return count;
}

int trainer_weights_open(struct engine_trainer *t, struct err *err)
{
    if (open_parameters(t, err))
        return -1;
    if (t->options.start_delta && add_start_delta(t, t->options.start_delta, err))
        return -1;
    tie_heads(t);
    return 0;
}

void trainer_weights_close(struct engine_trainer *t)
{
    struct backend *b = t->engine->backend;
    void *memory[] = {t->w, t->g, t->m, t->v, t->copy, t->frozen, t->frozen_copy};

    for (size_t i = 0; i < sizeof memory / sizeof memory[0]; i++)
        if (memory[i])
            b->ops->free(b, memory[i]);
    model_weights_release(&t->weights);
    model_weights_release(&t->grads);
    free(t->parameter);
}

int trainer_weights_refresh(struct engine_trainer *t, struct err *err)
{
    struct backend *b = t->engine->backend;
    float part[PORTION];

    for (int64_t i = 0; t->copy && i < t->parameters; i += PORTION) {
        int64_t count = t->parameters - i < PORTION ? t->parameters - i : PORTION;

        b->ops->download(b, part, t->w + i, (size_t)count * sizeof *part);
        if (backend_check(b, err))
            return -1;
        put(t, t->w, t->copy, i, part, count);
    }
    return backend_check(b, err);
}

struct engine *trainer_engine(const struct engine_trainer *trainer)
{
    return trainer->engine;
}

const struct model_weights *trainer_weights(const struct engine_trainer *trainer)
{
    return &trainer->weights;
}

bool trainer_trains(const struct engine_trainer *t, int32_t index)
{
    return is_trained(t, index) ||
           (t->frozen && tensor_at(t, &t->weights, index)->data !=
                             tensor_at(t, model_base_weights(t->engine->model), index)->data);
}

int trainer_read(void *trainer, int32_t index, int64_t from, int64_t count, float *base,
                 float *tuned, struct err *err)
{
    struct engine_trainer *t = trainer;
    struct backend *b = t->engine->backend;
    const struct model_weights *base_weights = model_base_weights(t->engine->model);
    char name[MODEL_NAME_MAX];
    struct tensor host;

    model_tensor(t->engine->model, (struct model_weights *)(uintptr_t)base_weights, index, name);
    if (!base_file_tensor(t->engine->base, name, &host))
        return err_set(err, ERR_INTERNAL, "the base has no tensor %s", name);
    tensor_to_f32(&host, from, count, base);
    if (!trainer_trains(t, index)) {
        memcpy(tuned, base, (size_t)count * sizeof *tuned);
        return 0;
    }
    const float *values = is_trained(t, index) ? t->w + place_of(t, index) : t->frozen;
    if (!is_trained(t, index) && index > 0) /* a head of its own lies behind the embedding */
        values += padded(tensor_elements(tensor_at(t, &t->weights, index)));
    b->ops->download(b, tuned, values + from, (size_t)count * sizeof *tuned);
    return backend_check(b, err);
}
