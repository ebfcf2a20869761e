/* kl_curve.h: what a compression costs at sizes that were not tried, from those that were: straight
 * lines in the logarithms of ratio and KL. Pure. */
#ifndef GRAFT_CODEC_KL_CURVE_H
#define GRAFT_CODEC_KL_CURVE_H

#include <stdint.h>

#define KL_CURVE_MAX 16

struct kl_curve { /* zeroed: nothing was tried */
    int32_t count;
    double ratio[KL_CURVE_MAX]; /* ascending, all different */
    double kl[KL_CURVE_MAX];
};

/* Positive numbers; what has no room any more, or is there already, is left out. */
void kl_curve_add(struct kl_curve *curve, double ratio, double kl);
/* What a ratio is expected to cost, and the ratio that is expected to cost so much. Beyond what was
 * tried the curve goes on as it does at its end; with one point alone it is taken to be a square.
 * At least one was tried. */
double kl_curve_kl(const struct kl_curve *curve, double ratio);
double kl_curve_ratio(const struct kl_curve *curve, double kl);

#endif
