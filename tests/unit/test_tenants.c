/* Keys, and what keeps tenants apart: row-level security alone, with the product's own predicates
 * left out. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "storage/models.h"
#include "tests/unit/pg_fixture.h"

static void a_key_opens_its_project(void **state)
{
    struct fixture *f = fixture();
    struct key_identity who;

    assert_ok(keys_lookup(f->app, f->key_a, &who, err));
    assert_string_equal(who.project, f->a.project);
    assert_string_equal(who.organization, "Acme Corp");
    assert_string_equal(who.project_name, "default");
    assert_true(id_has_shape(ID_ORGANIZATION, who.organization_id));
    assert_ok(keys_lookup(f->app, f->key_b, &who, err));
    assert_string_equal(who.project, f->b.project);
    assert_string_not_equal(f->a.project, f->b.project);
}

static void a_second_key_opens_the_same_project(void **state)
{
    struct fixture *f = fixture();
    struct key_identity who;
    char key[KEY_TEXT_SIZE];

    assert_ok(keys_create(f->owner, "Acme Corp", "default", key, &who, err));
    assert_string_equal(who.project, f->a.project);
    assert_string_equal(who.organization_id, f->a.organization_id);
    assert_string_not_equal(key, f->key_a);
}

static void a_revoked_or_unknown_key_opens_nothing(void **state)
{
    struct fixture *f = fixture();
    struct key_identity who;
    char key[KEY_TEXT_SIZE];

    assert_ok(keys_create(f->owner, "Acme Corp", "default", key, &who, err));
    assert_ok(keys_lookup(f->app, key, &who, err));
    assert_ok(keys_revoke(f->owner, who.key_id, err));
    assert_err(keys_lookup(f->app, key, &who, err), ERR_AUTH);
    assert_err(keys_revoke(f->owner, key, err), ERR_NOT_FOUND);
    assert_err(keys_lookup(f->app, "", &who, err), ERR_AUTH);
    assert_err(keys_lookup(f->app, "sk-abc", &who, err), ERR_AUTH);
    key[10] = key[10] == 'a' ? 'b' : 'a';
    assert_false(keys_well_formed(key)); /* the checksum sees one wrong character */
    assert_err(keys_lookup(f->app, key, &who, err), ERR_AUTH);
}

static void the_database_holds_no_key(void **state)
{
    struct fixture *f = fixture();
    char sql[256];

    snprintf(sql, sizeof sql, "SELECT count(*) FROM graft.api_key k WHERE k::text LIKE '%%%.20s%%'",
             f->key_a);
    assert_int_equal(fixture_number(f, sql), 0);
}

static void the_last_use_is_noted_once_a_minute(void **state)
{
    struct fixture *f = fixture();
    struct key_identity who;
    char key[KEY_TEXT_SIZE];

    assert_ok(keys_create(f->owner, "Uses", "default", key, &who, err));
    assert_int_equal(fixture_number(f, "SELECT count(last_used_at) FROM graft.api_key k"
                                       " JOIN graft.project p USING (tenant)"
                                       " JOIN graft.organization o ON o.id = p.organization"
                                       " WHERE o.name = 'Uses'"),
                     0);
    for (int i = 0; i < 3; i++)
        assert_ok(keys_lookup(f->app, key, &who, err));
    /* Three look-ups, one version of the row: it was written once. */
    fixture_admin(f,
                  "CREATE TABLE public.first_use AS SELECT xmin::text AS x, id FROM graft.api_key"
                  " WHERE last_used_at IS NOT NULL");
    assert_ok(keys_lookup(f->app, key, &who, err));
    assert_int_equal(fixture_number(f, "SELECT count(*) FROM graft.api_key k JOIN"
                                       " public.first_use u ON u.id = k.id"
                                       " WHERE k.xmin::text <> u.x"),
                     0);
    fixture_admin(f, "UPDATE graft.api_key SET last_used_at = now() - interval '2 minutes'");
    assert_ok(keys_lookup(f->app, key, &who, err));
    assert_int_equal(fixture_number(f, "SELECT count(*) FROM graft.api_key"
                                       " WHERE last_used_at > now() - interval '1 minute'"),
                     1);
    fixture_admin(f, "DROP TABLE public.first_use");
}

static void names_of_organizations_are_checked(void **state)
{
    struct fixture *f = fixture();
    struct key_identity who;
    char key[KEY_TEXT_SIZE];

    assert_err(keys_create(f->owner, "", "p", key, &who, err), ERR_INVALID);
    assert_err(keys_create(f->owner, "a:b", "p", key, &who, err), ERR_INVALID);
    assert_err(keys_create(f->owner, " a", "p", key, &who, err), ERR_INVALID);
    /* The application's role may not make keys. */
    assert_err(keys_create(f->app, "Acme Corp", "default", key, &who, err), ERR_INTERNAL);
}

/* ------------------------------------------------------------------ isolation */

