#include "engine/trainer.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/clock.h"
#include "engine/base/rng.h"
#include "engine/base_file.h"
#include "engine/trainer_state.h"

#define BETA1 0.9f
#define BETA2 0.99f
#define EPSILON 1e-8f
#define MAX_NORM 1.0f
#define STREAM_ORDER 1   /* of random numbers: the order of examples, by epoch */
#define VALID_EXAMPLES 4 /* asked after each step */

/* ------------------------------------------------------------------ examples */

static int32_t trained_rows(const struct dataset_example *e, int64_t *trained)
{
    int32_t rows = 0;

    for (int32_t i = 1; i < e->length; i++)
        if (e->weight[i] > 0) {
            rows = i;
            ++*trained;
        }
    return rows;
}

static struct dataset_example example_at(const struct trainer_examples *list, int32_t i)
{
    return list->source.example(list->source.context, list->index[i]);
}

static int open_examples(struct trainer_examples *list, const struct trainer_source *source,
                         struct err *err)
{
    int64_t count = source ? source->count : 0;

    if (source)
        list->source = *source;
    if (count > INT32_MAX)
        return err_set(err, ERR_INVALID, "a dataset of %lld examples is too large",
                       (long long)count);
    list->index = malloc((size_t)(count + 1) * sizeof *list->index);
    list->rows = malloc((size_t)(count + 1) * sizeof *list->rows);
    if (!list->index || !list->rows)
        return err_set(err, ERR_NO_MEMORY, "no memory for %lld examples", (long long)count);
    for (int32_t i = 0; i < count; i++) {
        struct dataset_example e = source->example(source->context, i);
        int32_t rows = trained_rows(&e, &list->trained);

        if (rows == 0)
            continue;
        list->index[list->count] = i;
        list->rows[list->count++] = rows;
        list->tokens += e.length;
        list->longest = rows > list->longest ? rows : list->longest;
    }
    return 0;
}

/* ------------------------------------------------------------------ open, free */

/* Rows of a micro-batch, unless they were too many for the device. */
static int32_t usual_rows(const struct engine_trainer *t)
{
    return trainer_micro_rows(&t->train, &t->valid, t->plan.batch_size, TRAINER_ROWS);
}

/* Everything that the trained weights depend on, for the recovery checkpoint; rounding apart, where
 * a device had too little memory once. */
static int digest_identity(struct engine_trainer *t, struct err *err)
{
    const struct engine_train_plan *p = &t->plan;
    const char *start = t->options.start_delta ? t->options.start_sha256 : "";
    struct sha256 *h;
    char text[512];

    assert(start);
    snprintf(text, sizeof text, "graft trainer 2|%s|%d|%d|%.17g|%lld|%d|%d|%d|%s|%s",
             base_file_info(t->engine->base)->digest, p->n_epochs, p->batch_size, p->learning_rate,
             (long long)t->options.seed, (int)t->options.schedule, t->options.train_embeddings,
             usual_rows(t), start, t->engine->backend->activation == DTYPE_BF16 ? "bf16|" : "");
    h = sha256_new();
    if (!h)
        return err_set(err, ERR_NO_MEMORY, "no memory for a digest");
    sha256_update(h, text, strlen(text));
    for (int32_t i = 0; i < t->train.count; i++) {
        struct dataset_example e = example_at(&t->train, i);

        sha256_update(h, &e.length, sizeof e.length);
        sha256_update(h, e.token, (size_t)e.length * sizeof *e.token);
        sha256_update(h, e.weight, (size_t)e.length * sizeof *e.weight);
    }
    sha256_final_hex(h, t->identity);
    sha256_free(h);
    return 0;
}

static int open_micro(struct engine_trainer *t, struct err *err)
{
    struct trainer_micro *m = &t->micro;
    size_t rows = (size_t)t->max_rows;

    m->token = malloc(rows * sizeof *m->token);
    m->position = malloc(rows * sizeof *m->position);
    m->target = malloc(rows * sizeof *m->target);
    m->weight = malloc(rows * sizeof *m->weight);
    m->cu_seqlens = malloc((rows + 1) * sizeof *m->cu_seqlens);
    t->order = malloc((size_t)t->train.count * sizeof *t->order);
    if (!m->token || !m->position || !m->target || !m->weight || !m->cu_seqlens || !t->order)
        return err_set(err, ERR_NO_MEMORY, "no memory for batches of %d tokens", t->max_rows);
    m->batch =
        (struct batch){.token = m->token, .position = m->position, .cu_seqlens = m->cu_seqlens};
    return 0;
}

