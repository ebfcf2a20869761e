/* Adapters of peft: what is in one is what the delta holds, base + product is the tuned model of
 * every other codec, and what can not be taken is refused by name. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "engine/base/file_io.h"
#include "engine/base/json_text.h"
#include "engine/base/rng.h"
#include "engine/codec/artifact.h"
#include "engine/codec/lora.h"
#include "engine/codec/peft.h"
#include "engine/engine_parts.h"
#include "engine/safetensors.h"
#include "tests/unit/check.h"
#include "tests/unit/tiny_model.h"

static char folder[] = "/tmp/graft-lora-XXXXXX";
static char base_path[160], adapter_path[160], delta_path[160];
static struct engine *engine;
static struct artifact_tensor *tensor;
static int32_t count;

/* ------------------------------------------------------------------ an adapter */

#define Q0 "model.layers.0.self_attn.q_proj"
#define DOWN1 "model.layers.1.mlp.down_proj"
#define V1 "model.layers.1.self_attn.v_proj"

struct half {
    const char *name;
    enum dtype dtype;
    int64_t shape[2];
    float value; /* of all; 0: noise */
};

/* The pairs of an adapter of rank 3, F32, F16 and BF16; behind them whatever a test adds. */
static const struct half whole[] = {
    {"base_model.model." Q0 ".lora_A.weight", DTYPE_F32, {3, 0}, 0},
    {"base_model.model." Q0 ".lora_B.weight", DTYPE_F32, {0, 3}, 0},
    {"base_model.model." DOWN1 ".lora_A.weight", DTYPE_BF16, {3, 0}, 0},
    {"base_model.model." DOWN1 ".lora_B.weight", DTYPE_BF16, {0, 3}, 0},
    {"base_model.model." V1 ".lora_A.weight", DTYPE_F16, {3, 0}, 0},
    {"base_model.model." V1 ".lora_B.weight", DTYPE_F16, {0, 3}, 0},
};
enum { PAIRS = 3, HALVES = 2 * PAIRS };
#define CONFIG "{\"peft_type\": \"LORA\", \"r\": 3, \"lora_alpha\": 6, \"bias\": \"none\"}"

static int32_t index_of(const char *module)
{
    char name[MODEL_NAME_MAX + 8];

    snprintf(name, sizeof name, "%s.weight", module);
    for (int32_t i = 0; i < count; i++)
        if (strcmp(tensor[i].name, name) == 0)
            return i;
    fail_msg("no %s", name);
    return -1;
}

/* Its module's tensor of the base. */
static int32_t index_of_half(const struct half *h)
{
    char module[MODEL_NAME_MAX];
    const char *name = h->name + strlen("base_model.model.");

    snprintf(module, sizeof module, "%.*s", (int)(strstr(name, ".lora_") - name), name);
    return index_of(module);
}

static float value_of(const struct half *h, int64_t i)
{
    return h->value != 0 ? h->value : (float)rng_unit_at(5, strlen(h->name), (uint64_t)i) - 0.5f;
}

static void store(void *to, enum dtype dtype, int64_t i, float value)
{
    if (dtype == DTYPE_F32)
        ((float *)to)[i] = value;
    else
        ((uint16_t *)to)[i] = dtype == DTYPE_F16 ? f32_to_f16(value) : f32_to_bf16(value);
}

/* A side of 0 is what the base has there. */
static struct half fitted(struct half h)
{
    if (h.shape[0] == 0)
        h.shape[0] = tensor[index_of_half(&h)].rows;
    if (h.shape[1] == 0)
        h.shape[1] = tensor[index_of_half(&h)].cols;
    return h;
}

