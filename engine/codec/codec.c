#include "engine/codec/codec.h"

#include <string.h>

#include "engine/codec/bitdelta.h"
#include "engine/codec/delta_come.h"
#include "engine/codec/graft.h"
#include "engine/codec/lossless.h"

static const struct codec *const codecs[] = {&codec_graft, &codec_bitdelta, &codec_delta_come,
                                             &codec_lossless};

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
    return "graft, bitdelta, delta-come, lossless";
}
