#include "server/api_job_request.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "server/api_check.h"
#include "server/api_compression.h"
#include "server/field_table.h"

#define MULTIPLIER_MAX 1000.0

/* Keeps the JSON text of an object in the request. */
static int keep_text(struct api_job_request *request, int slot, const json_t *json,
                     const char **out, struct err *err)
{
    request->owned[slot] = json_dumps(json, JSON_COMPACT);
    if (!request->owned[slot])
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    *out = request->owned[slot];
    return 0;
}

static bool is_auto(const json_t *object, const char *key)
{
    const char *text = json_string_value(json_object_get(object, key));
    return text && strcmp(text, "auto") == 0;
}

/* One hyperparameter object; what is "auto" or absent leaves `out` as it is. */
static int read_hyperparameters(const json_t *object, const char *prefix,
                                struct job_hyperparameters *out, struct err *err)
{
    char epochs[96], batch[96], rate[96];
    int64_t n = out->n_epochs, b = out->batch_size;
    double r = out->learning_rate_multiplier;
    snprintf(epochs, sizeof(epochs), "%s.n_epochs", prefix);
    snprintf(batch, sizeof(batch), "%s.batch_size", prefix);
    snprintf(rate, sizeof(rate), "%s.learning_rate_multiplier", prefix);
    const struct api_member epochs_member = {object, "n_epochs", epochs, false};
    const struct api_member batch_member = {object, "batch_size", batch, false};
    const struct api_member rate_member = {object, "learning_rate_multiplier", rate, false};
    if (!is_auto(object, "n_epochs") && api_check_integer(&epochs_member, 1, 50, &n, err) < 0)
        return -1;
    if (!is_auto(object, "batch_size") && api_check_integer(&batch_member, 1, 256, &b, err) < 0)
        return -1;
    if (!is_auto(object, "learning_rate_multiplier")) {
        if (api_check_number(&rate_member, 0, MULTIPLIER_MAX, &r, err) < 0)
            return -1;
        if (r == 0 && json_is_number(json_object_get(object, "learning_rate_multiplier")))
            return err_set_code(err, ERR_INVALID, "decimal_below_min_value", rate,
                                "Invalid '%s': decimal below minimum value. Expected a value > 0, "
                                "but got 0 instead.",
                                rate);
    }
    out->n_epochs = (int32_t)n;
    out->batch_size = (int32_t)b;
    out->learning_rate_multiplier = r;
    return 0;
}

static int read_method(struct api_job_request *request, const json_t *method, struct err *err)
{
    static const char *const types[] = {"supervised", "dpo", "reinforcement", NULL};
    const struct api_member type_member = {method, "type", "method.type", true};
    const struct api_member supervised_member = {method, "supervised", "method.supervised", false};
    const json_t *supervised = NULL, *hyperparameters = NULL;
    int type = 0;
    if (api_check_choice(&type_member, types, &type, err) < 0)
        return -1;
    if (type != 0)
        return err_set_code(err, ERR_INVALID, "unsupported_value", "method.type",
                            "Unsupported value: 'method.type' does not support '%s' here yet. "
                            "Supported values are: 'supervised'.",
                            types[type]);
    request->job.method_type = types[type];
    if (api_check_object(&supervised_member, &supervised, err) < 0)
        return -1;
    const struct api_member inner = {supervised, "hyperparameters",
                                     "method.supervised.hyperparameters", false};
    if (supervised && api_check_object(&inner, &hyperparameters, err) < 0)
        return -1;
    if (hyperparameters &&
        read_hyperparameters(hyperparameters, inner.path, &request->job.chosen, err) < 0)
        return -1;
    return keep_text(request, 0, method, &request->job.method, err);
}

static int read_extension(struct api_job_request *request, const json_t *graft, struct err *err)
{
    static const char *const schedules[] = {"linear", "cosine", NULL};
    const struct api_member embeddings = {graft, "train_embeddings", "graft.train_embeddings",
                                          false};
    const struct api_member schedule_member = {graft, "schedule", "graft.schedule", false};
    const struct api_member compression_member = {graft, "compression", "graft.compression", false};
    const json_t *compression = NULL;
    int schedule = 0;
    if (api_check_bool(&embeddings, &request->job.train_embeddings, err) < 0 ||
        api_check_choice(&schedule_member, schedules, &schedule, err) < 0 ||
        api_check_object(&compression_member, &compression, err) < 0 ||
        api_compression_read(compression, compression_member.path, &request->job.compression, err) <
            0)
        return -1;
    request->job.schedule = schedules[schedule];
    return keep_text(request, 1, graft, &request->job.extension, err);
}

static int read_plain(struct api_job_request *request, const json_t *body, struct err *err)
{
    struct job_new *job = &request->job;
    const struct api_member model = {body, "model", "model", true};
    const struct api_member training = {body, "training_file", "training_file", true};
    const struct api_member validation = {body, "validation_file", "validation_file", false};
    const struct api_member suffix = {body, "suffix", "suffix", false};
    const struct api_member seed = {body, "seed", "seed", false};
    if (api_check_string(&model, 1, 300, &job->model, err) < 0 ||
        api_check_string(&training, 1, 300, &job->training_file, err) < 0 ||
        api_check_string(&validation, 1, 300, &job->validation_file, err) < 0 ||
        api_check_suffix(&suffix, &job->suffix, err) < 0 ||
        api_check_integer(&seed, 0, INT32_MAX, &job->seed, err) < 0)
        return -1;
    return 0;
}

int api_job_request_parse(struct api_job_request *request, const json_t *body, struct err *err)
{
    memset(request, 0, sizeof(*request));
    request->job.seed = -1;
    request->job.compression.distill_steps = -1;
    const json_t *hyperparameters = NULL, *method = NULL, *metadata = NULL, *graft = NULL;
    const struct api_member objects[] = {
        {body, "hyperparameters", "hyperparameters", false},
        {body, "method", "method", false},
        {body, "metadata", "metadata", false},
        {body, "graft", "graft", false},
    };
    if (field_table_check(&field_table_jobs, body, err) < 0 || read_plain(request, body, err) < 0 ||
        api_check_object(&objects[0], &hyperparameters, err) < 0 ||
        api_check_object(&objects[1], &method, err) < 0 ||
        api_check_object(&objects[2], &metadata, err) < 0 ||
        api_check_object(&objects[3], &graft, err) < 0)
        return -1;
    /* The deprecated place first: what `method` says wins. */
    if (hyperparameters &&
        read_hyperparameters(hyperparameters, "hyperparameters", &request->job.chosen, err) < 0)
        return -1;
    if (method && read_method(request, method, err) < 0)
        return -1;
    if (metadata && (api_check_metadata(metadata, err) < 0 ||
                     keep_text(request, 2, metadata, &request->job.metadata, err) < 0))
        return -1;
    return graft ? read_extension(request, graft, err) : 0;
}

void api_job_request_release(struct api_job_request *request)
{
    for (size_t i = 0; i < sizeof(request->owned) / sizeof(request->owned[0]); i++)
        free(request->owned[i]);
    memset(request, 0, sizeof(*request));
}
