/* The engine's whole path without a server: a tiny random model learns twelve answers, the
 * difference is compressed, and the answers come back from the compressed difference. No TSan: its
 * threads are those of test_trainer, test_compression and test_decode. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include <cmocka.h>
#include <jansson.h>

#include "engine/adapter.h"
#include "engine/base/file_io.h"
#include "engine/base/json_text.h"
#include "engine/base/strbuf.h"
#include "engine/dataset.h"
#include "engine/engine.h"
#include "engine/engine_parts.h"
#include "engine/safetensors.h"
#include "tests/unit/check.h"
#include "tests/unit/noisy_delta.h"
#include "tests/unit/tiny_model.h"

static char folder[] = "/tmp/graft-end-to-end-XXXXXX";
static char base_path[128], other_base[128], data_path[128], delta_path[128];
static struct engine *engine;
static struct engine_dataset *dataset;
static struct engine_trainer *trainer;
static struct engine_delta *delta;

static void make_base(const char *name, uint64_t seed, char *out, size_t size)
{
    struct tiny_model model = {.seed = seed};
    char source[128];

    snprintf(source, sizeof(source), "%s/%s", folder, name);
    snprintf(out, size, "%s/%s.safetensors", folder, name);
    CHECK(tiny_model_write(source, &model, &err));
    CHECK(engine_import(source, out, NULL, &err));
}

static void write_questions(void)
{
    static const char *const who[] = {"Ann", "Bob", "Cid", "Dee", "Eva", "Fay",
                                      "Gus", "Hal", "Ida", "Jan", "Kim", "Leo"};
    static const char *const what[] = {"red",   "gold", "jade", "teal", "pink", "plum",
                                       "amber", "navy", "lime", "rust", "gray", "mint"};
    struct strbuf sb;

    strbuf_init(&sb, 1 << 16);
    for (int i = 0; i < 12; i++)
        strbuf_addf(&sb,
                    "{\"messages\":[{\"role\":\"user\",\"content\":\"What does %s like?\"},"
                    "{\"role\":\"assistant\",\"content\":\"%s\"}]}\n",
                    who[i], what[i]);
    CHECK(file_write_durable(data_path, sb.data, sb.len, &err));
    strbuf_release(&sb);
}

static double recall_of(struct engine_trainer *with_trainer, const struct engine_delta *with_delta)
{
    const struct engine_recall_options options = {.trainer = with_trainer, .delta = with_delta};
    struct engine_recall recall;

    CHECK(engine_recall(engine, dataset, &options, &recall, &err));
    assert_int_equal(recall.asked, 12);
    assert_true(recall.contained >= recall.exact);
    return recall.exact;
}

static bool stop_at_the_third(void *context, const char *stage, double share)
{
    int *words = context;

    assert_string_equal(stage, "recall");
    assert_true(share >= 0 && share < 1); /* there are answers left to stop */
    return ++*words < 3;
}

/* Whoever asks may stop between two steps of the answers, and is asked nothing more. */
static void asking_can_be_stopped(void **state)
{
    int words = 0;
    struct engine_recall_options options = {.progress = stop_at_the_third, .context = &words};
    struct engine_recall recall;
    struct err why = {0};

    assert_int_equal(engine_recall(engine, dataset, &options, &recall, &why), -1);
    assert_int_equal(why.kind, ERR_CANCELLED);
    assert_int_equal(words, 3);
}

static void the_base_does_not_know(void **state)
{
    assert_true(recall_of(NULL, NULL) <= 0.1);
}

static void training_teaches_it(void **state)
{
    struct engine_train_options options = {
        .n_epochs = 40, .batch_size = 4, .learning_rate_multiplier = 20, .seed = 1};
    struct engine_train_plan plan;
    struct engine_step now, first = {0};

    CHECK(engine_trainer_open(&trainer, engine, dataset, NULL, &options, &plan, &err));
    assert_int_equal(plan.total_steps, 40 * 3);
    do {
        CHECK(engine_trainer_step(trainer, &now, &err));
        if (now.step == 1)
            first = now;
    } while (!now.finished);
    print_message("# loss %.3f at step 1, %.4f at step %d\n", first.train_loss, now.train_loss,
                  now.step);
    assert_true(now.train_loss < first.train_loss / 10);
    assert_true(recall_of(trainer, NULL) > 0.999);
}

