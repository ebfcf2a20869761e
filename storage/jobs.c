#include "storage/jobs.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "storage/events.h"
#include "storage/job_row.h"
#include "storage/models.h"
#include "storage/page.h"

/* ------------------------------------------------------------------ creation */

/* What a request's names stand for, found before the row is written. */
struct found {
    struct model model;
    struct file training, validation;
};

static void found_release(struct found *f)
{
    file_release(&f->training);
    file_release(&f->validation);
}

static int find_file(struct db *db, const char *project, const char *id, const char *param,
                     struct file *out, struct err *err)
{
    struct err why = {0};

    if (files_get(db, project, id, out, &why) != 0) {
        if (why.kind == ERR_NOT_FOUND)
            return err_set_code(err, ERR_INVALID, "", param, "invalid %s: %.100s", param, id);
        return err_set_code(err, why.kind, why.code, why.param, "%s", why.message);
    }
    if (strcmp(out->purpose, "fine-tune") != 0)
        return err_set_code(err, ERR_INVALID, "", param,
                            "%s %s has the purpose \"%.40s\": upload it with purpose \"fine-tune\"",
                            param, id, out->purpose);
    return 0;
}

/* Keeps what the job will read from being deleted until the job's own row, which the collector
 * heeds, is committed. */
static int hold_sources(struct db *db, const char *project, const struct job_new *n,
                        struct err *err)
{
    if (db_exec(db,
                "SELECT 1 FROM file WHERE tenant = $1::uuid AND id IN ($2, $3)"
                " ORDER BY id FOR KEY SHARE",
                DB_ARGS(DB_TEXT(project), DB_TEXT(n->training_file), DB_TEXT(n->validation_file)),
                NULL, err) != 0 ||
        db_exec(db, "SELECT 1 FROM model WHERE tenant = $1::uuid AND name = $2 FOR KEY SHARE",
                DB_ARGS(DB_TEXT(project), DB_TEXT(n->model)), NULL, err) != 0)
        return -1;
    return db_exec(db,
                   "SELECT 1 FROM checkpoint WHERE tenant = $1::uuid AND model = $2 FOR KEY SHARE",
                   DB_ARGS(DB_TEXT(project), DB_TEXT(n->model)), NULL, err);
}

/* One creation of a project at a time passes here, to the end of its transaction: else two could
 * count the same jobs and both find room. */
static int check_room(struct db *db, const char *project, int max_unfinished, struct err *err)
{
    struct db_result *res = NULL;
    int64_t unfinished;

    if (max_unfinished <= 0)
        return 0;
    if (db_exec(db, "SELECT pg_advisory_xact_lock(hashtextextended('job limit of ' || $1, 0))",
                DB_ARGS(DB_TEXT(project)), NULL, err) != 0 ||
        db_exec(db,
                "SELECT count(*) FROM job WHERE tenant = $1::uuid"
                " AND state NOT IN ('succeeded', 'failed', 'cancelled')",
                DB_ARGS(DB_TEXT(project)), &res, err) != 0)
        return -1;
    unfinished = db_int(res, 0, 0);
    db_result_free(res);
    if (unfinished >= max_unfinished)
        return err_set_code(err, ERR_RATE, "rate_limit_exceeded", "",
                            "this project has %lld fine-tuning jobs that have not ended, and may "
                            "have %d: wait for one, or cancel one",
                            (long long)unfinished, max_unfinished);
    return 0;
}

static struct db_value int_or_null(int64_t value)
{
    return value > 0 ? DB_INT(value) : DB_NULL;
}

static struct db_value real_or_null(double value)
{
    return value > 0 ? DB_REAL(value) : DB_NULL;
}

