/* worker_models.h: files are told apart by what they are, and what is wrong with one in the store
 * is told to the log, not to a client. */
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>
#include <openssl/evp.h>

#include "engine/base/file_io.h"
#include "engine/base/json_text.h"
#include "engine/base/rng.h"
#include "server/worker_check.h"
#include "server/worker_models.h"
#include "tests/unit/delta_fixture.h"
#include "tests/unit/noisy_delta.h"
#include "tests/unit/tiny_model.h"

static char folder[] = "/tmp/graft-models-XXXXXX";
static char base_path[64], digest[65], base_sha256[65];
static const struct worker_models_options options = {.base_bytes = 1 << 30,
                                                     .delta_bytes = 1 << 30,
                                                     .engine = {.device = "cpu", .threads = 1},
                                                     .max_sequences = 8};
static const struct timespec moment = {.tv_nsec = 1000000};
static struct worker_models *models;
static struct err err;

/* What a hash begins with, in place of OpenSSL's own: as many of the next find no memory. */
static atomic_int shortages;

int EVP_DigestInit_ex(EVP_MD_CTX *context, const EVP_MD *type, ENGINE *engine)
{
    if (atomic_load(&shortages) > 0) {
        atomic_fetch_sub(&shortages, 1);
        return 0;
    }
    return EVP_DigestInit_ex2(context, type, NULL);
}

/* A file with this content; its path, and its digest into sha256. */
static const char *file(const char *content, char sha256[65])
{
    static char path[64];
    int64_t bytes;

    snprintf(path, sizeof path, "%s/artifact", folder);
    assert_int_equal(file_write_durable(path, content, strlen(content), NULL), 0);
    assert_int_equal(file_sha256(path, sha256, &bytes, NULL), 0);
    return path;
}

static void refused(int rc, enum err_kind kind)
{
    assert_int_equal(rc, -1);
    assert_int_equal(err.kind, kind);
    if (strstr(err.message, folder) != NULL || strchr(err.message, '/') != NULL)
        fail_msg("names a place: %s", err.message);
    err_clear(&err);
}

static void a_base_is_loaded_once(void **state)
{
    struct worker_base *first, *second;

    assert_int_equal(worker_models_base(models, base_sha256, base_path, &first, &err), 0);
    assert_int_equal(worker_models_base(models, base_sha256, base_path, &second, &err), 0);
    assert_ptr_equal(first, second);
}

static void take_count(void *context, const struct engine_event *event)
{
    *(int32_t *)context = event->prompt_tokens;
}

/* Tokens of "hello" as this base's template puts it. */
static int32_t prompt_tokens(struct worker_base *base)
{
    const struct engine_message message = {.role = "user", .content = "hello"};
    const struct engine_request request = {
        .messages = &message, .message_count = 1, .top_p = 1, .max_tokens = 1};
    int32_t count = 0, active = 1;
    uint64_t id;

    assert_int_equal(engine_session_submit(base->session, &request, &id, &err), 0);
    while (active > 0)
        assert_int_equal(engine_session_step(base->session, take_count, &count, &active, &err), 0);
    return count;
}

/* The digest is of values alone: two imports of the same ones may speak differently. */
static void bases_of_one_digest_answer_each_with_its_own_template(void **state)
{
    struct worker_base *first, *second;
    struct worker_models_stats stats;
    struct engine_base_info info;
    struct worker_delta *of_first, *of_second;
    const struct noisy_delta noise = {.codec = "graft", .seed = 6};
    char source[64], other[64], delta[64], sha256[65];

    snprintf(source, sizeof source, "%s/tiny", folder);
    snprintf(other, sizeof other, "%s/other", folder);
    snprintf(delta, sizeof delta, "%s/of-both", folder);
    assert_int_equal(tiny_model_brief_template(source, &err), 0);
    assert_int_equal(engine_import(source, other, &info, &err), 0);
    assert_string_equal(info.digest, digest);
    assert_int_equal(file_sha256(other, sha256, NULL, &err), 0);
    assert_int_equal(worker_models_base(models, base_sha256, base_path, &first, &err), 0);
    assert_int_equal(worker_models_base(models, sha256, other, &second, &err), 0);
    assert_ptr_not_equal(first, second);
    worker_models_stats(models, &stats);
    assert_int_equal(stats.bases, 2);
    assert_true(prompt_tokens(first) > prompt_tokens(second)); /* it also has a system prompt */

    assert_int_equal(noisy_delta_write(first->engine, &noise, delta, &err), 0);
    assert_int_equal(file_sha256(delta, sha256, NULL, NULL), 0);
    assert_int_equal(worker_models_pin(models, first, "tenant", sha256, delta, &of_first, &err), 0);
    assert_int_equal(worker_models_pin(models, second, "tenant", sha256, delta, &of_second, &err),
                     0);
    assert_ptr_not_equal(of_first, of_second);
    worker_models_unpin(of_first);
    worker_models_unpin(of_second);
}

