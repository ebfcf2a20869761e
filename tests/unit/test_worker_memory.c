/* worker_models.h when memory is short: what goes, in which order, and what may never go. On the
 * CPU where only the bytes count that are allowed, on the test shim where there are no more. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/base/file_io.h"
#include "engine/base/json_text.h"
#include "engine/cuda/shim/shim_control.h"
#include "server/worker_models.h"
#include "tests/unit/delta_fixture.h"
#include "tests/unit/noisy_delta.h"
#include "tests/unit/stored_model.h"
#include "tests/unit/tiny_model.h"

#define DELTAS 4
#define BASES 2
#define MATRICES 14 /* of a tiny model */
#define PLENTY (INT64_C(1) << 30)

static char folder[] = "/tmp/graft-memory-XXXXXX";
static struct stored_file base_file[BASES]; /* the same values twice */
static struct stored_file delta_file[DELTAS];
static int64_t delta_bytes; /* of the largest, on the CPU */
static struct err err;

static struct worker_models *open_models(const char *device, int64_t base_bytes, int64_t bytes)
{
    const struct worker_models_options options = {.base_bytes = base_bytes,
                                                  .delta_bytes = bytes,
                                                  .engine = {.device = device, .threads = 1},
                                                  .max_sequences = 8,
                                                  .max_context = 64};
    struct worker_models *models;

    assert_int_equal(worker_models_open(&models, &options, &err), 0);
    return models;
}

static struct worker_base *base_of(struct worker_models *models, int which)
{
    struct worker_base *base;

    if (worker_models_base(models, base_file[which].sha256, base_file[which].path, &base, &err) !=
        0)
        fail_msg("%s", err.message);
    return base;
}

static int try_pin(struct worker_models *models, struct worker_base *base, int which,
                   struct worker_delta **out)
{
    return worker_models_pin(models, base, "tenant", delta_file[which].sha256,
                             delta_file[which].path, out, &err);
}

static struct worker_delta *pin(struct worker_models *models, struct worker_base *base, int which)
{
    struct worker_delta *delta;

    if (try_pin(models, base, which, &delta) != 0)
        fail_msg("%s", err.message);
    return delta;
}

static void use(struct worker_models *models, struct worker_base *base, int which)
{
    worker_models_unpin(pin(models, base, which));
}

/* Without its file it can be had only where it is loaded. It counts as used then. */
static bool is_loaded(struct worker_models *models, struct worker_base *base, int which)
{
    struct worker_delta *delta;
    char away[80];
    int rc;

    snprintf(away, sizeof away, "%s.away", delta_file[which].path);
    assert_int_equal(rename(delta_file[which].path, away), 0);
    rc = try_pin(models, base, which, &delta);
    assert_int_equal(rename(away, delta_file[which].path), 0);
    if (rc == 0)
        worker_models_unpin(delta);
    else
        assert_int_equal(err.kind, ERR_NOT_FOUND);
    err_clear(&err);
    return rc == 0;
}

static struct worker_models_stats stats_of(const struct worker_models *models)
{
    struct worker_models_stats stats;

    worker_models_stats(models, &stats);
    return stats;
}

/* ------------------------------------------------------------------ bytes that are allowed */

static void the_longest_unused_delta_goes_first(void **state)
{
    struct worker_models *models = open_models("cpu", PLENTY, 2 * delta_bytes + delta_bytes / 2);
    struct worker_base *base = base_of(models, 0);

    use(models, base, 0);
    use(models, base, 1);
    use(models, base, 0);
    use(models, base, 2);
    assert_int_equal(stats_of(models).deltas, 2);
    assert_false(is_loaded(models, base, 1));
    assert_true(is_loaded(models, base, 0));
    assert_true(is_loaded(models, base, 2));
    worker_models_free(models);
}

static void what_is_in_use_survives_a_load_over_the_bytes(void **state)
{
    struct worker_models *models = open_models("cpu", PLENTY, 1);
    struct worker_base *base = base_of(models, 0);
    struct worker_delta *first = pin(models, base, 0), *second = pin(models, base, 1);

    assert_int_equal(stats_of(models).deltas, 2);
    assert_ptr_equal(pin(models, base, 0), first);
    worker_models_unpin(first);
    worker_models_unpin(second);
    use(models, base, 2); /* the second goes, the first is pinned once more */
    assert_true(is_loaded(models, base, 0));
    assert_false(is_loaded(models, base, 1));
    worker_models_unpin(first);
    worker_models_free(models);
}

