/* Whatever the source, the same values become the same base; a broken source is refused in words.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/base/file_io.h"
#include "engine/base/json_text.h"
#include "engine/base_file.h"
#include "engine/chat_template.h"
#include "engine/engine.h"
#include "engine/safetensors.h"
#include "tests/unit/check.h"
#include "tests/unit/golden.h"
#include "tests/unit/tiny_gguf.h"
#include "tests/unit/tiny_model.h"

enum { LAYERS = 2, VOCABULARY = 512 };

static char dir[64];

static int make_dir(void **state)
{
    json_text_setup();
    snprintf(dir, sizeof dir, "/tmp/graft-test-XXXXXX");
    return mkdtemp(dir) == NULL;
}

static int remove_dir(void **state)
{
    return file_remove_tree(dir, NULL);
}

/* One of four static buffers. */
static const char *in_dir(const char *name)
{
    static char paths[4][160];
    static int next;
    char *path = paths[next++ % 4];

    snprintf(path, sizeof paths[0], "%s/%s", dir, name);
    return path;
}

static void make_tiny(const char *name, const struct tiny_model *model)
{
    struct err err = {0};

    if (tiny_model_write(in_dir(name), model, &err) != 0)
        fail_msg("%s", err.message);
}

static struct engine_base_info import_ok(const char *name, const char *base)
{
    struct engine_base_info info = {0};
    struct err err = {0};

    if (engine_import(in_dir(name), in_dir(base), &info, &err) != 0)
        fail_msg("%s", err.message);
    return info;
}

static void import_fails(const char *name, const char *expected)
{
    struct err err = {0};

    if (engine_import(in_dir(name), in_dir("refused.base"), NULL, &err) == 0)
        fail_msg("%s was imported", name);
    assert_int_equal(err.kind, ERR_INVALID);
    if (strstr(err.message, expected) == NULL)
        fail_msg("\"%s\" is not in: %s", expected, err.message);
    assert_int_equal(access(in_dir("refused.base"), F_OK), -1);
}

static void test_a_directory_becomes_a_base(void **state)
{
    struct engine_base_info info, read = {0};
    struct base_file *base = NULL;
    struct tensor t;
    size_t len = 0, file_len = 0;
    char *text;

    make_tiny("hf", &(struct tiny_model){.seed = 1});
    info = import_ok("hf", "hf.base");
    assert_int_equal(info.layers, LAYERS);
    assert_int_equal(info.parameters,
                     512 * 64 + 2 * (64 * (64 + 32 + 32 + 64 + 3 * 128) + 128) + 64);
    assert_int_equal(info.linear_parameters, 2 * 64 * (64 + 32 + 32 + 64 + 3 * 128));
    assert_int_equal(info.bytes_16bit, 2 * info.parameters);
    assert_true(info.tied_embeddings);
    assert_int_equal(engine_base_read(in_dir("hf.base"), &read, NULL), 0);
    assert_memory_equal(&info, &read, sizeof info);

    assert_int_equal(base_file_open(&base, in_dir("hf.base"), NULL), 0);
    assert_true(base_file_tensor(base, "model.layers.1.self_attn.k_proj.weight", &t));
    assert_int_equal(t.shape[0], 32);
    assert_true(((float *)t.data)[65] ==
                tiny_model_value("model.layers.1.self_attn.k_proj.weight", 65, 64, 1));
    base_file_done_with(base, "model.norm.weight");
    assert_false(base_file_tensor(base, "lm_head.weight", &t));
    assert_true(base_file_config(base)->rms_norm_eps == 1e-5f);
    text = golden_text("tests/golden/tiny_tokenizer.json", &file_len);
    assert_memory_equal(base_file_tokenizer_json(base, &len), text, file_len);
    assert_int_equal(len, file_len);
    assert_non_null(base_file_chat_template(base, &len));
    assert_int_equal(len, 340);
    free(text);
    base_file_free(base);
}

static void test_import_of_a_base_is_the_same_file(void **state)
{
    struct engine_base_info first, second;
    char a[65], b[65];

    make_tiny("again", &(struct tiny_model){.seed = 2, .untied = true, .dtype = DTYPE_BF16});
    first = import_ok("again", "again.base");
    second = import_ok("again.base", "again2.base");
    assert_memory_equal(&first, &second, sizeof first);
    assert_int_equal(file_sha256(in_dir("again.base"), a, NULL, NULL), 0);
    assert_int_equal(file_sha256(in_dir("again2.base"), b, NULL, NULL), 0);
    assert_string_equal(a, b);
}

