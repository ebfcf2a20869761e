#include "engine/codec/distill.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/progress.h"
#include "engine/base_file.h"
#include "engine/codec/distill_batch.h"
#include "engine/codec/lessons.h"
#include "engine/engine_parts.h"

#define PORTION (1 << 18) /* floats of zeros */

struct student_matrix {
    int32_t index, rows, cols;
    struct tensor *parts;
    void *weight;         /* base + difference, as stages read it, in the backend's memory */
    float *gradient;      /* the same */
    int32_t count;        /* of scales */
    float *scale, *slope; /* [count] */
    /* [count + 1] Adam's moments of log scale; the last of the factor they have in common */
    float *first, *second;
};

struct student {
    struct engine *engine;
    const struct codec *codec;
    const struct distill_options *options;
    const struct model_weights *tuned;
    struct model_weights weights, grads;
    struct student_matrix *matrix; /* [matrices] */
    int32_t matrices;
    struct model_training *pass;
    struct distill_batches batches;
    char *given; /* [rows] what the teacher gave for the batch */
    struct lessons lessons;
    float pace; /* of the rates' size; the first step finds it */
    float *zeros;
    float **work;       /* [threads] the largest matrix */
    struct err *errors; /* [threads] */
};

static struct tensor *tensor_at(const struct student *s, struct model_weights *weights,
                                int32_t index)
{
    char name[MODEL_NAME_MAX];

    return model_tensor(s->engine->model, weights, index, name);
}

/* ------------------------------------------------------------------ open, close */

static int open_matrix(struct student *s, struct student_matrix *m, struct err *err)
{
    struct backend *b = s->engine->backend;
    size_t count = (size_t)m->rows * (size_t)m->cols, scales;
    const int64_t shape[2] = {m->rows, m->cols};

    m->count = s->codec->scales(m->parts, m->rows, m->cols);
    scales = ((size_t)m->count + 1) * sizeof(float);
    m->scale = calloc(1, scales);
    m->first = calloc(1, scales);
    m->second = calloc(1, scales);
    m->slope = calloc(1, scales);
    if (!m->scale || !m->first || !m->second || !m->slope)
        return err_set(err, ERR_NO_MEMORY, "no memory for %d scales", m->count);
    m->weight = b->ops->alloc(b, count * (size_t)dtype_size(b->activation), err);
    if (!m->weight)
        return -1;
    m->gradient = b->ops->alloc(b, count * sizeof(float), err);
    if (!m->gradient)
        return -1;
    s->codec->read_scales(m->parts, m->rows, m->cols, m->scale);
    *tensor_at(s, &s->weights, m->index) = tensor_view(m->weight, b->activation, 2, shape);
    *tensor_at(s, &s->grads, m->index) = tensor_view(m->gradient, DTYPE_F32, 2, shape);
    return 0;
}

/* The tuned model, but for the matrices that are compressed. */
static int open_weights(struct student *s, const struct compression *compression, struct err *err)
{
    struct model *model = s->engine->model;
    int32_t count = model_tensor_count(model);

    if (model_weights_alloc(&s->weights, model, err) || model_weights_alloc(&s->grads, model, err))
        return -1;
    s->matrix = calloc((size_t)count, sizeof *s->matrix);
    if (!s->matrix)
        return err_set(err, ERR_NO_MEMORY, "no memory for %d matrices", count);
    for (int32_t i = 0; i < count; i++) {
        struct tensor *w = tensor_at(s, &s->weights, i);
        struct student_matrix *m = &s->matrix[s->matrices];

        *w = *tensor_at(s, (struct model_weights *)(uintptr_t)s->tuned, i);
        if (!compression_parts(compression, i))
            continue;
        *m = (struct student_matrix){.index = i,
                                     .rows = (int32_t)w->shape[0],
                                     .cols = (int32_t)w->shape[1],
                                     .parts = compression_parts(compression, i)};
        s->matrices++;
        if (open_matrix(s, m, err))
            return -1;
    }
    s->weights.head = s->tuned->head; /* tied or not */
    return 0;
}

/* What a teacher gives for a token. */
static size_t row_bytes(const struct student *s)
{
    return (size_t)model_get_config(s->engine->model)->hidden *
           (size_t)dtype_size(s->engine->backend->activation);
}

