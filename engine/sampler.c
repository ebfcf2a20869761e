#include "engine/sampler.h"

#include <math.h>
#include <stdbool.h>

#include "engine/base/rng.h"

#define STREAM_TOKENS 2 /* of random numbers: the choices of an answer */

/* Index of the largest logit, lowest id on ties; -1 on NaN or when there is no finite value. */
static int32_t best(const float *logits, int32_t vocabulary)
{
    int32_t found = 0;
    bool nan = false;

    for (int32_t i = 0; i < vocabulary; i++) {
        nan |= logits[i] != logits[i];
        if (logits[i] > logits[found])
            found = i;
    }
    return nan || !isfinite(logits[found]) ? -1 : found;
}

static bool before(const float *weight, int32_t a, int32_t b)
{
    return weight[a] > weight[b] || (weight[a] == weight[b] && a < b);
}

static void sift_down(int32_t *heap, int32_t count, const float *weight, int32_t at)
{
    for (;;) {
        int32_t child = 2 * at + 1, moved = heap[at];

        if (child >= count)
            return;
        if (child + 1 < count && before(weight, heap[child + 1], heap[child]))
            child++;
        if (!before(weight, heap[child], moved))
            return;
        heap[at] = heap[child];
        heap[child] = moved;
        at = child;
    }
}

/* Leaves in weight[] only the smallest set of best tokens that holds `top_p` of `total`, the others
 * become 0; returns the set's weight. A heap, since the set is mostly a handful of tokens. */
static double keep_nucleus(const struct sampler_scratch *scratch, int32_t vocabulary, double total,
                           double top_p)
{
    int32_t *heap = scratch->id, left = vocabulary;
    double kept = 0;

    for (int32_t i = 0; i < vocabulary; i++)
        heap[i] = i;
    for (int32_t i = vocabulary / 2; i-- > 0;)
        sift_down(heap, vocabulary, scratch->weight, i);
    do {
        kept += scratch->weight[heap[0]];
        heap[0] = heap[--left];
        sift_down(heap, left, scratch->weight, 0);
    } while (left > 0 && kept < top_p * total);
    for (int32_t i = 0; i < left; i++)
        scratch->weight[heap[i]] = 0;
    return kept;
}

int32_t sampler_pick(const float *logits, int32_t vocabulary, const struct sampler_options *options,
                     uint64_t index, const struct sampler_scratch *scratch)
{
    int32_t top = best(logits, vocabulary), last;
    double total = 0, point;

    if (top < 0 || options->temperature <= 0 || options->top_p <= 0)
        return top;
    for (int32_t i = 0; i < vocabulary; i++) {
        scratch->weight[i] =
            (float)exp(((double)logits[i] - (double)logits[top]) / options->temperature);
        total += scratch->weight[i];
    }
    if (options->top_p < 1)
        total = keep_nucleus(scratch, vocabulary, total, options->top_p);
    point = rng_unit_at(options->seed, STREAM_TOKENS, index) * total;
    last = top;
    for (int32_t i = 0; i < vocabulary; i++) {
        if (scratch->weight[i] <= 0)
            continue;
        last = i;
        point -= scratch->weight[i];
        if (point < 0)
            return i;
    }
    return last; /* rounding left a crumb behind the last token */
}