static void test_the_digest_is_of_the_values(void **state)
{
    struct engine_base_info one, other;

    make_tiny("d1", &(struct tiny_model){.seed = 3});
    make_tiny("d2", &(struct tiny_model){.seed = 4});
    one = import_ok("d1", "d1.base");
    other = import_ok("d2", "d2.base");
    assert_string_not_equal(one.digest, other.digest);
    /* Worked out by another program (base_layout.h): an imported base stays the same base. */
    assert_string_equal(one.digest,
                        "4666e1c4ee610d28ac9c961cee8174a696d9aee0ac94cd8ad94859cc96fa1791");
}

static void write_gguf(const char *name, const struct tiny_gguf *gguf)
{
    struct err err = {0};

    if (tiny_gguf_write(in_dir(name), gguf, &err) != 0)
        fail_msg("%s", err.message);
}

static void test_gguf_and_directory_give_the_same_base(void **state)
{
    struct engine_base_info hf, gguf;
    struct base_file *a = NULL, *b = NULL;
    struct tokenizer *tokenizer = NULL;
    struct tensor x, y;
    const char *json;
    size_t len = 0;

    make_tiny("same", &(struct tiny_model){.seed = 1});
    write_gguf("same.gguf", &(struct tiny_gguf){.seed = 1});
    hf = import_ok("same", "same-hf.base");
    gguf = import_ok("same.gguf", "same-gguf.base");
    assert_memory_equal(&hf, &gguf, sizeof hf);

    assert_int_equal(base_file_open(&a, in_dir("same-hf.base"), NULL), 0);
    assert_int_equal(base_file_open(&b, in_dir("same-gguf.base"), NULL), 0);
    assert_memory_equal(base_file_config(a), base_file_config(b), sizeof(struct model_config));
    assert_true(base_file_tensor(a, "model.layers.0.self_attn.q_proj.weight", &x));
    assert_true(base_file_tensor(b, "model.layers.0.self_attn.q_proj.weight", &y));
    assert_memory_equal(x.data, y.data, 64 * 64 * 4);
    json = base_file_tokenizer_json(b, &len);
    assert_int_equal(tokenizer_open(&tokenizer, json, len, NULL), 0);
    assert_int_equal(tokenizer_size(tokenizer), VOCABULARY);
    assert_int_equal(tokenizer_added_token(tokenizer, "<|im_end|>"), 2);
    tokenizer_free(tokenizer);
    base_file_free(a);
    base_file_free(b);
}

/* The difference of two models, to the SHA-256 of its file. */
static void compress(const char *base, const char *tuned, char digest[65])
{
    const struct engine_options cpu = {.device = "cpu", .threads = 1};
    const struct engine_compress_options lossless = {.codec = "lossless"};
    struct engine_delta_report report;
    struct engine *engine;

    CHECK(engine_open_model(&engine, in_dir(base), &cpu, &err));
    CHECK(engine_model_compress(engine, in_dir(tuned), &lossless, in_dir("delta"), &report, &err));
    assert_true(report.linear_bytes > 0);
    engine_free(engine);
    CHECK(file_sha256(in_dir("delta"), digest, NULL, &err));
}

static void test_gguf_and_directory_have_the_same_delta(void **state)
{
    static const char *const base[] = {"from", "from.gguf"}, *const tuned[] = {"to", "to.gguf"};
    char want[65], got[65];

    make_tiny(base[0], &(struct tiny_model){.seed = 1});
    make_tiny(tuned[0], &(struct tiny_model){.seed = 2});
    write_gguf(base[1], &(struct tiny_gguf){.seed = 1});
    write_gguf(tuned[1], &(struct tiny_gguf){.seed = 2});
    compress(base[0], tuned[0], want);
    for (int i = 1; i < 4; i++) {
        compress(base[i % 2], tuned[i / 2], got);
        assert_string_equal(got, want);
    }
}

