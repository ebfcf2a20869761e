#include <math.h>
#include <stdbool.h>

#include "engine/base/rng.h"
#include "engine/cpu/cpu.h"
#include "engine/sampler.h"

/* Index of the largest logit, lowest id on ties; -1 on NaN or when there is no finite value. */
static int32_t best(const float *logit, int32_t vocabulary)
{
    int32_t found = 0;
    bool nan = false;

    for (int32_t i = 0; i < vocabulary; i++) {
        nan |= logit[i] != logit[i];
        if (logit[i] > logit[found])
            found = i;
    }
    return nan || !isfinite(logit[found]) ? -1 : found;
}

/* The weight at which the sum of the shares, from the largest on, reaches `needed`: digit by digit
 * of its bits, which are ordered as weights are. */
static struct sampler_set find_set(const float *weight, int32_t vocabulary, uint64_t needed)
{
    uint32_t found = 0;
    uint64_t above = 0;

    for (int shift = (SAMPLER_PASSES - 1) * SAMPLER_DIGIT; shift >= 0; shift -= SAMPLER_DIGIT) {
        uint64_t bin[SAMPLER_BINS] = {0};
        uint32_t digit = SAMPLER_BINS - 1;

        for (int32_t i = 0; i < vocabulary; i++) {
            uint32_t bits = sampler_bits(weight[i]);

            if ((bits ^ found) >> shift < SAMPLER_BINS)
                bin[bits >> shift & (SAMPLER_BINS - 1)] += sampler_share(weight[i]);
        }
        while (above + bin[digit] < needed)
            above += bin[digit--];
        found |= digit << shift;
    }
    return sampler_set_of(sampler_from_bits(found), above, needed);
}

static int32_t choose(const float *weight, struct sampler_set set, uint64_t point)
{
    int32_t i = 0;

    for (;; i++) {
        uint64_t share = sampler_share(weight[i]);

        if (weight[i] < set.lowest || (weight[i] == set.lowest && set.ties == 0))
            continue;
        set.ties -= weight[i] == set.lowest;
        if (point < share)
            return i;
        point -= share;
    }
}

static int32_t sample(float *logit, int32_t vocabulary, const struct sample_row *row)
{
    int32_t top = best(logit, vocabulary);
    struct sampler_set set = {0};

    if (top < 0 || row->temperature <= 0 || row->top_p <= 0)
        return top;
    float largest = logit[top];
    double inverse = sampler_inverse(row->temperature);
    for (int32_t i = 0; i < vocabulary; i++) {
        logit[i] = sampler_weight(logit[i], largest, inverse);
        set.kept += sampler_share(logit[i]);
    }
    if (row->top_p < 1)
        set = find_set(logit, vocabulary, sampler_needed(row->top_p, set.kept));
    return choose(logit, set,
                  sampler_point(rng_at(row->seed, SAMPLER_STREAM, row->index), set.kept));
}

static void sample_task(void *context, int64_t i, int worker)
{
    const struct sample_args *a = context;
    int32_t vocabulary = (int32_t)a->logits.shape[1];

    ((int32_t *)a->token.data)[i] =
        sample(f32(&a->logits) + i * vocabulary, vocabulary, &a->row[i]);
}

void cpu_sample(struct backend *backend, const struct sample_args *args)
{
    struct sample_args a = *args;

    thread_pool_run(cpu_of(backend)->pool, a.logits.shape[0], sample_task, &a);
}
