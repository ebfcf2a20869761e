#include "engine/codec/fidelity.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/adapter.h"
#include "engine/base/progress.h"
#include "engine/engine_parts.h"

struct measuring {
    struct engine *engine;
    const struct model_weights *tuned;
    const struct engine_delta *delta;
    struct model_decoder *decoder;
    int32_t max_rows, vocabulary;
    int32_t *position, *row;
    float *served, *exact; /* [max_rows, vocabulary] logits */
    double kl, answer_kl, loss, tuned_loss;
    int64_t tokens, answer_tokens;
};

static int open_measuring(struct measuring *m, struct err *err)
{
    size_t rows = (size_t)m->max_rows, logits = rows * (size_t)m->vocabulary;

    m->position = malloc(rows * sizeof *m->position);
    m->row = malloc(rows * sizeof *m->row);
    m->served = malloc(logits * sizeof *m->served);
    m->exact = malloc(logits * sizeof *m->exact);
    if (!m->position || !m->row || !m->served || !m->exact)
        return err_set(err, ERR_NO_MEMORY, "no memory to measure a delta on %d rows", m->max_rows);
    for (int32_t i = 0; i < m->max_rows; i++)
        m->position[i] = m->row[i] = i;
    return model_decoder_open(&m->decoder, m->engine->model, m->max_rows, m->max_rows, err);
}

static void close_measuring(struct measuring *m)
{
    model_decoder_free(m->decoder);
    free(m->position);
    free(m->row);
    free(m->served);
    free(m->exact);
}

static double log_sum(const float *logit, int32_t count)
{
    float best = logit[0];
    double sum = 0;

    for (int32_t i = 1; i < count; i++)
        best = logit[i] > best ? logit[i] : best;
    for (int32_t i = 0; i < count; i++)
        sum += (double)expf(logit[i] - best);
    return (double)best + log(sum);
}

static void add_row(struct measuring *m, const float *served, const float *exact, int32_t next,
                    bool answer)
{
    double a = log_sum(exact, m->vocabulary), b = log_sum(served, m->vocabulary), kl = 0;

    for (int32_t i = 0; i < m->vocabulary; i++) {
        double log_p = (double)exact[i] - a;

        if (log_p > -40) /* e^-40 of anything is nothing */
            kl += exp(log_p) * (log_p - ((double)served[i] - b));
    }
    m->kl += kl;
    m->tokens++;
    if (!answer)
        return;
    m->answer_kl += kl;
    m->loss += b - (double)served[next];
    m->tuned_loss += a - (double)exact[next];
    m->answer_tokens++;
}

static int add_example(struct measuring *m, const struct dataset_example *e, struct err *err)
{
    int32_t rows = e->length - 1 < m->max_rows ? e->length - 1 : m->max_rows;
    const int32_t ends[2] = {0, rows};
    const struct adapter *adapter = engine_delta_adapter(m->delta);
    struct batch batch = {
        .rows = rows, .token = e->token, .position = m->position, .docs = 1, .cu_seqlens = ends};
    struct model_decode_args args = {
        .batch = &batch, .logit_row = m->row, .logit_count = rows, .logits = m->exact};

    if (rows < 1)
        return 0;
    args.weights = m->tuned;
    if (model_decode(m->decoder, &args, err))
        return -1;
    batch.segments = (struct row_segments){.count = 1, .start = ends, .adapter = &adapter};
    args.weights = NULL;
    args.logits = m->served;
    if (model_decode(m->decoder, &args, err))
        return -1;
    for (int64_t i = 0; i < rows; i++)
        add_row(m, m->served + i * m->vocabulary, m->exact + i * m->vocabulary, e->token[i + 1],
                e->weight[i + 1] > 0);
    progress_tick();
    return 0;
}

/* Examples at a stride that makes about FIDELITY_TOKENS of them. */
static int64_t stride_of(const struct trainer_source *examples)
{
    int64_t tokens = 0;

    for (int64_t i = 0; i < examples->count; i++) {
        struct dataset_example e = examples->example(examples->context, i);

        tokens += e.length < FIDELITY_ROWS ? e.length : FIDELITY_ROWS;
    }
    return (tokens + FIDELITY_TOKENS - 1) / FIDELITY_TOKENS;
}

int fidelity_measure(struct fidelity *out, struct engine *engine, const struct model_weights *tuned,
                     const struct engine_delta *delta, const struct trainer_source *examples,
                     struct err *err)
{
    struct measuring m = {.engine = engine,
                          .tuned = tuned,
                          .delta = delta,
                          .max_rows = FIDELITY_ROWS,
                          .vocabulary = model_get_config(engine->model)->vocabulary};
    int64_t stride = stride_of(examples);
    int rc = open_measuring(&m, err);

    for (int64_t i = 0; !rc && i < examples->count; i += stride) {
        struct dataset_example e = examples->example(examples->context, i);

        rc = add_example(&m, &e, err);
    }
    close_measuring(&m);
    *out = (struct fidelity){.kl = m.tokens ? m.kl / (double)m.tokens : NAN,
                             .answer_kl = NAN,
                             .loss = NAN,
                             .tuned_loss = NAN,
                             .tokens = m.tokens,
                             .answer_tokens = m.answer_tokens};
    if (m.answer_tokens > 0) {
        out->answer_kl = m.answer_kl / (double)m.answer_tokens;
        out->loss = m.loss / (double)m.answer_tokens;
        out->tuned_loss = m.tuned_loss / (double)m.answer_tokens;
    }
    return rc;
}