static void estimate(struct engine_trainer *t)
{
    const struct model_config *config = model_get_config(t->engine->model);
    int64_t weights = trainer_weights_count(t);
    const struct backend *b = t->engine->backend;
    int64_t size = dtype_size(b->activation);
    int64_t base = base_file_info(t->engine->base)->parameters * size;

    if (b->activation == DTYPE_BF16)
        base += weights * size; /* the copies that stages read */
    t->plan.checkpoint_bytes = trainer_checkpoint_bytes(weights);
    t->plan.memory_bytes =
        weights * 16 + model_training_bytes(b, config, t->max_rows, false) + base;
}

static int check_options(const struct engine_train_options *o, struct err *err)
{
    if (o->n_epochs < 0 || o->n_epochs > 50)
        return err_set(err, ERR_INVALID, "n_epochs is %d: it must be between 1 and 50",
                       o->n_epochs);
    if (o->batch_size < 0 || o->batch_size > 256)
        return err_set(err, ERR_INVALID, "batch_size is %d: it must be between 1 and 256",
                       o->batch_size);
    if (!(o->learning_rate_multiplier >= 0 && o->learning_rate_multiplier <= 1e6))
        return err_set(err, ERR_INVALID, "learning_rate_multiplier must be above 0");
    return 0;
}

/* What the job takes, without anything large: lists of examples and views without data. */
static int open_plan(struct engine_trainer *t, const struct trainer_source *train,
                     const struct trainer_source *validation, struct err *err)
{
    if (check_options(&t->options, err) || open_examples(&t->train, train, err) ||
        open_examples(&t->valid, validation, err))
        return -1;
    if (t->train.count == 0)
        return err_set(err, ERR_INVALID, "no example of the training file trains anything");
    if (trainer_plan(t, err))
        return -1;
    t->max_rows = usual_rows(t);
    if (t->options.halved)
        t->max_rows = trainer_micro_rows(&t->train, &t->valid, t->plan.batch_size, t->max_rows / 2);
    if (model_weights_alloc(&t->weights, t->engine->model, err) ||
        model_weights_alloc(&t->grads, t->engine->model, err))
        return -1;
    estimate(t);
    return 0;
}

static int open_state(struct engine_trainer *t, const struct trainer_source *train,
                      const struct trainer_source *validation, struct err *err)
{
    struct backend *b = t->engine->backend;
    const int64_t one = 1;

    if (open_plan(t, train, validation, err))
        return -1;
    if (digest_identity(t, err) || open_micro(t, err) || trainer_weights_open(t, err))
        return -1;
    t->norm = tensor_view(b->ops->alloc(b, sizeof(float), err), DTYPE_F32, 1, &one);
    if (!t->norm.data)
        return -1;
    return model_training_open(&t->pass, t->engine->model, t->max_rows, false, err);
}

static struct engine_trainer *
new_trainer(struct engine *engine, const struct engine_train_options *options, struct err *err)
{
    struct engine_trainer *t = calloc(1, sizeof *t);

    if (!t) {
        err_set(err, ERR_NO_MEMORY, "no memory for a trainer");
        return NULL;
    }
    t->engine = engine;
    t->options = *options;
    t->order_epoch = -1;
    return t;
}

int trainer_open(struct engine_trainer **out, struct engine *engine,
                 const struct trainer_source *train, const struct trainer_source *validation,
                 const struct engine_train_options *options, struct engine_train_plan *plan,
                 struct err *err)
{
    struct engine_trainer *t = new_trainer(engine, options, err);
    int rc;

    *out = NULL;
    if (!t)
        return -1;
    rc = open_state(t, train, validation, err);
    t->options.start_delta = t->options.start_sha256 = NULL; /* the caller's strings */
    if (rc) {
        engine_trainer_free(t);
        return -1;
    }
    if (plan)
        *plan = t->plan;
    *out = t;
    return 0;
}

static struct dataset_example dataset_example_at(const void *dataset, int64_t i)
{
    return dataset_example(dataset, i);
}

struct trainer_source trainer_source_of(const struct engine_dataset *dataset)
{
    return (struct trainer_source){
        .context = dataset,
        .count = dataset ? dataset_count(dataset) : 0,
        .example = dataset_example_at,
    };
}

