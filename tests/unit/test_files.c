/* Files, and requests that are sent twice. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "storage/idempotency.h"
#include "tests/unit/pg_fixture.h"

static void a_file_is_created_read_and_deleted(void **state)
{
    struct fixture *f = fixture();
    char sha256[SHA256_HEX];
    struct file made, file;

    fixture_blob(f, f->a.project, "content\n", sha256);
    assert_ok(files_create(f->app, f->a.project,
                           &(struct file_new){.filename = "ünïcode \"name\".jsonl",
                                              .purpose = "user_data",
                                              .bytes = 8,
                                              .sha256 = sha256,
                                              .expires_after = 3600},
                           &made, err));
    assert_true(id_has_shape(ID_FILE, made.id));
    assert_ok(files_get(f->app, f->a.project, made.id, &file, err));
    assert_string_equal(file.filename, "ünïcode \"name\".jsonl");
    assert_string_equal(file.purpose, "user_data");
    assert_string_equal(file.status, "processed");
    assert_string_equal(file.sha256, sha256);
    assert_int_equal(file.bytes, 8);
    assert_int_equal(file.expires_at, file.created_at + 3600);
    file_release(&file);
    assert_ok(files_delete(f->app, f->a.project, made.id, err));
    assert_err(files_get(f->app, f->a.project, made.id, &file, err), ERR_NOT_FOUND);
    assert_err(files_delete(f->app, f->a.project, made.id, err), ERR_NOT_FOUND);
    file_release(&made);
}

static void an_expired_file_is_not_there(void **state)
{
    struct fixture *f = fixture();
    struct file_list list;
    struct file file;
    char id[ID_SIZE], sql[200];

    fixture_file(f, f->b.project, "short-lived\n", id);
    snprintf(sql, sizeof sql, "UPDATE graft.file SET expires_at = now() WHERE id = '%s'", id);
    fixture_admin(f, sql);
    assert_err(files_get(f->app, f->b.project, id, &file, err), ERR_NOT_FOUND);
    assert_err(files_delete(f->app, f->b.project, id, err), ERR_NOT_FOUND);
    assert_ok(files_list(f->app, f->b.project, &(struct file_query){.limit = 100}, &list, err));
    for (int i = 0; i < list.count; i++)
        assert_string_not_equal(list.items[i].id, id);
    file_list_release(&list);
}

static void text_that_is_not_utf8_is_refused(void **state)
{
    struct fixture *f = fixture();
    struct file file;

    assert_err(files_create(
                   f->app, f->a.project,
                   &(struct file_new){.filename = "a\xff", .purpose = "fine-tune", .sha256 = "ab"},
                   &file, err),
               ERR_INVALID);
    assert_false(db_in_transaction(f->app));
}

static void lists_go_both_ways(void **state)
{
    struct fixture *f = fixture();
    char key[KEY_TEXT_SIZE], ids[5][ID_SIZE];
    struct key_identity c;
    struct file_list list;

    assert_ok(keys_create(f->owner, "Lists", "default", key, &c, err));
    for (int i = 0; i < 5; i++)
        fixture_file(f, c.project, "x\n", ids[i]);
    assert_ok(files_list(f->app, c.project, &(struct file_query){.limit = 2}, &list, err));
    assert_int_equal(list.count, 2);
    assert_true(list.has_more);
    assert_string_equal(list.items[0].id, ids[4]);
    file_list_release(&list);
    assert_ok(files_list(f->app, c.project, &(struct file_query){.limit = 5, .after = ids[3]},
                         &list, err));
    assert_int_equal(list.count, 3);
    assert_false(list.has_more);
    assert_string_equal(list.items[0].id, ids[2]);
    file_list_release(&list);
    assert_ok(files_list(f->app, c.project,
                         &(struct file_query){.limit = 2, .after = ids[0], .ascending = true},
                         &list, err));
    assert_string_equal(list.items[0].id, ids[1]);
    assert_true(list.has_more);
    file_list_release(&list);
    assert_ok(files_list(f->app, c.project, &(struct file_query){.limit = 9, .purpose = "batch"},
                         &list, err));
    assert_int_equal(list.count, 0);
    assert_false(list.has_more);
    file_list_release(&list);
    assert_err(files_list(f->app, c.project, &(struct file_query){.limit = 9, .after = "file-x"},
                          &list, err),
               ERR_INVALID);
    /* Another tenant's file is no place to begin. */
    assert_err(files_list(f->app, f->a.project, &(struct file_query){.limit = 9, .after = ids[0]},
                          &list, err),
               ERR_INVALID);
}

/* ------------------------------------------------------------------ idempotency */

/* One POST: makes a file under a key, unless it was made. The answer is its id. */
static int post(struct db *db, const char *project, const char *key, const char *digest,
                char id[ID_SIZE], struct err *err)
{
    enum idempotency what;
    struct file file = {0};
    char *body = NULL;
    int status, rc = -1;

    if (db_begin(db, project, err) != 0)
        return -1;
    if (idempotency_take(db, project, key, digest, &what, &status, &body, err) != 0)
        goto out;
    if (what == IDEMPOTENCY_REPLAY) {
        assert_int_equal(status, 200);
        snprintf(id, ID_SIZE, "%s", body);
        rc = 0;
        goto out;
    }
    if (files_create(db, project,
                     &(struct file_new){.filename = "once",
                                        .purpose = "user_data",
                                        .bytes = 1,
                                        .sha256 = "00000000000000000000000000000000"
                                                  "00000000000000000000000000000000"},
                     &file, err) != 0 ||
        idempotency_store(db, project, key, 200, file.id, err) != 0)
        goto out;
    snprintf(id, ID_SIZE, "%s", file.id);
    rc = 0;
out:
    if (rc == 0)
        rc = db_commit(db, err);
    else
        db_rollback(db);
    file_release(&file);
    free(body);
    return rc;
}

