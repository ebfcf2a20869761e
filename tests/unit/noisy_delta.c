#include "tests/unit/noisy_delta.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

#include "engine/base_file.h"
#include "engine/codec/artifact.h"
#include "engine/engine_parts.h"
#include "tests/unit/delta_fixture.h"
#include "tests/unit/tiny_model.h"

/* ------------------------------------------------------------------ noise */

struct noise {
    const struct noisy_delta *what;
    const struct engine *engine;
    const struct artifact_tensor *tensor;
};

static int read_noisy(void *context, int32_t index, int64_t from, int64_t count, float *base,
                      float *tuned, struct err *err)
{
    const struct noise *noise = context;
    const struct artifact_tensor *t = &noise->tensor[index];
    float size = t->kind == ARTIFACT_VECTOR ? 0.1f : 0.05f;
    struct tensor host;

    if (!base_file_tensor(noise->engine->base, t->name, &host))
        return err_set(err, ERR_INTERNAL, "no tensor \"%s\"", t->name);
    tensor_to_f32(&host, from, count, base);
    if (t->kind == ARTIFACT_EMBEDDING && !noise->what->embeddings)
        size = 0;
    for (int64_t i = 0; i < count; i++)
        tuned[i] = base[i] + size * tiny_model_value("noise", from + i, 4,
                                                     noise->what->seed + (uint64_t)index);
    return 0;
}

int noisy_delta_write(struct engine *engine, const struct noisy_delta *what, const char *path,
                      struct err *err)
{
    struct noise noise = {.what = what, .engine = engine};
    struct artifact_source source = {
        .base_digest = engine_info(engine)->digest, .read = read_noisy, .context = &noise};
    struct delta_fixture report;
    struct artifact_tensor *tensor;
    int rc;

    if (artifact_tensors_of_model(engine->model, &tensor, &source.count, err) != 0)
        return -1;
    noise.tensor = source.tensor = tensor;
    rc = delta_fixture_write(&source, what->codec, what->bytes, NULL, path, &report, err);
    free(tensor);
    return rc;
}

/* ------------------------------------------------------------------ expanded */

void expanded_weights_add(struct model_weights *out, struct engine *engine,
                          const float *const *difference)
{
    char name[MODEL_NAME_MAX];
    struct err err = {0};

    if (model_weights_alloc(out, engine->model, &err) != 0)
        fail_msg("%s", err.message);
    for (int32_t i = 0; i < model_tensor_count(engine->model); i++) {
        struct tensor *t = model_tensor(engine->model, out, i, name), host;
        int64_t elements = tensor_elements(t);
        float *value = malloc((size_t)elements * sizeof *value);

        assert_non_null(value);
        assert_true(base_file_tensor(engine->base, name, &host));
        tensor_to_f32(&host, 0, elements, value);
        for (int64_t k = 0; difference[i] && k < elements; k++)
            value[k] += difference[i][k];
        t->data = value;
    }
    if (model_get_config(engine->model)->tied_embeddings)
        out->head = out->embed;
}

void expanded_weights_open(struct model_weights *out, struct engine *engine, const char *path)
{
    struct artifact_expectation want = {.base_digest = engine_info(engine)->digest};
    struct artifact_tensor *tensor;
    struct artifact *artifact;
    struct err err = {0};
    float **difference;

    if (artifact_tensors_of_model(engine->model, &tensor, &want.count, &err) != 0)
        fail_msg("%s", err.message);
    want.tensor = tensor;
    if (artifact_open(&artifact, path, &want, &err) != 0)
        fail_msg("%s", err.message);
    difference = calloc((size_t)want.count, sizeof *difference);
    assert_non_null(difference);
    for (int32_t i = 0; i < want.count; i++) {
        difference[i] = malloc((size_t)tensor[i].rows * (size_t)tensor[i].cols * sizeof(float));
        assert_non_null(difference[i]);
        if (artifact_expand(artifact, i, difference[i], &err) != 0)
            fail_msg("%s", err.message);
    }
    expanded_weights_add(out, engine, (const float *const *)difference);
    for (int32_t i = 0; i < want.count; i++)
        free(difference[i]);
    free(difference);
    artifact_free(artifact);
    free(tensor);
}

void expanded_weights_free(struct model_weights *weights, struct engine *engine)
{
    char name[MODEL_NAME_MAX];

    for (int32_t i = 0; i < model_tensor_count(engine->model); i++)
        free(model_tensor(engine->model, weights, i, name)->data);
    model_weights_release(weights);
}