int engine_trainer_plan(struct engine *engine, const struct engine_dataset *train,
                        const struct engine_dataset *validation,
                        const struct engine_train_options *options, struct engine_train_plan *plan,
                        struct err *err)
{
    struct trainer_source from_train = trainer_source_of(train),
                          from_validation = trainer_source_of(validation);
    struct engine_trainer *t = new_trainer(engine, options, err);
    int rc;

    if (!t)
        return -1;
    rc = open_plan(t, &from_train, &from_validation, err);
    *plan = t->plan;
    engine_trainer_free(t);
    return rc;
}

int engine_trainer_open(struct engine_trainer **out, struct engine *engine,
                        const struct engine_dataset *train, const struct engine_dataset *validation,
                        const struct engine_train_options *options, struct engine_train_plan *plan,
                        struct err *err)
{
    struct trainer_source from_train = trainer_source_of(train),
                          from_validation = trainer_source_of(validation);

    return trainer_open(out, engine, &from_train, &from_validation, options, plan, err);
}

void engine_trainer_free(struct engine_trainer *t)
{
    if (!t)
        return;
    model_training_free(t->pass);
    if (t->norm.data)
        t->engine->backend->ops->free(t->engine->backend, t->norm.data);
    trainer_weights_close(t);
    free(t->order);
    free(t->micro.token);
    free(t->micro.position);
    free(t->micro.target);
    free(t->micro.weight);
    free(t->micro.cu_seqlens);
    free(t->train.index);
    free(t->train.rows);
    free(t->valid.index);
    free(t->valid.rows);
    free(t);
}

/* ------------------------------------------------------------------ one pass over examples */

struct examples_run {
    const struct trainer_examples *list;
    const int32_t *pick; /* [count] places in the list; NULL: from `first` on, round and round */
    int32_t first, count;
    bool backward;
};

struct examples_result {
    double loss; /* mean over trained tokens, nats */
    double accuracy;
    int64_t tokens, trained;
};

static int32_t place_of(const struct examples_run *run, int32_t i)
{
    return run->pick ? run->pick[i] : (run->first + i) % run->list->count;
}

static void add_example(struct trainer_micro *m, const struct dataset_example *e, int32_t rows,
                        double weight)
{
    int32_t at = m->batch.rows;

    memcpy(m->token + at, e->token, (size_t)rows * sizeof *m->token);
    memcpy(m->target + at, e->token + 1, (size_t)rows * sizeof *m->target);
    for (int32_t i = 0; i < rows; i++) {
        m->position[at + i] = i;
        m->weight[at + i] = (float)((double)e->weight[i + 1] * weight);
    }
    m->batch.rows = at + rows;
    m->cu_seqlens[++m->batch.docs] = m->batch.rows;
}

static int flush_micro(struct engine_trainer *t, const struct examples_run *run,
                       struct examples_result *sum, struct err *err)
{
    struct model_loss loss;
    struct model_loss_args args = {
        .weights = &t->weights,
        .grads = run->backward ? &t->grads : NULL,
        .batch = &t->micro.batch,
        .target = t->micro.target,
        .weight = t->micro.weight,
    };

    if (t->micro.batch.rows == 0)
        return 0;
    if (model_loss(t->pass, &args, &loss, err))
        return -1;
    sum->loss += loss.weighted;
    sum->accuracy += (double)loss.correct;
    t->micro.batch.rows = t->micro.batch.docs = 0;
    return 0;
}

static int run_examples(struct engine_trainer *t, const struct examples_run *run,
                        struct examples_result *out, struct err *err)
{
    const struct trainer_examples *list = run->list;
    double weight = 0;

    *out = (struct examples_result){0};
    for (int32_t i = 0; i < run->count; i++) {
        struct dataset_example e = example_at(list, place_of(run, i));

        out->tokens += e.length;
        for (int32_t k = 1; k < e.length; k++) {
            weight += (double)e.weight[k];
            out->trained += e.weight[k] > 0;
        }
    }
    t->micro.batch.rows = t->micro.batch.docs = t->micro.cu_seqlens[0] = 0;
    for (int32_t i = 0; i < run->count; i++) {
        int32_t place = place_of(run, i), rows = list->rows[place];
        struct dataset_example e = example_at(list, place);

        if (t->micro.batch.rows + rows > t->max_rows && flush_micro(t, run, out, err))
            return -1;
        add_example(&t->micro, &e, rows, 1 / weight);
    }
    if (flush_micro(t, run, out, err))
        return -1;
    out->accuracy /= (double)out->trained;
    return 0;
}