static int64_t rows_seen(struct db *db, const char *project, const char *table)
{
    struct db_result *res = NULL;
    char sql[128];
    int64_t n;

    snprintf(sql, sizeof sql, "SELECT count(*) FROM %s", table);
    assert_ok(db_begin(db, project, err));
    assert_ok(db_exec(db, sql, DB_NO_ARGS, &res, err));
    n = db_int(res, 0, 0);
    db_result_free(res);
    db_rollback(db);
    return n;
}

static void without_predicates_a_tenant_sees_its_own_rows_only(void **state)
{
    static const char *const tables[] = {"file", "job", "job_lease", "job_event", "project"};
    struct fixture *f = fixture();
    char job[ID_SIZE];

    fixture_job(f, f->a.project, job);
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++) {
        char other[128];

        snprintf(other, sizeof other, "SELECT count(*) FROM graft.%s WHERE tenant <> '%s'",
                 tables[i], f->b.project);
        assert_true(fixture_number(f, other) > 0); /* there is something to hide */
        assert_int_equal(rows_seen(f->app, f->b.project, tables[i]),
                         strcmp(tables[i], "project") == 0);
        assert_true(rows_seen(f->app, f->a.project, tables[i]) > 0);
        assert_int_equal(rows_seen(f->app, NULL, tables[i]), 0);
        assert_int_equal(rows_seen(f->worker, f->b.project, tables[i]),
                         strcmp(tables[i], "project") == 0);
        assert_int_equal(rows_seen(f->worker, NULL, tables[i]), 0);
        /* FORCED: nor does the owner of the tables see any. */
        assert_int_equal(rows_seen(f->owner, NULL, tables[i]), 0);
    }
    assert_int_equal(rows_seen(f->app, f->b.project, "organization"), 1);
}

static void another_tenants_row_can_not_be_written(void **state)
{
    struct fixture *f = fixture();
    struct db_result *res = NULL;
    char job[ID_SIZE];

    fixture_job(f, f->a.project, job);
    assert_ok(db_begin(f->app, f->b.project, err));
    assert_err(db_exec(f->app,
                       "INSERT INTO file (tenant, id, filename, purpose, bytes, sha256)"
                       " VALUES ($1::uuid, 'file-x', 'x', 'fine-tune', 1, repeat('a', 64))",
                       DB_ARGS(DB_TEXT(f->a.project)), NULL, err),
               ERR_INTERNAL);
    assert_string_equal(db_sqlstate(f->app), "42501");
    db_rollback(f->app);

    assert_ok(db_begin(f->app, f->b.project, err));
    assert_ok(db_exec(f->app, "DELETE FROM file", DB_NO_ARGS, &res, err));
    assert_int_equal(db_affected(res), 0);
    db_result_free(res);
    assert_ok(db_exec(f->app, "UPDATE job_lease SET worker = NULL", DB_NO_ARGS, &res, err));
    assert_int_equal(db_affected(res), 0);
    db_result_free(res);
    db_rollback(f->app);
}

static void the_system_setting_opens_nothing_to_others(void **state)
{
    struct fixture *f = fixture();
    struct db_result *res = NULL;

    assert_ok(db_begin(f->app, NULL, err));
    assert_ok(
        db_exec(f->app, "SELECT set_config('app.system', 'on', true)", DB_NO_ARGS, NULL, err));
    assert_ok(db_exec(f->app, "SELECT count(*) FROM job", DB_NO_ARGS, &res, err));
    assert_int_equal(db_int(res, 0, 0), 0);
    db_result_free(res);
    db_rollback(f->app);
}

static void roles_may_do_only_what_they_need(void **state)
{
    struct fixture *f = fixture();
    static const char *const forbidden_to_app[] = {
        "SELECT * FROM api_key",
        "SELECT lease_claim('w', 30)",
        "TRUNCATE file",
        "CREATE TABLE graft.x (i int)",
        "DELETE FROM job",
        "UPDATE job SET seed = 1",
        "SELECT collect_blobs('{}', '{}')",
        "INSERT INTO base_model (name) VALUES ('x')",
        "SELECT key_create('', '', '', '', '', '', '')",
        "UPDATE job_event SET message = ''",
    };
    static const char *const forbidden_to_worker[] = {
        "SELECT * FROM api_key",
        "SELECT key_find('')",
        "DELETE FROM file",
        "SELECT * FROM idempotency_key",
        "UPDATE job SET training_file = ''",
        "DELETE FROM job_event",
        "SELECT * FROM outbox",
    };

    for (size_t i = 0; i < sizeof forbidden_to_app / sizeof *forbidden_to_app; i++) {
        assert_err(db_exec(f->app, forbidden_to_app[i], DB_NO_ARGS, NULL, err), ERR_INTERNAL);
        assert_string_equal(db_sqlstate(f->app), "42501");
    }
    for (size_t i = 0; i < sizeof forbidden_to_worker / sizeof *forbidden_to_worker; i++) {
        assert_err(db_exec(f->worker, forbidden_to_worker[i], DB_NO_ARGS, NULL, err), ERR_INTERNAL);
        assert_string_equal(db_sqlstate(f->worker), "42501");
    }
}

