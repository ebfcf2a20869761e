/* sampler.h: from logits to the next token: the arithmetic that the bodies of backend_ops.sample
 * share, so that each draws the same token from the same logits.
 *
 * A token's weight is exp((logit - best) / temperature) as a float, computed by additions and
 * products that round alike everywhere. Its share is the weight in units of 2^-40, a whole number:
 * sums of shares do not depend on their order. Tokens come by weight, the larger first, then by
 * id, the lower first: greedy takes the first of all; top_p keeps the smallest set of first ones
 * whose shares reach top_p of all; of those, in the order of ids, the token is chosen within whose
 * share the random number falls. That is rng_at(seed, SAMPLER_STREAM, index): the same request
 * gives the same tokens whatever else runs, and needs no state. */
#ifndef GRAFT_SAMPLER_H
#define GRAFT_SAMPLER_H

#include <float.h>
#include <stdint.h>
#include <string.h>

#define SAMPLER_STREAM 2   /* of random numbers: the choices of an answer */
#define SAMPLER_DIGIT 10   /* bits of a weight that one pass of the search for top_p settles */
#define SAMPLER_BINS 1024  /* 2^SAMPLER_DIGIT */
#define SAMPLER_PASSES 3   /* weights are at most 1: their bits are below 2^30 */
#define SAMPLER_LOWEST -28 /* exp of it is no share any more */

/* Compilers for GPUs fuse a product with a sum unless the product is named. */
#ifdef __CUDACC__
#define SAMPLER_FUNCTION static __host__ __device__ __forceinline__
#else
#define SAMPLER_FUNCTION static inline
#endif
#ifdef __CUDA_ARCH__
#define SAMPLER_MUL(a, b) __dmul_rn(a, b)
#define SAMPLER_MUL_F(a, b) __fmul_rn(a, b)
#else
#define SAMPLER_MUL(a, b) ((a) * (b))
#define SAMPLER_MUL_F(a, b) ((a) * (b))
#endif

/* What multiplies logits; finite. */
SAMPLER_FUNCTION double sampler_inverse(double temperature)
{
    double inverse = 1 / temperature;

    return inverse < DBL_MAX ? inverse : DBL_MAX;
}

SAMPLER_FUNCTION uint32_t sampler_bits(float weight)
{
    uint32_t bits;

    memcpy(&bits, &weight, sizeof bits);
    return bits;
}

SAMPLER_FUNCTION float sampler_from_bits(uint32_t bits)
{
    float weight;

    memcpy(&weight, &bits, sizeof weight);
    return weight;
}

/* In [0, 1]: exp(z) = 2^n · exp(r), z ≤ 0, |r| ≤ ln 2 / 2, exp(r) by a polynomial (Cephes expf) to
 * 2e-7. `best` is the largest logit and finite. */
SAMPLER_FUNCTION float sampler_weight(float logit, float best, double inverse)
{
    double z = SAMPLER_MUL((double)logit - (double)best, inverse);

    if (!(z > SAMPLER_LOWEST))
        return 0;
    int n = (int)(SAMPLER_MUL(z, 1.4426950408889634) - 0.5);
    float r = (float)(z - SAMPLER_MUL((double)n, 0.6931471805599453));
    float p = 1.9875691500e-4f;
    p = SAMPLER_MUL_F(p, r) + 1.3981999507e-3f;
    p = SAMPLER_MUL_F(p, r) + 8.3334519073e-3f;
    p = SAMPLER_MUL_F(p, r) + 4.1665795894e-2f;
    p = SAMPLER_MUL_F(p, r) + 1.6666665459e-1f;
    p = SAMPLER_MUL_F(p, r) + 5.0000001201e-1f;
    p = SAMPLER_MUL_F(p, SAMPLER_MUL_F(r, r)) + (r + 1.0f);
    return p * sampler_from_bits((uint32_t)(127 + n) << 23);
}

/* At most 2^40; the sum of any vocabulary fits. */
SAMPLER_FUNCTION uint64_t sampler_share(float weight)
{
    return (uint64_t)(weight * 0x1p40f);
}

/* What the shares of the set must reach: top_p of the total, in [1, total]. */
SAMPLER_FUNCTION uint64_t sampler_needed(double top_p, uint64_t total)
{
    double exact = top_p * (double)total;
    uint64_t needed = (uint64_t)exact;

    needed += (double)needed < exact;
    return needed < 1 ? 1 : needed < total ? needed : total;
}

/* Number `random` becomes a point in [0, total). */
SAMPLER_FUNCTION uint64_t sampler_point(uint64_t random, uint64_t total)
{
    random = random >> 11 << 11; /* 53 bits, as rng_unit_at */
#ifdef __CUDA_ARCH__
    return __umul64hi(random, total);
#else
    return (uint64_t)((unsigned __int128)random * total >> 64);
#endif
}

/* Which tokens may be chosen: those whose weight is larger than `lowest`, and of those that equal
 * it the `ties` with the lowest ids. Their shares add up to `kept`. lowest = 0, ties = 0: all. */
struct sampler_set {
    float lowest;
    uint64_t ties, kept;
};

/* The set that reaches `needed`, once the weight where that happens is known: `above` is the sum of
 * all shares of larger ones. */
SAMPLER_FUNCTION struct sampler_set sampler_set_of(float lowest, uint64_t above, uint64_t needed)
{
    struct sampler_set set;
    uint64_t share = sampler_share(lowest);

    set.lowest = lowest;
    set.ties = (needed - above + share - 1) / share;
    set.kept = above + set.ties * share;
    return set;
}

#endif
