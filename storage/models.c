#include "storage/models.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/strbuf.h"

#define EPOCH(column) "floor(extract(epoch FROM " column "))::bigint"

/* Three sources, one shape: kind, name, created, owner, job, base name, digest and sha256, artifact
 * sha256 and bytes, order. */
#define FROM_BASE                                                      \
    "SELECT 0, b.name, " EPOCH(                                        \
        "b.created_at") ", 'graft', NULL, b.name, b.digest, b.sha256," \
                        " NULL, 0::bigint, 0::bigint FROM base_model b WHERE true "
#define FROM_MODEL                                                                                 \
    "SELECT 1, m.name, " EPOCH(                                                                    \
        "m.created_at") ", p.organization, m.job, b.name, b.digest,"                               \
                        " b.sha256, m.artifact_sha256, m.artifact_bytes, -m.ordinal FROM model m"  \
                        " JOIN base_model b ON b.name = m.base_name JOIN project p ON p.tenant = " \
                        "m.tenant"                                                                 \
                        " WHERE m.tenant = $1::uuid "
#define FROM_CHECKPOINT                                                                            \
    "SELECT 2, c.model, " EPOCH(                                                                   \
        "c.created_at") ", p.organization, c.job, b.name, b.digest,"                               \
                        " b.sha256, c.artifact_sha256, c.artifact_bytes, 0::bigint FROM "          \
                        "checkpoint c"                                                             \
                        " JOIN job j ON j.tenant = c.tenant AND j.id = c.job"                      \
                        " JOIN base_model b ON b.name = j.base_name JOIN project p ON p.tenant = " \
                        "c.tenant"                                                                 \
                        " WHERE c.tenant = $1::uuid "

static int no_such_model(const char *name, struct err *err)
{
    return err_set_code(err, ERR_NOT_FOUND, "model_not_found", "model",
                        "The model `%.200s` does not exist or you do not have access to it.", name);
}

static void read_model(const struct db_result *res, int row, struct model *m)
{
    *m = (struct model){.kind = (enum model_kind)db_int(res, row, 0)};
    db_text_into(res, row, 1, m->name, sizeof m->name);
    m->created_at = db_int(res, row, 2);
    db_text_into(res, row, 3, m->owned_by, sizeof m->owned_by);
    db_text_into(res, row, 4, m->job, sizeof m->job);
    db_text_into(res, row, 5, m->base_name, sizeof m->base_name);
    db_text_into(res, row, 6, m->base_digest, sizeof m->base_digest);
    db_text_into(res, row, 7, m->base_sha256, sizeof m->base_sha256);
    db_text_into(res, row, 8, m->artifact_sha256, sizeof m->artifact_sha256);
    m->artifact_bytes = db_int(res, row, 9);
}

int models_resolve(struct db *db, const char *project, const char *name, struct model *out,
                   struct err *err)
{
    struct db_result *res = NULL;
    int rc = 0;

    *out = (struct model){0};
    if (name[0] == '\0' || strlen(name) >= MODEL_NAME_SIZE)
        return no_such_model(name, err);
    if (db_begin(db, project, err) != 0)
        return -1;
    if (db_exec(db,
                FROM_BASE "AND b.name = $2 UNION ALL " FROM_MODEL
                          "AND m.name = $2 UNION ALL " FROM_CHECKPOINT "AND c.model = $2",
                DB_ARGS(DB_TEXT(project), DB_TEXT(name)), &res, err) != 0) {
        db_rollback(db);
        return -1;
    }
    if (db_rows(res) > 0)
        read_model(res, 0, out);
    else
        rc = no_such_model(name, err);
    db_result_free(res);
    return db_commit(db, err) != 0 ? -1 : rc;
}

int models_list(struct db *db, const char *project, struct model_list *out, struct err *err)
{
    struct db_result *res = NULL;

    *out = (struct model_list){0};
    if (db_begin(db, project, err) != 0)
        return -1;
    /* Kind, then order, then name: bases by name, models newest first. */
    if (db_exec(db, FROM_BASE "UNION ALL " FROM_MODEL "ORDER BY 1, 11, 2",
                DB_ARGS(DB_TEXT(project)), &res, err) != 0) {
        db_rollback(db);
        return -1;
    }
    out->items = calloc((size_t)db_rows(res) + 1, sizeof *out->items);
    if (out->items == NULL) {
        db_result_free(res);
        db_rollback(db);
        return err_set(err, ERR_NO_MEMORY, "list the models: out of memory");
    }
    for (; out->count < db_rows(res); out->count++)
        read_model(res, out->count, &out->items[out->count]);
    db_result_free(res);
    if (db_commit(db, err) != 0) {
        model_list_release(out);
        return -1;
    }
    return 0;
}

void model_list_release(struct model_list *list)
{
    free(list->items);
    *list = (struct model_list){0};
}

/* The checkpoint of a job's last step is the model under another name. */
static const char delete_model[] =
    "WITH gone AS (DELETE FROM model WHERE tenant = $1::uuid AND name = $2"
    "               RETURNING tenant, job, artifact_sha256)"
    " DELETE FROM checkpoint c USING gone g"
    "  WHERE c.tenant = g.tenant AND c.job = g.job AND c.artifact_sha256 = g.artifact_sha256";
