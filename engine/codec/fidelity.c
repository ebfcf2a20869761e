#include "engine/codec/fidelity.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/adapter.h"
#include "engine/base/progress.h"
#include "engine/engine_parts.h"

#define PORTION 256 /* rows of a pass: longer examples take more than one */

struct measuring {
    const struct fidelity_args *args;
    struct model_decoder *decoder;
    struct kv_cache served_past, exact_past; /* of one example */
    int32_t max_rows, vocabulary;
    int32_t *position, *row;
    float *served, *exact; /* [max_rows, vocabulary] logits */
    double kl, answer_kl, loss, tuned_loss;
    int64_t tokens, answer_tokens;
};

/* Of those that are measured. */
static int32_t longest_of(const struct trainer_source *examples, int64_t stride)
{
    int32_t longest = 1;

    for (int64_t i = 0; i < examples->count; i += stride) {
        struct dataset_example e = examples->example(examples->context, i);

        longest = e.length > longest ? e.length : longest;
    }
    return longest;
}

static int open_measuring(struct measuring *m, int64_t stride, struct err *err)
{
    const struct model *model = m->args->engine->model;
    int32_t longest = longest_of(m->args->examples, stride);
    size_t rows, logits;

    m->vocabulary = model_get_config(model)->vocabulary;
    m->max_rows = longest < PORTION ? longest : PORTION;
    rows = (size_t)m->max_rows;
    logits = rows * (size_t)m->vocabulary;

    m->position = malloc(rows * sizeof *m->position);
    m->row = malloc(rows * sizeof *m->row);
    m->served = malloc(logits * sizeof *m->served);
    m->exact = malloc(logits * sizeof *m->exact);
    if (!m->position || !m->row || !m->served || !m->exact)
        return err_set(err, ERR_NO_MEMORY, "no memory to measure a delta on %d rows", m->max_rows);
    for (int32_t i = 0; i < m->max_rows; i++)
        m->row[i] = i;
    if (model_kv_cache_open(&m->served_past, model, 1, longest, err) ||
        (m->args->tuned && model_kv_cache_open(&m->exact_past, model, 1, longest, err)))
        return -1;
    return model_decoder_open(&m->decoder, m->args->engine->model, m->max_rows, m->max_rows, err);
}

static void close_measuring(struct measuring *m)
{
    model_decoder_free(m->decoder);
    model_kv_cache_close(&m->served_past, m->args->engine->model);
    model_kv_cache_close(&m->exact_past, m->args->engine->model);
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

static double kl_of(const float *exact, double exact_sum, const float *served, double served_sum,
                    int32_t count)
{
    double kl = 0;

    for (int32_t i = 0; i < count; i++) {
        double log_p = (double)exact[i] - exact_sum;

        if (log_p <= -40) /* e^-40 of anything is nothing; what is no number is not skipped */
            continue;
        kl += exp(log_p) * (log_p - ((double)served[i] - served_sum));
    }
    return kl;
}

static void add_row(struct measuring *m, int64_t row, int32_t next, bool answer)
{
    const float *served = m->served + row * m->vocabulary, *exact = m->exact + row * m->vocabulary;
    bool tuned = m->args->tuned != NULL;
    double a = tuned ? log_sum(exact, m->vocabulary) : 0, kl = 0, b = 0;

    m->tokens++;
    if (tuned || answer)
        b = log_sum(served, m->vocabulary);
    if (tuned)
        kl = kl_of(exact, a, served, b, m->vocabulary);
    m->kl += kl;
    if (!answer)
        return;
    m->answer_kl += kl;
    m->loss += b - (double)served[next];
    m->tuned_loss += tuned ? a - (double)exact[next] : 0;
    m->answer_tokens++;
}

/* Rows [from, from + rows) of an example, whose rows before lie in the caches. */
static int add_portion(struct measuring *m, const struct dataset_example *e, int32_t from,
                       int32_t rows, struct err *err)
{
    const int32_t ends[2] = {0, rows};
    const struct batch_slot slot = {.past = from};
    const struct adapter *adapter = engine_delta_adapter(m->args->delta);
    struct batch batch = {.rows = rows,
                          .token = e->token + from,
                          .position = m->position,
                          .docs = 1,
                          .cu_seqlens = ends,
                          .slot = &slot};
    struct model_decode_args args = {.weights = m->args->tuned,
                                     .batch = &batch,
                                     .cache = &m->exact_past,
                                     .logit_row = m->row,
                                     .logit_count = rows,
                                     .logits = m->exact};

    for (int32_t i = 0; i < rows; i++)
        m->position[i] = from + i;
    if (m->args->tuned && model_decode(m->decoder, &args, err))
        return -1;
    if (!m->args->other)
        batch.segments = (struct row_segments){.count = 1, .start = ends, .adapter = &adapter};
    args.weights = m->args->other;
    args.cache = &m->served_past;
    args.logits = m->served;
    if (model_decode(m->decoder, &args, err))
        return -1;
    for (int32_t i = 0; i < rows; i++)
        add_row(m, i, e->token[from + i + 1], e->weight[from + i + 1] > 0);
    progress_tick();
    return 0;
}

static int add_example(struct measuring *m, const struct dataset_example *e, struct err *err)
{
    for (int32_t from = 0, rows = e->length - 1; from < rows; from += m->max_rows) {
        int32_t left = rows - from;

        if (add_portion(m, e, from, left < m->max_rows ? left : m->max_rows, err))
            return -1;
    }
    return 0;
}

/* Examples at a stride that makes about max_tokens of them. */
static int64_t stride_of(const struct measuring *m)
{
    const struct trainer_source *examples = m->args->examples;
    int64_t tokens = 0, most = m->args->max_tokens;

    for (int64_t i = 0; i < examples->count; i++) {
        struct dataset_example e = examples->example(examples->context, i);

        tokens += e.length;
    }
    return most > 0 ? (tokens + most - 1) / most : 1;
}

/* A mean that rounding alone can take below zero. What is no number stays none. */
static double mean_kl(double sum, double count)
{
    if (count <= 0)
        return NAN;
    return sum < 0 ? 0 : sum / count;
}

static void conclude(const struct measuring *m, struct fidelity *out)
{
    bool tuned = m->args->tuned != NULL;
    double tokens = (double)m->tokens, answers = (double)m->answer_tokens;

    *out = (struct fidelity){.kl = tuned ? mean_kl(m->kl, tokens) : NAN,
                             .answer_kl = tuned ? mean_kl(m->answer_kl, answers) : NAN,
                             .loss = answers > 0 ? m->loss / answers : NAN,
                             .tuned_loss = tuned && answers > 0 ? m->tuned_loss / answers : NAN,
                             .tokens = m->tokens,
                             .answer_tokens = m->answer_tokens};
}

int fidelity_measure(struct fidelity *out, const struct fidelity_args *args, struct err *err)
{
    struct measuring m = {.args = args};
    int64_t stride = stride_of(&m);
    int rc = open_measuring(&m, stride, err);

    for (int64_t i = 0; !rc && i < args->examples->count; i += stride) {
        struct dataset_example e = args->examples->example(args->examples->context, i);

        if (add_example(&m, &e, err))
            rc = -1;
        else
            rc = stage_tell(&args->listener, "measure",
                            (double)(i + 1) / (double)args->examples->count, err);
    }
    close_measuring(&m);
    conclude(&m, out);
    return rc;
}