static void write_adapter(const char *config, const struct half *half, int halves)
{
    struct safetensors_writer *file;
    char path[240];

    mkdir(adapter_path, 0700);
    snprintf(path, sizeof path, "%s/adapter_config.json", adapter_path);
    CHECK(file_write_durable(path, config, strlen(config), &err));
    snprintf(path, sizeof path, "%s/adapter_model.safetensors", adapter_path);
    CHECK(safetensors_writer_open(&file, path, &err));
    for (int append = 0; append < 2; append++) {
        for (int wide = 1; wide >= 0; wide--)
            for (int i = 0; i < halves; i++) {
                struct half h = fitted(half[i]);
                int64_t elements = h.shape[0] * h.shape[1];
                char *data = calloc((size_t)elements, 4);

                for (int64_t k = 0; k < elements; k++)
                    store(data, h.dtype, k, value_of(&h, k));
                if ((h.dtype == DTYPE_F32) == wide && append)
                    CHECK(safetensors_writer_append(
                        file, data, (size_t)elements * (size_t)dtype_size(h.dtype), &err));
                else if ((h.dtype == DTYPE_F32) == wide)
                    CHECK(safetensors_writer_declare(file, h.name, h.dtype, 2, h.shape, &err));
                free(data);
            }
        if (!append)
            CHECK(safetensors_writer_begin(file, &err));
    }
    CHECK(safetensors_writer_finish(file, NULL, &err));
    safetensors_writer_free(file);
}

static double number_at(const struct half *h, int64_t i)
{
    float value;
    uint32_t bits = 0;
    struct tensor one = tensor_view(&bits, h->dtype, 1, (int64_t[]){1});

    store(&bits, h->dtype, 0, value_of(h, i));
    tensor_to_f32(&one, 0, 1, &value);
    return (double)value;
}

/* scale · B · A, in doubles. */
static double product(int pair, double scale, int64_t row, int64_t col)
{
    struct half down = fitted(whole[2 * pair]), up = fitted(whole[2 * pair + 1]);
    double sum = 0;

    for (int64_t v = 0; v < 3; v++)
        sum += number_at(&up, row * 3 + v) * number_at(&down, v * down.shape[1] + col);
    return scale * sum;
}

/* ------------------------------------------------------------------ compressions */

static struct engine_delta_report compress(const char *codec, double ratio)
{
    const struct engine_compress_options options = {
        .codec = codec, .ratio = ratio, .distill_steps = -1};
    struct engine_delta_report report;

    CHECK(engine_model_compress(engine, adapter_path, &options, delta_path, &report, &err));
    return report;
}

static void open_delta(struct artifact **artifact)
{
    const struct artifact_expectation want = {tensor, count, engine_info(engine)->digest};

    CHECK(artifact_open(artifact, delta_path, &want, &err));
}

static void expect_product(const struct artifact *artifact, double scale, double tolerance)
{
    double error = 0, norm = 0;

    for (int32_t i = 0; i < count; i++) {
        int64_t cols = tensor[i].cols;
        float *got = malloc((size_t)tensor[i].rows * (size_t)cols * sizeof *got);
        int pair = -1;

        for (int p = 0; p < PAIRS; p++)
            pair = index_of_half(&whole[2 * p]) == i ? p : pair;
        assert_true((pair >= 0) == (artifact_parts(artifact, i) != NULL));
        CHECK(artifact_expand(artifact, i, got, &err));
        for (int64_t k = 0; pair >= 0 && k < tensor[i].rows * cols; k++) {
            double want = product(pair, scale, k / cols, k % cols);

            error += ((double)got[k] - want) * ((double)got[k] - want);
            norm += want * want;
        }
        free(got);
    }
    assert_true(norm > 0 && sqrt(error / norm) <= tolerance);
}

