#include "storage/page.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>

#include "storage/job_row.h"

#define FIRST_FILTER 3

void page_release(const struct page_list *list, void *items, int count)
{
    for (int i = 0; list->release != NULL && i < count; i++)
        list->release((char *)items + (size_t)i * list->item_size);
    free(items);
}

/* *bound: the key behind which the page begins. */
static int find_after(struct db *db, const char *project, const struct page_list *list,
                      const struct page_query *q, int64_t *bound, struct err *err)
{
    const struct db_value args[] = {DB_TEXT(project), DB_TEXT(q->after), DB_TEXT(q->job)};
    struct db_result *res = NULL;
    int rc = 0;

    if (db_exec(db, list->find, args, q->job != NULL ? 3 : 2, &res, err) != 0)
        return -1;
    if (db_rows(res) == 1)
        *bound = db_int(res, 0, 0);
    else
        rc = err_set_code(err, ERR_INVALID, "", "after", "%s: %.100s", list->unknown, q->after);
    db_result_free(res);
    return rc;
}

static int select_rows(struct db *db, const char *project, const struct page_list *list,
                       const struct page_query *q, int64_t bound, struct db_result **res,
                       struct err *err)
{
    struct db_value args[FIRST_FILTER + PAGE_FILTERS_MAX + 1] = {DB_TEXT(project), DB_INT(bound)};
    int count = FIRST_FILTER - 1, rc;
    char *sql = NULL;

    assert(q->filter_count <= PAGE_FILTERS_MAX);
    if (q->job != NULL)
        args[count++] = DB_TEXT(q->job);
    for (int i = 0; i < q->filter_count; i++)
        args[count++] = q->filters[i];
    args[count++] = DB_INT((int64_t)q->limit + 1);
    if (asprintf(&sql, "%s AND %s %s $2::bigint ORDER BY %s %s LIMIT $%d", list->select, list->key,
                 q->ascending ? ">" : "<", list->key, q->ascending ? "ASC" : "DESC", count) < 0)
        return err_set(err, ERR_NO_MEMORY, "list %s: out of memory", list->what);
    rc = db_exec(db, sql, args, count, res, err);
    free(sql);
    return rc;
}

static int read_rows(const struct db_result *res, const struct page_list *list, int limit,
                     struct page *out, struct err *err)
{
    int rows = db_rows(res);

    out->has_more = rows > limit;
    if (rows > limit)
        rows = limit;
    out->items = calloc((size_t)rows + 1, list->item_size);
    if (out->items == NULL)
        return err_set(err, ERR_NO_MEMORY, "list %s: out of memory", list->what);
    for (int i = 0; i < rows; i++) {
        out->count++; /* what a failing read leaves is released too */
        if (list->read(res, i, (char *)out->items + (size_t)i * list->item_size, err) != 0)
            return -1;
    }
    return 0;
}

int page_read(struct db *db, const char *project, const struct page_list *list,
              const struct page_query *query, struct page *out, struct err *err)
{
    int64_t bound = query->ascending ? query->bound : INT64_MAX;
    struct db_result *res = NULL;
    int rc = -1;

    *out = (struct page){0};
    if (db_begin(db, project, err) != 0)
        return -1;
    if ((query->job == NULL || job_row_exists(db, project, query->job, err) == 0) &&
        (query->after == NULL || find_after(db, project, list, query, &bound, err) == 0) &&
        select_rows(db, project, list, query, bound, &res, err) == 0)
        rc = read_rows(res, list, query->limit, out, err);
    db_result_free(res);
    if (rc != 0)
        db_rollback(db);
    else
        rc = db_commit(db, err);
    if (rc != 0) {
        page_release(list, out->items, out->count);
        *out = (struct page){0};
    }
    return rc;
}
