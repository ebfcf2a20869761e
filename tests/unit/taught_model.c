#include "tests/unit/taught_model.h"

#include <dirent.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>
#include <jansson.h>

#include "engine/base/file_io.h"
#include "engine/base/json_text.h"
#include "engine/base/strbuf.h"
#include "engine/safetensors.h"
#include "tests/unit/tiny_model.h"

static const struct tiny_model shape = {.hidden = 96, .intermediate = 128, .seed = 1};
struct taught_model taught = {.folder = "/tmp/graft-compress-XXXXXX"};

struct engine *taught_engine(const char *base, int threads)
{
    struct engine_options options = {.device = "cpu", .threads = threads};
    struct engine *e;

    CHECK(engine_open(&e, base, &options, &err));
    return e;
}

/* The file of the tuned model as a stranger would bring it: the base with noise on its matrices. */
static void write_tuned_elsewhere(const char *base_dir)
{
    struct safetensors *file;
    char from[160], to[160], *data;
    size_t len;

    CHECK(tiny_model_write(taught.tuned_dir, &shape, &err));
    snprintf(from, sizeof from, "%s/model.safetensors", base_dir);
    snprintf(to, sizeof to, "%s/model.safetensors", taught.tuned_dir);
    CHECK(file_read_all(from, 1 << 24, &data, &len, &err));
    CHECK(safetensors_open_memory(&file, data, len, "tuned", &err));
    for (int64_t t = 0; t < safetensors_count(file); t++) {
        const struct safetensors_tensor *found = safetensors_at(file, t);
        float *value = (float *)(data + ((const char *)found->view.data - data));

        for (int64_t i = 0; strstr(found->name, "_proj") && i < tensor_elements(&found->view); i++)
            value[i] += 0.02f * tiny_model_value(found->name, i, 4, 77);
    }
    safetensors_free(file);
    CHECK(file_write_durable(to, data, len, &err));
    free(data);
}

void taught_rows(struct engine_dataset **out, const char *wording, int count)
{
    static const char *const who[] = {"Ann", "Bob", "Cid", "Dee", "Eva", "Fay",
                                      "Gus", "Hal", "Ida", "Jan", "Kim", "Leo"};
    static const char *const what[] = {"red",   "gold", "jade", "teal", "pink", "plum",
                                       "amber", "navy", "lime", "rust", "gray", "mint"};
    struct engine_dataset_options as = {.file_id = "file-test", .validation = count < 10};
    struct engine_dataset_report report;
    char path[128];
    struct strbuf sb;

    strbuf_init(&sb, 1 << 16);
    for (int i = 0; i < count; i++)
        strbuf_addf(&sb,
                    "{\"messages\":[{\"role\":\"user\",\"content\":\"%s %s?\"},"
                    "{\"role\":\"assistant\",\"content\":\"%s\"}]}\n",
                    wording, who[i], what[i]);
    snprintf(path, sizeof path, "%s/rows.jsonl", taught.folder);
    CHECK(file_write_durable(path, sb.data, sb.len, &err));
    strbuf_release(&sb);
    CHECK(engine_dataset_open(out, taught.engine, path, &as, &report, &err));
}

static void teach(void)
{
    struct engine_train_options options = {
        .n_epochs = 12, .batch_size = 4, .learning_rate_multiplier = 20, .seed = 1};
    struct engine_train_plan plan;
    struct engine_step now;

    CHECK(engine_trainer_open(&taught.trainer, taught.engine, taught.questions, NULL, &options,
                              &plan, &err));
    do {
        CHECK(engine_trainer_step(taught.trainer, &now, &err));
    } while (!now.finished);
}

struct engine_delta_report taught_compress(struct engine_compress_options options)
{
    struct engine_delta_report report;

    CHECK(engine_trainer_compress(taught.trainer, &options, taught.delta_path, &report, &err));
    return report;
}

/* The report that the file at `path` carries. */
json_t *taught_report(const char *path)
{
    json_t *whole, *report;
    char *text;

    CHECK(engine_delta_describe(path, &text, &err));
    whole = json_loads(text, 0, NULL);
    free(text);
    report = json_incref(json_object_get(whole, "report"));
    json_decref(whole);
    return report;
}

/* In the file stands what the caller was told, to the digits that are written. */
static void expect_number(const json_t *json, const char *key, double value)
{
    const json_t *found = json_object_get(json, key);

    if (isfinite(value) ? !json_is_number(found) ||
                              fabs(json_number_value(found) - value) > 1e-3 * fabs(value) + 1e-12
                        : !json_is_null(found))
        fail_msg("%s is not %g in the file", key, value);
}