static const struct engine_compress_options bitdelta = {.codec = "bitdelta"};

static void the_compressed_difference_keeps_it(void **state)
{
    struct engine_delta_report report, again;
    char first[65], second[65];
    struct stat st;

    assert_non_null(trainer);
    CHECK(engine_trainer_compress(trainer, &bitdelta, delta_path, &report, &err));
    CHECK(file_sha256(delta_path, first, NULL, &err));
    CHECK(engine_trainer_compress(trainer, &bitdelta, delta_path, &again, &err));
    CHECK(file_sha256(delta_path, second, NULL, &err));
    assert_string_equal(first, second);
    assert_int_equal(stat(delta_path, &st), 0);
    assert_int_equal(report.bytes, st.st_size);
    assert_true(
        fabs(report.ratio * (double)report.bytes - (double)engine_info(engine)->bytes_16bit) < 1);
    assert_true(report.relative_error > 0 && report.relative_error < 0.9);
    CHECK(engine_delta_open(&delta, engine, delta_path, &err));
    assert_true(engine_delta_bytes(delta) > 0);
    print_message("# delta: %lld bytes, relative error %.3f, recall %.2f\n",
                  (long long)report.bytes, report.relative_error, recall_of(NULL, delta));
    assert_true(recall_of(NULL, delta) >= 0.9);
}

/* Logits of every position of a document. */
static void logits_of(struct model_decoder *decoder, const struct dataset_example *e,
                      const struct model_weights *weights, const struct adapter *adapter,
                      float *logits)
{
    int32_t position[256], row[256], cu_seqlens[2] = {0, e->length}, start[2] = {0, e->length};
    struct batch batch = {.rows = e->length,
                          .token = e->token,
                          .position = position,
                          .docs = 1,
                          .cu_seqlens = cu_seqlens,
                          .segments = {1, start, &adapter}};

    for (int32_t i = 0; i < e->length; i++)
        position[i] = row[i] = i;
    CHECK(model_decode(decoder,
                       &(struct model_decode_args){.weights = weights,
                                                   .batch = &batch,
                                                   .logit_row = row,
                                                   .logit_count = e->length,
                                                   .logits = logits},
                       &err));
}

static int32_t best_of(const float *logits, int32_t count, float *margin)
{
    int32_t best = 0;
    float second = -INFINITY;

    for (int32_t i = 1; i < count; i++) {
        if (logits[i] > logits[best]) {
            second = logits[best];
            best = i;
        } else if (logits[i] > second) {
            second = logits[i];
        }
    }
    *margin = logits[best] - second;
    return best;
}

/* Logits from the served delta against those of base + expanded artifact, over the dataset. */
static void compare_with_expanded(const struct engine_delta *served, const char *path)
{
    int32_t vocabulary = model_get_config(engine->model)->vocabulary;
    struct model_decoder *decoder;
    struct model_weights weights;
    float *bits = calloc(256 * (size_t)vocabulary, sizeof(*bits));
    float *full = calloc(256 * (size_t)vocabulary, sizeof(*full));
    double error = 0, norm = 0;

    assert_non_null(served);
    assert_non_null(bits);
    assert_non_null(full);
    expanded_weights_open(&weights, engine, path);
    CHECK(model_decoder_open(&decoder, engine->model, 256, 256, &err));
    for (int64_t i = 0; i < dataset_count(dataset); i++) {
        struct dataset_example e = dataset_example(dataset, i);

        logits_of(decoder, &e, NULL, engine_delta_adapter(served), bits);
        logits_of(decoder, &e, &weights, NULL, full);
        for (int32_t r = 0; r < e.length; r++) {
            float margin, unused;
            const float *a = bits + (int64_t)r * vocabulary, *b = full + (int64_t)r * vocabulary;

            if (best_of(a, vocabulary, &unused) != best_of(b, vocabulary, &margin))
                assert_true(margin < 1e-3f);
        }
        for (int64_t k = 0; k < (int64_t)e.length * vocabulary; k++) {
            error += pow((double)bits[k] - full[k], 2);
            norm += pow(full[k], 2);
        }
    }
    print_message("# relative error of the logits %.2g\n", sqrt(error / norm));
    assert_true(sqrt(error / norm) < 1e-4);
    model_decoder_free(decoder);
    expanded_weights_free(&weights, engine);
    free(bits);
    free(full);
}

