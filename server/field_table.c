#include "server/field_table.h"

#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "engine/base/json_text.h"

#define HONOURED(path)                   \
    {                                    \
        path, FIELD_HONOURED, NULL, NULL \
    }
#define OURS(path, note)                 \
    {                                    \
        path, FIELD_HONOURED, NULL, note \
    }
#define ACCEPTED(path, note)             \
    {                                    \
        path, FIELD_ACCEPTED, NULL, note \
    }
#define REFUSED(path, neutral, note)       \
    {                                      \
        path, FIELD_REFUSED, neutral, note \
    }

/* clang-format off */
static const struct field file_fields[] = {
    HONOURED("file"),
    HONOURED("purpose"),
    HONOURED("expires_after"),
    HONOURED("expires_after.anchor"),
    HONOURED("expires_after.seconds"),
};

static const struct field job_fields[] = {
    HONOURED("model"),
    HONOURED("training_file"),
    HONOURED("validation_file"),
    HONOURED("suffix"),
    HONOURED("seed"),
    HONOURED("metadata"),
    HONOURED("method"),
    HONOURED("method.type"),
    HONOURED("method.supervised"),
    HONOURED("method.supervised.hyperparameters"),
    HONOURED("method.supervised.hyperparameters.n_epochs"),
    HONOURED("method.supervised.hyperparameters.batch_size"),
    HONOURED("method.supervised.hyperparameters.learning_rate_multiplier"),
    ACCEPTED("method.dpo", "only method.type \"supervised\" is built; sub-objects of methods that are not selected are ignored"),
    ACCEPTED("method.reinforcement", "only method.type \"supervised\" is built; sub-objects of methods that are not selected are ignored"),
    HONOURED("hyperparameters"),
    HONOURED("hyperparameters.n_epochs"),
    HONOURED("hyperparameters.batch_size"),
    HONOURED("hyperparameters.learning_rate_multiplier"),
    REFUSED("integrations", "[]", "no reporting to third parties is built; metrics are in the job's events and its result file"),
    OURS("graft", "Graft's own settings"),
    OURS("graft.train_embeddings", "train embeddings and output head too (default false)"),
    OURS("graft.schedule", "learning rate after warm-up: \"linear\" (default) or \"cosine\""),
    OURS("graft.compression", "how the difference to the base is compressed"),
    OURS("graft.compression.codec", "default: the server's own; a name that it does not know is refused with the list"),
    OURS("graft.compression.ratio", "16-bit bytes of the whole base over bytes of the file, 1 to 1024; default: the codec's own"),
    OURS("graft.compression.max_kl", "instead of ratio: the smallest file whose measured KL, in nats per token, is not above it"),
    OURS("graft.compression.distill_steps", "steps of distillation against the tuned model, 0 to 10000; default: the codec's own"),
};

static const struct field chat_fields[] = {
    HONOURED("messages"),
    HONOURED("model"),
    HONOURED("temperature"),
    HONOURED("top_p"),
    HONOURED("seed"),
    HONOURED("max_tokens"),
    HONOURED("max_completion_tokens"),
    HONOURED("stop"),
    HONOURED("stream"),
    HONOURED("stream_options"),
    HONOURED("stream_options.include_usage"),
    ACCEPTED("stream_options.include_obfuscation", "chunks carry no padding"),
    ACCEPTED("metadata", "completions are not stored"),
    ACCEPTED("user", "there is no abuse monitoring that would use it"),
    ACCEPTED("safety_identifier", "there is no abuse monitoring that would use it"),
    ACCEPTED("prompt_cache_key", "there is no prompt cache"),
    ACCEPTED("prompt_cache_retention", "there is no prompt cache"),
    ACCEPTED("prompt_cache_options", "there is no prompt cache"),
    ACCEPTED("service_tier", "there is one tier"),
    ACCEPTED("verbosity", "the models here have no such setting"),
    ACCEPTED("reasoning_effort", "the models here have no such setting"),
    ACCEPTED("parallel_tool_calls", "tools are refused"),
    REFUSED("n", "1", "one choice for each request; send several requests"),
    REFUSED("frequency_penalty", "0", "penalties are not built"),
    REFUSED("presence_penalty", "0", "penalties are not built"),
    REFUSED("logit_bias", "{}", "not built"),
    REFUSED("logprobs", "false", "not built"),
    REFUSED("top_logprobs", "0", "not built"),
    REFUSED("response_format", "{\"type\":\"text\"}", "answers are plain text"),
    REFUSED("tools", "[]", "tool calls are not built"),
    REFUSED("tool_choice", "\"none\"", "tool calls are not built"),
    REFUSED("functions", "[]", "tool calls are not built"),
    REFUSED("function_call", "\"none\"", "tool calls are not built"),
    REFUSED("modalities", "[\"text\"]", "text is the only modality"),
    REFUSED("audio", NULL, "text is the only modality"),
    REFUSED("prediction", NULL, "not built"),
    REFUSED("store", "false", "completions are not stored"),
    REFUSED("moderation", NULL, "there is no moderation model"),
    REFUSED("web_search_options", NULL, "there is no web search"),
};

