/* page.h: what every list has in common, on a list of its own over the table of files. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "storage/page.h"
#include "tests/unit/pg_fixture.h"

struct thing {
    int64_t ordinal;
    char *id;
};

static int fail_at = -1; /* row at which reading fails, having taken memory */
static int released;

static int read_thing(const struct db_result *res, int row, void *item, struct err *err)
{
    struct thing *t = item;

    assert_null(t->id);
    t->ordinal = db_int(res, row, 0);
    t->id = db_text_copy(res, row, 1);
    return row == fail_at ? err_set(err, ERR_NO_MEMORY, "as planned") : 0;
}

static void release_thing(void *item)
{
    struct thing *t = item;

    free(t->id);
    released++;
}

static const struct page_list things = {
    .what = "things",
    .item_size = sizeof(struct thing),
    .read = read_thing,
    .release = release_thing,
    .select = "SELECT ordinal, id FROM file WHERE tenant = $1::uuid AND purpose = $3",
    .key = "ordinal",
    .find = "SELECT ordinal FROM file WHERE tenant = $1::uuid AND id = $2",
    .unknown = "No such thing",
};

#define COUNT 5

/* A tenant of the test's own, so that the rows are known. */
static const char *make_things(struct fixture *f, char ids[COUNT][ID_SIZE])
{
    static struct key_identity own;
    static int number;
    char key[KEY_TEXT_SIZE], project[32], content[64];

    snprintf(project, sizeof project, "pages-%d", ++number);
    assert_ok(keys_create(f->owner, "org-pages", project, key, &own, err));
    for (int i = 0; i < COUNT; i++) {
        snprintf(content, sizeof content, "%s %d", project, i);
        fixture_file(f, own.project, content, ids[i]);
    }
    return own.project;
}

static struct page_query query_of(const char *after, int limit, bool ascending)
{
    return (struct page_query){.after = after,
                               .limit = limit,
                               .ascending = ascending,
                               .filters = {DB_TEXT("fine-tune")},
                               .filter_count = 1};
}

/* The page's ids are ids[first], ids[first ± 1], … */
static void expect(struct fixture *f, const char *project, const struct page_query *query,
                   char ids[COUNT][ID_SIZE], int first, int count, bool more)
{
    struct page page;

    assert_ok(page_read(f->app, project, &things, query, &page, err));
    assert_int_equal(page.count, count);
    assert_int_equal(page.has_more, more);
    for (int i = 0; i < count; i++)
        assert_string_equal(((struct thing *)page.items)[i].id,
                            ids[query->ascending ? first + i : first - i]);
    page_release(&things, page.items, page.count);
}

static void pages_follow_one_another_both_ways(void **state)
{
    struct fixture *f = fixture();
    char ids[COUNT][ID_SIZE];
    const char *project = make_things(f, ids);

    for (int up = 0; up < 2; up++) {
        int first = up ? 0 : COUNT - 1, step = up ? 1 : -1;
        struct page_query q = query_of(NULL, 2, up);

        expect(f, project, &q, ids, first, 2, true);
        q.after = ids[first + step];
        expect(f, project, &q, ids, first + 2 * step, 2, true);
        q.after = ids[first + 3 * step];
        expect(f, project, &q, ids, first + 4 * step, 1, false);
        q.after = ids[first + 4 * step];
        expect(f, project, &q, ids, 0, 0, false);
        q = query_of(NULL, COUNT, up); /* as many as there are: no more behind them */
        expect(f, project, &q, ids, first, COUNT, false);
    }
}

static void a_number_can_stand_for_the_id(void **state)
{
    struct fixture *f = fixture();
    char ids[COUNT][ID_SIZE];
    const char *project = make_things(f, ids);
    struct page_query q = query_of(NULL, 1, true);
    struct page page;

    assert_ok(page_read(f->app, project, &things, &q, &page, err));
    q.bound = ((struct thing *)page.items)[0].ordinal;
    q.limit = COUNT;
    page_release(&things, page.items, page.count);
    expect(f, project, &q, ids, 1, COUNT - 1, false);
}

static void filters_are_the_lists_own(void **state)
{
    struct fixture *f = fixture();
    char ids[COUNT][ID_SIZE];
    const char *project = make_things(f, ids);
    struct page_query q = query_of(NULL, 3, false);

    q.filters[0] = DB_TEXT("batch");
    expect(f, project, &q, ids, 0, 0, false);
}

static void an_unknown_id_is_named(void **state)
{
    struct fixture *f = fixture();
    char ids[COUNT][ID_SIZE];
    const char *project = make_things(f, ids);
    struct page_query q = query_of("file-none", 3, false);
    struct err e = {0};
    struct page page;

    assert_int_equal(page_read(f->app, project, &things, &q, &page, &e), -1);
    assert_int_equal(e.kind, ERR_INVALID);
    assert_string_equal(e.param, "after");
    assert_string_equal(e.message, "No such thing: file-none");
    assert_null(page.items);
    /* Another tenant's id is as unknown. */
    q.after = ids[0];
    assert_err(page_read(f->app, f->b.project, &things, &q, &page, err), ERR_INVALID);
}

static void an_absent_job_comes_before_all_else(void **state)
{
    struct fixture *f = fixture();
    struct page_query q = query_of("file-none", 3, false);
    struct err e = {0};
    struct page page;

    q.job = "ftjob-none";
    assert_int_equal(page_read(f->app, f->a.project, &things, &q, &page, &e), -1);
    assert_int_equal(e.kind, ERR_NOT_FOUND);
    assert_string_equal(e.code, "fine_tune_not_found");
    assert_string_equal(e.param, "fine_tune_id");
    assert_string_equal(e.message, "Could not find fine tune: ftjob-none");
}

static void what_a_failed_read_took_is_given_back(void **state)
{
    struct fixture *f = fixture();
    char ids[COUNT][ID_SIZE];
    const char *project = make_things(f, ids);
    struct page_query q = query_of(NULL, COUNT, false);
    struct page page;

    for (int at = 0; at < COUNT; at++) {
        released = 0;
        fail_at = at;
        assert_err(page_read(f->app, project, &things, &q, &page, err), ERR_NO_MEMORY);
        assert_int_equal(released, at + 1);
        assert_null(page.items);
        assert_int_equal(page.count, 0);
        assert_false(db_in_transaction(f->app));
    }
    fail_at = -1;
    expect(f, project, &q, ids, COUNT - 1, COUNT, false);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(pages_follow_one_another_both_ways),
        cmocka_unit_test(a_number_can_stand_for_the_id),
        cmocka_unit_test(filters_are_the_lists_own),
        cmocka_unit_test(an_unknown_id_is_named),
        cmocka_unit_test(an_absent_job_comes_before_all_else),
        cmocka_unit_test(what_a_failed_read_took_is_given_back),
    };

    return cmocka_run_group_tests(tests, fixture_setup, fixture_teardown);
}