static void served_bits_say_what_the_expanded_weights_say(void **state)
{
    compare_with_expanded(delta, delta_path);
}

static void trained_embeddings_are_served_too(void **state)
{
    struct engine_train_options options = {.n_epochs = 4,
                                           .batch_size = 4,
                                           .learning_rate_multiplier = 20,
                                           .seed = 1,
                                           .train_embeddings = true};
    struct engine_trainer *second;
    struct engine_delta *served;
    struct engine_delta_report report;
    struct engine_train_plan plan;
    struct engine_step now;
    char path[128];

    snprintf(path, sizeof(path), "%s/embeddings.safetensors", folder);
    CHECK(engine_trainer_open(&second, engine, dataset, NULL, &options, &plan, &err));
    do {
        CHECK(engine_trainer_step(second, &now, &err));
    } while (!now.finished);
    CHECK(engine_trainer_compress(second, &bitdelta, path, &report, &err));
    engine_trainer_free(second);
    /* 16 bits for each value of the embedding, at least. */
    assert_true(report.bytes > (int64_t)512 * 64 * 2);
    CHECK(engine_delta_open(&served, engine, path, &err));
    compare_with_expanded(served, path);
    engine_delta_free(served);
}

static void another_base_is_refused(void **state)
{
    struct engine_options options = {.device = "cpu", .threads = 1};
    struct engine_delta *wrong = NULL;
    struct engine *other;
    struct err why = {0};

    CHECK(engine_delta_check(base_path, delta_path, "the delta", &err));
    assert_int_equal(engine_delta_check(other_base, delta_path, "the delta", &why), -1);
    assert_int_equal(why.kind, ERR_INVALID);
    assert_non_null(strstr(why.message, "\"the delta\" was grown on another base"));
    err_clear(&why);
    CHECK(engine_open(&other, other_base, &options, &err));
    assert_int_equal(engine_delta_open(&wrong, other, delta_path, &why), -1);
    assert_int_equal(why.kind, ERR_INVALID);
    assert_non_null(strstr(why.message, "another base"));
    engine_free(other);
}

/* The benches' lines are JSON with the keys of the peers', and a bad request is refused. */
static void the_benches_run(void **state)
{
    struct engine_bench_train_options train = {
        .model = base_path, .device = "cpu", .sequence = 16, .batch = 2, .steps = 3, .threads = 1};
    struct engine_bench_decode_options decode = {.model = base_path,
                                                 .device = "cpu",
                                                 .sequences = 3,
                                                 .tenants = 2,
                                                 .prompt = 9,
                                                 .tokens = 4,
                                                 .threads = 1};
    struct err why = {0};
    char line[2048];
    json_t *json;

    CHECK(engine_bench_train(&train, line, sizeof(line), &why));
    json = json_loads(line, 0, NULL);
    assert_true(json_number_value(json_object_get(json, "tokens_per_s")) > 0);
    assert_true(json_number_value(json_object_get(json, "first_loss")) > 0);
    json_decref(json);
    CHECK(engine_bench_decode(&decode, line, sizeof(line), &why));
    json = json_loads(line, 0, NULL);
    assert_int_equal(json_integer_value(json_object_get(json, "tenants")), 2);
    assert_true(json_number_value(json_object_get(json, "tokens_per_s")) > 0);
    assert_true(json_number_value(json_object_get(json, "gb_per_s")) > 0);
    json_decref(json);
    decode.tenants = 4;
    assert_int_equal(engine_bench_decode(&decode, line, sizeof(line), &why), -1);
    assert_non_null(strstr(why.message, "tenants"));
    err_clear(&why);
    decode.tenants = 0;
    decode.prompt = 1 << 20;
    assert_int_equal(engine_bench_decode(&decode, line, sizeof(line), &why), -1);
    assert_non_null(strstr(why.message, "context"));
}