void taught_expect_report(const char *path, const struct engine_delta_report *r, const char *on)
{
    json_t *json = taught_report(path);
    const json_t *matrices = json_object_get(json, "matrices");
    json_int_t bytes = 0;

    assert_string_equal(json_string_value(json_object_get(json, "codec")), r->codec);
    assert_string_equal(json_string_value(json_object_get(json, "measured_on")), on);
    assert_int_equal(json_integer_value(json_object_get(json, "bytes")), r->bytes);
    assert_int_equal(json_integer_value(json_object_get(json, "linear_bytes")), r->linear_bytes);
    assert_int_equal(json_integer_value(json_object_get(json, "measured_tokens")),
                     r->measured_tokens);
    assert_int_equal(json_integer_value(json_object_get(json, "calibration_tokens")),
                     r->calibration_tokens);
    assert_int_equal(json_integer_value(json_object_get(json, "distill_steps")), r->distill_steps);
    expect_number(json, "ratio", r->ratio);
    expect_number(json, "linear_ratio", r->linear_ratio);
    expect_number(json, "relative_error", r->relative_error);
    expect_number(json, "predicted_kl", r->predicted_kl);
    expect_number(json, "measured_kl", r->measured_kl);
    expect_number(json, "answer_kl", r->answer_kl);
    expect_number(json, "held_out_loss", r->held_out_loss);
    expect_number(json, "tuned_loss", r->tuned_loss);
    assert_int_equal(json_array_size(json_object_get(matrices, "bytes")), 14);
    assert_int_equal(json_array_size(json_object_get(matrices, "relative_error")), 14);
    for (size_t i = 0; i < 14; i++)
        bytes += json_integer_value(json_array_get(json_object_get(matrices, "bytes"), i));
    assert_int_equal(bytes, r->linear_bytes);
    json_decref(json);
}

void taught_nothing_is_left(void)
{
    DIR *dir = opendir(taught.folder);
    struct dirent *entry;

    assert_non_null(dir);
    while ((entry = readdir(dir)) != NULL)
        if (strstr(entry->d_name, "delta.safetensors.") || strstr(entry->d_name, "draft"))
            fail_msg("%s was left behind", entry->d_name);
    closedir(dir);
}

static const char older[] = "an older delta";

void taught_put_older(void)
{
    CHECK(file_write_durable(taught.delta_path, older, sizeof older, &err));
}

void taught_expect_older(void)
{
    char *data;
    size_t len;

    CHECK(file_read_all(taught.delta_path, 1 << 24, &data, &len, &err));
    assert_int_equal(len, sizeof older);
    assert_memory_equal(data, older, len);
    free(data);
}

bool taught_on_progress(void *context, const char *stage, double share)
{
    struct taught_progress *told = context;

    assert_true(share >= 0 && share <= 1);
    if (strcmp(told->stage, stage) == 0) {
        assert_true(share >= told->share);
    } else {
        told->stages++;
        told->rounds -= told->stop && strcmp(told->stage, told->stop) == 0;
        snprintf(told->stage, sizeof told->stage, "%s", stage);
    }
    told->share = share;
    told->after += told->stop && told->rounds <= 0 && strcmp(stage, told->stop) == 0;
    return !told->after;
}

int taught_setup(void **state)
{
    char dir[128];

    json_text_setup();
    if (mkdtemp(taught.folder) == NULL)
        return -1;
    snprintf(dir, sizeof dir, "%s/base", taught.folder);
    snprintf(taught.base_path, sizeof taught.base_path, "%s/base.safetensors", taught.folder);
    snprintf(taught.tuned_dir, sizeof taught.tuned_dir, "%s/tuned", taught.folder);
    snprintf(taught.delta_path, sizeof taught.delta_path, "%s/delta.safetensors", taught.folder);
    snprintf(taught.other_path, sizeof taught.other_path, "%s/other.safetensors", taught.folder);
    CHECK(tiny_model_write(dir, &shape, &err));
    CHECK(engine_import(dir, taught.base_path, NULL, &err));
    write_tuned_elsewhere(dir);
    taught.engine = taught_engine(taught.base_path, 2);
    taught_rows(&taught.questions, "What suits", 12);
    taught_rows(&taught.reworded, "Who likes it,", 12);
    teach();
    return 0;
}

int taught_teardown(void **state)
{
    engine_trainer_free(taught.trainer);
    engine_dataset_free(taught.questions);
    engine_dataset_free(taught.reworded);
    engine_free(taught.engine);
    return file_remove_tree(taught.folder, NULL);
}
