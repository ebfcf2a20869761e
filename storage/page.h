/* page.h: one page of a list, the same way for every list that the API pages through.
 *
 * A list's rows stand in the order of a number that each has (its key: a file's ordinal, an event's
 * sequence). The client asks for `limit` rows behind the one whose id it names. The id is looked up
 * for its key, and one row more than asked for tells whether there are more.
 *
 *   static const struct page_list files = {.item_size = sizeof(struct file), .read = …};
 *   page_read(db, project, &files, &query, &page, err) →
 *   *out = (struct file_list){page.items, page.count, page.has_more};
 *
 * Project, look-up and rows are read in one transaction. */
#ifndef GRAFT_STORAGE_PAGE_H
#define GRAFT_STORAGE_PAGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "storage/db.h"

#define PAGE_FILTERS_MAX 3

/* A kind of list: constant. */
struct page_list {
    const char *what; /* "files", for messages */
    size_t item_size;
    /* Fills an item of zero bytes. Where it fails, release is called on what it left. */
    int (*read)(const struct db_result *res, int row, void *item, struct err *err);
    void (*release)(void *item); /* NULL: items own nothing */
    /* SELECT … FROM … WHERE tenant = $1, and the filters $3, $4, … of page_query. */
    const char *select;
    const char *key; /* the ordering column, as `select` calls it: "j.ordinal" */
    /* The key of the row that `after` names: $1 the project, $2 the id, $3 page_query.job where the
     * list is a job's. */
    const char *find;
    const char *unknown; /* the message where there is none: "No such File object" */
};

struct page_query {
    /* NULL, or the job whose list it is: the first filter, $3. A job that is not there is
     * ERR_NOT_FOUND as jobs_get says it. */
    const char *job;
    const char *after; /* id; NULL: from the start. Unknown: ERR_INVALID, param after */
    int64_t bound;     /* without `after`: keys > bound, ascending only. 0: from the start */
    int limit;         /* 1.. */
    bool ascending;    /* by key; else the highest first */
    struct db_value filters[PAGE_FILTERS_MAX]; /* $3.. (of a job's list: $4..) */
    int filter_count;
};

struct page {
    void *items; /* malloc'ed, never NULL on success */
    int count;
    bool has_more;
};

/* On failure *out is empty and nothing is left to release. */
int page_read(struct db *db, const char *project, const struct page_list *list,
              const struct page_query *query, struct page *out, struct err *err);
/* Releases each item and the array; for the lists' own release functions. */
void page_release(const struct page_list *list, void *items, int count);

#endif