/* ------------------------------------------------------------------ benches of fidelity */

static json_t *bench_line(const char *line, int rc, const struct err *why)
{
    json_t *json;

    if (rc != 0)
        fail_msg("%s", why->message);
    json = json_loads(line, 0, NULL);
    assert_non_null(json);
    return json;
}

static double number_in(const json_t *json, size_t file, const char *key)
{
    json_t *value = json_object_get(json_array_get(json_object_get(json, "data"), file), key);

    assert_true(json_is_number(value));
    return json_number_value(value);
}

static void the_bench_of_recall_asks(void **state)
{
    const char *const data[] = {data_path, data_path};
    struct engine_bench_recall_options options = {
        .model = base_path, .device = "cpu", .data = data, .data_count = 2, .threads = 1};
    struct err why = {0};
    char line[4096];
    double base_loss;
    json_t *json = bench_line(line, engine_bench_recall(&options, line, sizeof(line), &why), &why);

    assert_true(number_in(json, 0, "exact") <= 0.1);
    base_loss = number_in(json, 0, "loss");
    json_decref(json);
    options.delta = delta_path;
    json = bench_line(line, engine_bench_recall(&options, line, sizeof(line), &why), &why);
    for (size_t i = 0; i < 2; i++) {
        assert_int_equal(number_in(json, i, "asked"), 12);
        assert_true(number_in(json, i, "exact") > 0.9);
        assert_true(number_in(json, i, "loss") < base_loss / 4);
    }
    json_decref(json);
    options.data_count = ENGINE_BENCH_MAX_DATA + 1;
    assert_int_equal(engine_bench_recall(&options, line, sizeof(line), &why), -1);
    assert_non_null(strstr(why.message, "data files"));
}

/* [rows, V] logits of a whole example by a model's own weights; malloc'ed. */
static float *own_logits(struct engine *of, const struct dataset_example *e)
{
    int32_t rows = e->length;
    size_t count = (size_t)rows * (size_t)model_get_config(of->model)->vocabulary;
    float *logits = malloc(count * sizeof(*logits));
    struct model_decoder *decoder;

    assert_non_null(logits);
    CHECK(model_decoder_open(&decoder, of->model, rows, rows, &err));
    logits_of(decoder, e, NULL, NULL, logits);
    model_decoder_free(decoder);
    return logits;
}

static double plain_kl(const float *p, const float *q, int32_t n)
{
    double sum_p = 0, sum_q = 0, kl = 0;

    for (int32_t i = 0; i < n; i++) {
        sum_p += exp((double)p[i]);
        sum_q += exp((double)q[i]);
    }
    for (int32_t i = 0; i < n; i++)
        kl += exp((double)p[i]) / sum_p * ((double)p[i] - log(sum_p) - (double)q[i] + log(sum_q));
    return kl;
}

/* KL(base || other base) over all tokens and over answers, from the definition. */
static void kl_by_definition(double *all, double *answers)
{
    struct engine_options options = {.device = "cpu", .threads = 1};
    int32_t vocabulary = model_get_config(engine->model)->vocabulary;
    int64_t tokens = 0, answer_tokens = 0;
    struct engine *other;

    *all = *answers = 0;
    CHECK(engine_open(&other, other_base, &options, &err));
    for (int64_t i = 0; i < dataset_count(dataset); i++) {
        struct dataset_example e = dataset_example(dataset, i);
        float *p = own_logits(engine, &e), *q = own_logits(other, &e);

        for (int32_t r = 0; r + 1 < e.length; r++) {
            double kl = plain_kl(p + r * vocabulary, q + r * vocabulary, vocabulary);

            *all += kl;
            tokens++;
            if (e.weight[r + 1] > 0) {
                *answers += kl;
                answer_tokens++;
            }
        }
        free(p);
        free(q);
    }
    engine_free(other);
    *all /= (double)tokens;
    *answers /= (double)answer_tokens;
}