static int open_work(struct student *s, struct err *err)
{
    size_t largest = 1;
    int threads = thread_pool_threads(s->options->pool);

    for (int32_t i = 0; i < s->matrices; i++) {
        size_t size = (size_t)s->matrix[i].rows * (size_t)s->matrix[i].cols;

        largest = size > largest ? size : largest;
    }
    s->given = malloc(DISTILL_ROWS * row_bytes(s));
    s->zeros = calloc(PORTION, sizeof *s->zeros);
    s->work = calloc((size_t)threads, sizeof *s->work);
    s->errors = calloc((size_t)threads, sizeof *s->errors);
    if (!s->given || !s->zeros || !s->work || !s->errors)
        return err_set(err, ERR_NO_MEMORY, "no memory to distil");
    for (int i = 0; i < threads; i++) {
        s->work[i] = malloc(2 * largest * sizeof(float));
        if (!s->work[i])
            return err_set(err, ERR_NO_MEMORY, "no memory to distil");
    }
    return model_training_open(&s->pass, s->engine->model, DISTILL_ROWS, true, err);
}

static void close_student(struct student *s)
{
    struct backend *b = s->engine->backend;

    for (int32_t i = 0; i < s->matrices; i++) {
        struct student_matrix *m = &s->matrix[i];

        if (m->weight)
            b->ops->free(b, m->weight);
        if (m->gradient)
            b->ops->free(b, m->gradient);
        free(m->scale);
        free(m->first);
        free(m->second);
        free(m->slope);
    }
    for (int i = 0; s->work && i < thread_pool_threads(s->options->pool); i++)
        free(s->work[i]);
    model_training_free(s->pass);
    model_weights_release(&s->weights);
    model_weights_release(&s->grads);
    free(s->matrix);
    distill_batches_close(&s->batches);
    lessons_close(&s->lessons);
    free(s->given);
    free(s->zeros);
    free(s->work);
    free(s->errors);
}

/* ------------------------------------------------------------------ one step */

/* Some neighbouring matrices at a time, one for each thread. */
struct wave {
    struct student *s;
    int32_t first;
};

static void make_weight(void *context, int64_t task, int worker)
{
    struct wave *wave = context;
    struct student *s = wave->s;
    struct student_matrix *m = &s->matrix[wave->first + task];
    int64_t count = (int64_t)m->rows * m->cols;
    float *difference = s->work[task], *base = difference + count;
    char name[MODEL_NAME_MAX];
    struct tensor host;

    model_tensor(s->engine->model, &s->weights, m->index, name);
    s->codec->write_scales(m->parts, m->rows, m->cols, m->scale);
    base_file_tensor(s->engine->base, name, &host);
    if (s->codec->expand(m->parts, m->rows, m->cols, difference, &s->errors[task]))
        return;
    tensor_to_f32(&host, 0, count, base);
    if (s->engine->backend->activation == DTYPE_BF16) {
        uint16_t *half = (uint16_t *)(void *)base;

        for (int64_t i = 0; i < count; i++)
            half[i] = f32_to_bf16(base[i] + difference[i]);
        return;
    }
    for (int64_t i = 0; i < count; i++)
        base[i] += difference[i];
}

static void make_slope(void *context, int64_t task, int worker)
{
    struct wave *wave = context;
    struct student *s = wave->s;
    struct student_matrix *m = &s->matrix[wave->first + task];

    (void)s->codec->slope(m->parts, m->rows, m->cols, s->work[task], m->slope, &s->errors[task]);
}

static int wave_error(const struct student *s, int32_t count, struct err *err)
{
    for (int32_t i = 0; i < count; i++) {
        if (s->errors[i].kind == ERR_NONE)
            continue;
        if (err)
            *err = s->errors[i];
        return -1;
    }
    return 0;
}

/* Base and difference, with the scales as they are now, to the student; its gradients to zero. */
static int put_weights(struct student *s, struct err *err)
{
    struct backend *b = s->engine->backend;
    int32_t threads = thread_pool_threads(s->options->pool);

    for (int32_t at = 0; at < s->matrices; at += threads) {
        int32_t count = s->matrices - at < threads ? s->matrices - at : threads;

        thread_pool_run(s->options->pool, count, make_weight, &(struct wave){s, at});
        if (wave_error(s, count, err))
            return -1;
        for (int32_t i = 0; i < count; i++) {
            struct student_matrix *m = &s->matrix[at + i];
            int64_t size = (int64_t)m->rows * m->cols;

            b->ops->upload(b, m->weight, s->work[i] + size,
                           (size_t)size * (size_t)dtype_size(b->activation));
            for (int64_t k = 0; k < size; k += PORTION)
                b->ops->upload(b, m->gradient + k, s->zeros,
                               (size_t)(size - k < PORTION ? size - k : PORTION) * sizeof(float));
        }
        if (backend_check(b, err))
            return -1;
    }
    return 0;
}