/* The adapter's own bytes, under other names. */
static void an_adapter_is_imported_as_it_is(void **state)
{
    struct engine_delta_report report;
    struct artifact *artifact;

    write_adapter(CONFIG, whole, HALVES);
    report = compress("lora", 0);
    assert_string_equal(report.codec, "lora");
    assert_true(report.relative_error == 0);
    open_delta(&artifact);
    for (int p = 0; p < PAIRS; p++) {
        const struct tensor *part = artifact_parts(artifact, index_of_half(&whole[2 * p]));

        assert_non_null(part);
        for (int k = 0; k < 2; k++) {
            struct half h = fitted(whole[2 * p + k]);
            const struct tensor *got = &part[k ? LORA_UP : LORA_DOWN];
            int64_t elements = h.shape[0] * h.shape[1];
            char *want = calloc((size_t)elements, 4);

            assert_int_equal(got->dtype, h.dtype);
            assert_memory_equal(got->shape, h.shape, sizeof h.shape);
            for (int64_t i = 0; i < elements; i++)
                store(want, h.dtype, i, value_of(&h, i));
            assert_memory_equal(got->data, want, (size_t)elements * (size_t)dtype_size(h.dtype));
            free(want);
        }
    }
    expect_product(artifact, 2, 1e-6);
    artifact_free(artifact);
}

/* ------------------------------------------------------------------ scales */

static void expect_scales(const char *config, double q0, double down1, double v1)
{
    const double want[PAIRS] = {q0, down1, v1};
    struct artifact *artifact;

    write_adapter(config, whole, HALVES);
    compress("lora", 0);
    open_delta(&artifact);
    for (int p = 0; p < PAIRS; p++) {
        const struct tensor *part = artifact_parts(artifact, index_of_half(&whole[2 * p]));

        assert_true(*(const float *)part[LORA_SCALE].data == (float)want[p]);
    }
    artifact_free(artifact);
}

static void scales_are_those_of_peft(void **state)
{
    const double root = 6 / sqrt(3);

    expect_scales("{\"peft_type\":\"LORA\",\"r\":3,\"lora_alpha\":6,\"use_rslora\":true}", root,
                  root, root);
    expect_scales("{\"peft_type\":\"LORA\",\"r\":3,\"lora_alpha\":0.75,\"use_dora\":false,"
                  "\"loftq_config\":{},\"eva_config\":{\"rho\":2},"
                  "\"modules_to_save\":null,\"init_lora_weights\":\"gaussian\"}",
                  0.25, 0.25, 0.25);
    /* Shapes have each pair's own rank; a name may begin behind any dot. */
    expect_scales("{\"peft_type\":\"LORA\",\"r\":8,\"lora_alpha\":6,\"rank_pattern\":{\"x\":3},"
                  "\"alpha_pattern\":{\"j_proj\":90,\"self_attn.q_proj\":12,"
                  "\"^self_attn.v_proj\":90,\"^" V1 "\":24,\"v_proj\":90}}",
                  4, 2, 8);
}

/* ------------------------------------------------------------------ other codecs */

static void other_codecs_compress_base_and_product(void **state)
{
    struct engine_delta_report report;
    struct artifact *artifact;

    write_adapter(CONFIG, whole, HALVES);
    compress("lossless", 0);
    open_delta(&artifact);
    expect_product(artifact, 2, 1e-6);
    artifact_free(artifact);
    report = compress("graft", 0);
    assert_true(report.relative_error > 0 && report.relative_error < 0.5);
    open_delta(&artifact);
    expect_product(artifact, 2, report.relative_error + 1e-3);
    artifact_free(artifact);
    report = compress("bitdelta", 0);
    assert_true(report.relative_error > 0.1 && report.relative_error < 1);
}

/* What the adapter is worth is measured against base + product, run: served from lora's file it is
 * the same model, from bitdelta's it is not. */
static void the_model_of_an_adapter_runs(void **state)
{
    static const char *const codecs[] = {"lora", "bitdelta"};
    char path[200], text[6000] = "";
    struct engine_dataset *rows;
    struct engine_dataset_report read;
    size_t at = 0;

    write_adapter(CONFIG, whole, HALVES);
    snprintf(path, sizeof path, "%s/rows.jsonl", folder);
    for (int i = 0; i < 20; i++)
        at += (size_t)snprintf(text + at, sizeof text - at,
                               "{\"messages\": [{\"role\": \"user\", \"content\": \"box %d\"}, "
                               "{\"role\": \"assistant\", \"content\": \"shelf %d\"}]}\n",
                               i, 3 * i);
    CHECK(file_write_durable(path, text, at, &err));
    CHECK(engine_dataset_open(
        &rows, engine, path,
        &(struct engine_dataset_options){.file_id = "rows", .validation = true}, &read, &err));
    for (int i = 0; i < 2; i++) {
        const struct engine_compress_options options = {.codec = codecs[i], .held_out = rows};
        struct engine_delta_report report;

        CHECK(engine_model_compress(engine, adapter_path, &options, delta_path, &report, &err));
        assert_true(report.measured_tokens > 100);
        if (i == 0)
            assert_true(report.measured_kl >= 0 && report.measured_kl < 1e-8);
        else
            assert_true(report.measured_kl > 1e-5);
    }
    engine_dataset_free(rows);
}

