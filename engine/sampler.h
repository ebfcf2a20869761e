/* sampler.h: from logits to the next token.
 *
 * The random number of a choice is a function of the request's seed and of the token's index in
 * the answer, nothing else: the same request gives the same tokens whatever else runs, and needs
 * no state. Greedy and ties choose the lowest id. Any thread; the scratch belongs to one call. */
#ifndef GRAFT_SAMPLER_H
#define GRAFT_SAMPLER_H

#include <stdint.h>

struct sampler_options {
    double temperature; /* 0: greedy */
    double top_p;       /* the smallest set of best tokens that holds this share; 1: all */
    uint64_t seed;
};

struct sampler_scratch {
    float *weight; /* [vocabulary] */
    int32_t *id;   /* [vocabulary] */
};

/* The token chosen from logits[vocabulary] for answer token `index` (0-based), or -1 when the
 * logits hold a NaN or no finite value: the model has broken down, nothing may be made of it. */
int32_t sampler_pick(const float *logits, int32_t vocabulary, const struct sampler_options *options,
                     uint64_t index, const struct sampler_scratch *scratch);

#endif
