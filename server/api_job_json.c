#include "server/api_job_json.h"

#include <math.h>
#include <string.h>

#include "server/api_compression.h"

static json_t *text_or_null(const char *text)
{
    return text && text[0] ? json_string(text) : json_null();
}

static json_t *integer_or_null(int64_t n)
{
    return n ? json_integer(n) : json_null();
}

static json_t *real_or_null(double n)
{
    return isfinite(n) ? json_real(n) : json_null();
}

/* JSON text from the database; null where there is none. */
static json_t *parsed_or_null(const char *text)
{
    json_t *json = text ? json_loads(text, JSON_DECODE_ANY, NULL) : NULL;
    return json ? json : json_null();
}

/* A whole number looks like one: 2, not 2.0. */
static json_t *number(double n)
{
    return n == floor(n) && fabs(n) < 1e15 ? json_integer((json_int_t)n) : json_real(n);
}

static json_t *integer_or_auto(int64_t resolved, int64_t chosen)
{
    int64_t n = resolved ? resolved : chosen;
    return n ? json_integer(n) : json_string("auto");
}

/* "auto" until the job runs, then what it became. */
static json_t *hyperparameters_json(const struct job *job)
{
    const struct job_hyperparameters *r = &job->resolved, *c = &job->chosen;
    double rate =
        r->learning_rate_multiplier > 0 ? r->learning_rate_multiplier : c->learning_rate_multiplier;
    return json_pack("{s:o, s:o, s:o}", "n_epochs", integer_or_auto(r->n_epochs, c->n_epochs),
                     "batch_size", integer_or_auto(r->batch_size, c->batch_size),
                     "learning_rate_multiplier", rate > 0 ? number(rate) : json_string("auto"));
}

static json_t *error_json(const struct job *job)
{
    if (!job->error_code[0])
        return json_null();
    return json_pack("{s:s, s:s, s:o}", "code", job->error_code, "message",
                     job->error_message ? job->error_message : "", "param",
                     text_or_null(job->error_param));
}

static json_t *method_json(const struct job *job, json_t *hyperparameters)
{
    const char *type = job->method_type ? job->method_type : "supervised";
    return json_pack("{s:s, s:{s:O}}", "type", type, type, "hyperparameters", hyperparameters);
}

static json_t *dataset_json(const struct job_dataset *d)
{
    if (!d->examples)
        return json_null();
    return json_pack("{s:I, s:I, s:I, s:I, s:I}", "examples", (json_int_t)d->examples, "tokens",
                     (json_int_t)d->tokens, "trained_tokens", (json_int_t)d->trained_tokens,
                     "truncated_examples", (json_int_t)d->truncated_examples, "untrained_examples",
                     (json_int_t)d->untrained_examples);
}

static json_t *share_json(double share)
{
    return isfinite(share) ? json_pack("{s:f}", "exact", share) : json_null();
}

static json_t *recall_json(const struct job_recall *r)
{
    if (!isfinite(r->base) && !isfinite(r->tuned) && !isfinite(r->served))
        return json_null();
    return json_pack("{s:o, s:o, s:o}", "base", share_json(r->base), "tuned", share_json(r->tuned),
                     "served", share_json(r->served));
}

static json_t *delta_json(const struct job_delta *d)
{
    if (!d->bytes)
        return json_null();
    return json_pack("{s:s, s:I, s:I, s:f, s:o}", "codec", d->codec, "bytes", (json_int_t)d->bytes,
                     "base_bytes", (json_int_t)llround(d->ratio * (double)d->bytes), "ratio",
                     d->ratio, "relative_error", real_or_null(d->relative_error));
}

