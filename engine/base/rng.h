/* rng.h: random numbers by counter: number i of stream s under a seed is a pure function of the
 * three, so there is no state to save, and any part of a run can be repeated alone.
 *
 * The mixing is SplitMix64's (Steele, Lea, Flood 2014), applied to each of the three in turn. Not
 * for secrets. */
#ifndef GRAFT_BASE_RNG_H
#define GRAFT_BASE_RNG_H

#include <stdint.h>

uint64_t rng_at(uint64_t seed, uint64_t stream, uint64_t counter);
/* In [0, 1), 53 bits. */
double rng_unit_at(uint64_t seed, uint64_t stream, uint64_t counter);
/* order[0..count) becomes a random permutation of 0..count-1 (Fisher-Yates). */
void rng_permutation(int32_t *order, int32_t count, uint64_t seed, uint64_t stream);

#endif
