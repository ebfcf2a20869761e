#include "engine/codec/calibration.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/rng.h"
#include "engine/model_moments.h"

#define STREAM_EXAMPLES 4 /* of random numbers: which examples */

struct pick { /* an example, or its beginning */
    int32_t example;
    int32_t rows; /* those that have a next token, one at least */
};

struct measuring {
    const struct trainer_source *examples;
    const struct model_weights *tuned;
    const struct calibration_options *options;
    struct pick *pick;
    int32_t count;      /* of picks */
    int32_t longest;    /* rows of one */
    int64_t rows, done; /* of the picks; so far */

    struct model_moments_pass *pass;
    struct model_moments *moments; /* by index of a tensor */
    struct batch batch;
    int32_t max_rows;
    int32_t *token, *position, *cu_seqlens;
    float *margin;
};

/* ------------------------------------------------------------------ which examples */

static int64_t most_tokens(const struct calibration_options *o, const struct model_config *c)
{
    int64_t tokens = CALIBRATION_TOKENS, widest = 2 * (int64_t)c->intermediate;

    if (o->inputs_only && widest < tokens)
        tokens = widest > CALIBRATION_TOKENS_INPUTS ? widest : CALIBRATION_TOKENS_INPUTS;
    return tokens;
}

static int pick_examples(struct measuring *m, const struct model *model, struct err *err)
{
    int64_t count = m->examples->count, left = most_tokens(m->options, model_get_config(model));
    int32_t *order;

    if (count < 1 || count > INT32_MAX)
        return err_set(err, ERR_INVALID, "%lld examples to calibrate with", (long long)count);
    order = malloc((size_t)count * sizeof *order);
    m->pick = malloc((size_t)count * sizeof *m->pick);
    if (!order || !m->pick) {
        free(order);
        return err_set(err, ERR_NO_MEMORY, "no memory for %lld examples", (long long)count);
    }
    rng_permutation(order, (int32_t)count, (uint64_t)m->options->seed, STREAM_EXAMPLES);
    for (int64_t i = 0; i < count && left > 0; i++) {
        struct dataset_example e = m->examples->example(m->examples->context, order[i]);
        int32_t rows = e.length > 1 ? e.length - 1 : 1;

        rows = rows < left ? rows : (int32_t)left;
        m->pick[m->count++] = (struct pick){order[i], rows};
        m->longest = rows > m->longest ? rows : m->longest;
        m->rows += rows;
        left -= rows;
    }
    free(order);
    return m->rows > 0 ? 0 : err_set(err, ERR_INVALID, "the examples to calibrate with are empty");
}

/* ------------------------------------------------------------------ memory */

/* Tokens of a micro-batch: on a device as many as an eighth of its memory has room for. */
static int32_t usual_rows(const struct model *model)
{
    struct backend *b = model_backend(model);
    int32_t rows = CALIBRATION_ROWS_DEVICE;
    int64_t bytes, unused;

    if (!b->ops->memory)
        return CALIBRATION_ROWS;
    b->ops->memory(b, &bytes, &unused);
    while (rows > CALIBRATION_ROWS &&
           model_training_bytes(b, model_get_config(model), rows, false) > bytes / 8)
        rows /= 2;
    return rows;
}

static int open_batch(struct measuring *m, const struct model *model, struct err *err)
{
    int32_t usual = usual_rows(model);
    size_t rows;

    m->max_rows = m->rows < usual ? (int32_t)m->rows : usual;
    m->max_rows = m->longest > m->max_rows ? m->longest : m->max_rows;
    rows = (size_t)m->max_rows;
    m->token = malloc(rows * sizeof *m->token);
    m->position = malloc(rows * sizeof *m->position);
    m->cu_seqlens = malloc((rows + 1) * sizeof *m->cu_seqlens);
    m->margin = malloc(rows * sizeof *m->margin);
    if (!m->token || !m->position || !m->cu_seqlens || !m->margin)
        return err_set(err, ERR_NO_MEMORY, "no memory for batches of %d tokens", m->max_rows);
    m->cu_seqlens[0] = 0;
    m->batch =
        (struct batch){.token = m->token, .position = m->position, .cu_seqlens = m->cu_seqlens};
    return 0;
}

static float *square(int64_t n, int64_t *bytes)
{
    *bytes = n * n * (int64_t)sizeof(float);
    return calloc((size_t)(n * n), sizeof(float));
}

/* Zeroed sums in `out`, and views of them in the moments. */
static int open_sums(struct measuring *m, struct calibration *out, const struct model *model,
                     struct err *err)
{
    struct model_weights shapes;
    char name[MODEL_NAME_MAX];
    int rc = -1;

    out->count = model_tensor_count(model);
    out->h = calloc((size_t)out->count, sizeof *out->h);
    out->g = calloc((size_t)out->count, sizeof *out->g);
    m->moments = calloc((size_t)out->count, sizeof *m->moments);
    if (!out->h || !out->g || !m->moments)
        return err_set(err, ERR_NO_MEMORY, "no memory for statistics");
    if (model_weights_alloc(&shapes, model, err))
        return -1;
    for (int32_t i = 0; i < out->count; i++) {
        const struct tensor *t = model_tensor(model, &shapes, i, name);
        int64_t bytes[2] = {0, 0};

        if (!model_tensor_is_linear(model, i))
            continue;
        if (m->options->inputs_only && model_moments_reads(model, i) != i) {
            out->h[i] = out->h[model_moments_reads(model, i)];
            continue;
        }
        m->moments[i].h = out->h[i] = square(t->shape[1], &bytes[0]);
        if (!m->options->inputs_only)
            m->moments[i].g = out->g[i] = square(t->shape[0], &bytes[1]);
        if (!out->h[i] || (!out->g[i] && !m->options->inputs_only)) {
            err_set(err, ERR_NO_MEMORY, "no memory for the statistics of %s: %lld bytes", name,
                    (long long)(bytes[0] + bytes[1]));
            goto out;
        }
    }
    rc = 0;
out:
    model_weights_release(&shapes);
    return rc;
}

