/* engine_bench_train: the speed of training steps on random tokens, in the keys of the peer's
 * script, so that the two can be compared in one run. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "engine/backend.h"
#include "engine/base/rng.h"
#include "engine/bench.h"
#include "engine/engine_parts.h"
#include "engine/trainer.h"

struct random_examples {
    int32_t *token; /* [count, length] */
    float *weight;  /* [length] */
    int32_t length;
};

static struct dataset_example random_example(const void *context, int64_t i)
{
    const struct random_examples *r = context;

    return (struct dataset_example){
        .token = r->token + i * r->length, .weight = r->weight, .length = r->length};
}

static int make_examples(struct random_examples *r, int64_t count, int32_t length,
                         int32_t vocabulary, struct err *err)
{
    r->length = length;
    r->token = malloc((size_t)(count * length) * sizeof *r->token);
    r->weight = malloc((size_t)length * sizeof *r->weight);
    if (!r->token || !r->weight)
        return err_set(err, ERR_NO_MEMORY, "no memory for %lld random tokens",
                       (long long)(count * length));
    for (int64_t i = 0; i < count * length; i++)
        r->token[i] = (int32_t)(rng_at(0, 0, (uint64_t)i) % (uint64_t)vocabulary);
    for (int32_t i = 0; i < length; i++)
        r->weight[i] = i > 0;
    return 0;
}

/* One step more than asked for: the first warms up and does not count. */
static int run_steps(struct engine_trainer *trainer, const struct engine_bench_train_options *o,
                     double *seconds, struct engine_step *first, struct engine_step *last,
                     struct err *err)
{
    if (engine_trainer_step(trainer, first, err))
        return -1;
    for (int32_t i = 0; i < o->steps; i++) {
        if (engine_trainer_step(trainer, last, err))
            return -1;
        seconds[i] = last->seconds;
    }
    return 0;
}

static int report(const struct engine_bench_train_options *o, const struct backend *backend,
                  double step, const struct engine_step *first, const struct engine_step *last,
                  char *json, size_t size, struct err *err)
{
    struct rusage usage;
    int n;

    getrusage(RUSAGE_SELF, &usage);
    n = snprintf(json, size,
                 "{\"what\": \"graft full %s%s\", \"seq\": %d, \"batch\": %d, \"threads\": %d, "
                 "\"tokens_per_s\": %.1f, \"s_per_step\": %.3f, \"peak_rss_mib\": %ld, "
                 "\"first_loss\": %.4f, \"last_loss\": %.4f}",
                 backend->activation == DTYPE_BF16 ? "bf16" : "f32",
                 o->train_embeddings ? "" : ", embeddings frozen", o->sequence, o->batch,
                 backend->threads, (double)o->batch * o->sequence / step, step,
                 usage.ru_maxrss / 1024, first->train_loss, last->train_loss);
    if (n < 0 || (size_t)n >= size)
        return err_set(err, ERR_INTERNAL, "the bench's line needs %d bytes", n + 1);
    return 0;
}

static int check_options(const struct engine_bench_train_options *o, struct err *err)
{
    if (o->sequence < 2 || o->batch < 1 || o->batch > 256 || o->steps < 1 || o->steps > 10000)
        return err_set(err, ERR_INVALID,
                       "bench train: at least 2 tokens, 1 to 256 rows, 1 to 10000 steps");
    return 0;
}

int engine_bench_train(const struct engine_bench_train_options *o, char *json, size_t json_size,
                       struct err *err)
{
    const struct engine_options device = {
        .device = o->device, .threads = o->threads, .precision = o->precision};
    struct engine_train_options options = {.n_epochs = 1,
                                           .batch_size = o->batch,
                                           .learning_rate_multiplier = 0.1,
                                           .train_embeddings = o->train_embeddings};
    struct random_examples examples = {0};
    struct trainer_source source = {.context = &examples, .example = random_example};
    struct engine *engine = NULL;
    struct engine_trainer *trainer = NULL;
    struct engine_step first, last;
    double *seconds = NULL;
    int rc = -1;

    if (check_options(o, err) || engine_open_model(&engine, o->model, &device, err))
        goto out;
    source.count = (int64_t)o->batch * (o->steps + 1);
    if (o->sequence > engine_info(engine)->context) {
        err_set(err, ERR_INVALID, "bench train: the model's context is %d tokens",
                engine_info(engine)->context);
        goto out;
    }
    seconds = malloc((size_t)o->steps * sizeof *seconds);
    if (!seconds) {
        err_set(err, ERR_NO_MEMORY, "no memory for %d steps", o->steps);
        goto out;
    }
    if (make_examples(&examples, source.count, o->sequence, engine_info(engine)->vocabulary, err) ||
        trainer_open(&trainer, engine, &source, NULL, &options, NULL, err) ||
        run_steps(trainer, o, seconds, &first, &last, err))
        goto out;
    rc = report(o, engine->backend, bench_median(seconds, o->steps), &first, &last, json, json_size,
                err);
out:
    engine_trainer_free(trainer);
    engine_free(engine);
    free(seconds);
    free(examples.token);
    free(examples.weight);
    return rc;
}