static const struct field delta_fields[] = {
    OURS("file", "import: id of a file with purpose graft-delta"),
    OURS("base", "compress: the base model"),
    OURS("tuned", "compress: the imported model whose difference to the base becomes a delta"),
    OURS("calibration_file", "compress: id of a file with purpose fine-tune whose rows look like what will be asked"),
    OURS("compression", "compress: as graft.compression of a job"),
    OURS("compression.codec", "as there"),
    OURS("compression.ratio", "as there"),
    OURS("compression.max_kl", "as there; needs a calibration_file to measure on"),
    OURS("compression.distill_steps", "as there"),
    OURS("seed", "compress: of the choice and order of rows; default: chosen, and told"),
    OURS("suffix", "a part of the model's name"),
};
/* clang-format on */

#define COUNT(a) (sizeof(a) / sizeof((a)[0]))

const struct field_table field_table_files = {"CreateFileRequest", "POST /v1/files", file_fields,
                                              COUNT(file_fields)};
const struct field_table field_table_jobs = {
    "CreateFineTuningJobRequest", "POST /v1/fine_tuning/jobs", job_fields, COUNT(job_fields)};
const struct field_table field_table_chat = {
    "CreateChatCompletionRequest", "POST /v1/chat/completions", chat_fields, COUNT(chat_fields)};

const struct field_table field_table_deltas = {"CreateDeltaRequest", "POST /v1/graft/deltas",
                                               delta_fields, COUNT(delta_fields)};

const struct field_table *const field_tables[] = {&field_table_files, &field_table_jobs,
                                                  &field_table_chat, &field_table_deltas};
const size_t field_table_count = COUNT(field_tables);

const struct field *field_table_find(const struct field_table *table, const char *path)
{
    for (size_t i = 0; i < table->count; i++)
        if (strcmp(table->fields[i].path, path) == 0)
            return &table->fields[i];
    return NULL;
}

static bool has_children(const struct field_table *table, const char *path)
{
    size_t len = strlen(path);
    for (size_t i = 0; i < table->count; i++)
        if (strncmp(table->fields[i].path, path, len) == 0 && table->fields[i].path[len] == '.')
            return true;
    return false;
}

static bool is_neutral(const struct field *field, const json_t *value)
{
    if (json_is_null(value))
        return true;
    if (!field->neutral)
        return false;
    json_t *neutral = json_loads(field->neutral, JSON_DECODE_ANY, NULL);
    bool equal =
        json_equal(neutral, value) || (json_is_number(neutral) && json_is_number(value) &&
                                       json_number_value(neutral) == json_number_value(value));
    json_decref(neutral);
    return equal;
}

static int unknown(const char *path, struct err *err)
{
    return err_set_code(err, ERR_INVALID, "unknown_parameter", path, "Unknown parameter: '%s'.",
                        path);
}

static int refused(const struct field *field, struct err *err)
{
    return err_set_code(err, ERR_INVALID, "unsupported_parameter", field->path,
                        "Unsupported parameter: '%s': %s.", field->path, field->note);
}

static int check_object(const struct field_table *table, const json_t *object, const char *prefix,
                        struct err *err)
{
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)(uintptr_t)object, key, value)
    {
        char path[160];
        int n = snprintf(path, sizeof(path), "%s%s%s", prefix, prefix[0] ? "." : "", key);
        if (n < 0 || (size_t)n >= sizeof(path))
            return err_set_code(err, ERR_INVALID, "unknown_parameter", "",
                                "Unknown parameter: a name of %zu bytes.", strlen(key));
        const struct field *field = strchr(key, '.') ? NULL : field_table_find(table, path);
        if (!field)
            return unknown(path, err);
        if (field->use == FIELD_REFUSED && !is_neutral(field, value))
            return refused(field, err);
        if (json_is_object(value) && has_children(table, path) &&
            check_object(table, value, path, err) < 0)
            return -1;
    }
    return 0;
}

int field_table_check(const struct field_table *table, const json_t *object, struct err *err)
{
    return check_object(table, object, "", err);
}

int field_table_check_name(const struct field_table *table, const char *path, struct err *err)
{
    const struct field *field = field_table_find(table, path);
    if (!field)
        return unknown(path, err);
    return field->use == FIELD_REFUSED ? refused(field, err) : 0;
}

void field_table_render(struct strbuf *out)
{
    static const char *const uses[] = {[FIELD_HONOURED] = "honoured",
                                       [FIELD_ACCEPTED] = "accepted without effect",
                                       [FIELD_REFUSED] = "refused by name"};
    strbuf_addstr(
        out, "# Request fields\n\n"
             "What becomes of each field of a request. This page is printed from the tables in "
             "`server/field_table.c`, by which requests are checked; a test holds it to them. "
             "A field that is not listed is refused: `Unknown parameter: 'x'.` "
             "Refused fields may be `null`, or have the value that means \"without it\".\n");
    for (size_t i = 0; i < field_table_count; i++) {
        const struct field_table *table = field_tables[i];
        strbuf_addf(out, "\n## %s (`%s`)\n\n| field | | |\n|---|---|---|\n", table->resource,
                    table->route);
        for (size_t j = 0; j < table->count; j++) {
            const struct field *field = &table->fields[j];
            strbuf_addf(out, "| `%s` | %s | %s", field->path, uses[field->use],
                        field->note ? field->note : "");
            if (field->neutral)
                strbuf_addf(out, "%s`%s` is let through", field->note ? "; " : "", field->neutral);
            strbuf_addstr(out, " |\n");
        }
    }
}
