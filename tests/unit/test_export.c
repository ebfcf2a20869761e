/* Base and delta as one directory: it is the tuned model, it loads, it is there whole or not at
 * all, and what was there before stays. */
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "engine/base/file_io.h"
#include "engine/engine.h"
#include "engine/safetensors.h"
#include "tests/unit/check.h"
#include "tests/unit/folder_entries.h"
#include "tests/unit/tiny_model.h"

/* Half of what is written of it, in F32. */
static const struct tiny_model base = {.seed = 1, .dtype = DTYPE_BF16},
                               tuned = {.seed = 2, .dtype = DTYPE_BF16};
static const struct engine_options cpu = {.device = "cpu", .threads = 1};
static char folder[] = "/tmp/graft-export-XXXXXX";
static char base_dir[64], tuned_dir[64], delta_path[64], out_dir[64], out_slash[64];

/* Of a directory's own weights. */
static void digest_of(const char *dir, char digest[65])
{
    struct engine *engine;

    CHECK(engine_open_model(&engine, dir, &cpu, &err));
    snprintf(digest, 65, "%s", engine_info(engine)->digest);
    engine_free(engine);
}

static void open_weights(struct safetensors **file, const char *dir)
{
    char path[96];

    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    CHECK(safetensors_open(file, path, &err));
}

static double value_at(const struct safetensors_tensor *t, int64_t index)
{
    float value;

    tensor_to_f32(&t->view, index, 1, &value);
    return (double)value;
}

/* How far base + difference may be from tuned (api-spec/delta-format.md): the difference and the
 * sum are rounded to F32; and what is no matrix of a block has a difference in F16. */
static double rounding(const char *name, double from, double to)
{
    double sum = 0x1p-22 * fmax(fabs(from), fabs(to));

    return strstr(name, "_proj") ? sum : sum + fmax(0x1p-11 * fabs(to - from), 0x1p-25);
}

static void it_is_the_tuned_model(void **state)
{
    struct safetensors *from, *to, *out;

    CHECK(engine_delta_apply(base_dir, delta_path, out_dir, &err));
    open_weights(&from, base_dir);
    open_weights(&to, tuned_dir);
    open_weights(&out, out_dir);
    assert_int_equal(safetensors_count(out), safetensors_count(to));
    for (int64_t t = 0; t < safetensors_count(to); t++) {
        const struct safetensors_tensor *want = safetensors_at(to, t),
                                        *before = safetensors_find(from, want->name),
                                        *got = safetensors_find(out, want->name);

        assert_non_null(got);
        assert_int_equal(got->view.dtype, DTYPE_F32);
        assert_int_equal(got->view.rank, want->view.rank);
        assert_memory_equal(got->view.shape, want->view.shape, sizeof want->view.shape);
        for (int64_t i = 0; i < tensor_elements(&want->view); i++) {
            double was = value_at(before, i), is = value_at(want, i);

            if (fabs(value_at(got, i) - is) > rounding(want->name, was, is))
                fail_msg("%s[%lld] is %.9g, not %.9g (of %.9g)", want->name, (long long)i,
                         value_at(got, i), is, was);
        }
    }
    safetensors_free(from);
    safetensors_free(to);
    safetensors_free(out);
    CHECK(file_remove_tree(out_dir, &err));
}

static void it_loads(void **state)
{
    char first[65], again[65];
    int before = folder_entries(folder);

    CHECK(engine_delta_apply(base_dir, delta_path, out_dir, &err));
    assert_int_equal(folder_entries(folder), before + 1);
    digest_of(out_dir, first);
    CHECK(file_remove_tree(out_dir, &err));
    CHECK(engine_delta_apply(base_dir, delta_path, out_slash, &err));
    digest_of(out_dir, again);
    assert_string_equal(first, again);
    CHECK(file_remove_tree(out_dir, &err));
    assert_int_equal(folder_entries(folder), before);
}

/* As on a disk that is full when most is written: the next try finds its place empty. */
static void a_directory_that_does_not_fit_leaves_nothing(void **state)
{
    int before = folder_entries(folder);
    struct rlimit unlimited, limited;
    struct err why = {0};
    char model[96];
    struct stat st;
    int rc;

    snprintf(model, sizeof model, "%s/model.safetensors", base_dir);
    assert_int_equal(stat(model, &st), 0);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &unlimited), 0);
    limited = unlimited;
    limited.rlim_cur = (rlim_t)(st.st_size * 3 / 2);
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limited), 0);
    rc = engine_delta_apply(base_dir, delta_path, out_dir, &why);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &unlimited), 0);
    signal(SIGXFSZ, SIG_DFL);
    assert_int_equal(rc, -1);
    assert_int_equal(why.kind, ERR_NO_SPACE);
    assert_non_null(strstr(why.message, out_dir));
    assert_int_equal(folder_entries(folder), before);
    CHECK(engine_delta_apply(base_dir, delta_path, out_dir, &err));
    CHECK(file_remove_tree(out_dir, &err));
}

/* Even an empty one: it is somebody's. */
static void what_is_there_stays(void **state)
{
    int before = folder_entries(folder);

    for (int i = 0; i < 2; i++) {
        struct err why = {0};

        assert_int_equal(mkdir(out_dir, 0700), 0);
        assert_int_equal(engine_delta_apply(base_dir, delta_path, i ? out_slash : out_dir, &why),
                         -1);
        assert_int_equal(why.kind, ERR_INVALID);
        assert_non_null(strstr(why.message, "exists"));
        assert_int_equal(folder_entries(folder), before + 1);
        assert_int_equal(rmdir(out_dir), 0);
    }
}

static void a_place_that_is_nowhere_is_named(void **state)
{
    struct err why = {0};
    char nowhere[96];

    snprintf(nowhere, sizeof nowhere, "%s/none/out", folder);
    assert_int_equal(engine_delta_apply(base_dir, delta_path, nowhere, &why), -1);
    assert_non_null(strstr(why.message, nowhere));
}

static int setup(void **state)
{
    const struct engine_compress_options options = {.codec = "lossless"};
    struct engine_delta_report report;
    struct engine *engine;

    if (mkdtemp(folder) == NULL)
        return -1;
    snprintf(base_dir, sizeof base_dir, "%s/base", folder);
    snprintf(tuned_dir, sizeof tuned_dir, "%s/tuned", folder);
    snprintf(delta_path, sizeof delta_path, "%s/delta", folder);
    snprintf(out_dir, sizeof out_dir, "%s/out", folder);
    snprintf(out_slash, sizeof out_slash, "%s/out//", folder);
    CHECK(tiny_model_write(base_dir, &base, &err));
    CHECK(tiny_model_write(tuned_dir, &tuned, &err));
    CHECK(engine_open_model(&engine, base_dir, &cpu, &err));
    CHECK(engine_model_compress(engine, tuned_dir, &options, delta_path, &report, &err));
    engine_free(engine);
    return 0;
}

static int teardown(void **state)
{
    return file_remove_tree(folder, NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(it_is_the_tuned_model),
        cmocka_unit_test(it_loads),
        cmocka_unit_test(a_directory_that_does_not_fit_leaves_nothing),
        cmocka_unit_test(what_is_there_stays),
        cmocka_unit_test(a_place_that_is_nowhere_is_named),
    };

    return cmocka_run_group_tests(tests, setup, teardown);
}