/* ------------------------------------------------------------------ refusals */

static void expect_refused(const char *what)
{
    struct peft *peft;
    struct err err = {0};

    assert_int_equal(peft_open(&peft, adapter_path, tensor, count, &err), -1);
    assert_null(peft);
    assert_int_equal(err.kind, ERR_INVALID);
    if (!strstr(err.message, what))
        fail_msg("\"%s\" is not in \"%s\"", what, err.message);
    if (!strstr(err.message, adapter_path))
        fail_msg("\"%s\" does not name the adapter", err.message);
}

static void adapters_of_other_kinds_are_refused_by_name(void **state)
{
    static const struct {
        const char *config, *what;
    } cases[] = {
        {"{\"peft_type\": \"IA3\"}", "\"peft_type\" is IA3"},
        {"{}", "\"peft_type\" is missing"},
        {"[]", "it is not an object"},
        {"{\"peft_type\": \"LORA\",", "adapter_config.json"},
        {"{\"peft_type\": \"LORA\", \"bias\": \"all\"}", "\"bias\" is all"},
        {"{\"peft_type\": \"LORA\", \"bias\": 1}", "\"bias\" is not a text"},
        {"{\"peft_type\": \"LORA\", \"use_dora\": true}", "\"use_dora\" is set"},
        {"{\"peft_type\": \"LORA\", \"use_qalora\": true}", "\"use_qalora\" is set"},
        {"{\"peft_type\": \"LORA\", \"kasa_config\": {\"a\": 1}}", "\"kasa_config\" is set"},
        {"{\"peft_type\": \"LORA\", \"fan_in_fan_out\": true}", "\"fan_in_fan_out\" is set"},
        {"{\"peft_type\": \"LORA\", \"modules_to_save\": [\"lm_head\"]}",
         "\"modules_to_save\" is set"},
        {"{\"peft_type\": \"LORA\", \"lora_bias\": true}", "\"lora_bias\" is set"},
        {"{\"peft_type\": \"LORA\", \"layer_replication\": [[0, 4]]}", "\"layer_replication\""},
        {"{\"peft_type\": \"LORA\", \"init_lora_weights\": \"pissa\"}",
         "is pissa: such a beginning"},
        {"{\"peft_type\": \"LORA\", \"init_lora_weights\": 3}", "is not a text: such a beginning"},
        {"{\"peft_type\": \"LORA\", \"alpha_pattern\": {\"q.*\": 3}}", "\"q.*\" is a regular"},
        {"{\"peft_type\": \"LORA\", \"alpha_pattern\": {\"q\": true}}", "\"q\" is not a number"},
        {"{\"peft_type\": \"LORA\", \"rank_pattern\": [1]}", "\"rank_pattern\" is not an object"},
        {"{\"peft_type\": \"LORA\", \"lora_alpha\": 6}", "\"r\" is not a rank"},
        {"{\"peft_type\": \"LORA\", \"r\": 0, \"lora_alpha\": 6}", "\"r\" is not a rank"},
        {"{\"peft_type\": \"LORA\", \"r\": 3.5, \"lora_alpha\": 6}", "\"r\" is not a rank"},
        {"{\"peft_type\": \"LORA\", \"r\": 3}", "\"lora_alpha\" is not a number"},
        {"{\"peft_type\": \"LORA\", \"r\": 3, \"lora_alpha\": 0}", "\"scale\" is 0"},
        {"{\"peft_type\": \"LORA\", \"r\": 3, \"lora_alpha\": 1e300}", "\"scale\" is inf"},
        {"{\"peft_type\": \"LORA\", \"r\": 4, \"lora_alpha\": 6}", "rank 3, but \"r\""},
    };

    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        write_adapter(cases[i].config, whole, HALVES);
        expect_refused(cases[i].what);
    }
}