static void more_tensors(struct gguf_builder *b)
{
    static const float ones[8] = {1, 1, 1, 1, 1, 1, 1, 1};

    gguf_add_tensor(b, "rope_freqs.weight", 1, (uint64_t[]){8}, 0, gguf_next_offset(b));
    strbuf_add(&b->data, ones, sizeof ones);
}

static void lose_tensor(struct gguf_builder *b)
{
    /* The last description is that of the output norm: name, rank, one dimension, type, offset. */
    b->tensors.len -= 8 + strlen("output_norm.weight") + 4 + 8 + 4 + 8;
    b->tensor_count--;
}

static void other_architecture(struct gguf_builder *b)
{
    memcpy(memmem(b->entries.data, b->entries.len, "llama", 5), "gemma", 5);
}

static void not_finite(struct gguf_builder *b)
{
    memcpy(b->data.data + 4096, "\0\0\xc0\x7f", 4);
}

static void test_gguf_files_that_do_not_fit_are_refused(void **state)
{
    write_gguf("bad.gguf", &(struct tiny_gguf){.spoil = more_tensors});
    import_fails("bad.gguf", "\"rope_freqs.weight\" is not supported");
    write_gguf("bad.gguf", &(struct tiny_gguf){.spoil = lose_tensor});
    import_fails("bad.gguf", "\"output_norm.weight\" is missing");
    write_gguf("bad.gguf", &(struct tiny_gguf){.spoil = other_architecture});
    import_fails("bad.gguf", "architecture \"gemma\" is not supported yet; supported: llama");
    write_gguf("bad.gguf", &(struct tiny_gguf){.spoil = not_finite});
    import_fails("bad.gguf", "\"model.embed_tokens.weight\" holds values that are not finite");
}

static void old_rope_scale(struct gguf_builder *b)
{
    gguf_add_f32(b, "llama.rope.scale_linear", 4);
}

static void untyped_rope_factor(struct gguf_builder *b)
{
    gguf_add_f32(b, "llama.rope.scaling.factor", 4);
}

static void no_rope_scale(struct gguf_builder *b)
{
    gguf_add_f32(b, "llama.rope.scaling.factor", 4);
    gguf_add_string(b, "llama.rope.scaling.type", "none");
}

/* Files from before there was a type, too. */
static void test_gguf_rope_factors_are_linear_unless_they_say_so(void **state)
{
    static const struct {
        void (*add)(struct gguf_builder *b);
        enum rope_scaling scaling;
        float factor;
    } cases[] = {{old_rope_scale, ROPE_SCALING_LINEAR, 4},
                 {untyped_rope_factor, ROPE_SCALING_LINEAR, 4},
                 {no_rope_scale, ROPE_SCALING_NONE, 0}};

    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct base_file *base = NULL;

        write_gguf("rope.gguf", &(struct tiny_gguf){.spoil = cases[i].add});
        import_ok("rope.gguf", "rope.base");
        assert_int_equal(base_file_open(&base, in_dir("rope.base"), NULL), 0);
        assert_int_equal(base_file_config(base)->rope_scaling, cases[i].scaling);
        assert_true(base_file_config(base)->rope_factor == cases[i].factor);
        base_file_free(base);
    }
}

/* What is listed as known can be imported; what is not names what is. */
static void test_gguf_pre_tokenizers_are_known_or_refused(void **state)
{
    static const char *const known[] = {"smollm", "llama-bpe", "gpt-2"};
    static const char *const unknown[] = {"qwen2", "tekken", "smoll"};
    char words[200];

    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        write_gguf("pre.gguf", &(struct tiny_gguf){.pre_tokenizer = known[i]});
        import_ok("pre.gguf", "pre.base");
    }
    for (size_t i = 0; i < sizeof unknown / sizeof *unknown; i++) {
        write_gguf("bad.gguf", &(struct tiny_gguf){.pre_tokenizer = unknown[i]});
        snprintf(words, sizeof words,
                 "pre-tokenizer \"%s\" (tokenizer.ggml.pre) is not supported yet; supported: "
                 "smollm, llama-bpe, gpt-2.",
                 unknown[i]);
        import_fails("bad.gguf", words);
    }
}

