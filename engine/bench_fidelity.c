/* engine_bench_recall and engine_bench_kl: what a model, or a base with a delta, knows of the rows
 * of a file, and how far it is from the model that it stands for. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "engine/base/clock.h"
#include "engine/base/strbuf.h"
#include "engine/bench.h"
#include "engine/codec/fidelity.h"
#include "engine/engine_parts.h"
#include "engine/trainer.h"
#include "engine/twin.h"

#define MAX_LINE (1 << 16) /* bytes of the JSON */
#define MAX_ROWS 512       /* tokens of a row: longer ones are cut, and counted */

struct fidelity_bench {
    struct engine *engine;
    struct engine_delta *delta;
    struct twin tuned, other;
    struct strbuf line;
};

/* One member of an object; what is no number is null. */
static void add_number(struct strbuf *line, const char *key, double value)
{
    if (isfinite(value))
        strbuf_addf(line, ", \"%s\": %.6g", key, value);
    else
        strbuf_addf(line, ", \"%s\": null", key);
}

static int open_bench(struct fidelity_bench *b, const char *model, const char *delta,
                      const struct engine_options *device, struct err *err)
{
    strbuf_init(&b->line, MAX_LINE);
    if (engine_open_model(&b->engine, model, device, err))
        return -1;
    return delta ? engine_delta_open(&b->delta, b->engine, delta, err) : 0;
}

static void close_bench(struct fidelity_bench *b)
{
    strbuf_release(&b->line);
    engine_delta_free(b->delta);
    twin_close(&b->other);
    twin_close(&b->tuned);
    engine_free(b->engine);
}

static void begin_line(struct fidelity_bench *b, const char *what,
                       const struct engine_options *device)
{
    strbuf_addf(&b->line,
                "{\"what\": \"graft %s\", \"device\": \"%s\", \"precision\": \"%s\", "
                "\"threads\": %d, \"linear_parameters\": %lld, \"delta_bytes\": %lld, \"data\": [",
                what, device->device, b->engine->backend->activation == DTYPE_BF16 ? "bf16" : "f32",
                b->engine->backend->threads, (long long)engine_info(b->engine)->linear_parameters,
                (long long)(b->delta ? engine_delta_bytes(b->delta) : 0));
}

/* The last member, and the end, of the line or of a file's object in it. */
static void end_object(struct strbuf *line, double began)
{
    add_number(line, "seconds", clock_now() - began);
    strbuf_addf(line, "}");
}

static int end_line(struct fidelity_bench *b, double began, char *json, size_t size,
                    struct err *err)
{
    strbuf_addf(&b->line, "]");
    end_object(&b->line, began);
    if (strbuf_failed(&b->line) || b->line.len >= size)
        return err_set(err, ERR_INTERNAL, "the bench's line needs %zu bytes", b->line.len + 1);
    memcpy(json, b->line.data, b->line.len + 1);
    return 0;
}

static int open_data(struct engine_dataset **out, const struct fidelity_bench *b, const char *path,
                     struct engine_dataset_report *report, struct err *err)
{
    const struct engine_dataset_options options = {
        .file_id = path, .validation = true, .max_sequence = MAX_ROWS};

    return engine_dataset_open(out, b->engine, path, &options, report, err);
}

/* The object of a file: what holds of all its rows. */
static void begin_object(struct fidelity_bench *b, const struct engine_dataset_report *report)
{
    const char *separator = b->line.data[b->line.len - 1] == '[' ? "" : ", ";

    strbuf_addf(&b->line, "%s{\"rows\": %lld, \"cut\": %lld", separator,
                (long long)report->examples, (long long)report->truncated_examples);
}

static int check_count(int32_t count, struct err *err)
{
    if (count >= 1 && count <= ENGINE_BENCH_MAX_DATA)
        return 0;
    return err_set(err, ERR_INVALID, "bench: 1 to %d data files can be measured at once",
                   ENGINE_BENCH_MAX_DATA);
}

/* ------------------------------------------------------------------ recall */