static void a_damaged_artifact_names_no_place(void **state)
{
    struct worker_base *base;
    struct worker_delta *delta;
    char sha256[65];
    const char *path;

    assert_int_equal(worker_models_base(models, base_sha256, base_path, &base, &err), 0);
    path = file("no safetensors at all", sha256); /* its digest is right: the engine refuses it */
    refused(worker_models_pin(models, base, "tenant", sha256, path, &delta, &err), ERR_INTERNAL);
    path = file("", sha256);
    refused(worker_models_pin(models, base, "tenant", sha256, path, &delta, &err), ERR_INTERNAL);
    sha256[0] = sha256[0] == '0' ? '1' : '0';
    refused(worker_models_pin(models, base, "tenant", sha256, path, &delta, &err), ERR_IO);
    refused(worker_models_pin(models, base, "tenant", sha256, "/nowhere/a", &delta, &err),
            ERR_NOT_FOUND);
}

/* Whatever bit of it changes on its way or on the disk: its digest tells, and nobody is answered
 * with it. A delta of the same name that was loaded before goes on. */
static void an_artifact_with_another_bit_is_refused(void **state)
{
    struct worker_base *base;
    struct worker_delta *delta, *other;
    char sha256[65], codec[DELTA_FIXTURE_NAME], path[64], *data;
    size_t size;

    snprintf(path, sizeof path, "%s/delta", folder);
    assert_int_equal(worker_models_base(models, base_sha256, base_path, &base, &err), 0);
    for (int i = 0; delta_fixture_codec(i, codec); i++) {
        const struct noisy_delta noise = {.codec = codec, .seed = 3};

        assert_int_equal(noisy_delta_write(base->engine, &noise, path, &err), 0);
        assert_int_equal(file_sha256(path, sha256, NULL, NULL), 0);
        assert_int_equal(file_read_all(path, 1 << 24, &data, &size, NULL), 0);
        assert_int_equal(worker_models_pin(models, base, "tenant", sha256, path, &delta, &err), 0);
        for (uint64_t k = 0; k < 40; k++) {
            uint64_t bit = rng_at(1, (uint64_t)i, k) % (8 * size);
            int fd = open(path, O_WRONLY);
            char byte = (char)(data[bit / 8] ^ (1 << bit % 8));

            assert_true(fd >= 0);
            assert_int_equal(pwrite(fd, &byte, 1, (off_t)(bit / 8)), 1);
            refused(worker_models_pin(models, base, "other", sha256, path, &other, &err), ERR_IO);
            assert_int_equal(pwrite(fd, &data[bit / 8], 1, (off_t)(bit / 8)), 1);
            close(fd);
        }
        assert_int_equal(truncate(path, (off_t)size - 1), 0);
        refused(worker_models_pin(models, base, "other", sha256, path, &other, &err), ERR_IO);
        worker_models_unpin(delta);
        free(data);
    }
}

/* Nothing is known of the file then: it is neither called damaged nor refused without a look. */
static void a_shortage_of_memory_is_no_damage_to_a_delta(void **state)
{
    const struct noisy_delta noise = {.codec = "graft", .seed = 7};
    struct worker_base *base;
    struct worker_delta *delta;
    char sha256[65], path[64];

    snprintf(path, sizeof path, "%s/short", folder);
    assert_int_equal(worker_models_base(models, base_sha256, base_path, &base, &err), 0);
    assert_int_equal(noisy_delta_write(base->engine, &noise, path, &err), 0);
    assert_int_equal(file_sha256(path, sha256, NULL, NULL), 0);
    while (worker_check_state(base->check) == WORKER_CHECK_RUNS) /* it hashes too */
        nanosleep(&moment, NULL);
    atomic_store(&shortages, 1);
    refused(worker_models_pin(models, base, "tenant", sha256, path, &delta, &err), ERR_NO_MEMORY);
    assert_int_equal(worker_models_pin(models, base, "tenant", sha256, path, &delta, &err), 0);
    worker_models_unpin(delta);
}

/* What is in use when its file goes stays what it was; who asks anew hears that it was deleted, and
 * no other tenant's copy is taken for it. */
static void a_delta_that_is_deleted_in_use_goes_on(void **state)
{
    const struct noisy_delta noise = {.codec = "graft", .seed = 4};
    struct worker_base *base;
    struct worker_delta *delta, *again;
    char sha256[65], path[64];

    snprintf(path, sizeof path, "%s/deleted", folder);
    assert_int_equal(worker_models_base(models, base_sha256, base_path, &base, &err), 0);
    assert_int_equal(noisy_delta_write(base->engine, &noise, path, &err), 0);
    assert_int_equal(file_sha256(path, sha256, NULL, NULL), 0);
    assert_int_equal(worker_models_pin(models, base, "tenant", sha256, path, &delta, &err), 0);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(worker_models_pin(models, base, "tenant", sha256, path, &again, &err), 0);
    assert_ptr_equal(delta, again);
    assert_true(engine_delta_bytes(worker_delta_engine(delta)) > 0);
    refused(worker_models_pin(models, base, "other", sha256, path, &again, &err), ERR_NOT_FOUND);
    worker_models_unpin(delta);
    worker_models_unpin(delta);
}

