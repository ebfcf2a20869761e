#include "engine/tokenizer_bpe.h"

#include <stdlib.h>

static size_t slot_of(const struct tokenizer_merges *merges, int32_t left, int32_t right)
{
    uint64_t h = ((uint64_t)(uint32_t)left << 32 | (uint32_t)right) * 0x9E3779B97F4A7C15u;

    h = (h ^ h >> 29) * 0xBF58476D1CE4E5B9u;
    return (size_t)(h ^ h >> 32) & (merges->slots - 1);
}

int tokenizer_merges_init(struct tokenizer_merges *merges, size_t count, struct err *err)
{
    merges->slots = 16;
    while (merges->slots < count * 2)
        merges->slots *= 2;
    merges->items = malloc(merges->slots * sizeof *merges->items);
    if (merges->items == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    for (size_t i = 0; i < merges->slots; i++)
        merges->items[i].left = -1;
    return 0;
}

void tokenizer_merges_release(struct tokenizer_merges *merges)
{
    free(merges->items);
    *merges = (struct tokenizer_merges){0};
}

void tokenizer_merges_set(struct tokenizer_merges *merges, struct tokenizer_merge merge)
{
    size_t i = slot_of(merges, merge.left, merge.right);

    while (merges->items[i].left >= 0 &&
           (merges->items[i].left != merge.left || merges->items[i].right != merge.right))
        i = (i + 1) & (merges->slots - 1);
    merges->items[i] = merge;
}

const struct tokenizer_merge *tokenizer_merges_get(const struct tokenizer_merges *merges,
                                                   int32_t left, int32_t right)
{
    for (size_t i = slot_of(merges, left, right);; i = (i + 1) & (merges->slots - 1)) {
        const struct tokenizer_merge *m = &merges->items[i];

        if (m->left < 0)
            return NULL;
        if (m->left == left && m->right == right)
            return m;
    }
}

void tokenizer_bpe_release(struct tokenizer_bpe *bpe)
{
    free(bpe->symbols);
    free(bpe->queue);
    *bpe = (struct tokenizer_bpe){0};
}

int tokenizer_bpe_add_symbol(struct tokenizer_bpe *bpe, int32_t id, uint32_t start, struct err *err)
{
    if (bpe->count == bpe->capacity) {
        size_t capacity = bpe->capacity ? bpe->capacity * 2 : 64;
        struct tokenizer_symbol *grown = reallocarray(bpe->symbols, capacity, sizeof *bpe->symbols);

        if (grown == NULL)
            return err_set(err, ERR_NO_MEMORY, "out of memory");
        bpe->symbols = grown;
        bpe->capacity = capacity;
    }
    if (bpe->count >= INT32_MAX)
        return err_set(err, ERR_INVALID, "a word has more than 2^31 bytes");
    bpe->symbols[bpe->count] = (struct tokenizer_symbol){
        .id = id,
        .start = start,
        .previous = (int32_t)bpe->count - 1,
        .next = -1,
    };
    if (bpe->count > 0)
        bpe->symbols[bpe->count - 1].next = (int32_t)bpe->count;
    bpe->count++;
    return 0;
}

static int before(const struct tokenizer_queued *a, const struct tokenizer_queued *b)
{
    return a->rank != b->rank ? a->rank < b->rank : a->position < b->position;
}

/* Queues the merge of the symbol at `position` with its right neighbour, if there is one. */
static int push(struct tokenizer_bpe *bpe, const struct tokenizer_merges *merges, int32_t position,
                struct err *err)
{
    const struct tokenizer_symbol *s = &bpe->symbols[position];
    const struct tokenizer_merge *merge;
    struct tokenizer_queued item;
    size_t i;

    if (s->next < 0)
        return 0;
    merge = tokenizer_merges_get(merges, s->id, bpe->symbols[s->next].id);
    if (merge == NULL)
        return 0;
    if (bpe->queued == bpe->queue_capacity) {
        size_t capacity = bpe->queue_capacity ? bpe->queue_capacity * 2 : 64;
        struct tokenizer_queued *grown = reallocarray(bpe->queue, capacity, sizeof *bpe->queue);

        if (grown == NULL)
            return err_set(err, ERR_NO_MEMORY, "out of memory");
        bpe->queue = grown;
        bpe->queue_capacity = capacity;
    }
    item = (struct tokenizer_queued){merge->rank, (uint32_t)position, merge->result};
    for (i = bpe->queued++; i > 0 && before(&item, &bpe->queue[(i - 1) / 2]); i = (i - 1) / 2)
        bpe->queue[i] = bpe->queue[(i - 1) / 2];
    bpe->queue[i] = item;
    return 0;
}

static struct tokenizer_queued pop(struct tokenizer_bpe *bpe)
{
    struct tokenizer_queued top = bpe->queue[0];
    struct tokenizer_queued last = bpe->queue[--bpe->queued];
    size_t i = 0;

    for (;;) {
        size_t child = 2 * i + 1;

        if (child >= bpe->queued)
            break;
        if (child + 1 < bpe->queued && before(&bpe->queue[child + 1], &bpe->queue[child]))
            child++;
        if (!before(&bpe->queue[child], &last))
            break;
        bpe->queue[i] = bpe->queue[child];
        i = child;
    }
    bpe->queue[i] = last;
    return top;
}

/* A queued merge may be outdated: its symbols have changed since. Like the reference, it counts
 * when the pair that is there now merges to the same token. */
static int apply(struct tokenizer_bpe *bpe, const struct tokenizer_merges *merges,
                 const struct tokenizer_queued *top, struct err *err)
{
    struct tokenizer_symbol *s = &bpe->symbols[top->position];
    struct tokenizer_symbol *right;
    const struct tokenizer_merge *merge;

    if (s->id < 0 || s->next < 0)
        return 0;
    right = &bpe->symbols[s->next];
    merge = tokenizer_merges_get(merges, s->id, right->id);
    if (merge == NULL || merge->result != top->result)
        return 0;
    s->id = merge->result;
    s->next = right->next;
    right->id = -1;
    if (s->next >= 0)
        bpe->symbols[s->next].previous = (int32_t)top->position;
    if (s->previous >= 0 && push(bpe, merges, s->previous, err) != 0)
        return -1;
    return push(bpe, merges, (int32_t)top->position, err);
}

int tokenizer_bpe_run(struct tokenizer_bpe *bpe, const struct tokenizer_merges *merges,
                      struct token_list *out, struct err *err)
{
    int rc = 0;

    bpe->queued = 0;
    for (size_t i = 0; rc == 0 && i + 1 < bpe->count; i++)
        rc = push(bpe, merges, (int32_t)i, err);
    while (rc == 0 && bpe->queued > 0) {
        struct tokenizer_queued top = pop(bpe);

        rc = apply(bpe, merges, &top, err);
    }
    for (int32_t i = bpe->count > 0 ? 0 : -1; rc == 0 && i >= 0; i = bpe->symbols[i].next)
        rc = token_list_add(out, bpe->symbols[i].id, bpe->symbols[i].start, err);
    bpe->count = 0;
    return rc;
}
