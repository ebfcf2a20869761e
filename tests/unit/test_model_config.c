/* config.json in its spellings; what is not computed here is refused by name. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/json_text.h"
#include "engine/model_config.h"

static int setup(void **state)
{
    json_text_setup();
    return 0;
}

/* A good configuration, with `change` (a JSON object) merged into it. */
static int read_with(const char *change, struct model_config *config, struct err *err)
{
    json_t *root =
        json_pack("{s:s, s:[s], s:i, s:i, s:i, s:i, s:i, s:i, s:i}", "model_type", "llama",
                  "architectures", "LlamaForCausalLM", "hidden_size", 64, "intermediate_size", 128,
                  "num_hidden_layers", 2, "num_attention_heads", 4, "num_key_value_heads", 2,
                  "vocab_size", 512, "max_position_embeddings", 256);
    json_t *more = json_loads(change, 0, NULL);
    char *text;
    int rc;

    assert_non_null(more);
    json_object_update(root, more);
    text = json_dumps(root, 0);
    *err = (struct err){0};
    rc = model_config_from_json(config, text, strlen(text), err);
    free(text);
    json_decref(more);
    json_decref(root);
    return rc;
}

static void refuses(const char *change, const char *expected)
{
    struct model_config config;
    struct err err;

    if (read_with(change, &config, &err) == 0)
        fail_msg("accepted: %s", change);
    assert_int_equal(err.kind, ERR_INVALID);
    if (strstr(err.message, expected) == NULL)
        fail_msg("\"%s\" is not in: %s", expected, err.message);
}

static struct model_config accepts(const char *change)
{
    struct model_config config = {0};
    struct err err;

    if (read_with(change, &config, &err) != 0)
        fail_msg("%s: %s", change, err.message);
    return config;
}

static void test_spellings_old_and_new_are_read(void **state)
{
    struct model_config c = accepts("{}");

    assert_int_equal(c.head_dim, 16);
    assert_true(c.rope_theta == 10000);
    assert_true(c.rms_norm_eps == 1e-6f);
    assert_false(c.tied_embeddings);
    assert_int_equal(c.bos_token, -1);
    c = accepts("{\"rope_theta\":500000.0,\"head_dim\":32,\"rope_scaling\":null}");
    assert_true(c.rope_theta == 500000 && c.head_dim == 32);
    c = accepts("{\"rope_parameters\":{\"rope_theta\":100000.0,\"rope_type\":\"default\"}}");
    assert_true(c.rope_theta == 100000 && c.rope_scaling == ROPE_SCALING_NONE);
    c = accepts("{\"rope_scaling\":{\"type\":\"linear\",\"factor\":2}}");
    assert_true(c.rope_scaling == ROPE_SCALING_LINEAR && c.rope_factor == 2);
    c = accepts("{\"rope_theta\":5e5,\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":32.0,"
                "\"low_freq_factor\":1.0,\"high_freq_factor\":4.0,"
                "\"original_max_position_embeddings\":8192}}");
    assert_true(c.rope_scaling == ROPE_SCALING_LLAMA3 && c.rope_original_context == 8192);
    assert_true(c.rope_theta == 500000);
    c = accepts("{\"eos_token_id\":[5,6],\"bos_token_id\":4}");
    assert_int_equal(c.eos_token, 5);
    assert_int_equal(c.bos_token, 4);
    c = accepts("{\"num_key_value_heads\":null,\"head_dim\":null}");
    assert_int_equal(c.kv_heads, 4);
    assert_int_equal(c.head_dim, 16);
    accepts("{\"architectures\":null}");
    accepts("{\"model_type\":null}");
}

static void test_what_is_not_computed_is_refused_by_name(void **state)
{
    refuses("{\"model_type\":\"qwen2\"}",
            "architecture \"qwen2\" is not supported yet; supported: llama");
    refuses("{\"architectures\":[\"LlamaForSequenceClassification\"]}",
            "\"LlamaForSequenceClassification\"");
    refuses("{\"model_type\":null,\"architectures\":[\"MistralForCausalLM\"]}",
            "\"MistralForCausalLM\"");
    refuses("{\"model_type\":null,\"architectures\":null}", "\"model_type\" is missing");
    refuses("{\"hidden_act\":\"gelu\"}", "hidden_act");
    refuses("{\"mlp_bias\":true}", "mlp_bias");
    refuses("{\"attention_bias\":true}", "attention_bias");
    refuses("{\"partial_rotary_factor\":0.5}", "partial_rotary_factor");
    refuses("{\"quantization_config\":{}}", "quantization_config");
    refuses("{\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":2}}", "\"yarn\"");
    refuses("{\"rope_scaling\":{\"type\":\"dynamic\",\"factor\":2}}", "\"dynamic\"");
}