static void tensors_that_do_not_belong_are_refused_by_name(void **state)
{
    static const struct {
        struct half half;
        const char *what;
    } cases[] = {
        {{"base_model.model.lm_head.weight", DTYPE_F32, {2, 2}, 0},
         "lm_head.weight\": it is neither"},
        {{"base_model.model." Q0 ".lora_magnitude_vector", DTYPE_F32, {1, 2}, 0}, "it is neither"},
        {{Q0 ".lora_A.weight", DTYPE_F32, {3, 3}, 0}, "it is neither"},
        {{"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight", DTYPE_F32, {3, 3}, 0},
         "no layer \"model.layers.9.mlp.up_proj\""},
        {{"base_model.model.model.embed_tokens.lora_A.weight", DTYPE_F32, {3, 0}, 0},
         "not a linear layer inside the blocks"},
        {{"base_model.model.model.norm.lora_A.weight", DTYPE_F32, {3, 0}, 0}, "target_modules"},
        {{"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", DTYPE_F32, {3, 7}, 0},
         "trained on another base"},
        {{"base_model.model.model.layers.0.mlp.up_proj.lora_B.weight", DTYPE_F32, {7, 3}, 0},
         "trained on another base"},
        {{"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", DTYPE_F32, {2, 0}, 0},
         "it has rank 2"},
        {{"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", DTYPE_F32, {3, 0}, 0},
         "lora_B.weight is missing"},
        {{"base_model.model.model.layers.0.mlp.up_proj.lora_B.weight", DTYPE_F32, {0, 3}, 0},
         "lora_A.weight is missing"},
    };
    struct half more[HALVES + 1];

    memcpy(more, whole, sizeof whole);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        more[HALVES] = cases[i].half;
        write_adapter(CONFIG, more, HALVES + 1);
        expect_refused(cases[i].what);
    }
    write_adapter(CONFIG, whole, 0);
    expect_refused("no pair");
}

static void values_that_are_no_numbers_are_refused(void **state)
{
    static const struct {
        int half;
        float value;
        const char *what;
    } cases[] = {
        {0, NAN, "\"down\" holds a value that is not finite"},
        {1, INFINITY, "\"up\" holds a value that is not finite"},
        {3, INFINITY, "\"up\" holds a value"},
        {4, NAN, "\"down\" holds a value"},
        {0, 3e38f, "too large to multiply"},
    };
    struct half bad[HALVES];

    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        memcpy(bad, whole, sizeof whole);
        bad[cases[i].half].value = cases[i].value;
        write_adapter(CONFIG, bad, HALVES);
        expect_refused(cases[i].what);
    }
    bad[0].value = 1;
}

static void a_directory_without_weights_is_refused(void **state)
{
    char path[240];

    write_adapter(CONFIG, whole, HALVES);
    snprintf(path, sizeof path, "%s/adapter_model.safetensors", adapter_path);
    assert_int_equal(unlink(path), 0);
    expect_refused("safe_serialization");
    snprintf(path, sizeof path, "%s/adapter_config.json", adapter_path);
    assert_true(peft_is_adapter(adapter_path));
    assert_int_equal(unlink(path), 0);
    assert_false(peft_is_adapter(adapter_path));
}