static int take_slopes(struct student *s, struct err *err)
{
    struct backend *b = s->engine->backend;
    int32_t threads = thread_pool_threads(s->options->pool);

    for (int32_t at = 0; at < s->matrices; at += threads) {
        int32_t count = s->matrices - at < threads ? s->matrices - at : threads;

        for (int32_t i = 0; i < count; i++) {
            struct student_matrix *m = &s->matrix[at + i];

            b->ops->download(b, s->work[i], m->gradient,
                             (size_t)m->rows * (size_t)m->cols * sizeof(float));
        }
        if (backend_check(b, err))
            return -1;
        thread_pool_run(s->options->pool, count, make_slope, &(struct wave){s, at});
        if (wave_error(s, count, err))
            return -1;
    }
    return 0;
}

/* Of the logarithm with moments k: what Adam, with the usual constants, takes from it at rate 1. */
static double adam(struct student_matrix *m, int32_t k, double slope, int32_t step)
{
    double first = 0.9 * (double)m->first[k] + 0.1 * slope;
    double second = 0.999 * (double)m->second[k] + 0.001 * slope * slope;

    m->first[k] = (float)first;
    m->second[k] = (float)second;
    return first / (1 - pow(0.9, step)) / (sqrt(second / (1 - pow(0.999, step))) + 1e-12);
}

/* Adam's steps have the size of the rate, whatever the slope's: what is nearly right would be
 * shaken by it. The KL goes by the square of what is wrong with the scales. */
static float pace_of(double kl)
{
    return kl > 0 ? (float)fmin(1, sqrt(kl / DISTILL_FAR)) : 0;
}

/* `step` is 1-based. */
static void follow_slopes(struct student *s, int32_t step)
{
    double left = (double)s->pace * (1 - (double)(step - 1) / s->options->steps);
    double settled = fmin(1, (double)s->options->steps / DISTILL_SETTLE);

    for (int32_t i = 0; i < s->matrices; i++) {
        struct student_matrix *m = &s->matrix[i];
        int32_t vectors = s->codec->vector_scales ? s->codec->vector_scales(m->parts) : m->count;
        double all = 0, common = 0;

        for (int32_t k = 0; k < m->count; k++)
            all += (double)m->slope[k];
        if (s->codec->common_rate > 0)
            common = s->codec->common_rate * left * adam(m, m->count, all, step);
        for (int32_t k = 0; k < m->count; k++) {
            double rate = DISTILL_RATE * left * (k < vectors ? 1 : settled);

            m->scale[k] *= (float)exp(-common - rate * adam(m, k, (double)m->slope[k], step));
        }
    }
}

/* ------------------------------------------------------------------ examples */

/* Where a row's bits are not its own alone, a run that was interrupted would end with others: it
 * does not know what the batches before gave. So one that may be interrupted keeps no lessons. */
static int open_examples(struct student *s, const struct trainer_source *examples, struct err *err)
{
    size_t count = (size_t)examples->count;
    int32_t *length;
    int rc;

    if (distill_batches_open(&s->batches, examples, s->engine->tokenizer, DISTILL_ROWS,
                             s->options->seed, err))
        return -1;
    if (s->options->resume)
        return 0;
    length = malloc(count * sizeof *length);
    if (!length)
        return err_set(err, ERR_NO_MEMORY, "no memory for %zu examples", count);
    for (size_t i = 0; i < count; i++)
        length[i] = distill_batches_rows(&s->batches, (int64_t)i);
    rc = lessons_open(&s->lessons, length, examples->count, (int64_t)row_bytes(s), err);
    free(length);
    return rc;
}

/* ------------------------------------------------------------------ interruptions */