/* Same kind, code, param and message as for an id that never was, but for the id itself. */
static void check_same_answer(const struct err *other, const char *other_id,
                              const struct err *missing, const char *missing_id)
{
    char text[2][1024];

    snprintf(text[0], sizeof text[0], "%s", other->message);
    snprintf(text[1], sizeof text[1], "%s", missing->message);
    for (int i = 0; i < 2; i++) {
        char *at = strstr(text[i], i == 0 ? other_id : missing_id);

        assert_non_null(at);
        memset(at, '?', strlen(other_id));
    }
    assert_string_equal(text[0], text[1]);
    assert_int_equal(other->kind, missing->kind);
    assert_string_equal(other->code, missing->code);
    assert_string_equal(other->param, missing->param);
}

static void another_tenants_id_reads_like_a_random_one(void **state)
{
    struct fixture *f = fixture();
    char job[ID_SIZE], file[ID_SIZE], random_job[ID_SIZE], random_file[ID_SIZE];
    struct err other = {0}, missing = {0};
    struct job j;
    struct file fi;

    fixture_job(f, f->a.project, job);
    fixture_file(f, f->a.project, "secret\n", file);
    assert_ok(id_new(ID_JOB, random_job, err));
    assert_ok(id_new(ID_FILE, random_file, err));

    assert_int_equal(jobs_get(f->app, f->b.project, job, &j, &other), -1);
    assert_int_equal(jobs_get(f->app, f->b.project, random_job, &j, &missing), -1);
    check_same_answer(&other, job, &missing, random_job);

    err_clear(&other), err_clear(&missing);
    assert_int_equal(jobs_cancel(f->app, f->b.project, job, &j, &other), -1);
    assert_int_equal(jobs_cancel(f->app, f->b.project, random_job, &j, &missing), -1);
    check_same_answer(&other, job, &missing, random_job);

    err_clear(&other), err_clear(&missing);
    assert_int_equal(files_get(f->app, f->b.project, file, &fi, &other), -1);
    assert_int_equal(files_get(f->app, f->b.project, random_file, &fi, &missing), -1);
    check_same_answer(&other, file, &missing, random_file);

    err_clear(&other), err_clear(&missing);
    assert_int_equal(files_delete(f->app, f->b.project, file, &other), -1);
    assert_int_equal(files_delete(f->app, f->b.project, random_file, &missing), -1);
    check_same_answer(&other, file, &missing, random_file);

    err_clear(&other), err_clear(&missing);
    assert_int_equal(
        jobs_create(f->app, f->b.project,
                    &(struct job_new){.model = "tiny", .training_file = file, .seed = 1}, &j,
                    &other),
        -1);
    assert_int_equal(
        jobs_create(f->app, f->b.project,
                    &(struct job_new){.model = "tiny", .training_file = random_file, .seed = 1}, &j,
                    &missing),
        -1);
    check_same_answer(&other, file, &missing, random_file);
    assert_int_equal(other.kind, ERR_INVALID);
    assert_string_equal(other.param, "training_file");
}

static void the_self_test_passes_and_can_fail(void **state)
{
    struct fixture *f = fixture();
    char *url = fixture_admin_url(f);
    struct db *admin;

    assert_ok(db_self_test(f->app, err));
    assert_ok(db_self_test(f->worker, err));
    assert_ok(db_open(&admin, url, DB_ROLE_LOGIN, err));
    assert_err(db_self_test(admin, err), ERR_INTERNAL); /* a superuser */
    db_close(admin);
    free(url);

    fixture_admin(f, "ALTER TABLE graft.file NO FORCE ROW LEVEL SECURITY");
    assert_err(db_self_test(f->app, err), ERR_INTERNAL);
    fixture_admin(f, "ALTER TABLE graft.file FORCE ROW LEVEL SECURITY");
    fixture_admin(f, "CREATE POLICY leak ON graft.project TO graft_app USING (true)");
    assert_err(db_self_test(f->app, err), ERR_INTERNAL);
    fixture_admin(f, "DROP POLICY leak ON graft.project");
    assert_ok(db_self_test(f->app, err));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_key_opens_its_project),
        cmocka_unit_test(a_second_key_opens_the_same_project),
        cmocka_unit_test(a_revoked_or_unknown_key_opens_nothing),
        cmocka_unit_test(the_database_holds_no_key),
        cmocka_unit_test(the_last_use_is_noted_once_a_minute),
        cmocka_unit_test(names_of_organizations_are_checked),
        cmocka_unit_test(without_predicates_a_tenant_sees_its_own_rows_only),
        cmocka_unit_test(another_tenants_row_can_not_be_written),
        cmocka_unit_test(the_system_setting_opens_nothing_to_others),
        cmocka_unit_test(roles_may_do_only_what_they_need),
        cmocka_unit_test(another_tenants_id_reads_like_a_random_one),
        cmocka_unit_test(the_self_test_passes_and_can_fail),
    };

    return cmocka_run_group_tests(tests, fixture_setup, fixture_teardown);
}
