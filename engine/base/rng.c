#include "engine/base/rng.h"

static uint64_t mix(uint64_t z)
{
    z += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

uint64_t rng_at(uint64_t seed, uint64_t stream, uint64_t counter)
{
    return mix(mix(mix(seed) ^ stream) ^ counter);
}

double rng_unit_at(uint64_t seed, uint64_t stream, uint64_t counter)
{
    return (double)(rng_at(seed, stream, counter) >> 11) * 0x1p-53;
}

void rng_permutation(int32_t *order, int32_t count, uint64_t seed, uint64_t stream)
{
    for (int32_t i = 0; i < count; i++)
        order[i] = i;
    for (int32_t i = count - 1; i > 0; i--) {
        /* The bias of a remainder is below 2^-32 for 31-bit counts. */
        int32_t j = (int32_t)(rng_at(seed, stream, (uint64_t)i) % ((uint64_t)i + 1));
        int32_t t = order[i];

        order[i] = order[j];
        order[j] = t;
    }
}