static void a_repeated_request_gets_the_first_answer(void **state)
{
    struct fixture *f = fixture();
    char first[ID_SIZE], second[ID_SIZE], other[ID_SIZE];
    struct err why = {0};

    assert_ok(post(f->app, f->a.project, "key-1", "digest", first, err));
    assert_ok(post(f->app, f->a.project, "key-1", "digest", second, err));
    assert_string_equal(first, second);
    assert_ok(post(f->app, f->b.project, "key-1", "digest", other, err)); /* keys are a project's */
    assert_string_not_equal(first, other);
    assert_int_equal(post(f->app, f->a.project, "key-1", "another body", second, &why), -1);
    assert_int_equal(why.kind, ERR_INVALID);
    assert_string_equal(why.code, "idempotency_key_reused");
    assert_err(post(f->app, f->a.project, "", "digest", second, err), ERR_INVALID);
}

static void a_failed_request_leaves_its_key_free(void **state)
{
    struct fixture *f = fixture();
    enum idempotency what;
    char id[ID_SIZE], *body;
    int status;

    assert_ok(db_begin(f->app, f->a.project, err));
    assert_ok(
        idempotency_take(f->app, f->a.project, "key-2", "digest", &what, &status, &body, err));
    assert_int_equal(what, IDEMPOTENCY_NEW);
    db_rollback(f->app);
    assert_ok(post(f->app, f->a.project, "key-2", "other digest", id, err));
}

static void an_answer_is_found_without_taking_its_key(void **state)
{
    struct fixture *f = fixture();
    const char *a = f->a.project;
    char id[ID_SIZE], *body;
    enum idempotency what;
    int status;

    assert_ok(idempotency_find(f->app, a, "key-4", "digest", &what, &status, &body, err));
    assert_int_equal(what, IDEMPOTENCY_NEW);
    assert_ok(post(f->app, a, "key-4", "digest", id, err));
    assert_ok(idempotency_find(f->app, a, "key-4", "digest", &what, &status, &body, err));
    assert_int_equal(what, IDEMPOTENCY_REPLAY);
    assert_int_equal(status, 200);
    assert_string_equal(body, id);
    free(body);
    assert_err(idempotency_find(f->app, a, "key-4", "digest 2", &what, &status, &body, err),
               ERR_INVALID);
    assert_ok(
        idempotency_find(f->app, f->b.project, "key-4", "digest", &what, &status, &body, err));
    assert_int_equal(what, IDEMPOTENCY_NEW);
    fixture_admin(f, "UPDATE graft.idempotency_key SET created_at = now() - interval '25 hours'"
                     " WHERE key = 'key-4'");
    assert_ok(idempotency_find(f->app, a, "key-4", "digest 2", &what, &status, &body, err));
    assert_int_equal(what, IDEMPOTENCY_NEW);
    assert_false(db_in_transaction(f->app));
}

static void a_key_lasts_a_day(void **state)
{
    struct fixture *f = fixture();
    char first[ID_SIZE], second[ID_SIZE];

    assert_ok(post(f->app, f->a.project, "key-3", "digest", first, err));
    fixture_admin(f, "UPDATE graft.idempotency_key SET created_at = now() - interval '25 hours'"
                     " WHERE key = 'key-3'");
    assert_ok(post(f->app, f->a.project, "key-3", "digest 2", second, err));
    assert_string_not_equal(first, second);
}

struct poster {
    struct fixture *f;
    char ids[20][ID_SIZE];
    bool failed;
};

static void *post_all(void *context)
{
    struct poster *p = context;
    struct db *db = NULL;

    p->failed = db_open(&db, p->f->storage.url, DB_ROLE_APP, NULL) != 0;
    for (int i = 0; i < 20 && !p->failed; i++) {
        char key[32];

        snprintf(key, sizeof key, "race-%d", i);
        p->failed = post(db, p->f->a.project, key, "digest", p->ids[i], NULL) != 0;
    }
    db_close(db);
    return NULL;
}

static void requests_at_the_same_time_happen_once(void **state)
{
    struct fixture *f = fixture();
    struct poster posters[4];
    pthread_t threads[4];

    for (int i = 0; i < 4; i++) {
        posters[i] = (struct poster){.f = f};
        assert_int_equal(pthread_create(&threads[i], NULL, post_all, &posters[i]), 0);
    }
    for (int i = 0; i < 4; i++) {
        pthread_join(threads[i], NULL);
        assert_false(posters[i].failed);
    }
    for (int i = 1; i < 4; i++)
        for (int k = 0; k < 20; k++)
            assert_string_equal(posters[0].ids[k], posters[i].ids[k]);
    assert_int_equal(fixture_number(f, "SELECT count(*) FROM graft.idempotency_key"
                                       " WHERE key LIKE 'race-%'"),
                     20);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_file_is_created_read_and_deleted),
        cmocka_unit_test(an_expired_file_is_not_there),
        cmocka_unit_test(text_that_is_not_utf8_is_refused),
        cmocka_unit_test(lists_go_both_ways),
        cmocka_unit_test(a_repeated_request_gets_the_first_answer),
        cmocka_unit_test(a_failed_request_leaves_its_key_free),
        cmocka_unit_test(an_answer_is_found_without_taking_its_key),
        cmocka_unit_test(a_key_lasts_a_day),
        cmocka_unit_test(requests_at_the_same_time_happen_once),
    };

    return cmocka_run_group_tests(tests, fixture_setup, fixture_teardown);
}
