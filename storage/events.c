#include "storage/events.h"

#include <stdlib.h>

#define EVENT_COLUMNS                                                                     \
    "id, sequence, floor(extract(epoch FROM created_at))::bigint, level, type, message, " \
    "data::text"

void event_list_release(struct event_list *list)
{
    for (int i = 0; i < list->count; i++) {
        free(list->items[i].message);
        free(list->items[i].data);
    }
    free(list->items);
    *list = (struct event_list){0};
}

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

static int read_events(const struct db_result *res, int limit, struct event_list *out,
                       struct err *err)
{
    int rows = db_rows(res);

    out->has_more = rows > limit;
    if (rows > limit)
        rows = limit;
    out->items = calloc((size_t)rows + 1, sizeof *out->items);
    if (out->items == NULL)
        return err_set(err, ERR_NO_MEMORY, "list events: out of memory");
    for (; out->count < rows; out->count++) {
        struct event *e = &out->items[out->count];

        db_text_into(res, out->count, 0, e->id, sizeof e->id);
        e->sequence = db_int(res, out->count, 1);
        e->created_at = db_int(res, out->count, 2);
        db_text_into(res, out->count, 3, e->level, sizeof e->level);
        db_text_into(res, out->count, 4, e->type, sizeof e->type);
        e->message = db_text_copy(res, out->count, 5);
        e->data = db_text_copy(res, out->count, 6);
        if (e->message == NULL || e->data == NULL) {
            out->count++;
            return err_set(err, ERR_NO_MEMORY, "list events: out of memory");
        }
    }
    return 0;
}

static int job_exists(struct db *db, const char *project, const char *job, struct err *err)
{
    struct db_result *res = NULL;
    int rc = 0;

    if (db_exec(db, "SELECT 1 FROM job WHERE tenant = $1::uuid AND id = $2",
                DB_ARGS(DB_TEXT(project), DB_TEXT(job)), &res, err) != 0)
        return -1;
    if (db_rows(res) != 1)
        rc = err_set_code(err, ERR_NOT_FOUND, "fine_tune_not_found", "fine_tune_id",
                          "Could not find fine tune: %.100s", job);
    db_result_free(res);
    return rc;
}

static int find_after(struct db *db, const char *project, const char *job, const char *after,
                      int64_t *sequence, struct err *err)
{
    struct db_result *res = NULL;
    int rc = 0;

    if (db_exec(db,
                "SELECT sequence FROM job_event"
                " WHERE tenant = $1::uuid AND job = $2 AND id = $3",
                DB_ARGS(DB_TEXT(project), DB_TEXT(job), DB_TEXT(after)), &res, err) != 0)
        return -1;
    if (db_rows(res) == 1)
        *sequence = db_int(res, 0, 0);
    else
        rc =
            err_set_code(err, ERR_INVALID, "", "after", "No such event of this job: %.100s", after);
    db_result_free(res);
    return rc;
}

/* newest: sequence < bound, descending; else sequence > bound, ascending. */
static int list(struct db *db, const char *project, const char *job, bool newest, const char *after,
                int64_t bound, int limit, struct event_list *out, struct err *err)
{
    struct db_result *res = NULL;
    const char *sql = newest ? "SELECT " EVENT_COLUMNS " FROM job_event"
                               " WHERE tenant = $1::uuid AND job = $2 AND sequence < $3"
                               " ORDER BY sequence DESC LIMIT $4"
                             : "SELECT " EVENT_COLUMNS " FROM job_event"
                               " WHERE tenant = $1::uuid AND job = $2 AND sequence > $3"
                               " ORDER BY sequence LIMIT $4";

    *out = (struct event_list){0};
    if (db_begin(db, project, err) != 0)
        return -1;
    if (job_exists(db, project, job, err) != 0 ||
        (after != NULL && find_after(db, project, job, after, &bound, err) != 0) ||
        db_exec(db, sql,
                DB_ARGS(DB_TEXT(project), DB_TEXT(job), DB_INT(bound), DB_INT((int64_t)limit + 1)),
                &res, err) != 0 ||
        read_events(res, limit, out, err) != 0) {
        db_result_free(res);
        event_list_release(out);
        db_rollback(db);
        return -1;
    }
    db_result_free(res);
    if (db_commit(db, err) != 0) {
        event_list_release(out);
        return -1;
    }
    return 0;
}

int events_list(struct db *db, const char *project, const char *job, const char *after, int limit,
                struct event_list *out, struct err *err)
{
    return list(db, project, job, true, after, INT64_MAX, limit, out, err);
}

int events_since(struct db *db, const char *project, const char *job, int64_t since, int limit,
                 struct event_list *out, struct err *err)
{
    return list(db, project, job, false, NULL, since, limit, out, err);
}
