/* Settings: precedence, bounds, the file, and that secrets stay out of messages and of help. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "server/settings.h"

static const char *const names[] = {
    "data",     "listen", "database",  "database_file", "workers",   "insecure",      "recovery",
    "max_file", "fence",  "heartbeat", "lease",         "log_level", "infer_context", NULL};
static const struct setting_option options[] = {
    {"--org", "NAME", "organization"}, {"--force", NULL, "force"}, {NULL, NULL, NULL}};
static const struct setting_spec spec = {
    .settings = names, .options = options, .args_min = 0, .args_max = 1};

static struct settings settings;
static struct setting_args args;
static struct err err;

/* argv from the arguments, up to a NULL. */
static int load(const char *first, ...)
{
    static char *argv[16];
    int argc = 0;
    va_list ap;

    err_clear(&err);
    va_start(ap, first);
    for (const char *a = first; a != NULL; a = va_arg(ap, const char *))
        argv[argc++] = (char *)a;
    va_end(ap);
    return settings_load(&settings, &args, &spec, argc, argv, &err);
}

static char *write_file(const char *text)
{
    static char path[64];
    FILE *f;
    int fd;

    snprintf(path, sizeof path, "/tmp/test_settings.XXXXXX");
    fd = mkstemp(path);
    assert_true(fd >= 0);
    f = fdopen(fd, "w");
    fputs(text, f);
    fclose(f);
    return path;
}

static void defaults_without_anything(void **state)
{
    assert_int_equal(load(NULL), 0);
    assert_string_equal(settings.listen, "127.0.0.1:8080");
    assert_int_equal(settings.workers, 1);
    assert_int_equal(settings.max_file, 512 << 20);
    assert_true(settings.recovery == 60);
    assert_false(settings.insecure);
    assert_string_equal(settings.database, "");
    settings_release(&settings);
}

static void flag_beats_variable_beats_file(void **state)
{
    char *path = write_file("# three\nworkers = 2\nrecovery=3.5 \n  listen = h:1\n");

    setenv("GRAFT_WORKERS", "4", 1);
    setenv("GRAFT_LISTEN", "h:2", 1);
    assert_int_equal(load("--config", path, "--listen=h:3", NULL), 0);
    assert_string_equal(settings.listen, "h:3");
    assert_int_equal(settings.workers, 4);
    assert_true(settings.recovery == 3.5);
    settings_release(&settings);
    unsetenv("GRAFT_WORKERS");
    unsetenv("GRAFT_LISTEN");
    unlink(path);
}

static void options_and_arguments(void **state)
{
    assert_int_equal(load("PATH", "--org", "o", "--insecure", "--force", NULL), 0);
    assert_string_equal(args.options[0], "o");
    assert_string_equal(args.options[1], "true");
    assert_true(settings.insecure);
    assert_int_equal(args.arg_count, 1);
    assert_string_equal(args.args[0], "PATH");
    settings_release(&settings);
    assert_int_equal(load("--", "--org", NULL), 0);
    assert_string_equal(args.args[0], "--org");
    settings_release(&settings);
}

static void refused(const char *expected, int rc)
{
    assert_int_equal(rc, -1);
    assert_int_equal(err.kind, ERR_INVALID);
    assert_non_null(strstr(err.message, expected));
    assert_null(settings.data);
}

static void usage_errors_name_the_thing(void **state)
{
    char *path;

    refused("unknown option --nonsense", load("--nonsense", NULL));
    refused("unknown option --threads", load("--threads", "2", NULL)); /* not of this command */
    refused("--workers needs a value", load("--workers", NULL));
    refused("--insecure takes no value", load("--insecure=true", NULL));
    refused("--workers: \"x\" is not a number", load("--workers", "x", NULL));
    refused("--workers: \"1.5\" is not a whole", load("--workers", "1.5", NULL));
    refused("outside 0 to 64", load("--workers", "65", NULL));
    refused("unexpected argument \"b\"", load("a", "b", NULL));
    refused("heartbeat (9 s) must be shorter", load("--heartbeat", "9", "--fence", "8", NULL));
    refused("fence (26 s) must be at most", load("--fence", "26", NULL));
    refused("fence (3 s) must be at most",
            load("--heartbeat", "1", "--fence", "3", "--lease", "3", NULL));
    refused("log level \"loud\"", load("--log-level", "loud", NULL));
    setenv("GRAFT_RECOVERY", "often", 1);
    refused("GRAFT_RECOVERY: \"often\"", load(NULL));
    unsetenv("GRAFT_RECOVERY");
    path = write_file("\n\nworker = 1\n");
    refused("line 3: there is no setting \"worker\"", load("--config", path, NULL));
    unlink(path);
    path = write_file("workers\n");
    refused("line 1: expected", load("--config", path, NULL));
    unlink(path);
}

/* Where the template's own tokens fill it no chat could be answered. */
static void a_context_has_room_for_a_chat(void **state)
{
    refused("infer_context (1 tokens) leaves no room", load("--infer-context", "1", NULL));
    refused("use 64 or more, or 0", load("--infer-context", "63", NULL));
    assert_int_equal(load("--infer-context", "64", NULL), 0);
    assert_int_equal(settings.infer_context, 64);
    settings_release(&settings);
    assert_int_equal(load("--infer-context", "0", NULL), 0);
    assert_int_equal(settings.infer_context, 0);
    settings_release(&settings);
}