static int insert_job(struct db *db, const char *project, const char *id, const char *model_name,
                      int64_t seed, const struct job_new *n, const struct found *f, struct err *err)
{
    const struct job_compression *c = &n->compression;

    return db_exec(
        db,
        "WITH new AS ("
        "  INSERT INTO job (tenant, id, model, model_name, suffix, training_file, validation_file,"
        "    training_sha256, validation_sha256, base_name, base_digest, base_sha256,"
        "    start_sha256, seed, method_type, method, metadata, integrations, extension,"
        "    train_embeddings, schedule, chosen_n_epochs, chosen_batch_size,"
        "    chosen_learning_rate_multiplier, compression_codec, compression_ratio,"
        "    compression_max_kl, compression_distill_steps, tuned_model, tuned_sha256)"
        "  VALUES ($1::uuid, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, nullif($13, ''), $14,"
        "    $15, $16::json, $17::jsonb, $18::json, $19::json, $20, $21, $22::integer, "
        "$23::integer,"
        "    $24::double precision, nullif($25, ''), $26::double precision,"
        "    $27::double precision, $28::integer, $29, $30)"
        "  RETURNING tenant, id, ordinal)"
        "INSERT INTO job_lease (tenant, job, ordinal) SELECT tenant, id, ordinal FROM new",
        DB_ARGS(DB_TEXT(project), DB_TEXT(id), DB_TEXT(n->model), DB_TEXT(model_name),
                DB_TEXT(n->suffix), DB_TEXT(f->training.id), DB_TEXT(n->validation_file),
                DB_TEXT(f->training.sha256),
                DB_TEXT(n->validation_file != NULL ? f->validation.sha256 : NULL),
                DB_TEXT(f->model.base_name), DB_TEXT(f->model.base_digest),
                DB_TEXT(f->model.base_sha256), DB_TEXT(f->model.artifact_sha256), DB_INT(seed),
                DB_TEXT(n->method_type != NULL ? n->method_type : "supervised"), DB_TEXT(n->method),
                DB_TEXT(n->metadata), DB_TEXT(n->integrations), DB_TEXT(n->extension),
                DB_BOOL(n->train_embeddings), DB_TEXT(n->schedule != NULL ? n->schedule : "linear"),
                int_or_null(n->chosen.n_epochs), int_or_null(n->chosen.batch_size),
                real_or_null(n->chosen.learning_rate_multiplier), DB_TEXT(c->codec),
                real_or_null(c->ratio), real_or_null(c->max_kl),
                c->distill_steps >= 0 ? DB_INT(c->distill_steps) : DB_NULL,
                DB_TEXT(n->tuned != NULL ? n->tuned->name : NULL),
                DB_TEXT(n->tuned != NULL ? n->tuned->sha256 : NULL)),
        NULL, err);
}

static int tell_created(struct db *db, const char *project, const char *id, const struct job_new *n,
                        struct err *err)
{
    char created[128], validating[256];

    snprintf(created, sizeof created, "Created %s job: %s",
             n->tuned != NULL ? "compression" : "fine-tuning", id);
    snprintf(validating, sizeof validating, "Validating %s file: %s%s%s",
             n->tuned != NULL ? "calibration" : "training", n->training_file,
             n->validation_file != NULL ? " and validation file: " : "",
             n->validation_file != NULL ? n->validation_file : "");
    if (events_write(db, project, id, &(struct event_new){.message = created, .key = "created"},
                     err) != 0)
        return -1;
    if (n->training_file == NULL)
        return 0;
    return events_write(db, project, id,
                        &(struct event_new){.message = validating, .key = "validating"}, err);
}

static int choose_seed(int64_t *seed, struct err *err)
{
    char random[11];
    uint64_t mixed = 0;

    if (*seed >= 0)
        return 0;
    if (id_random(10, random, err) != 0)
        return -1;
    for (int i = 0; i < 10; i++)
        mixed = mixed * 131 + (unsigned char)random[i];
    *seed = (int64_t)(mixed % 2147483647u);
    return 0;
}

int jobs_create(struct db *db, const char *project, const struct job_new *n, struct job *out,
                struct err *err)
{
    struct found f = {0};
    char id[ID_SIZE], *model_name = NULL;
    int64_t seed = n->seed;
    int rc = -1;

    *out = (struct job){0};
    if (db_begin(db, project, err) != 0)
        return -1;
    if (hold_sources(db, project, n, err) != 0 ||
        models_resolve(db, project, n->model, &f.model, err) != 0 ||
        (n->training_file != NULL &&
         find_file(db, project, n->training_file,
                   n->tuned != NULL ? "calibration_file" : "training_file", &f.training,
                   err) != 0) ||
        (n->validation_file != NULL &&
         find_file(db, project, n->validation_file, "validation_file", &f.validation, err) != 0) ||
        check_room(db, project, n->max_unfinished, err) != 0 || id_new(ID_JOB, id, err) != 0 ||
        choose_seed(&seed, err) != 0)
        goto out;
    if (models_new_name(db, project, f.model.base_name, n->suffix, &model_name, err) != 0 ||
        insert_job(db, project, id, model_name, seed, n, &f, err) != 0 ||
        tell_created(db, project, id, n, err) != 0 ||
        job_row_outbox(db, project, id, "fine_tuning.job.created", err) != 0 ||
        jobs_get(db, project, id, out, err) != 0)
        goto out;
    rc = 0;
out:
    if (rc != 0)
        db_rollback(db);
    else
        rc = db_commit(db, err);
    if (rc != 0)
        job_release(out);
    found_release(&f);
    free(model_name);
    return rc;
}