static void a_damaged_base_names_no_place(void **state)
{
    struct worker_base *base;
    char sha256[65];
    const char *path = file("no base", sha256);

    refused(worker_models_base(models, sha256, path, &base, &err), ERR_INTERNAL);
    refused(worker_models_base(models, sha256, "/nowhere/b", &base, &err), ERR_INTERNAL);
}

/* A bit of its weights: all that is said of them in the header is still true, and that they
 * are others is found while it is loaded already. Asked again it is refused at once, until another
 * file is there. */
static void a_base_with_another_bit_is_dropped(void **state)
{
    struct worker_models_stats stats;
    struct worker_models *fresh;
    struct worker_base *base;
    char path[64], *data;
    size_t size;

    snprintf(path, sizeof path, "%s/rotten", folder);
    assert_int_equal(file_read_all(base_path, 1 << 26, &data, &size, &err), 0);
    assert_int_equal(worker_models_open(&fresh, &options, &err), 0);
    data[size / 2] ^= 1;
    assert_int_equal(file_write_durable(path, data, size, &err), 0);
    assert_int_equal(worker_models_base(fresh, base_sha256, path, &base, &err), 0);
    for (int i = 0; i < 20000 && worker_models_damaged(fresh, &err) == NULL; i++)
        nanosleep(&moment, NULL);
    assert_ptr_equal(worker_models_damaged(fresh, &err), base);
    assert_string_equal(err.code, "damaged_file");
    worker_models_drop(fresh, base);
    assert_null(worker_models_damaged(fresh, &err));
    for (int i = 0; i < 2; i++) {
        err_clear(&err);
        refused(worker_models_base(fresh, base_sha256, path, &base, &err), ERR_IO);
    }
    worker_models_stats(fresh, &stats);
    assert_int_equal(stats.loads, 1);
    data[size / 2] ^= 1;
    assert_int_equal(file_write_durable(path, data, size, &err), 0);
    assert_int_equal(worker_models_base(fresh, base_sha256, path, &base, &err), 0);
    while (worker_check_state(base->check) == WORKER_CHECK_RUNS)
        nanosleep(&moment, NULL);
    assert_null(worker_models_damaged(fresh, &err));
    worker_models_free(fresh);
    free(data);
}

static enum worker_check_state checked(const char *path, const char *sha256)
{
    struct worker_check *check;
    enum worker_check_state found;

    atomic_store(&shortages, 2);
    assert_int_equal(worker_check_start(&check, path, sha256, &err), 0);
    for (int i = 0; i < 20000 && worker_check_state(check) == WORKER_CHECK_RUNS; i++)
        nanosleep(&moment, NULL);
    found = worker_check_state(check);
    worker_check_free(check);
    assert_int_equal(atomic_load(&shortages), 0);
    return found;
}

/* It is hashed when there is some: a sound one stays, and a damaged one does not stay for it. */
static void a_shortage_of_memory_neither_damages_nor_vouches_for_a_base(void **state)
{
    char another[65];

    memcpy(another, base_sha256, sizeof another);
    another[0] = another[0] == '0' ? '1' : '0';
    assert_int_equal(checked(base_path, base_sha256), WORKER_CHECK_SOUND);
    assert_int_equal(checked(base_path, another), WORKER_CHECK_DAMAGED);
}

static int setup(void **state)
{
    struct tiny_model tiny = {.seed = 5};
    struct engine_base_info info;
    char source[64];

    json_text_setup();
    if (mkdtemp(folder) == NULL)
        return -1;
    snprintf(source, sizeof source, "%s/tiny", folder);
    snprintf(base_path, sizeof base_path, "%s/base", folder);
    if (tiny_model_write(source, &tiny, &err) != 0 ||
        engine_import(source, base_path, &info, &err) != 0 ||
        file_sha256(base_path, base_sha256, NULL, &err) != 0 ||
        worker_models_open(&models, &options, &err) != 0) {
        fprintf(stderr, "%s\n", err.message);
        return -1;
    }
    memcpy(digest, info.digest, sizeof digest);
    return 0;
}

static int teardown(void **state)
{
    worker_models_free(models);
    file_remove_tree(folder, NULL);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_base_is_loaded_once),
        cmocka_unit_test(bases_of_one_digest_answer_each_with_its_own_template),
        cmocka_unit_test(a_damaged_artifact_names_no_place),
        cmocka_unit_test(an_artifact_with_another_bit_is_refused),
        cmocka_unit_test(a_shortage_of_memory_is_no_damage_to_a_delta),
        cmocka_unit_test(a_delta_that_is_deleted_in_use_goes_on),
        cmocka_unit_test(a_damaged_base_names_no_place),
        cmocka_unit_test(a_base_with_another_bit_is_dropped),
        cmocka_unit_test(a_shortage_of_memory_neither_damages_nor_vouches_for_a_base),
    };

    return cmocka_run_group_tests(tests, setup, teardown);
}