/* The tiny model's weights, cut into two shards. */
static void write_shards(const char *name)
{
    struct safetensors *whole = NULL;
    struct strbuf index;
    char path[200];

    snprintf(path, sizeof path, "%s/model.safetensors", in_dir(name));
    assert_int_equal(safetensors_open(&whole, path, NULL), 0);
    strbuf_init(&index, 1 << 16);
    strbuf_addstr(&index, "{\"weight_map\":{");
    for (int shard = 0; shard < 2; shard++) {
        struct safetensors_writer *w = NULL;
        int64_t half = safetensors_count(whole) / 2;
        int64_t first = shard * half, last = shard == 0 ? half : safetensors_count(whole);

        snprintf(path, sizeof path, "%s/part-%d.safetensors", in_dir(name), shard);
        assert_int_equal(safetensors_writer_open(&w, path, NULL), 0);
        for (int64_t i = first; i < last; i++) {
            const struct safetensors_tensor *t = safetensors_at(whole, i);

            safetensors_writer_declare(w, t->name, t->view.dtype, t->view.rank, t->view.shape,
                                       NULL);
            strbuf_addf(&index, "%s\"%s\":\"part-%d.safetensors\"", i > 0 ? "," : "", t->name,
                        shard);
        }
        assert_int_equal(safetensors_writer_begin(w, NULL), 0);
        for (int64_t i = first; i < last; i++) {
            const struct safetensors_tensor *t = safetensors_at(whole, i);

            safetensors_writer_append(w, t->view.data, (size_t)t->bytes, NULL);
        }
        assert_int_equal(safetensors_writer_finish(w, NULL, NULL), 0);
        safetensors_writer_free(w);
    }
    strbuf_addstr(&index, "}}");
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", in_dir(name));
    assert_int_equal(file_write_durable(path, index.data, index.len, NULL), 0);
    strbuf_release(&index);
    safetensors_free(whole);
    snprintf(path, sizeof path, "%s/model.safetensors", in_dir(name));
    assert_int_equal(unlink(path), 0);
}

static void replace(const char *name, const char *file, const char *text)
{
    char path[200];

    snprintf(path, sizeof path, "%s/%s", in_dir(name), file);
    if (text == NULL)
        assert_int_equal(unlink(path), 0);
    else
        assert_int_equal(file_write_durable(path, text, strlen(text), NULL), 0);
}

static void test_shards_are_one_model(void **state)
{
    struct engine_base_info whole, shards;

    make_tiny("whole", &(struct tiny_model){.seed = 5});
    make_tiny("shards", &(struct tiny_model){.seed = 5});
    write_shards("shards");
    whole = import_ok("whole", "whole.base");
    shards = import_ok("shards", "shards.base");
    assert_memory_equal(&whole, &shards, sizeof whole);

    replace("shards", "model.safetensors.index.json",
            "{\"weight_map\":{\"a\":\"../whole/model.safetensors\"}}");
    import_fails("shards", "in the same folder");
    replace("shards", "model.safetensors.index.json", "{\"weight_map\":{\"a\":\".safetensors\"}}");
    import_fails("shards", "in the same folder");
    replace("shards", "model.safetensors.index.json", "{\"weight_map\":{\"a\":7}}");
    import_fails("shards", "in the same folder");
    replace("shards", "model.safetensors.index.json", "{}");
    import_fails("shards", "\"weight_map\" must be an object");
    replace("shards", "model.safetensors.index.json",
            "{\"weight_map\":{\"a\":\"part-0.safetensors\"}}");
    import_fails("shards", "is missing");
}

