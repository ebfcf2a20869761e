/* artifact.h's list of tensors, made from a model. */
#include <stdlib.h>

#include "engine/codec/artifact.h"

int artifact_tensors_of_model(const struct model *model, struct artifact_tensor **out,
                              int32_t *count, struct err *err)
{
    struct model_weights *weights = (struct model_weights *)model_base_weights(model);
    struct artifact_tensor *tensor;

    *count = model_tensor_count(model);
    tensor = calloc((size_t)*count, sizeof(*tensor));
    if (tensor == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory for a list of tensors");
    for (int32_t i = 0; i < *count; i++) {
        const struct tensor *t = model_tensor(model, weights, i, tensor[i].name);

        tensor[i].kind = model_tensor_is_linear(model, i)      ? ARTIFACT_MATRIX
                         : model_tensor_is_embedding(model, i) ? ARTIFACT_EMBEDDING
                                                               : ARTIFACT_VECTOR;
        tensor[i].rows = t->rank == 2 ? (int32_t)t->shape[0] : 1;
        tensor[i].cols = (int32_t)t->shape[t->rank - 1];
    }
    *out = tensor;
    return 0;
}
