#include "engine/codec/distill_batch.h"

#include <stdlib.h>

#include "engine/base/rng.h"

#define THINNING 0x7468696e /* a stream of the seed that shuffling does not use */

int distill_batches_open(struct distill_batches *b, const struct trainer_source *examples,
                         const struct tokenizer *tokenizer, int32_t max_rows, int64_t seed,
                         struct err *err)
{
    size_t rows = (size_t)max_rows;

    *b = (struct distill_batches){
        .examples = examples, .tokenizer = tokenizer, .max_rows = max_rows, .seed = (uint64_t)seed};
    b->order = malloc((size_t)examples->count * sizeof *b->order);
    b->token = malloc(rows * sizeof *b->token);
    b->position = malloc(rows * sizeof *b->position);
    b->example = malloc(rows * sizeof *b->example);
    b->ends = malloc((rows + 1) * sizeof *b->ends);
    b->weight = malloc(rows * sizeof *b->weight);
    if (b->order && b->token && b->position && b->example && b->ends && b->weight)
        return 0;
    distill_batches_close(b);
    return err_set(err, ERR_NO_MEMORY, "no memory for %d rows of %lld examples", max_rows,
                   (long long)examples->count);
}

void distill_batches_close(struct distill_batches *b)
{
    free(b->order);
    free(b->token);
    free(b->position);
    free(b->example);
    free(b->ends);
    free(b->weight);
    *b = (struct distill_batches){0};
}

static void shuffle(int32_t *order, int32_t count, uint64_t seed, uint64_t round)
{
    for (int32_t i = 0; i < count; i++)
        order[i] = i;
    for (int32_t i = count - 1; i > 0; i--) {
        int32_t other = (int32_t)(rng_at(seed, round, (uint64_t)i) % (uint64_t)(i + 1));
        int32_t kept = order[i];

        order[i] = order[other];
        order[other] = kept;
    }
}

static int32_t rows_of(const struct distill_batches *b, struct dataset_example e)
{
    return e.length < b->max_rows ? e.length : b->max_rows;
}

int32_t distill_batches_rows(const struct distill_batches *b, int64_t example)
{
    return rows_of(b, b->examples->example(b->examples->context, example));
}

/* Is token i of an example left out? since: tokens since the last special one. */
static bool left_out(const struct distill_batches *b, struct dataset_example e, int32_t i,
                     int32_t since)
{
    uint64_t drawn = rng_at(b->seed ^ THINNING, (uint64_t)b->next, (uint64_t)i);

    return since > DISTILL_SPECIAL && e.weight[i] == 0 && i + 1 < e.length &&
           (double)drawn < DISTILL_THINNED * 0x1p64;
}

/* Behind the rows that are there; how many there are then. */
static int32_t append(struct distill_batches *b, struct dataset_example e, bool thinned,
                      int32_t rows)
{
    int32_t first = rows, from = e.length - rows_of(b, e), since = 0;

    for (int32_t i = from; i < e.length; i++) {
        since = tokenizer_is_special(b->tokenizer, e.token[i]) ? 0 : since + 1;
        if (i > from && thinned && left_out(b, e, i, since))
            continue;
        if (rows > first)
            b->weight[rows - 1] = e.weight[i] > 0 ? DISTILL_ANSWERS : 1;
        b->token[rows] = e.token[i];
        b->position[rows] = rows - first;
        rows++;
    }
    b->weight[rows - 1] = 1;
    return rows;
}

void distill_batches_next(struct distill_batches *b, struct distill_batch *out)
{
    const struct trainer_source *examples = b->examples;
    bool any_thinned = false;
    int32_t rows = 0, docs = 0;
    float sum = 0;

    b->ends[0] = 0;
    while (docs < examples->count) {
        uint64_t round = (uint64_t)(b->next / examples->count);
        int32_t at = (int32_t)(b->next % examples->count);
        bool thinned = round % 2 == 1;
        struct dataset_example e;

        if (at == 0)
            shuffle(b->order, (int32_t)examples->count, b->seed, round);
        e = examples->example(examples->context, b->order[at]);
        if (rows + rows_of(b, e) > b->max_rows)
            break;
        rows = append(b, e, thinned, rows);
        any_thinned |= thinned;
        b->example[docs++] = b->order[at];
        b->ends[docs] = rows;
        b->next++;
    }
    for (int32_t i = 0; i < rows; i++)
        sum += b->weight[i];
    for (int32_t i = 0; i < rows; i++)
        b->weight[i] /= sum;
    *out = (struct distill_batch){.batch = {.rows = rows,
                                            .token = b->token,
                                            .position = b->position,
                                            .docs = docs,
                                            .cu_seqlens = b->ends},
                                  .weight = b->weight,
                                  .example = b->example,
                                  .thinned = any_thinned};
}
