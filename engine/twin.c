#include "engine/twin.h"

#include <string.h>
#include <unistd.h>

#include "engine/engine_parts.h"
#include "engine/model_config.h"

static int check_shapes(const struct engine *engine, const struct model *twin, const char *called,
                        struct err *err)
{
    struct model_weights *a = (struct model_weights *)(uintptr_t)model_base_weights(engine->model);
    struct model_weights *b = (struct model_weights *)(uintptr_t)model_base_weights(twin);
    int32_t count = model_tensor_count(engine->model);

    if (model_tensor_count(twin) != count)
        return err_set(err, ERR_INVALID,
                       "the %s model has %d tensors, its base %d: they do not belong together",
                       called, model_tensor_count(twin), count);
    for (int32_t i = 0; i < count; i++) {
        char name[MODEL_NAME_MAX], other[MODEL_NAME_MAX];
        const struct tensor *x = model_tensor(engine->model, a, i, name);
        const struct tensor *y = model_tensor(twin, b, i, other);

        if (strcmp(name, other) != 0 || x->rank != y->rank ||
            memcmp(x->shape, y->shape, (size_t)x->rank * sizeof *x->shape) != 0)
            return err_set(err, ERR_INVALID,
                           "\"%s\" of the %s model has not the shape that its base has: they do "
                           "not belong together",
                           other, called);
    }
    return 0;
}

/* The twin's weights are run by the base's configuration, and so is all that is made of them. */
static int check_config(const struct model_config *base, const struct model_config *twin,
                        const char *called, struct err *err)
{
    const struct {
        const char *key;
        double base, twin;
    } number[] = {
        {"num_attention_heads", base->heads, twin->heads},
        {"num_key_value_heads", base->kv_heads, twin->kv_heads},
        {"rms_norm_eps", (double)base->rms_norm_eps, (double)twin->rms_norm_eps},
        {"rope_theta", (double)base->rope_theta, (double)twin->rope_theta},
        {"kind of rope scaling", base->rope_scaling, twin->rope_scaling},
        {"rope scaling factor", (double)base->rope_factor, (double)twin->rope_factor},
        {"low_freq_factor", (double)base->rope_low_freq_factor, (double)twin->rope_low_freq_factor},
        {"high_freq_factor", (double)base->rope_high_freq_factor,
         (double)twin->rope_high_freq_factor},
        {"original_max_position_embeddings", base->rope_original_context,
         twin->rope_original_context},
    };

    for (size_t i = 0; i < sizeof number / sizeof number[0]; i++)
        if (number[i].base != number[i].twin)
            return err_set(err, ERR_INVALID,
                           "the %s of the %s model is %g, that of its base %g: weights alone are "
                           "taken from it, so they do not belong together",
                           number[i].key, called, number[i].twin, number[i].base);
    return 0;
}

int twin_open(struct twin *twin, const struct engine *engine, const char *path, const char *called,
              struct err *err)
{
    char base[ENGINE_PATH_MAX];
    bool temporary;
    int rc;

    if (engine_base_path(base, path, &temporary, err))
        return err_prefix(err, "the %s model", called);
    rc = base_file_open(&twin->file, base, err) ||
                 model_open(&twin->model, engine->backend, twin->file, err) ||
                 check_shapes(engine, twin->model, called, err) ||
                 check_config(base_file_config(engine->base), base_file_config(twin->file), called,
                              err)
             ? -1
             : 0;
    if (temporary) /* the file stays readable while it is open */
        unlink(base);
    return rc;
}

void twin_close(struct twin *twin)
{
    model_free(twin->model);
    base_file_free(twin->file);
    *twin = (struct twin){NULL, NULL};
}
