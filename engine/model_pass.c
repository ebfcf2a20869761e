#include "engine/model_pass.h"

#include <assert.h>

struct tensor model_arena_carve(struct model_arena *arena, enum dtype dtype, int64_t rows,
                                int64_t cols)
{
    const int64_t shape[2] = {rows, cols};
    struct tensor t = tensor_view(arena->memory ? arena->memory + arena->used : NULL, dtype,
                                  cols > 0 ? 2 : 1, shape);

    arena->used += (tensor_elements(&t) * dtype_size(dtype) + 127) / 64 * 64;
    return t;
}

struct tensor model_first_rows(struct tensor t, int64_t rows)
{
    assert(rows <= t.shape[0]);
    t.shape[0] = rows;
    return t;
}

void model_begin_batch(const struct model *model, const struct batch *batch, struct tensor rope)
{
    model->backend->ops->begin(model->backend, &(struct begin_args){
                                                   .config = &model->config,
                                                   .batch = batch,
                                                   .inv_freq = model->inv_freq,
                                                   .rope_magnitude = model->rope_magnitude,
                                                   .rope = rope,
                                               });
}

void model_assert_batch(const struct model *model, const struct batch *batch,
                        const struct kv_cache *cache)
{
    assert(batch->docs > 0 && batch->cu_seqlens[0] == 0);
    assert(batch->cu_seqlens[batch->docs] == batch->rows);
    for (int32_t r = 0; r < batch->rows; r++)
        assert(batch->token[r] >= 0 && batch->token[r] < model->config.vocabulary);
    for (int32_t d = 0; cache && d < batch->docs; d++) {
        const struct batch_slot *s = &batch->slot[d];
        int32_t rows = batch->cu_seqlens[d + 1] - batch->cu_seqlens[d];

        assert(s->slot >= 0 && s->slot < cache->slots);
        assert(s->past >= 0 && s->past <= cache->max_len - rows);
        assert(batch->position[batch->cu_seqlens[d]] == s->past);
    }
}