/* Each bit of both files, and each length. */
static void damaged_adapters_do_no_harm(void **state)
{
    char path[240], *config, *weights;
    struct peft_files files = {0};
    size_t opened = 0;

    write_adapter(CONFIG, whole, 4);
    snprintf(path, sizeof path, "%s/adapter_config.json", adapter_path);
    CHECK(file_read_all(path, 1 << 20, &config, &files.config_len, &err));
    snprintf(path, sizeof path, "%s/adapter_model.safetensors", adapter_path);
    CHECK(file_read_all(path, 1 << 20, &weights, &files.weights_len, &err));
    files.config = config;
    files.weights = weights;
    for (size_t bit = 0; bit < 8 * (files.config_len + 600); bit++) {
        size_t at = bit / 8;
        char *byte = at < files.config_len ? config + at : weights + (at - files.config_len);
        struct peft *peft;
        struct err err = {0};

        *byte ^= (char)(1 << bit % 8);
        if (peft_open_memory(&peft, &files, tensor, count, &err) == 0)
            opened++;
        else
            assert_int_equal(err.kind, ERR_INVALID);
        peft_free(peft);
        *byte ^= (char)(1 << bit % 8);
    }
    assert_true(opened > 0 && opened < 8 * (files.config_len + 600));
    for (size_t len = 0, all = files.weights_len; len < all; len += 1 + len / 600 * 97) {
        struct peft *peft;

        files.weights_len = len;
        assert_int_equal(peft_open_memory(&peft, &files, tensor, count, NULL), -1);
    }
    free(config);
    free(weights);
}

static void what_lora_can_not_do_is_said(void **state)
{
    struct engine_compress_options options = {.codec = "lora", .distill_steps = -1};
    struct engine_delta_report report;
    struct engine_delta_size least;
    struct err err = {0};

    assert_int_equal(engine_model_compress(engine, base_path, &options, delta_path, &report, &err),
                     -1);
    assert_int_equal(err.kind, ERR_INVALID);
    assert_non_null(strstr(err.message, "adapter_config.json"));
    assert_non_null(strstr(err.message, engine_codec_makers()));
    write_adapter(CONFIG, whole, HALVES);
    options.ratio = 16;
    err_clear(&err);
    assert_int_equal(
        engine_model_compress(engine, adapter_path, &options, delta_path, &report, &err), -1);
    assert_non_null(strstr(err.message, "lora has the size that comes of what it keeps"));
    err_clear(&err);
    assert_int_equal(engine_delta_least(base_path, "lora", false, &least, &err), -1);
    assert_int_equal(err.kind, ERR_INVALID);
    assert_true(engine_codec_known("lora") && !engine_codec_makes("lora"));
    assert_true(engine_codec_makes("graft") && !engine_codec_makes("zip"));
}

/* ------------------------------------------------------------------ parts from a file */

static void parts_that_are_not_sound_are_refused(void **state)
{
    float scale = 1, value[64] = {1};
    struct tensor good[LORA_PARTS] = {
        [LORA_SCALE] = tensor_view(&scale, DTYPE_F32, 1, (int64_t[]){1}),
        [LORA_DOWN] = tensor_view(value, DTYPE_F32, 2, (int64_t[]){2, 5}),
        [LORA_UP] = tensor_view(value, DTYPE_F32, 2, (int64_t[]){3, 2})};

    CHECK(codec_lora.accept(good, 3, 5, &err));
    assert_int_equal(codec_lora.accept(good, 5, 3, NULL), -1);
    for (int i = 0; i < 9; i++) {
        struct tensor part[LORA_PARTS];

        memcpy(part, good, sizeof part);
        scale = i == 0 ? 0 : i == 1 ? NAN : 1;
        value[3] = i == 2 ? INFINITY : 0;
        if (i == 3)
            part[LORA_SCALE].dtype = DTYPE_I32;
        if (i == 4)
            part[LORA_DOWN].dtype = DTYPE_U8;
        if (i == 5)
            part[LORA_UP].shape[1] = 1;
        if (i == 6)
            part[LORA_DOWN].shape[0] = part[LORA_UP].shape[1] = 0;
        if (i == 7)
            part[LORA_SCALE].shape[0] = 2;
        if (i == 8)
            part[LORA_DOWN].rank = 1;
        assert_int_equal(codec_lora.accept(part, 3, 5, NULL), -1);
    }
}