/* ------------------------------------------------------------------ reading */

int jobs_get(struct db *db, const char *project, const char *id, struct job *out, struct err *err)
{
    struct db_result *res = NULL;
    int rc;

    *out = (struct job){0};
    if (!id_has_shape(ID_JOB, id))
        return job_row_missing(id, err);
    if (db_begin(db, project, err) != 0)
        return -1;
    if (db_exec(db, JOB_ROW_SELECT "WHERE j.tenant = $1::uuid AND j.id = $2",
                DB_ARGS(DB_TEXT(project), DB_TEXT(id)), &res, err) != 0) {
        db_rollback(db);
        return -1;
    }
    rc = db_rows(res) == 1 ? job_row_read(res, 0, out, err) : job_row_missing(id, err);
    db_result_free(res);
    if (db_commit(db, err) != 0) {
        job_release(out);
        return -1;
    }
    return rc;
}

static int read_item(const struct db_result *res, int row, void *item, struct err *err)
{
    return job_row_read(res, row, item, err);
}

static void release_item(void *item)
{
    job_release(item);
}

static const struct page_list list = {
    .what = "jobs",
    .item_size = sizeof(struct job),
    .read = read_item,
    .release = release_item,
    .select = JOB_ROW_SELECT "WHERE j.tenant = $1::uuid"
                             " AND ($3::jsonb IS NULL OR j.metadata @> $3::jsonb)"
                             " AND (NOT $4::boolean OR j.metadata IS NULL)",
    .key = "j.ordinal",
    .find = "SELECT ordinal FROM job WHERE tenant = $1::uuid AND id = $2",
    .unknown = "Could not find fine tune",
};

int jobs_list(struct db *db, const char *project, const struct job_query *query,
              struct job_list *out, struct err *err)
{
    const struct page_query q = {
        .after = query->after,
        .limit = query->limit,
        .filters = {DB_TEXT(query->metadata), DB_BOOL(query->without_metadata)},
        .filter_count = 2,
    };
    struct page page;
    int rc = page_read(db, project, &list, &q, &page, err);

    *out = (struct job_list){page.items, page.count, page.has_more};
    return rc;
}

void job_list_release(struct job_list *jobs)
{
    page_release(&list, jobs->items, jobs->count);
    *jobs = (struct job_list){0};
}

int jobs_count(struct db *db, int64_t counts[JOB_STATE_COUNT], struct err *err)
{
    struct db_result *res = NULL;

    memset(counts, 0, JOB_STATE_COUNT * sizeof *counts);
    if (db_begin(db, NULL, err) != 0)
        return -1;
    if (db_exec(db, "SELECT * FROM job_count()", DB_NO_ARGS, &res, err) != 0) {
        db_rollback(db);
        return -1;
    }
    for (int row = 0; row < db_rows(res); row++)
        for (int i = 0; i < JOB_STATE_COUNT; i++)
            if (strcmp(db_text(res, row, 0), job_state_text((enum job_state)i)) == 0)
                counts[i] = db_int(res, row, 1);
    db_result_free(res);
    return db_commit(db, err);
}

/* ------------------------------------------------------------------ cancelling */

static int cancel(struct db *db, const char *project, const char *id, struct err *err)
{
    enum job_state state;

    if (job_row_lock(db, project, id, &state, err) != 0)
        return -1;
    if (state == JOB_STATE_CANCELLED)
        return 0;
    if (job_state_terminal(state))
        return err_set_code(err, ERR_INVALID, "", "fine_tune_id",
                            "Job has already completed: it is %s, and can not be cancelled",
                            job_state_wire(state));
    if (events_write(db, project, id, &(struct event_new){.message = "Fine-tuning job cancelled"},
                     err) != 0)
        return -1;
    return job_row_move(db, project, id, state, JOB_STATE_CANCELLED, NULL, err);
}

int jobs_cancel(struct db *db, const char *project, const char *id, struct job *out,
                struct err *err)
{
    *out = (struct job){0};
    if (!id_has_shape(ID_JOB, id))
        return job_row_missing(id, err);
    if (db_begin(db, project, err) != 0)
        return -1;
    if (cancel(db, project, id, err) != 0 || jobs_get(db, project, id, out, err) != 0) {
        db_rollback(db);
        return -1;
    }
    if (db_commit(db, err) != 0) {
        job_release(out);
        return -1;
    }
    return 0;
}