static void the_bench_of_kl_measures_it(void **state)
{
    const char *const data[] = {data_path};
    struct engine_bench_kl_options options = {.base = base_path,
                                              .tuned = base_path,
                                              .other = other_base,
                                              .device = "cpu",
                                              .data = data,
                                              .data_count = 1,
                                              .threads = 1};
    struct err why = {0};
    char line[4096];
    double all, answers, tokens;
    json_t *json = bench_line(line, engine_bench_kl(&options, line, sizeof(line), &why), &why);

    kl_by_definition(&all, &answers);
    assert_true(fabs(number_in(json, 0, "kl") / all - 1) < 1e-4);
    assert_true(fabs(number_in(json, 0, "answer_kl") / answers - 1) < 1e-4);
    tokens = number_in(json, 0, "tokens");
    json_decref(json);
    options.other = NULL; /* the base beside itself */
    options.max_tokens = (int64_t)tokens / 3;
    json = bench_line(line, engine_bench_kl(&options, line, sizeof(line), &why), &why);
    assert_true(number_in(json, 0, "kl") == 0);
    assert_true(number_in(json, 0, "tokens") < tokens / 2);
    json_decref(json);
    options.delta = delta_path;
    json = bench_line(line, engine_bench_kl(&options, line, sizeof(line), &why), &why);
    assert_true(number_in(json, 0, "kl") > 0.01);
    assert_true(number_in(json, 0, "loss") < number_in(json, 0, "tuned_loss"));
    json_decref(json);
    options.other = other_base;
    assert_int_equal(engine_bench_kl(&options, line, sizeof(line), &why), -1);
    assert_non_null(strstr(why.message, "either"));
}

/* The base, with a final norm that is no number: none of its logits is one. */
static void write_broken(const char *path)
{
    const struct safetensors_tensor *norm;
    const float nothing = NAN;
    struct safetensors *file;
    char *data;
    size_t len;

    CHECK(file_read_all(base_path, 1 << 24, &data, &len, &err));
    CHECK(safetensors_open_memory(&file, data, len, "broken", &err));
    norm = safetensors_find(file, "model.norm.weight");
    assert_non_null(norm);
    memcpy(data + ((const char *)norm->view.data - data), &nothing, sizeof(nothing));
    safetensors_free(file);
    CHECK(file_write_durable(path, data, len, &err));
    free(data);
}

/* A model that says nothing is near to no other, on whichever side it stands. */
static void logits_that_are_no_numbers_have_no_kl(void **state)
{
    const char *const data[] = {data_path};
    char broken[128], line[4096];

    snprintf(broken, sizeof(broken), "%s/broken.safetensors", folder);
    write_broken(broken);
    for (int i = 0; i < 2; i++) {
        struct engine_bench_kl_options options = {.base = base_path,
                                                  .tuned = i ? base_path : broken,
                                                  .other = i ? broken : base_path,
                                                  .device = "cpu",
                                                  .data = data,
                                                  .data_count = 1,
                                                  .threads = 1};
        struct err why = {0};
        json_t *json = bench_line(line, engine_bench_kl(&options, line, sizeof(line), &why), &why);
        const json_t *of = json_array_get(json_object_get(json, "data"), 0);

        assert_true(json_is_null(json_object_get(of, "kl")));
        assert_true(json_is_null(json_object_get(of, "answer_kl")));
        json_decref(json);
    }
}

static double member(const json_t *json, const char *key)
{
    json_t *value = json_object_get(json, key);

    assert_true(json_is_number(value));
    return json_number_value(value);
}

/* Tenants whose deltas went through a codec, as small as they were asked for, and what they cost.
 */