static int add_recall(struct fidelity_bench *b, const char *path, struct err *err)
{
    struct engine_dataset *data;
    struct engine_dataset_report report;
    struct engine_recall recall;
    struct fidelity found;
    struct trainer_source rows;
    double began = clock_now();
    int rc;

    if (open_data(&data, b, path, &report, err))
        return -1;
    rows = trainer_source_of(data);
    rc = engine_recall(b->engine, data, &(struct engine_recall_options){.delta = b->delta}, &recall,
                       err) ||
                 fidelity_measure(&found,
                                  &(struct fidelity_args){
                                      .engine = b->engine, .delta = b->delta, .examples = &rows},
                                  err)
             ? -1
             : 0;
    engine_dataset_free(data);
    if (rc)
        return -1;
    begin_object(b, &report);
    strbuf_addf(&b->line, ", \"asked\": %lld", (long long)recall.asked);
    add_number(&b->line, "exact", recall.exact);
    add_number(&b->line, "contained", recall.contained);
    add_number(&b->line, "loss", found.loss);
    strbuf_addf(&b->line, ", \"answer_tokens\": %lld", (long long)found.answer_tokens);
    end_object(&b->line, began);
    return 0;
}

int engine_bench_recall(const struct engine_bench_recall_options *o, char *json, size_t json_size,
                        struct err *err)
{
    const struct engine_options device = {
        .device = o->device, .threads = o->threads, .precision = o->precision};
    struct fidelity_bench b = {0};
    double began = clock_now();
    int rc = -1;

    if (check_count(o->data_count, err))
        return -1;
    if (open_bench(&b, o->model, o->delta, &device, err))
        goto out;
    begin_line(&b, "recall", &device);
    for (int32_t i = 0; i < o->data_count; i++)
        if (add_recall(&b, o->data[i], err))
            goto out;
    rc = end_line(&b, began, json, json_size, err);
out:
    close_bench(&b);
    return rc;
}

/* ------------------------------------------------------------------ KL */

static int add_kl(struct fidelity_bench *b, const char *path, int64_t max_tokens, struct err *err)
{
    struct engine_dataset *data;
    struct engine_dataset_report report;
    struct fidelity found;
    struct trainer_source rows;
    double began = clock_now();
    int rc;

    if (open_data(&data, b, path, &report, err))
        return -1;
    rows = trainer_source_of(data);
    rc = fidelity_measure(
        &found,
        &(struct fidelity_args){.engine = b->engine,
                                .tuned = model_base_weights(b->tuned.model),
                                .other = b->other.model ? model_base_weights(b->other.model) : NULL,
                                .delta = b->delta,
                                .examples = &rows,
                                .max_tokens = max_tokens},
        err);
    engine_dataset_free(data);
    if (rc)
        return -1;
    begin_object(b, &report);
    strbuf_addf(&b->line, ", \"tokens\": %lld", (long long)found.tokens);
    add_number(&b->line, "kl", found.kl);
    strbuf_addf(&b->line, ", \"answer_tokens\": %lld", (long long)found.answer_tokens);
    add_number(&b->line, "answer_kl", found.answer_kl);
    add_number(&b->line, "loss", found.loss);
    add_number(&b->line, "tuned_loss", found.tuned_loss);
    end_object(&b->line, began);
    return 0;
}

int engine_bench_kl(const struct engine_bench_kl_options *o, char *json, size_t json_size,
                    struct err *err)
{
    const struct engine_options device = {
        .device = o->device, .threads = o->threads, .precision = o->precision};
    struct fidelity_bench b = {0};
    double began = clock_now();
    int rc = -1;

    if (check_count(o->data_count, err))
        return -1;
    if (o->delta && o->other)
        return err_set(err, ERR_INVALID, "bench kl: either a delta or another model");
    if (open_bench(&b, o->base, o->delta, &device, err) ||
        twin_open(&b.tuned, b.engine, o->tuned, "tuned", err) ||
        (o->other && twin_open(&b.other, b.engine, o->other, "other", err)))
        goto out;
    begin_line(&b, "kl", &device);
    for (int32_t i = 0; i < o->data_count; i++)
        if (add_kl(&b, o->data[i], o->max_tokens, err))
            goto out;
    rc = end_line(&b, began, json, json_size, err);
out:
    close_bench(&b);
    return rc;
}
