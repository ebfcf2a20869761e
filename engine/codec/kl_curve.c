#include "engine/codec/kl_curve.h"

#include <assert.h>
#include <math.h>

void kl_curve_add(struct kl_curve *c, double ratio, double kl)
{
    int32_t at = c->count;

    if (c->count == KL_CURVE_MAX || !(ratio > 0) || !(kl > 0) || !isfinite(kl))
        return;
    for (int32_t i = 0; i < c->count; i++)
        if (c->ratio[i] == ratio)
            return;
    for (; at > 0 && c->ratio[at - 1] > ratio; at--) {
        c->ratio[at] = c->ratio[at - 1];
        c->kl[at] = c->kl[at - 1];
    }
    c->ratio[at] = ratio;
    c->kl[at] = kl;
    c->count++;
}

/* Of the stretch that begins with point `below`, or ends the curve. */
static double slope_at(const struct kl_curve *c, int32_t below)
{
    int32_t left = below < c->count - 1 ? below : below - 1;
    double slope = 2;

    if (c->count > 1)
        slope = log(c->kl[left + 1] / c->kl[left]) / log(c->ratio[left + 1] / c->ratio[left]);
    /* Measured on few rows, a smaller file may happen to cost less: that says nothing. */
    return slope > 0.5 ? slope : 0.5;
}

/* The last point that is no higher, or the first there is. */
static int32_t below(const double *value, int32_t count, double wanted)
{
    int32_t found = 0;

    for (int32_t i = 0; i < count; i++)
        if (value[i] <= wanted)
            found = i;
    return found;
}

double kl_curve_kl(const struct kl_curve *c, double ratio)
{
    int32_t at = below(c->ratio, c->count, ratio);

    assert(c->count > 0);
    return c->kl[at] * pow(ratio / c->ratio[at], slope_at(c, at));
}

double kl_curve_ratio(const struct kl_curve *c, double kl)
{
    int32_t at = below(c->kl, c->count, kl);

    assert(c->count > 0);
    return c->ratio[at] * pow(kl / c->kl[at], 1 / slope_at(c, at));
}