static json_t *graft_json(const struct job *job)
{
    return json_pack("{s:s, s:o, s:b, s:s, s:o, s:i, s:i, s:I, s:o, s:o, s:o, s:o}", "state",
                     job_state_text(job->state), "tuned", text_or_null(job->tuned_model),
                     "train_embeddings", (int)job->train_embeddings, "schedule", job->schedule,
                     "compression", api_compression_json(&job->compression), "step", (int)job->step,
                     "total_steps", (int)job->total_steps, "attempt", (json_int_t)job->attempt,
                     "dataset", dataset_json(&job->dataset), "recall", recall_json(&job->recall),
                     "delta", delta_json(&job->delta), "report", parsed_or_null(job->delta_report));
}

json_t *api_job_json(const struct job *job)
{
    json_t *hyperparameters = hyperparameters_json(job);
    json_t *files = json_array();
    if (job->result_file[0])
        json_array_append_new(files, json_string(job->result_file));
    json_t *integrations = parsed_or_null(job->integrations);
    json_t *json = json_pack(
        "{s:s, s:s, s:I, s:o, s:o, s:o, s:O, s:s, s:s, s:o, s:I, s:s, s:o, s:s, s:o, s:o, s:o, "
        "s:o, s:o, s:o, s:o}",
        "object", "fine_tuning.job", "id", job->id, "created_at", (json_int_t)job->created_at,
        "error", error_json(job), "fine_tuned_model",
        text_or_null(job->has_model ? job->model_name : NULL), "finished_at",
        integer_or_null(job->finished_at), "hyperparameters", hyperparameters, "model", job->model,
        "organization_id", job->organization_id, "result_files", files, "seed",
        (json_int_t)job->seed, "status", job_state_wire(job->state), "trained_tokens",
        integer_or_null(job->trained_tokens), "training_file", job->training_file,
        "validation_file", text_or_null(job->validation_file), "integrations",
        json_is_array(integrations) ? integrations : json_array(), "estimated_finish",
        integer_or_null(job_state_terminal(job->state) ? 0 : job->estimated_finish), "method",
        method_json(job, hyperparameters), "metadata", parsed_or_null(job->metadata),
        "user_provided_suffix", text_or_null(job->suffix), "graft", graft_json(job));
    if (!json_is_array(integrations))
        json_decref(integrations);
    json_decref(hyperparameters);
    if (json && job->tuned_model) /* no method of training: it compresses */
        json_object_del(json, "method");
    return json;
}

json_t *api_event_json(const struct event *event)
{
    json_t *data = parsed_or_null(event->data);
    if (!json_is_object(data)) {
        json_decref(data);
        data = json_object();
    }
    return json_pack("{s:s, s:s, s:I, s:s, s:s, s:s, s:o}", "object", "fine_tuning.job.event", "id",
                     event->id, "created_at", (json_int_t)event->created_at, "level", event->level,
                     "message", event->message ? event->message : "", "type", event->type, "data",
                     data);
}

json_t *api_checkpoint_json(const struct checkpoint *checkpoint)
{
    const struct checkpoint_metrics *m = &checkpoint->metrics;
    const struct {
        const char *name;
        double value;
    } values[] = {{"train_loss", m->train_loss},
                  {"train_mean_token_accuracy", m->train_mean_token_accuracy},
                  {"valid_loss", m->valid_loss},
                  {"valid_mean_token_accuracy", m->valid_mean_token_accuracy},
                  {"full_valid_loss", m->full_valid_loss},
                  {"full_valid_mean_token_accuracy", m->full_valid_mean_token_accuracy}};
    json_t *metrics = json_pack("{s:i}", "step", (int)checkpoint->step);
    for (size_t i = 0; i < sizeof(values) / sizeof(values[0]); i++)
        if (isfinite(values[i].value))
            json_object_set_new(metrics, values[i].name, json_real(values[i].value));
    return json_pack("{s:s, s:s, s:I, s:s, s:i, s:o, s:s}", "object", "fine_tuning.job.checkpoint",
                     "id", checkpoint->id, "created_at", (json_int_t)checkpoint->created_at,
                     "fine_tuned_model_checkpoint", checkpoint->model, "step_number",
                     (int)checkpoint->step, "metrics", metrics, "fine_tuning_job_id",
                     checkpoint->job);
}
