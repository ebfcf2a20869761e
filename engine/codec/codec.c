#include "engine/codec/codec.h"

#include <math.h>
#include <string.h>

#include "engine/codec/bitdelta.h"
#include "engine/codec/delta_come.h"
#include "engine/codec/graft.h"
#include "engine/codec/lora.h"
#include "engine/codec/lossless.h"

static const struct codec *const codecs[] = {&codec_graft, &codec_bitdelta, &codec_delta_come,
                                             &codec_lossless, &codec_lora};
/* The same in words; test_compression holds them together. */
#define MAKERS "graft, bitdelta, delta-come, lossless"
#define IMPORTERS "lora"

int32_t codec_plan_vectors(const struct codec_plan *plan)
{
    int32_t count = plan->rank;

    while (count > 0 && plan->width[count - 1] == 0)
        count--;
    return count;
}

int codec_check_finite(const float *delta, int32_t rows, int32_t cols, struct err *err)
{
    for (int64_t i = 0; i < (int64_t)rows * cols; i++)
        if (!isfinite(delta[i]))
            return err_set(
                err, ERR_INVALID,
                "a weight has changed by %g: the training has diverged, lower the learning rate",
                (double)delta[i]);
    return 0;
}

int codec_too_large(struct err *err)
{
    return err_set(err, ERR_INVALID,
                   "the weights have changed by more than a delta can hold: the training has "
                   "diverged, lower the learning rate");
}

const struct codec *codec_at(size_t index)
{
    return index < sizeof codecs / sizeof codecs[0] ? codecs[index] : NULL;
}

const struct codec *codec_find(const char *name)
{
    for (size_t i = 0; i < sizeof codecs / sizeof codecs[0]; i++)
        if (strcmp(codecs[i]->name, name) == 0)
            return codecs[i];
    return NULL;
}

const char *codec_default(void)
{
    return codecs[0]->name;
}

const char *codec_names(void)
{
    return MAKERS ", " IMPORTERS;
}

const char *codec_makers(void)
{
    return MAKERS;
}
