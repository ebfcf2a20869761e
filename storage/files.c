#include "storage/files.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "storage/page.h"

#define FILE_COLUMNS                                                                               \
    "id, filename, purpose, status, bytes, sha256, floor(extract(epoch FROM created_at))::bigint," \
    " floor(extract(epoch FROM expires_at))::bigint"
#define FILE_ALIVE "(expires_at IS NULL OR expires_at > now())"

void file_release(struct file *file)
{
    free(file->filename);
    free(file->purpose);
    free(file->status);
    *file = (struct file){0};
}

static int read_file(const struct db_result *res, int row, struct file *f, struct err *err)
{
    *f = (struct file){0};
    db_text_into(res, row, 0, f->id, sizeof f->id);
    f->filename = db_text_copy(res, row, 1);
    f->purpose = db_text_copy(res, row, 2);
    f->status = db_text_copy(res, row, 3);
    f->bytes = db_int(res, row, 4);
    db_text_into(res, row, 5, f->sha256, sizeof f->sha256);
    f->created_at = db_int(res, row, 6);
    f->expires_at = db_int(res, row, 7);
    if (f->filename == NULL || f->purpose == NULL || f->status == NULL) {
        file_release(f);
        return err_set(err, ERR_NO_MEMORY, "read a file's row: out of memory");
    }
    return 0;
}

static int no_such_file(const char *id, struct err *err)
{
    return err_set_code(err, ERR_NOT_FOUND, "", "id", "No such File object: %.100s", id);
}

int files_create(struct db *db, const char *project, const struct file_new *file, struct file *out,
                 struct err *err)
{
    struct db_result *res = NULL;
    char id[ID_SIZE];
    int rc;

    *out = (struct file){0};
    if (id_new(ID_FILE, id, err) != 0 || db_begin(db, project, err) != 0)
        return -1;
    if (db_exec(db,
                "INSERT INTO file (tenant, id, filename, purpose, bytes, sha256, expires_at)"
                " VALUES ($1::uuid, $2, $3, $4, $5, $6,"
                "         now() + make_interval(secs => nullif($7::bigint, 0)::double precision))"
                " RETURNING " FILE_COLUMNS,
                DB_ARGS(DB_TEXT(project), DB_TEXT(id), DB_TEXT(file->filename),
                        DB_TEXT(file->purpose), DB_INT(file->bytes), DB_TEXT(file->sha256),
                        DB_INT(file->expires_after)),
                &res, err) != 0) {
        db_rollback(db);
        return -1;
    }
    rc = read_file(res, 0, out, err);
    db_result_free(res);
    if (rc != 0) {
        db_rollback(db);
        return -1;
    }
    if (db_commit(db, err) != 0) {
        file_release(out);
        return -1;
    }
    return 0;
}

int files_get(struct db *db, const char *project, const char *id, struct file *out, struct err *err)
{
    struct db_result *res = NULL;
    int rc;

    *out = (struct file){0};
    if (!id_has_shape(ID_FILE, id))
        return no_such_file(id, err);
    if (db_begin(db, project, err) != 0)
        return -1;
    if (db_exec(db,
                "SELECT " FILE_COLUMNS
                " FROM file WHERE tenant = $1::uuid AND id = $2 AND " FILE_ALIVE,
                DB_ARGS(DB_TEXT(project), DB_TEXT(id)), &res, err) != 0) {
        db_rollback(db);
        return -1;
    }
    rc = db_rows(res) == 1 ? read_file(res, 0, out, err) : no_such_file(id, err);
    db_result_free(res);
    if (db_commit(db, err) != 0) {
        file_release(out);
        return -1;
    }
    return rc;
}

static int read_item(const struct db_result *res, int row, void *item, struct err *err)
{
    return read_file(res, row, item, err);
}

static void release_item(void *item)
{
    file_release(item);
}

static const struct page_list list = {
    .what = "files",
    .item_size = sizeof(struct file),
    .read = read_item,
    .release = release_item,
    .select = "SELECT " FILE_COLUMNS " FROM file WHERE tenant = $1::uuid"
              " AND ($3::text IS NULL OR purpose = $3) AND " FILE_ALIVE,
    .key = "ordinal",
    .find = "SELECT ordinal FROM file WHERE tenant = $1::uuid AND id = $2",
    .unknown = "No such File object",
};

int files_list(struct db *db, const char *project, const struct file_query *query,
               struct file_list *out, struct err *err)
{
    const struct page_query q = {
        .after = query->after,
        .limit = query->limit,
        .ascending = query->ascending,
        .filters = {DB_TEXT(query->purpose)},
        .filter_count = 1,
    };
    struct page page;
    int rc = page_read(db, project, &list, &q, &page, err);

    *out = (struct file_list){page.items, page.count, page.has_more};
    return rc;
}

void file_list_release(struct file_list *files)
{
    page_release(&list, files->items, files->count);
    *files = (struct file_list){0};
}

int files_delete(struct db *db, const char *project, const char *id, struct err *err)
{
    struct db_result *res = NULL;
    bool found;

    if (!id_has_shape(ID_FILE, id))
        return no_such_file(id, err);
    if (db_begin(db, project, err) != 0)
        return -1;
    if (db_exec(db, "DELETE FROM file WHERE tenant = $1::uuid AND id = $2 AND " FILE_ALIVE,
                DB_ARGS(DB_TEXT(project), DB_TEXT(id)), &res, err) != 0) {
        db_rollback(db);
        return -1;
    }
    found = db_affected(res) == 1;
    db_result_free(res);
    if (db_commit(db, err) != 0)
        return -1;
    return found ? 0 : no_such_file(id, err);
}
