#include <math.h>

#include "engine/base_file.h"
#include "engine/trainer_state.h"

/* Small files are facts to be learnt by heart and need many passes; large ones teach a manner, and
 * few passes do. Measured on SmolLM2-135M with 24 and 150 questions. */
static int32_t auto_epochs(int32_t examples)
{
    if (examples < 200)
        return 12;
    if (examples < 1000)
        return 8;
    return examples < 5000 ? 4 : 3;
}

static int32_t auto_batch(int32_t examples)
{
    int32_t batch = examples / 16;

    return batch < 4 ? 4 : batch > 16 ? 16 : batch;
}

#define AUTO_MULTIPLIER 2.0

int32_t trainer_micro_rows(const struct trainer_examples *train,
                           const struct trainer_examples *valid, int32_t batch_size, int32_t limit)
{
    int32_t longest = train->longest > valid->longest ? train->longest : valid->longest;
    int64_t most = (int64_t)longest * batch_size;

    if (longest >= limit)
        return longest;
    return most < limit ? (int32_t)most : limit;
}

int trainer_plan(struct engine_trainer *t, struct err *err)
{
    const struct engine_train_options *o = &t->options;
    struct engine_train_plan *p = &t->plan;
    int32_t examples = t->train.count;

    p->n_epochs = o->n_epochs ? o->n_epochs : auto_epochs(examples);
    p->batch_size = o->batch_size ? o->batch_size : auto_batch(examples);
    p->learning_rate_multiplier =
        o->learning_rate_multiplier > 0 ? o->learning_rate_multiplier : AUTO_MULTIPLIER;
    p->learning_rate = TRAINER_BASE_RATE * p->learning_rate_multiplier;
    p->steps_per_epoch = (examples + p->batch_size - 1) / p->batch_size;
    if (__builtin_mul_overflow(p->steps_per_epoch, p->n_epochs, &p->total_steps))
        return err_set(err, ERR_INVALID, "%d epochs of %d steps are too many", p->n_epochs,
                       p->steps_per_epoch);
    p->tokens_per_epoch = t->train.tokens;
    p->trained_tokens = t->train.trained * p->n_epochs;
    return 0;
}

double trainer_rate(const struct engine_trainer *t, int32_t step)
{
    int32_t total = t->plan.total_steps, warm = (total + 9) / 10;
    double left;

    if (warm > TRAINER_WARM_UP)
        warm = TRAINER_WARM_UP;
    if (step <= warm)
        return t->plan.learning_rate * step / warm;
    left = (double)(total - step + 1) / (total - warm + 1); /* 1 would be step `warm` */
    if (t->options.schedule == ENGINE_SCHEDULE_COSINE)
        return t->plan.learning_rate * 0.5 * (1 - cos(M_PI * left));
    return t->plan.learning_rate * left;
}