static const char delete_checkpoint[] =
    "DELETE FROM checkpoint WHERE tenant = $1::uuid AND model = $2";

int models_delete(struct db *db, const char *project, const char *name, struct err *err)
{
    struct model model;

    if (db_begin(db, project, err) != 0)
        return -1;
    if (models_resolve(db, project, name, &model, err) != 0)
        goto fail;
    if (model.kind == MODEL_BASE) {
        err_set_code(err, ERR_FORBIDDEN, "", "model",
                     "The model `%.200s` is a base model: only a fine-tuned model can be deleted.",
                     name);
        goto fail;
    }
    if (db_exec(db, model.kind == MODEL_FINE_TUNED ? delete_model : delete_checkpoint,
                DB_ARGS(DB_TEXT(project), DB_TEXT(name)), NULL, err) != 0)
        goto fail;
    return db_commit(db, err);
fail:
    db_rollback(db);
    return -1;
}

/* ------------------------------------------------------------------ new ones */

static int find_organization(struct db *db, const char *project, char out[65], struct err *err)
{
    struct db_result *res = NULL;
    int rc = 0;

    if (db_exec(db,
                "SELECT o.name FROM project p JOIN organization o ON o.id = p.organization"
                " WHERE p.tenant = $1::uuid",
                DB_ARGS(DB_TEXT(project)), &res, err) != 0)
        return -1;
    if (db_rows(res) == 1)
        db_text_into(res, 0, 0, out, 65);
    else
        rc = err_set(err, ERR_INTERNAL, "there is no project %s", project);
    db_result_free(res);
    return rc;
}

/* Lower-case letters, digits, '.', '_' and '-'; all else becomes '-'. ':' parts a model's name. */
static void add_slug(struct strbuf *sb, const char *text)
{
    for (; *text != '\0'; text++) {
        char c = *text;

        if (c >= 'A' && c <= 'Z')
            c = (char)(c - 'A' + 'a');
        else if (!((c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || strchr("._-", c) != NULL))
            c = '-';
        strbuf_addch(sb, c);
    }
}

int models_new_name(struct db *db, const char *project, const char *base_name, const char *suffix,
                    char **name, struct err *err)
{
    struct strbuf sb;
    char organization[65], random[9];

    *name = NULL;
    if (find_organization(db, project, organization, err) != 0 || id_random(8, random, err) != 0)
        return -1;
    strbuf_init(&sb, MODEL_NAME_SIZE - 32); /* room for ":ckpt-step-N" */
    strbuf_addf(&sb, "ft:%s:", base_name);
    add_slug(&sb, organization);
    strbuf_addch(&sb, ':');
    if (suffix != NULL)
        add_slug(&sb, suffix);
    strbuf_addf(&sb, ":%s", random);
    *name = strbuf_detach(&sb, NULL);
    if (*name == NULL)
        return err_set(err, ERR_INVALID,
                       "the model's name would be too long: use a shorter suffix");
    return 0;
}

int models_import_file(struct db *db, const char *project, const char *id, struct file *out,
                       struct err *err)
{
    struct err why = {0};

    if (files_get(db, project, id, out, &why) != 0) {
        if (why.kind == ERR_NOT_FOUND)
            return err_set_code(err, ERR_INVALID, "", "file", "invalid file: %.100s", id);
        *err = why;
        return -1;
    }
    if (strcmp(out->purpose, "graft-delta") == 0)
        return 0;
    err_set_code(err, ERR_INVALID, "", "file",
                 "file %s has the purpose \"%.40s\": upload it with purpose \"graft-delta\"", id,
                 out->purpose);
    file_release(out);
    return -1;
}

/* The file's row is held until the model's own, which the collector heeds, is committed. */
static int import(struct db *db, const char *project, const struct model_new *n, char **name,
                  struct err *err)
{
    struct file file;
    int rc;

    if (db_exec(db, "SELECT 1 FROM file WHERE tenant = $1::uuid AND id = $2 FOR KEY SHARE",
                DB_ARGS(DB_TEXT(project), DB_TEXT(n->file)), NULL, err) != 0 ||
        models_import_file(db, project, n->file, &file, err) != 0)
        return -1;
    rc = models_new_name(db, project, n->base->name, n->suffix, name, err);
    if (rc == 0)
        rc = db_exec(db,
                     "INSERT INTO model (tenant, name, base_name, base_digest, artifact_sha256,"
                     "                   artifact_bytes) VALUES ($1::uuid, $2, $3, $4, $5, $6)",
                     DB_ARGS(DB_TEXT(project), DB_TEXT(*name), DB_TEXT(n->base->name),
                             DB_TEXT(n->base->digest), DB_TEXT(file.sha256), DB_INT(file.bytes)),
                     NULL, err);
    file_release(&file);
    return rc;
}

int models_import(struct db *db, const char *project, const struct model_new *model,
                  struct model *out, struct err *err)
{
    char *name = NULL;
    int rc;

    if (db_begin(db, project, err) != 0)
        return -1;
    rc = import(db, project, model, &name, err);
    if (rc == 0)
        rc = models_resolve(db, project, name, out, err);
    free(name);
    if (rc == 0)
        return db_commit(db, err);
    db_rollback(db);
    return -1;
}
