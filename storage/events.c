#include "storage/events.h"

#include <stdlib.h>

#include "storage/page.h"

#define EVENT_COLUMNS                                                                     \
    "id, sequence, floor(extract(epoch FROM created_at))::bigint, level, type, message, " \
    "data::text"

int events_write(struct db *db, const char *project, const char *job, const struct event_new *event,
                 struct err *err)
{
    char id[ID_SIZE];

    if (id_new(ID_EVENT, id, err) != 0)
        return -1;
    /* The lease row is locked, so number and row go together, and a key is looked up in peace. */
    return db_exec(db,
                   "WITH next AS ("
                   "  UPDATE job_lease SET event_sequence = event_sequence + 1"
                   "   WHERE tenant = $1::uuid AND job = $2 AND NOT EXISTS ("
                   "     SELECT 1 FROM job_event e"
                   "      WHERE e.tenant = $1::uuid AND e.job = $2 AND e.key = $8)"
                   "  RETURNING event_sequence)"
                   "INSERT INTO job_event (tenant, job, sequence, id, level, type, message, data,"
                   "                       key)"
                   " SELECT $1::uuid, $2, event_sequence, $3, $4, $5, $6, $7::json, $8 FROM next",
                   DB_ARGS(DB_TEXT(project), DB_TEXT(job), DB_TEXT(id),
                           DB_TEXT(event->level != NULL ? event->level : "info"),
                           DB_TEXT(event->type != NULL ? event->type : "message"),
                           DB_TEXT(event->message),
                           DB_TEXT(event->data != NULL ? event->data : "{}"), DB_TEXT(event->key)),
                   NULL, err);
}

int events_append(struct db *db, const struct lease *lease, const struct event_new *events,
                  int count, struct err *err)
{
    if (db_begin(db, lease->project, err) != 0)
        return -1;
    if (leases_lock(db, lease, err) != 0)
        goto fail;
    for (int i = 0; i < count; i++)
        if (events_write(db, lease->project, lease->job, &events[i], err) != 0)
            goto fail;
    return db_commit(db, err);
fail:
    db_rollback(db);
    return -1;
}

static int read_item(const struct db_result *res, int row, void *item, struct err *err)
{
    struct event *e = item;

    db_text_into(res, row, 0, e->id, sizeof e->id);
    e->sequence = db_int(res, row, 1);
    e->created_at = db_int(res, row, 2);
    db_text_into(res, row, 3, e->level, sizeof e->level);
    db_text_into(res, row, 4, e->type, sizeof e->type);
    e->message = db_text_copy(res, row, 5);
    e->data = db_text_copy(res, row, 6);
    if (e->message == NULL || e->data == NULL)
        return err_set(err, ERR_NO_MEMORY, "read an event's row: out of memory");
    return 0;
}

static void release_item(void *item)
{
    struct event *e = item;

    free(e->message);
    free(e->data);
}

static const struct page_list list = {
    .what = "events",
    .item_size = sizeof(struct event),
    .read = read_item,
    .release = release_item,
    .select = "SELECT " EVENT_COLUMNS " FROM job_event WHERE tenant = $1::uuid AND job = $3",
    .key = "sequence",
    .find = "SELECT sequence FROM job_event WHERE tenant = $1::uuid AND id = $2 AND job = $3",
    .unknown = "No such event of this job",
};

static int read_page(struct db *db, const char *project, const struct page_query *query,
                     struct event_list *out, struct err *err)
{
    struct page page;
    int rc = page_read(db, project, &list, query, &page, err);

    *out = (struct event_list){page.items, page.count, page.has_more};
    return rc;
}

int events_list(struct db *db, const char *project, const char *job, const char *after, int limit,
                struct event_list *out, struct err *err)
{
    return read_page(db, project, &(struct page_query){.job = job, .after = after, .limit = limit},
                     out, err);
}

int events_since(struct db *db, const char *project, const char *job, int64_t since, int limit,
                 struct event_list *out, struct err *err)
{
    return read_page(
        db, project,
        &(struct page_query){.job = job, .ascending = true, .bound = since, .limit = limit}, out,
        err);
}

void event_list_release(struct event_list *events)
{
    page_release(&list, events->items, events->count);
    *events = (struct event_list){0};
}
