#include "engine/codec/budget.h"

#include <stdlib.h>

struct plans {
    struct codec_plan *plan; /* [count] of the matrices that changed */
    int32_t count;
    uint8_t *width; /* behind all of them */
    double *energy;
};

static int32_t rank_of(const struct artifact_tensor *t)
{
    return t->rows < t->cols ? t->rows : t->cols;
}

static int open_plans(const struct artifact_content *c, struct plans *p, struct err *err)
{
    size_t longest = 1;

    for (int32_t i = 0; i < c->source->count; i++) {
        p->count += artifact_is_matrix(c, i);
        if (artifact_is_matrix(c, i) && (size_t)rank_of(&c->source->tensor[i]) > longest)
            longest = (size_t)rank_of(&c->source->tensor[i]);
    }
    p->plan = calloc((size_t)p->count + 1, sizeof *p->plan);
    p->width = calloc(longest, 1);
    p->energy = calloc(longest, sizeof *p->energy);
    if (!p->plan || !p->width || !p->energy)
        return err_set(err, ERR_NO_MEMORY, "no memory to plan %d matrices", p->count);
    for (int32_t i = 0, at = 0; i < c->source->count; i++) {
        const struct artifact_tensor *t = &c->source->tensor[i];

        if (artifact_is_matrix(c, i)) /* the smallest plan is the same, whatever there is to lose */
            p->plan[at++] = (struct codec_plan){.rows = t->rows,
                                                .cols = t->cols,
                                                .rank = rank_of(t),
                                                .energy = p->energy,
                                                .width = p->width};
    }
    return 0;
}

/* *why: what the codec says of nothing at all. */
static int measure(const struct artifact_content *c, size_t report_len, struct budget *out,
                   struct err *why, struct err *err)
{
    struct plans p = {0};
    double cost;
    int rc = open_plans(c, &p, err);

    out->overhead = out->least = artifact_overhead(c, report_len);
    if (!rc && c->codec->allot(p.plan, p.count, 0, &cost, why) && why->kind != ERR_INVALID) {
        if (err)
            *err = *why;
        rc = -1;
    }
    for (int32_t i = 0; !rc && i < p.count; i++)
        out->least += p.plan[i].bytes;
    free(p.plan);
    free(p.width);
    free(p.energy);
    return rc;
}

int budget_measure(const struct artifact_content *content, size_t report_len, struct budget *out,
                   struct err *err)
{
    struct err why = {0};

    return measure(content, report_len, out, &why, err);
}

int budget_check(const struct artifact_content *content, size_t report_len, int64_t bytes,
                 struct err *err)
{
    struct budget b;
    struct err why = {0};

    if (measure(content, report_len, &b, &why, err))
        return -1;
    if (bytes >= b.least)
        return 0;
    err_set(&why, ERR_INVALID, "ask for a lower ratio");
    if (err)
        *err = why;
    return err_prefix(err,
                      "a delta of %lld bytes is too small: it takes at least %lld, of which %lld "
                      "are names, report, norms and embeddings that changed",
                      (long long)bytes, (long long)b.least, (long long)b.overhead);
}