static void the_bench_of_decoding_serves_codecs(void **state)
{
    struct engine_bench_decode_options options = {.model = base_path,
                                                  .device = "cpu",
                                                  .sequences = 3,
                                                  .tenants = 2,
                                                  .prompt = 9,
                                                  .tokens = 4,
                                                  .codec = "graft",
                                                  .ratio = 4,
                                                  .threads = 1};
    struct err why = {0};
    char line[2048];
    double large;
    json_t *json = bench_line(line, engine_bench_decode(&options, line, sizeof(line), &why), &why);

    assert_string_equal(json_string_value(json_object_get(json, "codec")), "graft");
    assert_true(member(json, "base_s_per_step") > 0);
    assert_true(fabs(member(json, "s_per_step") / member(json, "base_s_per_step") - 1 -
                     member(json, "tenant_cost")) < 0.5);
    large = member(json, "tenant_bytes");
    json_decref(json);
    options.ratio = 8;
    json = bench_line(line, engine_bench_decode(&options, line, sizeof(line), &why), &why);
    assert_true(member(json, "tenant_bytes") < large * 0.8);
    json_decref(json);
    options.codec = "gzip";
    assert_int_equal(engine_bench_decode(&options, line, sizeof(line), &why), -1);
    assert_non_null(strstr(why.message, "no codec \"gzip\""));
}

static void the_bench_of_apply_times_both(void **state)
{
    struct engine_bench_apply_options options = {
        .rows = 1536, .cols = 1024, .codec = "bitdelta", .rotation_bytes = 40000000, .threads = 1};
    struct err why = {0};
    char line[2048];
    json_t *json = bench_line(line, engine_bench_apply(&options, line, sizeof(line), &why), &why);

    assert_true(fabs(member(json, "stored_ratio") - 16) < 0.5);
    assert_true(fabs(member(json, "bytes") / member(json, "s") / 1e9 / member(json, "gb_per_s") -
                     1) < 0.01);
    assert_true(fabs(member(json, "f32_s") / member(json, "s") / member(json, "times_f32") - 1) <
                0.01);
    assert_true(member(json, "rotation_bytes") > 4e7 && member(json, "rotation_bytes") < 6e7);
    assert_true(member(json, "runs") >= 31);
    json_decref(json);
    options.kernels = "abacus";
    assert_int_equal(engine_bench_apply(&options, line, sizeof(line), &why), -1);
    assert_non_null(strstr(why.message, "abacus"));
    err_clear(&why);
    options.kernels = NULL;
    options.ratio = 4096;
    assert_int_equal(engine_bench_apply(&options, line, sizeof(line), &why), -1);
    assert_int_equal(why.kind, ERR_INVALID);
}

static int setup(void **state)
{
    struct engine_options options = {.device = "cpu", .threads = 2};
    struct engine_dataset_options as = {.file_id = "file-test"};
    struct engine_dataset_report report;

    json_text_setup();
    if (mkdtemp(folder) == NULL)
        return -1;
    snprintf(data_path, sizeof(data_path), "%s/train.jsonl", folder);
    snprintf(delta_path, sizeof(delta_path), "%s/delta.safetensors", folder);
    make_base("base", 1, base_path, sizeof(base_path));
    make_base("other", 2, other_base, sizeof(other_base));
    write_questions();
    CHECK(engine_open(&engine, base_path, &options, &err));
    CHECK(engine_dataset_open(&dataset, engine, data_path, &as, &report, &err));
    assert_true(report.question_answer);
    return 0;
}

static int teardown(void **state)
{
    engine_delta_free(delta);
    engine_trainer_free(trainer);
    engine_dataset_free(dataset);
    engine_free(engine);
    return file_remove_tree(folder, NULL);
}

int main(void)
{
    /* In this order: each stands on the one before. */
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_base_does_not_know),
        cmocka_unit_test(asking_can_be_stopped),
        cmocka_unit_test(training_teaches_it),
        cmocka_unit_test(the_compressed_difference_keeps_it),
        cmocka_unit_test(served_bits_say_what_the_expanded_weights_say),
        cmocka_unit_test(trained_embeddings_are_served_too),
        cmocka_unit_test(another_base_is_refused),
        cmocka_unit_test(the_benches_run),
        cmocka_unit_test(the_bench_of_recall_asks),
        cmocka_unit_test(the_bench_of_kl_measures_it),
        cmocka_unit_test(logits_that_are_no_numbers_have_no_kl),
        cmocka_unit_test(the_bench_of_decoding_serves_codecs),
        cmocka_unit_test(the_bench_of_apply_times_both),
    };

    return cmocka_run_group_tests(tests, setup, teardown);
}