static void test_directories_that_do_not_fit_are_refused(void **state)
{
    struct tiny_model model = {.seed = 6};

    import_fails("nowhere", "no such file or folder");
    make_tiny("bad", &model);
    replace("bad", "config.json", NULL);
    import_fails("bad", "no config.json");
    replace("bad", "config.json", "{\"model_type\":\"qwen2\"}");
    import_fails("bad", "config.json: architecture \"qwen2\" is not supported yet");
    make_tiny("bad", &model);
    replace("bad", "tokenizer.json", NULL);
    import_fails("bad", "no tokenizer.json");
    replace("bad", "tokenizer.json", "{}");
    import_fails("bad", "tokenizer: \"model\" is missing");
    make_tiny("bad", &model);
    replace("bad", "chat_template.jinja", "{{ messages[0].content }}");
    import_fails("bad", "chat template");
    make_tiny("bad", &model);
    replace("bad", "model.safetensors", NULL);
    import_fails("bad", "neither model.safetensors nor");
    replace("bad", "model.safetensors", "short");
    import_fails("bad", "too few");
    make_tiny("bad", &(struct tiny_model){.seed = 6, .layers = 3});
    make_tiny("deep", &model);
    assert_int_equal(rename(in_dir("bad/model.safetensors"), in_dir("deep/model.safetensors")), 0);
    import_fails("deep", "\"model.layers.2.");
    make_tiny("bad", &(struct tiny_model){.seed = 6, .hidden = 32});
    make_tiny("wide", &model);
    assert_int_equal(rename(in_dir("bad/model.safetensors"), in_dir("wide/model.safetensors")), 0);
    import_fails("wide", "has another shape than config.json calls for");
    make_tiny("small", &(struct tiny_model){.seed = 6, .vocabulary = 500});
    import_fails("small", "the tokenizer has 512 tokens, but the model only 500");
}

static void test_templates_are_found_where_they_may_be(void **state)
{
    struct base_file *base = NULL;
    size_t len = 0;

    make_tiny("t", &(struct tiny_model){.seed = 7});
    replace("t", "chat_template.jinja", NULL);
    import_ok("t", "t.base"); /* none: plain ChatML by the tokenizer's tokens */
    assert_int_equal(base_file_open(&base, in_dir("t.base"), NULL), 0);
    assert_null(base_file_chat_template(base, &len));
    base_file_free(base);
    replace("t", "tokenizer_config.json", "{\"chat_template\":\"{{ x }}\"}");
    import_fails("t", "chat template");
    replace("t", "tokenizer_config.json",
            "{\"chat_template\":[{\"name\":\"default\",\"template\":\"{{ y }}\"}]}");
    import_fails("t", "\"{{ y }}\"");
    replace("t", "tokenizer_config.json", "[");
    import_fails("t", "tokenizer_config.json");
}

/* As what a delta is made on. */
static void open_fails(const char *name, const char *expected)
{
    const struct engine_options cpu = {.device = "cpu", .threads = 1};
    struct engine *engine = NULL;
    struct err err = {0};

    assert_int_equal(engine_open_model(&engine, in_dir(name), &cpu, &err), -1);
    assert_null(engine);
    assert_int_equal(err.kind, ERR_INVALID);
    if (strstr(err.message, expected) == NULL)
        fail_msg("\"%s\" is not in: %s", expected, err.message);
}

static void test_a_damaged_base_is_refused(void **state)
{
    struct base_file *base = NULL;
    struct err err = {0};
    char *data = NULL;
    size_t len = 0;

    make_tiny("damage", &(struct tiny_model){.seed = 8});
    import_ok("damage", "damage.base");
    assert_int_equal(file_read_all(in_dir("damage.base"), 1 << 24, &data, &len, NULL), 0);
    data[len / 2] ^= 1; /* a weight */
    assert_int_equal(file_write_durable(in_dir("flipped.base"), data, len, NULL), 0);
    import_fails("flipped.base", "do not have the digest");
    open_fails("flipped.base", "do not have the digest");
    assert_int_equal(file_write_durable(in_dir("cut.base"), data, len - 1, NULL), 0);
    assert_int_equal(base_file_open(&base, in_dir("cut.base"), &err), -1);
    assert_int_equal(err.kind, ERR_INVALID);
    memcpy(memmem(data, len, "graft.base_version\":\"1", 22), "graft.base_version\":\"9", 22);
    assert_int_equal(file_write_durable(in_dir("new.base"), data, len, NULL), 0);
    err_clear(&err);
    assert_int_equal(base_file_open(&base, in_dir("new.base"), &err), -1);
    assert_non_null(strstr(err.message, "version \"9\""));
    free(data);
    /* Safetensors, but no base. */
    import_fails("damage/model.safetensors", "not an imported base model; of a Hugging Face model, "
                                             "name the directory");
}

/* The reference's ids: with digits cut one by one, or as converters that lose that do it. */
static const json_t *ids_of(const json_t *row, bool digits)
{
    const json_t *ids = json_object_get(row, "bytelevel_ids");

    return digits || ids == NULL ? json_object_get(row, "ids") : ids;
}