static void a_base_takes_its_deltas_along(void **state)
{
    struct worker_models *models = open_models("cpu", 1, PLENTY);
    struct worker_base *base = base_of(models, 0);

    use(models, base, 0);
    use(models, base, 1);
    base = base_of(models, 1);
    assert_int_equal(stats_of(models).bases, 1);
    assert_int_equal(stats_of(models).deltas, 0);
    base->active = 1; /* over the bytes, but it answers */
    base_of(models, 0);
    assert_int_equal(stats_of(models).bases, 2);
    worker_models_free(models);
}

/* From its header, but for the padding of small matrices, and an adapter's scales, which are kept
 * elsewhere. */
static void what_a_delta_takes_is_known_before(void **state)
{
    struct worker_models *models = open_models("cpu", PLENTY, PLENTY);
    struct worker_base *base = base_of(models, 0);
    char path[64], codec[DELTA_FIXTURE_NAME];

    snprintf(path, sizeof path, "%s/measured", folder);
    for (int i = 0; delta_fixture_codec(i, codec); i++) {
        const struct noisy_delta noise = {.codec = codec, .seed = 9, .embeddings = true};
        int64_t scales = strcmp(codec, "lora") == 0 ? 4 * MATRICES : 0;
        struct engine_delta_memory memory;
        struct engine_delta *delta;

        assert_int_equal(noisy_delta_write(base->engine, &noise, path, &err), 0);
        assert_int_equal(engine_delta_measure(base->engine, path, &memory, &err), 0);
        assert_int_equal(engine_delta_open(&delta, base->engine, path, &err), 0);
        if (memory.bytes < engine_delta_bytes(delta) / 2 ||
            memory.bytes > engine_delta_bytes(delta) + scales ||
            memory.opening_bytes <= memory.bytes)
            fail_msg("%s: %lld bytes foretold, %lld taken", codec, (long long)memory.bytes,
                     (long long)engine_delta_bytes(delta));
        engine_delta_free(delta);
    }
    worker_models_free(models);
}

/* ------------------------------------------------------------------ bytes that are there */

static void a_load_without_memory_takes_that_of_the_longest_unused(void **state)
{
    struct worker_models *models = open_models("shim:0", PLENTY, PLENTY);
    struct worker_base *base = base_of(models, 0);

    use(models, base, 0);
    use(models, base, 1);
    use(models, base, 2);
    use(models, base, 0);
    shim_fail(SHIM_FAULT_ALLOC, 3); /* in the midst of it */
    use(models, base, 3);
    shim_fail(SHIM_FAULT_ALLOC, 0);
    assert_int_equal(stats_of(models).deltas, 3);
    assert_false(is_loaded(models, base, 1));
    assert_true(is_loaded(models, base, 0));
    assert_true(is_loaded(models, base, 2));
    worker_models_free(models);
    assert_int_equal(shim_memory_used(), 0);
}

static void a_load_fails_only_where_all_is_in_use(void **state)
{
    struct worker_models *models = open_models("shim:0", PLENTY, PLENTY);
    struct worker_base *base = base_of(models, 0);
    struct worker_delta *first = pin(models, base, 0), *second = pin(models, base, 1), *third;

    shim_memory_limit(shim_memory_used());
    assert_int_equal(try_pin(models, base, 2, &third), -1);
    assert_int_equal(err.kind, ERR_NO_MEMORY);
    assert_string_equal(err.code, "insufficient_memory"); /* known before anything is loaded */
    assert_non_null(strstr(err.message, "needs about 1 MiB of memory and its worker has 0 MiB"));
    err_clear(&err);
    assert_int_equal(stats_of(models).deltas, 2);
    worker_models_unpin(first);
    worker_models_unpin(second);
    use(models, base, 2);
    assert_true(is_loaded(models, base, 2));
    shim_memory_limit(0);
    worker_models_free(models);
}

/* It would not fit even without the others. */
static void for_what_never_fits_nothing_goes(void **state)
{
    struct worker_models *models = open_models("shim:0", PLENTY, PLENTY);
    struct worker_base *base = base_of(models, 0);
    struct worker_delta *first = pin(models, base, 0), *large;
    const struct noisy_delta noise = {.codec = "lossless", .seed = 40};
    char path[64], sha[65];

    use(models, base, 1);
    snprintf(path, sizeof path, "%s/large", folder);
    assert_int_equal(noisy_delta_write(base->engine, &noise, path, &err), 0);
    assert_int_equal(file_sha256(path, sha, NULL, &err), 0);
    shim_memory_limit(shim_memory_used());
    assert_int_equal(worker_models_pin(models, base, "tenant", sha, path, &large, &err), -1);
    assert_string_equal(err.code, "insufficient_memory");
    err_clear(&err);
    assert_int_equal(stats_of(models).deltas, 2);
    shim_memory_limit(0);
    worker_models_unpin(first);
    worker_models_free(models);
}

