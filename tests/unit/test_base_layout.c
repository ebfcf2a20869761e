/* Which tensors a model has, by what name and in what order: written out here once more, and the
 * same for the list that an import follows and for an open model. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/base_layout.h"
#include "tests/unit/reference_model.h"

/* memory_model_config's: D 40, H·E 40, E 10; two key-value heads, so G·E 20. */
static const struct {
    const char *name;
    int64_t rows, columns; /* rows 0: a vector */
    bool linear;
} block[] = {
    {"input_layernorm.weight", 0, 40, false},
    {"self_attn.q_proj.weight", 40, 40, true},
    {"self_attn.k_proj.weight", 20, 40, true},
    {"self_attn.v_proj.weight", 20, 40, true},
    {"self_attn.o_proj.weight", 40, 40, true},
    {"self_attn.q_proj.bias", 0, 40, false},
    {"self_attn.k_proj.bias", 0, 20, false},
    {"self_attn.v_proj.bias", 0, 20, false},
    {"self_attn.q_norm.weight", 0, 10, false},
    {"self_attn.k_norm.weight", 0, 10, false},
    {"post_attention_layernorm.weight", 0, 40, false},
    {"mlp.gate_proj.weight", -1, 40, true}, /* -1: the configuration's */
    {"mlp.up_proj.weight", -1, 40, true},
    {"mlp.down_proj.weight", 40, -1, true},
};
#define BLOCK (sizeof block / sizeof block[0])

static struct base_layout_tensor *list_of(const struct model_config *config, int64_t *count)
{
    struct base_layout_tensor *list = NULL;

    assert_int_equal(base_layout_list(config, &list, count, NULL), 0);
    return list;
}

static void names_and_shapes_in_order(void **state)
{
    struct model_config c = memory_model_config(2, false, true, true);
    int64_t count, f = c.intermediate, i = 0;
    struct base_layout_tensor *list = list_of(&c, &count);
    char name[96];

    assert_int_equal(count, c.layers * (int64_t)BLOCK + 3);
    assert_string_equal(list[i].name, "model.embed_tokens.weight");
    assert_int_equal(list[i].shape[0], c.vocabulary);
    assert_false(list[i++].linear);
    for (int layer = 0; layer < c.layers; layer++)
        for (size_t k = 0; k < BLOCK; k++, i++) {
            int64_t rows = block[k].rows < 0 ? f : block[k].rows;
            int64_t columns = block[k].columns < 0 ? f : block[k].columns;

            snprintf(name, sizeof name, "model.layers.%d.%s", layer, block[k].name);
            assert_string_equal(list[i].name, name);
            assert_int_equal(list[i].rank, rows > 0 ? 2 : 1);
            assert_int_equal(list[i].shape[0], rows > 0 ? rows : columns);
            assert_int_equal(list[i].shape[1], columns);
            assert_int_equal(base_layout_elements(&list[i]), (rows > 0 ? rows : 1) * columns);
            assert_int_equal(list[i].linear, block[k].linear);
        }
    assert_string_equal(list[i++].name, "model.norm.weight");
    assert_string_equal(list[i].name, "lm_head.weight");
    assert_false(list[i].linear);
    free(list);
}

/* What a configuration does not ask for is left out, and nothing else. */
static void some_are_there_by_configuration(void **state)
{
    struct model_config all = memory_model_config(2, false, true, true);
    int64_t whole, count;

    free(list_of(&all, &whole));
    for (int flags = 0; flags < 8; flags++) {
        bool tied = flags & 1, bias = flags & 2, qk_norm = flags & 4;
        struct model_config c = memory_model_config(2, tied, bias, qk_norm);
        struct base_layout_tensor *list = list_of(&c, &count);

        assert_int_equal(count,
                         whole - tied - (bias ? 0 : 3 * c.layers) - (qk_norm ? 0 : 2 * c.layers));
        for (int64_t i = 0; i < count; i++) {
            assert_true(bias || strstr(list[i].name, ".bias") == NULL);
            assert_true(qk_norm || (strstr(list[i].name, "q_norm") == NULL &&
                                    strstr(list[i].name, "k_norm") == NULL));
            assert_true(!tied || strstr(list[i].name, "lm_head") == NULL);
        }
        free(list);
    }
}

static void an_open_model_counts_them_the_same(void **state)
{
    for (int flags = 0; flags < 8; flags++) {
        struct model_config c = memory_model_config(2, flags & 1, flags & 2, flags & 4);
        struct memory_model *memory = memory_model_new(&c, DTYPE_F32, 3);
        struct model_source source = memory_model_source(memory);
        struct backend backend;
        struct model *model = NULL;
        struct model_weights weights;
        struct base_layout_tensor *list;
        char name[MODEL_NAME_MAX];
        int64_t count;

        assert_int_equal(backend_open(&backend, &(struct backend_options){.threads = 1}, NULL), 0);
        assert_int_equal(model_open_source(&model, &backend, &source, NULL), 0);
        assert_int_equal(model_weights_alloc(&weights, model, NULL), 0);
        list = list_of(&c, &count);
        assert_int_equal(model_tensor_count(model), count);
        for (int32_t i = 0; i < count; i++) {
            const struct tensor *t = model_tensor(model, &weights, i, name);
            const struct tensor *base = model_tensor(
                model, (struct model_weights *)(uintptr_t)model_base_weights(model), i, name);

            assert_string_equal(name, list[i].name);
            assert_int_equal(t->rank, list[i].rank);
            for (int k = 0; k < t->rank; k++)
                assert_int_equal(t->shape[k], list[i].shape[k]);
            assert_non_null(base->data);
            assert_int_equal(model_tensor_is_linear(model, i), list[i].linear);
            assert_int_equal(model_tensor_is_embedding(model, i),
                             strstr(name, "embed_tokens") != NULL ||
                                 strstr(name, "lm_head") != NULL);
        }
        assert_null(model_tensor(model, &weights, (int32_t)count, name));
        assert_null(model_tensor(model, &weights, -1, name));
        free(list);
        model_weights_release(&weights);
        model_free(model);
        backend_close(&backend);
        memory_model_free(memory);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(names_and_shapes_in_order),
        cmocka_unit_test(some_are_there_by_configuration),
        cmocka_unit_test(an_open_model_counts_them_the_same),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