static void compare_smollm2_texts(const struct tokenizer *t, const json_t *golden, bool digits)
{
    json_t *row;
    size_t i;

    json_array_foreach(json_object_get(golden, "texts"), i, row)
    {
        json_t *text = json_object_get(row, "text");
        struct token_list list;

        token_list_init(&list);
        assert_int_equal(tokenizer_encode(t, json_string_value(text), json_string_length(text),
                                          true, &list, NULL),
                         0);
        golden_compare(json_string_value(text), ids_of(row, digits), list.ids, list.count);
        token_list_release(&list);
    }
}

static void compare_smollm2_conversations(const struct tokenizer *t, const struct base_file *base,
                                          const json_t *golden, bool digits)
{
    struct chat_template *chat = NULL;
    size_t len = 0, i;
    const char *text = base_file_chat_template(base, &len);
    json_t *row;

    assert_int_equal(chat_template_open(&chat, text, len, t, NULL), 0);
    json_array_foreach(json_object_get(golden, "conversations"), i, row)
    {
        struct engine_message messages[8];
        struct chat_tokens out;
        json_t *turn;
        size_t k;

        json_array_foreach(json_object_get(row, "messages"), k, turn)
        {
            messages[k].role = json_string_value(json_array_get(turn, 0));
            messages[k].content = json_string_value(json_array_get(turn, 1));
        }
        chat_tokens_init(&out);
        assert_int_equal(
            chat_template_encode(chat, messages, (int32_t)k,
                                 json_is_true(json_object_get(row, "add_generation_prompt")), &out,
                                 NULL),
            0);
        golden_compare(messages[0].content, ids_of(row, digits), out.ids, out.count);
        chat_tokens_release(&out);
    }
    chat_template_free(chat);
}

static void test_smollm2_is_the_model_it_was(void **state)
{
    const char *path = golden_smollm2();
    struct engine_base_info info;
    struct base_file *base = NULL;
    struct tokenizer *tokenizer = NULL;
    struct err err = {0};
    const char *json;
    size_t len = 0;
    json_t *golden;
    bool digits;

    if (path == NULL) {
        print_message("skipped: SmolLM2 is not at hand (GRAFT_TEST_SMOLLM2, .cache/models)\n");
        skip();
    }
    if (engine_import(path, in_dir("smollm2.base"), &info, &err) != 0)
        fail_msg("%s", err.message);
    assert_string_equal(info.digest,
                        "eeb03cd67ada50c1f5306d7a6985f32ea65de9d5cf868c86743712f8ab2dde92");
    assert_int_equal(info.parameters, 134515008);
    assert_int_equal(base_file_open(&base, in_dir("smollm2.base"), NULL), 0);
    json = base_file_tokenizer_json(base, &len);
    assert_int_equal(tokenizer_open(&tokenizer, json, len, NULL), 0);
    digits = memmem(json, len, "\"Digits\"", 8) != NULL;
    golden = golden_load("tests/golden/tokenizer_smollm2.json");
    compare_smollm2_texts(tokenizer, golden, digits);
    compare_smollm2_conversations(tokenizer, base, golden, digits);
    json_decref(golden);
    tokenizer_free(tokenizer);
    base_file_free(base);
    assert_int_equal(unlink(in_dir("smollm2.base")), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_directory_becomes_a_base),
        cmocka_unit_test(test_import_of_a_base_is_the_same_file),
        cmocka_unit_test(test_the_digest_is_of_the_values),
        cmocka_unit_test(test_gguf_and_directory_give_the_same_base),
        cmocka_unit_test(test_gguf_and_directory_have_the_same_delta),
        cmocka_unit_test(test_gguf_files_that_do_not_fit_are_refused),
        cmocka_unit_test(test_gguf_rope_factors_are_linear_unless_they_say_so),
        cmocka_unit_test(test_gguf_pre_tokenizers_are_known_or_refused),
        cmocka_unit_test(test_shards_are_one_model),
        cmocka_unit_test(test_directories_that_do_not_fit_are_refused),
        cmocka_unit_test(test_templates_are_found_where_they_may_be),
        cmocka_unit_test(test_a_damaged_base_is_refused),
        cmocka_unit_test(test_smollm2_is_the_model_it_was),
    };

    return cmocka_run_group_tests(tests, make_dir, remove_dir);
}