static void test_sizes_are_checked(void **state)
{
    refuses("{\"hidden_size\":null}", "\"hidden_size\" is missing");
    refuses("{\"hidden_size\":0}", "hidden size");
    refuses("{\"hidden_size\":-64}", "\"hidden_size\"");
    refuses("{\"hidden_size\":1e3}", "\"hidden_size\"");
    refuses("{\"hidden_size\":\"64\"}", "\"hidden_size\"");
    refuses("{\"hidden_size\":4294967296}", "\"hidden_size\"");
    refuses("{\"hidden_size\":66}", "can not be divided");
    refuses("{\"num_hidden_layers\":1025}", "number of layers");
    refuses("{\"num_attention_heads\":0}", "number of heads");
    refuses("{\"num_key_value_heads\":3}", "evenly");
    refuses("{\"num_key_value_heads\":8}", "key/value heads");
    refuses("{\"num_key_value_heads\":0}", "key/value heads");
    refuses("{\"head_dim\":15}", "odd");
    refuses("{\"head_dim\":514}", "head size");
    /* Few elements, yet rows that are longer than the portions in which a model is copied. */
    refuses("{\"num_attention_heads\":4096,\"num_key_value_heads\":1,\"head_dim\":512,"
            "\"hidden_size\":2}",
            "width of all heads");
    refuses("{\"vocab_size\":2097153}", "vocabulary");
    refuses("{\"vocab_size\":2000000,\"hidden_size\":4096,\"head_dim\":64}", "2^31");
    refuses("{\"intermediate_size\":1000000,\"hidden_size\":4096,\"head_dim\":64}", "2^31");
    refuses("{\"max_position_embeddings\":0}", "context");
    refuses("{\"eos_token_id\":512}", "outside of the vocabulary");
    refuses("{\"eos_token_id\":[\"a\"]}", "eos_token_id");
    refuses("{\"rms_norm_eps\":-1}", "epsilon");
    refuses("{\"rms_norm_eps\":\"x\"}", "rms_norm_eps");
    refuses("{\"rope_theta\":0}", "base");
    refuses("{\"rope_theta\":1e39}", "base");
    refuses("{\"rope_scaling\":{\"type\":\"linear\"}}", "\"factor\" is missing");
    refuses("{\"rope_scaling\":{\"type\":\"linear\",\"factor\":0}}", "factor");
    refuses("{\"rope_scaling\":{\"type\":\"llama3\",\"factor\":8,\"low_freq_factor\":4,"
            "\"high_freq_factor\":1,\"original_max_position_embeddings\":8192}}",
            "low_freq_factor");
    refuses("{\"rope_scaling\":[]}", "must be an object");
    refuses("{\"tie_word_embeddings\":1}", "true or false");
}

static void test_text_that_is_no_configuration_is_refused(void **state)
{
    static const char *const bad[] = {"", "[]", "7", "{", "{\"a\":1,\"a\":2}", "{} x"};
    struct model_config config;

    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct err err = {0};

        assert_int_equal(model_config_from_json(&config, bad[i], strlen(bad[i]), &err), -1);
        assert_int_equal(err.kind, ERR_INVALID);
    }
}

static void test_what_is_written_is_read_back_bit_for_bit(void **state)
{
    static const char *const changes[] = {
        "{\"rms_norm_eps\":9.999999747378752e-06,\"rope_theta\":12345.678}",
        "{\"rope_scaling\":{\"type\":\"linear\",\"factor\":3.3}}",
        "{\"tie_word_embeddings\":true,\"bos_token_id\":1,\"eos_token_id\":2,"
        "\"rope_scaling\":{\"type\":\"llama3\",\"factor\":8.1,\"low_freq_factor\":1.1,"
        "\"high_freq_factor\":4.7,\"original_max_position_embeddings\":8192}}",
    };

    for (size_t i = 0; i < sizeof changes / sizeof *changes; i++) {
        struct model_config first = accepts(changes[i]), second;
        struct strbuf text;

        memset(&second, 0, sizeof second);
        strbuf_init(&text, 1 << 16);
        model_config_to_json(&first, &text);
        assert_int_equal(model_config_from_json(&second, text.data, text.len, NULL), 0);
        assert_memory_equal(&first, &second, sizeof first);
        strbuf_release(&text);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_spellings_old_and_new_are_read),
        cmocka_unit_test(test_what_is_not_computed_is_refused_by_name),
        cmocka_unit_test(test_sizes_are_checked),
        cmocka_unit_test(test_text_that_is_no_configuration_is_refused),
        cmocka_unit_test(test_what_is_written_is_read_back_bit_for_bit),
    };

    return cmocka_run_group_tests(tests, setup, NULL);
}