static void ignore(void *context, const struct engine_event *event)
{
}

/* A worker that says so ends, and another begins; one that unloads everything first does neither.
 */
static void a_lost_device_is_no_shortage(void **state)
{
    const struct engine_message message = {.role = "user", .content = "x"};
    const struct engine_request request = {
        .messages = &message, .message_count = 1, .top_p = 1, .max_tokens = 2};
    struct worker_models *models = open_models("shim:0", PLENTY, PLENTY);
    struct worker_base *base = base_of(models, 0);
    struct worker_delta *delta;
    int32_t active;
    uint64_t id;

    use(models, base, 0);
    shim_fail(SHIM_FAULT_LAUNCH, 1);
    assert_int_equal(engine_session_submit(base->session, &request, &id, &err), 0);
    assert_int_equal(engine_session_step(base->session, ignore, NULL, &active, &err), -1);
    assert_int_equal(err.kind, ERR_DEVICE);
    err_clear(&err);
    assert_int_equal(try_pin(models, base, 1, &delta), -1);
    assert_int_equal(err.kind, ERR_DEVICE);
    err_clear(&err);
    assert_int_equal(stats_of(models).deltas, 1);
    worker_models_free(models);
    shim_fail(SHIM_FAULT_LAUNCH, 0);
}

static void a_base_without_memory_takes_that_of_an_idle_one(void **state)
{
    struct worker_models *models = open_models("shim:0", PLENTY, PLENTY);
    struct worker_base *base = base_of(models, 0), *other;

    use(models, base, 0);
    shim_memory_limit(shim_memory_used());
    base->active = 1;
    assert_int_equal(
        worker_models_base(models, base_file[1].sha256, base_file[1].path, &other, &err), -1);
    assert_int_equal(err.kind, ERR_NO_MEMORY);
    err_clear(&err);
    assert_int_equal(stats_of(models).bases, 1);
    assert_int_equal(stats_of(models).deltas, 0); /* the last that could go */
    base->active = 0;
    base_of(models, 1);
    assert_int_equal(stats_of(models).bases, 1);
    shim_memory_limit(0);
    worker_models_free(models);
    assert_int_equal(shim_memory_used(), 0);
}

/* ------------------------------------------------------------------ fixture */

/* Of the largest of the deltas. */
static int64_t largest_delta(struct engine *engine)
{
    int64_t most = 0;

    for (int i = 0; i < DELTAS; i++) {
        struct engine_delta *delta;

        assert_int_equal(engine_delta_open(&delta, engine, delta_file[i].path, &err), 0);
        if (engine_delta_bytes(delta) > most)
            most = engine_delta_bytes(delta);
        engine_delta_free(delta);
    }
    return most;
}

static int setup(void **state)
{
    const struct tiny_model tiny = {.seed = 5};
    struct engine *engine;
    char source[64];

    json_text_setup();
    if (mkdtemp(folder) == NULL)
        return -1;
    snprintf(source, sizeof source, "%s/tiny", folder);
    assert_int_equal(tiny_model_write(source, &tiny, &err), 0);
    stored_base(&base_file[0], source, folder, "base0");
    assert_int_equal(tiny_model_brief_template(source, &err), 0); /* which makes it another file */
    stored_base(&base_file[1], source, folder, "base1");
    engine = stored_engine(&base_file[0]);
    stored_deltas(delta_file, DELTAS, engine, "graft", folder);
    delta_bytes = largest_delta(engine);
    engine_free(engine);
    return 0;
}

static int teardown(void **state)
{
    file_remove_tree(folder, NULL);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_longest_unused_delta_goes_first),
        cmocka_unit_test(what_is_in_use_survives_a_load_over_the_bytes),
        cmocka_unit_test(a_base_takes_its_deltas_along),
        cmocka_unit_test(what_a_delta_takes_is_known_before),
        cmocka_unit_test(a_load_without_memory_takes_that_of_the_longest_unused),
        cmocka_unit_test(a_load_fails_only_where_all_is_in_use),
        cmocka_unit_test(for_what_never_fits_nothing_goes),
        cmocka_unit_test(a_lost_device_is_no_shortage),
        cmocka_unit_test(a_base_without_memory_takes_that_of_an_idle_one),
    };

    return cmocka_run_group_tests(tests, setup, teardown);
}