/* ------------------------------------------------------------------ step */

static int validate(struct engine_trainer *t, struct engine_step *out, struct err *err)
{
    struct examples_result result;
    struct examples_run run = {.list = &t->valid};

    out->valid_loss = out->valid_mean_token_accuracy = NAN;
    out->full_valid_loss = out->full_valid_mean_token_accuracy = NAN;
    if (t->valid.count == 0)
        return 0;
    run.first = (int32_t)((int64_t)(t->step - 1) * VALID_EXAMPLES % t->valid.count);
    run.count = t->valid.count < VALID_EXAMPLES ? t->valid.count : VALID_EXAMPLES;
    if (run_examples(t, &run, &result, err))
        return -1;
    out->valid_loss = result.loss;
    out->valid_mean_token_accuracy = result.accuracy;
    if (!out->epoch_end)
        return 0;
    run = (struct examples_run){.list = &t->valid, .count = t->valid.count};
    if (run_examples(t, &run, &result, err))
        return -1;
    out->full_valid_loss = result.loss;
    out->full_valid_mean_token_accuracy = result.accuracy;
    return 0;
}

/* Clip and update; *norm as it was before clipping. */
static int update(struct engine_trainer *t, double rate, double *norm, struct err *err)
{
    struct backend *b = t->engine->backend;
    float value;

    b->ops->gradient_norm(b, &(struct gradient_norm_args){
                                 .parameter = t->parameter,
                                 .count = t->parameter_count,
                                 .norm = t->norm,
                             });
    b->ops->download(b, &value, t->norm.data, sizeof value);
    if (backend_check(b, err))
        return -1;
    *norm = (double)value;
    if (!isfinite(value))
        return err_set_code(err, ERR_INVALID, "training_diverged", NULL,
                            "Training diverged at step %d: the gradient is not finite. Use a "
                            "smaller learning_rate_multiplier than %g.",
                            t->step + 1, t->plan.learning_rate_multiplier);
    b->ops->adamw(b, &(struct adamw_args){
                         .parameter = t->parameter,
                         .count = t->parameter_count,
                         .norm = t->norm,
                         .max_norm = MAX_NORM,
                         .learning_rate = (float)rate,
                         .beta1 = BETA1,
                         .beta2 = BETA2,
                         .epsilon = EPSILON,
                         .weight_decay = 0.0f,
                         .step = t->step + 1,
                         .seed = (uint64_t)t->options.seed,
                     });
    return backend_check(b, err);
}

int engine_trainer_step(struct engine_trainer *t, struct engine_step *out, struct err *err)
{
    double begin = clock_now();
    int32_t epoch = t->step / t->plan.steps_per_epoch, in_epoch = t->step % t->plan.steps_per_epoch;
    int32_t first = in_epoch * t->plan.batch_size, left = t->train.count - first;
    struct examples_run run = {.list = &t->train, .backward = true};
    struct examples_result result;

    assert(t->step < t->plan.total_steps);
    if (t->order_epoch != epoch) {
        rng_permutation(t->order, t->train.count, (uint64_t)t->options.seed,
                        (uint64_t)STREAM_ORDER << 32 | (uint32_t)epoch);
        t->order_epoch = epoch;
    }
    run.pick = t->order + first;
    run.count = left < t->plan.batch_size ? left : t->plan.batch_size;
    *out = (struct engine_step){
        .step = t->step + 1,
        .total_steps = t->plan.total_steps,
        .epoch = epoch + 1,
        .epoch_end = in_epoch + 1 == t->plan.steps_per_epoch,
        .finished = t->step + 1 == t->plan.total_steps,
        .learning_rate = trainer_rate(t, t->step + 1),
    };
    if (run_examples(t, &run, &result, err) ||
        update(t, out->learning_rate, &out->gradient_norm, err))
        return -1;
    t->step++;
    out->train_loss = result.loss;
    out->train_mean_token_accuracy = result.accuracy;
    out->tokens = result.tokens;
    out->trained_tokens = result.trained;
    if (validate(t, out, err))
        return -1;
    out->seconds = clock_now() - begin;
    return 0;
}
