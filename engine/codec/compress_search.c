/* The smallest file that keeps to a KL. Without distillation, which takes its time, the interval of
 * ratios is halved; what distillation then gains allows for a smaller file still. */
#include <math.h>

#include "engine/codec/compress_run.h"

#define SEARCH_STEPS 6     /* sizes that are tried for a KL */
#define SEARCH_LARGEST 4.0 /* ratio to the 16-bit base that a KL may cost at most */
#define SEARCH_SMALLEST 512.0
#define SEARCH_HOPE 3.0    /* times the KL asked for, from where distillation may get there */
#define SEARCH_DISTILLED 2 /* smaller sizes that are tried with distillation */
#define SEARCH_WORTH 1.1   /* times the ratio that holds: less is not tried for */

static int make_and_measure(struct compress_run *r, int64_t bytes, bool distilled, struct err *err)
{
    return compress_run_make(r, bytes, err) || compress_run_finish(r, distilled, err) ? -1 : 0;
}

static int make_plain(struct compress_run *r, double ratio, struct err *err)
{
    if (compress_run_make(r, compress_run_bytes(r, ratio), err) || compress_run_measure(r, err))
        return -1;
    kl_curve_add(&r->plain, ratio, r->report->measured_kl);
    return 0;
}

static bool holds(const struct compress_run *r)
{
    return r->report->measured_kl <= r->options->max_kl;
}

static int refuse(const struct compress_run *r, struct err *err)
{
    return err_set(err, ERR_INVALID,
                   "a KL of %g nats a token can not be kept to by %s: even the largest file that "
                   "is tried, 1/%.3g of the 16-bit model, costs %g",
                   r->options->max_kl, r->codec->name, r->report->ratio, r->report->measured_kl);
}

static double highest(const struct compress_run *r)
{
    return fmin(SEARCH_SMALLEST, compress_run_highest(r));
}

/* The highest of SEARCH_STEPS ratios, evenly spread in their logarithm, that keeps to the KL
 * without distillation: halving the interval, since a larger file costs less. 0: not even the
 * lowest does, but distillation may yet help. */
static int search(struct compress_run *r, double *ratio, struct err *err)
{
    double low = SEARCH_LARGEST, high = highest(r); /* low keeps to it */

    *ratio = 0;
    if (make_plain(r, low, err))
        return -1;
    if (!holds(r))
        return compress_run_distills(r) && r->report->measured_kl < SEARCH_HOPE * r->options->max_kl
                   ? 0
                   : refuse(r, err);
    for (int i = 0; i < SEARCH_STEPS && high > low; i++) {
        double middle = sqrt(low * high);

        if (make_plain(r, middle, err))
            return -1;
        if (holds(r))
            low = middle;
        else
            high = middle;
    }
    *ratio = low;
    return 0;
}

/* What distillation took from the KL at one ratio says how much it may be without it, and so how
 * high the ratio. */
static double expected(const struct compress_run *r, double ratio, double kl)
{
    double plain = kl_curve_kl(&r->plain, ratio) * r->options->max_kl / kl;

    return fmin(kl_curve_ratio(&r->plain, plain), highest(r));
}

/* Smaller than that ratio, since it is distilled. Where what was expected did not hold, half of the
 * way is tried. The smallest file that holds is kept. */
static int shrink(struct compress_run *r, double ratio, struct err *err)
{
    struct engine_delta_report best = *r->report;
    double low = ratio, next;

    if (r->plain.count == 0) /* nothing was lost at any size: the smallest is found */
        return 0;
    next = expected(r, low, best.measured_kl);
    for (int i = 0; i < SEARCH_DISTILLED && next > SEARCH_WORTH * low; i++) {
        if (make_and_measure(r, compress_run_bytes(r, next), true, err))
            return -1;
        if (!holds(r)) {
            next = sqrt(low * next);
            continue;
        }
        if (compress_run_keep(r, err))
            return -1;
        best = *r->report;
        low = next;
        next = expected(r, low, best.measured_kl);
    }
    best.distill_seconds = r->report->distill_seconds; /* of all that was tried */
    best.measure_seconds = r->report->measure_seconds;
    best.tried = r->report->tried;
    *r->report = best;
    return 0;
}

int compress_search(struct compress_run *r, struct err *err)
{
    double found = 0, ratio;

    if (search(r, &found, err))
        return -1;
    ratio = found > 0 ? found : SEARCH_LARGEST;
    if (make_and_measure(r, compress_run_bytes(r, ratio), true, err))
        return -1;
    if (!holds(r) && found == 0)
        return refuse(r, err);
    /* What helps on the rows it is distilled on may harm on those it is measured on. */
    if (!holds(r) && make_and_measure(r, compress_run_bytes(r, ratio), false, err))
        return -1;
    if (compress_run_keep(r, err))
        return -1;
    return r->report->distill_steps > 0 && r->codec->ratio > 0 ? shrink(r, ratio, err) : 0;
}
