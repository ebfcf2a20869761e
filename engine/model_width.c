#include "engine/model_config.h"

int64_t model_config_width(const struct model_config *c, enum model_width width)
{
    switch (width) {
    case WIDTH_D:
        return c->hidden;
    case WIDTH_QUERY:
        return (int64_t)c->heads * c->head_dim;
    case WIDTH_KEY:
        return (int64_t)c->kv_heads * c->head_dim;
    case WIDTH_F:
        return c->intermediate;
    case WIDTH_E:
        return c->head_dim;
    case WIDTH_V:
        return c->vocabulary;
    case WIDTH_NONE:
        break;
    }
    return 0;
}
