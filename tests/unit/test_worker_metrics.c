/* Metrics events: wording and data as the contract has them, with and without a validation file. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <jansson.h>

#include "server/worker_metrics.h"

static struct engine_step plain_step(void)
{
    return (struct engine_step){.step = 3,
                                .total_steps = 300,
                                .epoch = 1,
                                .train_loss = 0.224,
                                .train_mean_token_accuracy = 0.5,
                                .valid_loss = NAN,
                                .valid_mean_token_accuracy = NAN,
                                .full_valid_loss = NAN,
                                .full_valid_mean_token_accuracy = NAN,
                                .learning_rate = 1e-5,
                                .gradient_norm = 2,
                                .tokens = 100,
                                .seconds = 0.5};
}

static void without_validation_nothing_of_it_is_told(void **state)
{
    struct engine_step step = plain_step();
    char *message, *data;
    json_t *json;

    assert_int_equal(worker_metrics_format(&step, &message, &data, NULL), 0);
    assert_string_equal(message, "Step 3/300: training loss=0.22");
    json = json_loads(data, 0, NULL);
    assert_int_equal(json_integer_value(json_object_get(json, "step")), 3);
    assert_int_equal(json_integer_value(json_object_get(json, "total_steps")), 300);
    assert_true(json_real_value(json_object_get(json, "train_loss")) == 0.224);
    assert_true(json_real_value(json_object_get(json, "tokens_per_second")) == 200);
    assert_null(json_object_get(json, "valid_loss"));
    assert_null(json_object_get(json, "full_valid_loss"));
    json_decref(json);
    free(message);
    free(data);
}

static void with_validation_all_of_it_is_told(void **state)
{
    struct engine_step step = plain_step();
    char *message, *data;
    json_t *json;

    step.valid_loss = 0.27;
    step.valid_mean_token_accuracy = 0.25;
    step.full_valid_loss = 0.404;
    step.full_valid_mean_token_accuracy = 0.75;
    assert_int_equal(worker_metrics_format(&step, &message, &data, NULL), 0);
    assert_string_equal(
        message, "Step 3/300: training loss=0.22, validation loss=0.27, full validation loss=0.40");
    json = json_loads(data, 0, NULL);
    assert_true(json_real_value(json_object_get(json, "valid_mean_token_accuracy")) == 0.25);
    assert_true(json_real_value(json_object_get(json, "full_valid_mean_token_accuracy")) == 0.75);
    json_decref(json);
    free(message);
    free(data);
}

static void a_loss_that_is_no_number_is_left_out(void **state)
{
    struct engine_step step = plain_step();
    char *message, *data;

    step.gradient_norm = INFINITY;
    step.seconds = 0;
    assert_int_equal(worker_metrics_format(&step, &message, &data, NULL), 0);
    assert_null(strstr(data, "gradient_norm"));
    assert_null(strstr(data, "tokens_per_second"));
    free(message);
    free(data);
}

static void the_checkpoint_has_the_steps_numbers(void **state)
{
    struct engine_step step = plain_step();
    struct checkpoint_metrics m;

    step.valid_loss = 0.5;
    worker_metrics_of_step(&step, &m);
    assert_true(m.train_loss == 0.224 && m.train_mean_token_accuracy == 0.5);
    assert_true(m.valid_loss == 0.5 && isnan(m.full_valid_loss));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(without_validation_nothing_of_it_is_told),
        cmocka_unit_test(with_validation_all_of_it_is_told),
        cmocka_unit_test(a_loss_that_is_no_number_is_left_out),
        cmocka_unit_test(the_checkpoint_has_the_steps_numbers),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
