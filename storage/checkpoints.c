#include "storage/checkpoints.h"

#include <stdio.h>
#include <stdlib.h>

#include "storage/events.h"
#include "storage/page.h"

#define CHECKPOINT_COLUMNS                                                                   \
    "id, job, floor(extract(epoch FROM created_at))::bigint, step, model, artifact_sha256, " \
    "artifact_bytes, train_loss, train_mean_token_accuracy, valid_loss, "                    \
    "valid_mean_token_accuracy, full_valid_loss, full_valid_mean_token_accuracy"

void checkpoint_release(struct checkpoint *checkpoint)
{
    free(checkpoint->model);
    *checkpoint = (struct checkpoint){0};
}

static int tell(struct db *db, const char *project, const char *job, int32_t step,
                const char *model, struct err *err)
{
    char message[400], key[32];

    snprintf(message, sizeof message, "Checkpoint created at step %d with Snapshot ID: %s",
             (int)step, model);
    snprintf(key, sizeof key, "checkpoint:%d", (int)step);
    return events_write(db, project, job, &(struct event_new){.message = message, .key = key}, err);
}

static int write_row(struct db *db, const char *project, const char *job,
                     const struct checkpoint_new *c, struct err *err)
{
    struct db_result *res = NULL;
    char id[ID_SIZE];
    int rc;

    if (id_new(ID_CHECKPOINT, id, err) != 0)
        return -1;
    if (db_exec(
            db,
            "INSERT INTO checkpoint (tenant, id, job, step, model, artifact_sha256,"
            "  artifact_bytes, train_loss, train_mean_token_accuracy, valid_loss,"
            "  valid_mean_token_accuracy, full_valid_loss, full_valid_mean_token_accuracy)"
            " SELECT $1::uuid, $2, j.id, $4::integer,"
            "        j.model_name || ':ckpt-step-' || $4::integer, $5, $6,"
            "        $7, $8, $9, $10, $11, $12"
            "   FROM job j WHERE j.tenant = $1::uuid AND j.id = $3"
            " ON CONFLICT (tenant, job, step) DO UPDATE SET"
            "  artifact_sha256 = excluded.artifact_sha256,"
            "  artifact_bytes = excluded.artifact_bytes,"
            "  train_loss = excluded.train_loss,"
            "  train_mean_token_accuracy = excluded.train_mean_token_accuracy,"
            "  valid_loss = excluded.valid_loss,"
            "  valid_mean_token_accuracy = excluded.valid_mean_token_accuracy,"
            "  full_valid_loss = excluded.full_valid_loss,"
            "  full_valid_mean_token_accuracy = excluded.full_valid_mean_token_accuracy"
            " RETURNING model",
            DB_ARGS(DB_TEXT(project), DB_TEXT(id), DB_TEXT(job), DB_INT(c->step),
                    DB_TEXT(c->artifact_sha256), DB_INT(c->artifact_bytes),
                    DB_REAL(c->metrics.train_loss), DB_REAL(c->metrics.train_mean_token_accuracy),
                    DB_REAL(c->metrics.valid_loss), DB_REAL(c->metrics.valid_mean_token_accuracy),
                    DB_REAL(c->metrics.full_valid_loss),
                    DB_REAL(c->metrics.full_valid_mean_token_accuracy)),
            &res, err) != 0)
        return -1;
    if (db_rows(res) != 1)
        rc = err_set(err, ERR_INTERNAL, "a checkpoint of job %s, which is not there", job);
    else
        rc = tell(db, project, job, c->step, db_text(res, 0, 0), err);
    db_result_free(res);
    if (rc != 0)
        return -1;
    return db_exec(db,
                   "DELETE FROM checkpoint WHERE tenant = $1::uuid AND job = $2 AND step NOT IN ("
                   "  SELECT step FROM checkpoint WHERE tenant = $1::uuid AND job = $2"
                   "   ORDER BY step DESC LIMIT $3)",
                   DB_ARGS(DB_TEXT(project), DB_TEXT(job), DB_INT(CHECKPOINTS_KEPT)), NULL, err);
}

int checkpoints_add(struct db *db, const struct lease *lease,
                    const struct checkpoint_new *checkpoint, struct err *err)
{
    if (db_begin(db, lease->project, err) != 0)
        return -1;
    if (leases_lock(db, lease, err) != 0 ||
        write_row(db, lease->project, lease->job, checkpoint, err) != 0) {
        db_rollback(db);
        return -1;
    }
    return db_commit(db, err);
}

static int read_item(const struct db_result *res, int row, void *item, struct err *err)
{
    struct checkpoint *c = item;

    db_text_into(res, row, 0, c->id, sizeof c->id);
    db_text_into(res, row, 1, c->job, sizeof c->job);
    c->created_at = db_int(res, row, 2);
    c->step = (int32_t)db_int(res, row, 3);
    c->model = db_text_copy(res, row, 4);
    if (c->model == NULL)
        return err_set(err, ERR_NO_MEMORY, "read a checkpoint's row: out of memory");
    db_text_into(res, row, 5, c->artifact_sha256, sizeof c->artifact_sha256);
    c->artifact_bytes = db_int(res, row, 6);
    c->metrics = (struct checkpoint_metrics){
        .train_loss = db_real(res, row, 7),
        .train_mean_token_accuracy = db_real(res, row, 8),
        .valid_loss = db_real(res, row, 9),
        .valid_mean_token_accuracy = db_real(res, row, 10),
        .full_valid_loss = db_real(res, row, 11),
        .full_valid_mean_token_accuracy = db_real(res, row, 12),
    };
    return 0;
}

static void release_item(void *item)
{
    checkpoint_release(item);
}

static const struct page_list list = {
    .what = "checkpoints",
    .item_size = sizeof(struct checkpoint),
    .read = read_item,
    .release = release_item,
    .select = "SELECT " CHECKPOINT_COLUMNS " FROM checkpoint WHERE tenant = $1::uuid AND job = $3",
    .key = "step",
    .find = "SELECT step FROM checkpoint WHERE tenant = $1::uuid AND id = $2 AND job = $3",
    .unknown = "No such checkpoint of this job",
};

int checkpoints_list(struct db *db, const char *project, const char *job, const char *after,
                     int limit, struct checkpoint_list *out, struct err *err)
{
    const struct page_query query = {.job = job, .after = after, .limit = limit};
    struct page page;
    int rc = page_read(db, project, &list, &query, &page, err);

    *out = (struct checkpoint_list){page.items, page.count, page.has_more};
    return rc;
}

void checkpoint_list_release(struct checkpoint_list *checkpoints)
{
    page_release(&list, checkpoints->items, checkpoints->count);
    *checkpoints = (struct checkpoint_list){0};
}