/* Everything that a step changes. */
static int open_vectors(struct student *s, struct resume_vectors *v, struct err *err)
{
    size_t count = 3 * (size_t)s->matrices + 1;
    int32_t *length = malloc(count * sizeof *length + 1);

    v->vector = malloc(count * sizeof *v->vector + 1);
    v->length = length;
    if (!v->vector || !length)
        return err_set(err, ERR_NO_MEMORY, "no memory for %zu vectors of scales", count);
    for (int32_t i = 0; i < s->matrices; i++) {
        struct student_matrix *m = &s->matrix[i];
        float *three[3] = {m->scale, m->first, m->second};

        for (int k = 0; k < 3; k++) {
            v->vector[v->count] = three[k];
            length[v->count++] = k == 0 ? m->count : m->count + 1;
        }
    }
    v->vector[v->count] = &s->pace;
    length[v->count++] = 1;
    return 0;
}

static void close_vectors(struct resume_vectors *v)
{
    free(v->vector);
    free((void *)(uintptr_t)v->length);
}

/* How many steps were made before; their examples are passed over. */
static int32_t go_on(struct student *s, const struct resume_vectors *v)
{
    int32_t made = s->options->resume ? resume_load_vectors(s->options->resume, v) : 0;
    struct distill_batch unused;

    for (int32_t step = 0; step < made; step++)
        distill_batches_next(&s->batches, &unused);
    return made;
}

/* `part` of a step, which takes seconds, is behind us. */
static int tell(const struct student *s, int32_t step, double part, struct err *err)
{
    return stage_tell(&s->options->listener, "distill", (step - 1 + part) / s->options->steps, err);
}

/* The student's gradient towards what the teacher says; *kl: how far it is from that. */
static int compare(struct student *s, const struct distill_batch *b, double *kl, struct err *err)
{
    struct model_loss loss;
    struct model_loss_args args = {.weights = &s->weights,
                                   .grads = &s->grads,
                                   .batch = &b->batch,
                                   .weight = b->weight,
                                   .teacher = s->tuned};

    /* An example that is thinned will not come again as it is. */
    if (!b->thinned && lessons_recall(&s->lessons, b->example, b->batch.docs, s->given))
        args.teacher_rows = s->given;
    if (model_loss(s->pass, &args, &loss, err))
        return -1;
    if (!isfinite(loss.weighted))
        return err_set(err, ERR_INVALID,
                       "distillation lost its way: the KL is not a number any more; ask for fewer "
                       "steps (distill_steps)");
    *kl = loss.weighted;
    if (b->thinned || args.teacher_rows || !s->lessons.rows)
        return 0;
    if (model_teacher_rows(s->pass, b->batch.rows, s->given, err))
        return -1;
    lessons_keep(&s->lessons, b->example, b->batch.docs, s->given);
    return 0;
}

static int run(struct student *s, const struct resume_vectors *vectors,
               const struct trainer_source *examples, struct err *err)
{
    if (open_examples(s, examples, err))
        return -1;
    for (int32_t step = go_on(s, vectors) + 1; step <= s->options->steps; step++) {
        struct distill_batch batch;
        double kl = 0;

        distill_batches_next(&s->batches, &batch);
        if (put_weights(s, err) || tell(s, step, 1. / 3, err) || compare(s, &batch, &kl, err) ||
            tell(s, step, 2. / 3, err) || take_slopes(s, err))
            return -1;
        if (step == 1)
            s->pace = pace_of(kl);
        follow_slopes(s, step);
        progress_tick();
        if (s->options->resume && step % DISTILL_KEEP == 0 &&
            resume_save_vectors(s->options->resume, vectors, step, err))
            return -1;
        if (tell(s, step, 1, err))
            return -1;
    }
    for (int32_t i = 0; i < s->matrices; i++)
        s->codec->write_scales(s->matrix[i].parts, s->matrix[i].rows, s->matrix[i].cols,
                               s->matrix[i].scale);
    return 0;
}

int distill(struct compression *compression, const struct codec *codec, struct engine *engine,
            const struct model_weights *tuned, const struct trainer_source *examples,
            const struct distill_options *options, struct err *err)
{
    struct student s = {.engine = engine, .codec = codec, .options = options, .tuned = tuned};
    struct resume_vectors vectors = {0};
    int rc = -1;

    if (!codec->scales || examples->count == 0 || options->steps <= 0)
        return 0;
    if (!open_weights(&s, compression, err) && !open_work(&s, err) &&
        !open_vectors(&s, &vectors, err))
        rc = run(&s, &vectors, examples, err);
    close_vectors(&vectors);
    close_student(&s);
    return rc;
}