static void sizes_have_units(void **state)
{
    assert_int_equal(load("--max-file", "2G", NULL), 0);
    assert_true(settings.max_file == INT64_C(2) << 30);
    settings_release(&settings);
    refused("not a number", load("--max-file", "2Q", NULL));
}

static void database_url_comes_from_a_file(void **state)
{
    char *path = write_file("postgresql://u:canary-secret@h/d\nsecond line\n");

    setenv("GRAFT_DATABASE_URL", "postgresql://environment", 1);
    assert_int_equal(load("--database-file", path, NULL), 0);
    assert_string_equal(settings.database, "postgresql://u:canary-secret@h/d");
    settings_release(&settings);
    assert_int_equal(load(NULL), 0);
    assert_string_equal(settings.database, "postgresql://environment");
    settings_release(&settings);
    unsetenv("GRAFT_DATABASE_URL");
    unlink(path);
}

static void
a_database_url_of_the_environment_goes_before_a_file_that_the_settings_file_names(void **state)
{
    char *path = write_file("database_file = /nowhere\n");

    assert_int_equal(load("--config", path, NULL), -1);
    assert_non_null(strstr(err.message, "/nowhere"));
    setenv("GRAFT_DATABASE_URL", "postgresql://environment", 1);
    assert_int_equal(load("--config", path, NULL), 0);
    assert_string_equal(settings.database, "postgresql://environment");
    settings_release(&settings);
    setenv("GRAFT_DATABASE_FILE", "/no/more", 1);
    assert_int_equal(load("--config", path, NULL), -1);
    assert_non_null(strstr(err.message, "/no/more"));
    unsetenv("GRAFT_DATABASE_FILE");
    unsetenv("GRAFT_DATABASE_URL");
    unlink(path);
}

static void workers_inherit_settings(void **state)
{
    char **environment;
    bool recovery = false, workers = false;

    setenv("GRAFT_WORKERS", "9", 1);
    assert_int_equal(load("--workers", "3", "--recovery", "0.25", NULL), 0);
    environment = settings_environment(&settings);
    assert_non_null(environment);
    for (char **e = environment; *e != NULL; e++) {
        assert_string_not_equal(*e, "GRAFT_WORKERS=9");
        workers = workers || strcmp(*e, "GRAFT_WORKERS=3") == 0;
        recovery = recovery || strcmp(*e, "GRAFT_RECOVERY=0.25") == 0;
    }
    assert_true(workers && recovery);
    settings_environment_free(environment);
    settings_release(&settings);
    unsetenv("GRAFT_WORKERS");
}

static void help_never_shows_a_secret(void **state)
{
    char *text = NULL;
    size_t len = 0;
    FILE *f = open_memstream(&text, &len);

    setenv("GRAFT_DATABASE_URL", "canary-secret", 1);
    settings_print_help(f, &spec);
    fclose(f);
    assert_null(strstr(text, "canary-secret"));
    assert_non_null(strstr(text, "[GRAFT_DATABASE_URL]"));
    assert_non_null(strstr(text, "--recovery SECONDS"));
    assert_non_null(strstr(text, "(default 60)"));
    free(text);
    unsetenv("GRAFT_DATABASE_URL");
}

static void the_table_is_consistent(void **state)
{
    for (size_t i = 0; i < setting_count; i++) {
        const struct setting *s = &setting_table[i];
        char flag[64] = "--";

        for (size_t k = 0; s->name[k] != '\0'; k++)
            flag[k + 2] = s->name[k] == '_' ? '-' : s->name[k], flag[k + 3] = '\0';
        assert_string_equal(s->flag, flag);
        assert_int_equal(strncmp(s->variable, "GRAFT_", 6), 0);
        assert_true((s->argument == NULL) == (s->kind == SETTING_SWITCH));
        for (size_t j = 0; j < i; j++) {
            assert_string_not_equal(s->variable, setting_table[j].variable);
            assert_true(s->offset != setting_table[j].offset);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(defaults_without_anything),
        cmocka_unit_test(flag_beats_variable_beats_file),
        cmocka_unit_test(options_and_arguments),
        cmocka_unit_test(usage_errors_name_the_thing),
        cmocka_unit_test(a_context_has_room_for_a_chat),
        cmocka_unit_test(sizes_have_units),
        cmocka_unit_test(database_url_comes_from_a_file),
        cmocka_unit_test(
            a_database_url_of_the_environment_goes_before_a_file_that_the_settings_file_names),
        cmocka_unit_test(workers_inherit_settings),
        cmocka_unit_test(help_never_shows_a_secret),
        cmocka_unit_test(the_table_is_consistent),
    };

    for (size_t i = 0; i < setting_count; i++)
        unsetenv(setting_table[i].variable);
    unsetenv("GRAFT_CONFIG");
    return cmocka_run_group_tests(tests, NULL, NULL);
}
