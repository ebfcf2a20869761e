/* worker_models.h: what is wrong with a file in the store is told to the log, not to a client. */
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
#include "server/worker_models.h"
#include "tests/unit/tiny_model.h"

static char folder[] = "/tmp/graft-models-XXXXXX";
static char base_path[64], digest[65];
static struct worker_models *models;
static struct err err;

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

    assert_int_equal(worker_models_base(models, digest, base_path, &first, &err), 0);
    assert_int_equal(worker_models_base(models, digest, "elsewhere", &second, &err), 0);
    assert_ptr_equal(first, second);
}

static void a_damaged_artifact_names_no_place(void **state)
{
    struct worker_base *base;
    struct worker_delta *delta;
    char sha256[65];
    const char *path;

    assert_int_equal(worker_models_base(models, digest, base_path, &base, &err), 0);
    path = file("no safetensors at all", sha256); /* its digest is right: the engine refuses it */
    refused(worker_models_pin(models, base, "tenant", sha256, path, &delta, &err), ERR_INTERNAL);
    path = file("", sha256);
    refused(worker_models_pin(models, base, "tenant", sha256, path, &delta, &err), ERR_INTERNAL);
    sha256[0] = sha256[0] == '0' ? '1' : '0';
    refused(worker_models_pin(models, base, "tenant", sha256, path, &delta, &err), ERR_INTERNAL);
    refused(worker_models_pin(models, base, "tenant", sha256, "/nowhere/a", &delta, &err),
            ERR_NOT_FOUND);
}

static void a_damaged_base_names_no_place(void **state)
{
    struct worker_base *base;
    char sha256[65];
    const char *path = file("no base", sha256);

    refused(worker_models_base(models, sha256, path, &base, &err), ERR_INTERNAL);
    refused(worker_models_base(models, sha256, "/nowhere/b", &base, &err), ERR_INTERNAL);
}

static int setup(void **state)
{
    const struct worker_models_options options = {.base_bytes = 1 << 30,
                                                  .delta_bytes = 1 << 30,
                                                  .engine = {.device = "cpu", .threads = 1},
                                                  .max_sequences = 8};
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
        cmocka_unit_test(a_damaged_artifact_names_no_place),
        cmocka_unit_test(a_damaged_base_names_no_place),
    };

    return cmocka_run_group_tests(tests, setup, teardown);
}
