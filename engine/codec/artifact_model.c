/* artifact.h's list of tensors. */
#include <stdio.h>
#include <stdlib.h>

#include "engine/base_layout.h"
#include "engine/codec/artifact.h"

static enum artifact_kind kind_of(const struct base_layout_tensor *t)
{
    return t->linear ? ARTIFACT_MATRIX : t->rank == 2 ? ARTIFACT_EMBEDDING : ARTIFACT_VECTOR;
}

int artifact_tensors(const struct model_config *config, struct artifact_tensor **out,
                     int32_t *count, struct err *err)
{
    struct base_layout_tensor *list = NULL;
    int64_t n = 0;

    if (base_layout_list(config, &list, &n, err) != 0)
        return -1;
    *out = calloc((size_t)n, sizeof **out);
    if (*out == NULL) {
        free(list);
        return err_set(err, ERR_NO_MEMORY, "out of memory for a list of tensors");
    }
    *count = (int32_t)n;
    for (int64_t i = 0; i < n; i++) {
        struct artifact_tensor *t = &(*out)[i];

        snprintf(t->name, sizeof t->name, "%s", list[i].name);
        t->kind = kind_of(&list[i]);
        t->rows = list[i].rank == 2 ? (int32_t)list[i].shape[0] : 1;
        t->cols = (int32_t)list[i].shape[list[i].rank - 1];
    }
    free(list);
    return 0;
}

int artifact_tensors_of_model(const struct model *model, struct artifact_tensor **out,
                              int32_t *count, struct err *err)
{
    return artifact_tensors(model_get_config(model), out, count, err);
}