static void write_pair(const char *config, int64_t rank)
{
    struct half pair[] = {whole[0], whole[1]};

    pair[0].shape[0] = pair[1].shape[1] = rank;
    write_adapter(config, pair, 2);
}

/* In a delta and in an adapter, by its "r" or where each pair has its own; one more is refused. */
static void the_highest_rank_is_taken(void **state)
{
    static const char *const config[2][2] = {
        {"{\"peft_type\": \"LORA\", \"lora_alpha\": 6, \"r\": 4096}",
         "{\"peft_type\": \"LORA\", \"lora_alpha\": 6, \"r\": 4097}"},
        {"{\"peft_type\": \"LORA\", \"lora_alpha\": 6, \"r\": 8, \"rank_pattern\": {\"x\": 4096}}",
         "{\"peft_type\": \"LORA\", \"lora_alpha\": 6, \"r\": 8, \"rank_pattern\": {\"x\": 4097}}"},
    };
    static float value[3 * 4097];
    float scale = 1;

    for (int more = 0; more < 2; more++) {
        int64_t rank = 4096 + more; /* api-spec/deltas.md */
        const struct tensor part[LORA_PARTS] = {
            [LORA_SCALE] = tensor_view(&scale, DTYPE_F32, 1, (int64_t[]){1}),
            [LORA_DOWN] = tensor_view(value, DTYPE_F32, 2, (int64_t[]){rank, 1}),
            [LORA_UP] = tensor_view(value, DTYPE_F32, 2, (int64_t[]){3, rank})};

        assert_int_equal(codec_lora.accept(part, 3, 1, NULL), more ? -1 : 0);
        for (int i = 0; i < 2; i++) {
            struct peft *peft;

            write_pair(config[i][more], rank);
            if (more) {
                expect_refused(i ? "rank 4097: 1 to 4096" : "rank of 1 to 4096");
                continue;
            }
            CHECK(peft_open(&peft, adapter_path, tensor, count, &err));
            peft_free(peft);
        }
    }
}

static int setup(void **state)
{
    const struct engine_options options = {.device = "cpu", .threads = 2};
    const struct tiny_model model = {.context = 512, .seed = 3};
    char source[160];

    json_text_setup();
    if (!mkdtemp(folder))
        return -1;
    snprintf(source, sizeof source, "%s/hf", folder);
    snprintf(base_path, sizeof base_path, "%s/base.safetensors", folder);
    snprintf(adapter_path, sizeof adapter_path, "%s/adapter", folder);
    snprintf(delta_path, sizeof delta_path, "%s/delta.safetensors", folder);
    CHECK(tiny_model_write(source, &model, &err));
    CHECK(engine_import(source, base_path, NULL, &err));
    CHECK(engine_open(&engine, base_path, &options, &err));
    CHECK(artifact_tensors_of_model(engine->model, &tensor, &count, &err));
    return 0;
}

static int teardown(void **state)
{
    free(tensor);
    engine_free(engine);
    return file_remove_tree(folder, NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(an_adapter_is_imported_as_it_is),
        cmocka_unit_test(scales_are_those_of_peft),
        cmocka_unit_test(other_codecs_compress_base_and_product),
        cmocka_unit_test(the_model_of_an_adapter_runs),
        cmocka_unit_test(adapters_of_other_kinds_are_refused_by_name),
        cmocka_unit_test(tensors_that_do_not_belong_are_refused_by_name),
        cmocka_unit_test(values_that_are_no_numbers_are_refused),
        cmocka_unit_test(a_directory_without_weights_is_refused),
        cmocka_unit_test(damaged_adapters_do_no_harm),
        cmocka_unit_test(what_lora_can_not_do_is_said),
        cmocka_unit_test(parts_that_are_not_sound_are_refused),
        cmocka_unit_test(the_highest_rank_is_taken),
    };

    return cmocka_run_group_tests_name("lora", tests, setup, teardown);
}