void calibration_free(struct calibration *c)
{
    for (int32_t i = 0; i < c->count; i++) {
        if (c->h && c->h[i]) {
            for (int32_t k = i + 1; k < c->count; k++) /* the same sums again */
                c->h[k] = c->h[k] == c->h[i] ? NULL : c->h[k];
            free(c->h[i]);
        }
        if (c->g)
            free(c->g[i]);
    }
    free(c->h);
    free(c->g);
    memset(c, 0, sizeof *c);
}

static void close_measuring(struct measuring *m)
{
    model_moments_free(m->pass);
    free(m->margin);
    free(m->cu_seqlens);
    free(m->position);
    free(m->token);
    free(m->moments);
    free(m->pick);
}

/* ------------------------------------------------------------------ passes */

static int tell_share(void *context, double share, struct err *err)
{
    const struct measuring *m = context;
    double done = (double)m->done + share * m->batch.rows;

    return stage_tell(&m->options->listener, "statistics", done / (double)m->rows, err);
}

/* The batch as it is. */
static int flush(struct measuring *m, struct err *err)
{
    struct model_moments_args args = {
        .weights = m->tuned,
        .batch = &m->batch,
        .margin = m->options->margin > 0 ? m->margin : NULL,
        .seed = (uint64_t)m->options->seed,
        .first = (uint64_t)m->done,
        .inputs_only = m->options->inputs_only,
        .step = tell_share,
        .context = m,
    };

    if (m->batch.rows == 0)
        return 0;
    if (model_moments_add(m->pass, &args, m->moments, NULL, err))
        return -1;
    m->done += m->batch.rows;
    m->batch.rows = m->batch.docs = 0;
    return 0;
}

static void add_example(struct measuring *m, const struct pick *pick)
{
    struct dataset_example e = m->examples->example(m->examples->context, pick->example);
    int32_t at = m->batch.rows;

    memcpy(m->token + at, e.token, (size_t)pick->rows * sizeof *m->token);
    for (int32_t i = 0; i < pick->rows; i++) {
        m->position[at + i] = i;
        m->margin[at + i] = i + 1 < e.length && e.weight[i + 1] > 0 ? (float)m->options->margin : 0;
    }
    m->batch.rows = at + pick->rows;
    m->cu_seqlens[++m->batch.docs] = m->batch.rows;
}

/* Documents back to back. */
static int run_pass(struct measuring *m, struct err *err)
{
    for (int32_t i = 0; i < m->count; i++) {
        if (m->batch.rows + m->pick[i].rows > m->max_rows && flush(m, err))
            return -1;
        add_example(m, &m->pick[i]);
    }
    return flush(m, err);
}

/* False: not finite. */
static bool scale(float *sum, int64_t n, double divisor)
{
    double factor = divisor > 0 ? 1 / divisor : 0;
    bool finite = isfinite(divisor);

    for (int64_t i = 0; i < n; i++)
        for (int64_t j = i; j < n; j++)
            sum[i * n + j] = (float)((double)sum[i * n + j] * factor);
    model_moments_mirror(sum, n);
    for (int64_t i = 0; i < n; i++)
        finite = finite && isfinite(sum[i * n + i]);
    return finite;
}

/* Sums become means. */
static int finish(const struct measuring *m, struct calibration *out, const struct model *model,
                  struct err *err)
{
    struct model_weights shapes;
    char name[MODEL_NAME_MAX];
    int rc = 0;

    out->tokens = m->rows;
    if (model_weights_alloc(&shapes, model, err))
        return -1;
    for (int32_t i = 0; i < out->count && !rc; i++) {
        const struct tensor *t = model_tensor(model, &shapes, i, name);

        if (m->moments[i].h && !scale(out->h[i], t->shape[1], m->moments[i].weight))
            rc = err_set(err, ERR_INVALID, "what %s takes is not finite, or its gradients", name);
        else if (m->moments[i].g && !scale(out->g[i], t->shape[0], (double)m->rows))
            rc = err_set(err, ERR_INVALID, "the gradients at %s are not finite", name);
    }
    model_weights_release(&shapes);
    return rc;
}

int calibration_measure(struct calibration *out, struct model *model,
                        const struct model_weights *tuned, const struct trainer_source *examples,
                        const struct calibration_options *options, struct err *err)
{
    struct measuring m = {
        .examples = examples,
        .tuned = tuned,
        .options = options,
    };
    int rc = -1;

    assert(options->margin >= 0 && isfinite(options->margin));
    memset(out, 0, sizeof *out);
    if (pick_examples(&m, model, err) || open_batch(&m, model, err) ||
        open_sums(&m, out, model, err) || model_moments_open(&m.pass, model, m.max_rows, err))
        goto out;
    if (!run_pass(&m, err))
        rc = finish(&m, out, model, err);
out:
    if (rc)
        calibration_free(out);
    close_measuring(&m);
    return rc;
}
