#include "storage/bases.h"

#include <stdlib.h>
#include <string.h>

#define BASE_COLUMNS                                                                              \
    "name, digest, sha256, bytes, floor(extract(epoch FROM created_at))::bigint, architecture, "  \
    "parameters, linear_parameters, bytes_16bit, layers, hidden, intermediate, heads, kv_heads, " \
    "vocabulary, context, tied_embeddings"

bool bases_name_valid(const char *name)
{
    static const char first[] = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    static const char rest[] = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz._-/";
    size_t len = strlen(name);

    return len > 0 && len < BASE_NAME_SIZE && strchr(first, name[0]) != NULL &&
           strspn(name, rest) == len && name[len - 1] != '/' && strstr(name, "//") == NULL &&
           strstr(name, "..") == NULL;
}

static void read_base(const struct db_result *res, int row, struct base *b)
{
    *b = (struct base){0};
    db_text_into(res, row, 0, b->name, sizeof b->name);
    db_text_into(res, row, 1, b->digest, sizeof b->digest);
    db_text_into(res, row, 2, b->sha256, sizeof b->sha256);
    b->bytes = db_int(res, row, 3);
    b->created_at = db_int(res, row, 4);
    db_text_into(res, row, 5, b->architecture, sizeof b->architecture);
    b->parameters = db_int(res, row, 6);
    b->linear_parameters = db_int(res, row, 7);
    b->bytes_16bit = db_int(res, row, 8);
    b->layers = (int32_t)db_int(res, row, 9);
    b->hidden = (int32_t)db_int(res, row, 10);
    b->intermediate = (int32_t)db_int(res, row, 11);
    b->heads = (int32_t)db_int(res, row, 12);
    b->kv_heads = (int32_t)db_int(res, row, 13);
    b->vocabulary = (int32_t)db_int(res, row, 14);
    b->context = (int32_t)db_int(res, row, 15);
    b->tied_embeddings = db_bool(res, row, 16);
}

/* The one row that `sql` with its one parameter finds. *found tells. */
static int read_one(struct db *db, const char *sql, const char *parameter, struct base *out,
                    bool *found, struct err *err)
{
    struct db_result *res = NULL;

    if (db_begin(db, NULL, err) != 0)
        return -1;
    if (db_exec(db, sql, DB_ARGS(DB_TEXT(parameter)), &res, err) != 0) {
        db_rollback(db);
        return -1;
    }
    *found = db_rows(res) == 1;
    if (*found)
        read_base(res, 0, out);
    db_result_free(res);
    return db_commit(db, err);
}

int bases_get(struct db *db, const char *name, struct base *out, struct err *err)
{
    bool found;

    if (read_one(db, "SELECT " BASE_COLUMNS " FROM base_model WHERE name = $1", name, out, &found,
                 err) != 0)
        return -1;
    return found ? 0
                 : err_set_code(err, ERR_NOT_FOUND, "model_not_found", "model",
                                "there is no base model \"%.200s\"", name);
}

int bases_find(struct db *db, const char *digest, struct base *out, struct err *err)
{
    bool found;

    if (read_one(db,
                 "SELECT " BASE_COLUMNS " FROM base_model WHERE digest = $1 ORDER BY name LIMIT 1",
                 digest, out, &found, err) != 0)
        return -1;
    return found ? 0
                 : err_set(err, ERR_NOT_FOUND, "there is no base model with digest %.64s", digest);
}

int bases_add(struct db *db, struct base *base, struct err *err)
{
    struct base there;
    const char *sha256 = base->sha256;

    if (!bases_name_valid(base->name))
        return err_set(err, ERR_INVALID,
                       "\"%s\" can not be the name of a base model: 1 to %d letters, digits, '.', "
                       "'_', '-' or inner '/', beginning with a letter or digit",
                       base->name, BASE_NAME_SIZE - 1);
    if (db_begin(db, NULL, err) != 0)
        return -1;
    if (db_exec(db,
                "INSERT INTO base_model (name, digest, sha256, bytes, architecture, parameters,"
                "  linear_parameters, bytes_16bit, layers, hidden, intermediate, heads, kv_heads,"
                "  vocabulary, context, tied_embeddings)"
                " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)"
                " ON CONFLICT (name) DO NOTHING",
                DB_ARGS(DB_TEXT(base->name), DB_TEXT(base->digest), DB_TEXT(sha256),
                        DB_INT(base->bytes), DB_TEXT(base->architecture), DB_INT(base->parameters),
                        DB_INT(base->linear_parameters), DB_INT(base->bytes_16bit),
                        DB_INT(base->layers), DB_INT(base->hidden), DB_INT(base->intermediate),
                        DB_INT(base->heads), DB_INT(base->kv_heads), DB_INT(base->vocabulary),
                        DB_INT(base->context), DB_BOOL(base->tied_embeddings)),
                NULL, err) != 0 ||
        bases_get(db, base->name, &there, err) != 0) {
        db_rollback(db);
        return -1;
    }
    if (strcmp(there.digest, base->digest) != 0 || strcmp(there.sha256, sha256) != 0) {
        db_rollback(db);
        return err_set(err, ERR_INVALID,
                       "there is a base model \"%s\" with other content already: choose another "
                       "name",
                       base->name);
    }
    *base = there;
    return db_commit(db, err);
}

int bases_list(struct db *db, struct base_list *out, struct err *err)
{
    struct db_result *res = NULL;

    *out = (struct base_list){0};
    if (db_begin(db, NULL, err) != 0)
        return -1;
    if (db_exec(db, "SELECT " BASE_COLUMNS " FROM base_model ORDER BY name", DB_NO_ARGS, &res,
                err) != 0) {
        db_rollback(db);
        return -1;
    }
    out->items = calloc((size_t)db_rows(res) + 1, sizeof *out->items);
    if (out->items == NULL) {
        db_result_free(res);
        db_rollback(db);
        return err_set(err, ERR_NO_MEMORY, "list the base models: out of memory");
    }
    out->count = db_rows(res);
    for (int i = 0; i < out->count; i++)
        read_base(res, i, &out->items[i]);
    db_result_free(res);
    return db_commit(db, err);
}

void base_list_release(struct base_list *list)
{
    free(list->items);
    *list = (struct base_list){0};
}
