/* jobs.h: fine-tuning jobs from creation to their one end.
 *
 * States and moves: job_state.def. One function makes a move (job_move in jobs.c), fenced by the
 * lease's attempt where a worker makes it, and the database's trigger holds it to the same table. A
 * terminal state is never left. Job, event and outbox row change in one transaction.
 *
 * A worker's life with a job:
 *   leases_claim → jobs_get → jobs_mark_validated → jobs_mark_running → events_append,
 *   jobs_progress, jobs_set_recovery, checkpoints_add … → jobs_mark_compressing →
 *   jobs_commit_success, or jobs_commit_failure at any point.
 * A later attempt finds the job in the state where the earlier one left it; marking a state that
 * the job already has is fine and tells nothing, so the worker simply goes the same way again.
 *
 * jsonb columns travel as JSON text. Strings in structs are owned and may be NULL where said. */
#ifndef GRAFT_STORAGE_JOBS_H
#define GRAFT_STORAGE_JOBS_H

#include <stdbool.h>
#include <stdint.h>

#include "engine/base/sha256.h"
#include "storage/bases.h"
#include "storage/checkpoints.h"
#include "storage/db.h"
#include "storage/files.h"
#include "storage/ids.h"
#include "storage/leases.h"

enum job_state {
#define JOB_STATE(name, text, wire, terminal) JOB_STATE_##name,
#include "storage/job_state.def"
#undef JOB_STATE
    JOB_STATE_COUNT
};

const char *job_state_text(enum job_state state); /* in the database, logs and metrics */
const char *job_state_wire(enum job_state state); /* `status` of the API */
bool job_state_terminal(enum job_state state);
bool job_state_may_move(enum job_state from, enum job_state to);

struct job_hyperparameters { /* 0: auto (as chosen) or not known yet (as resolved) */
    int32_t n_epochs, batch_size;
    double learning_rate_multiplier;
};

struct job_recall { /* shares 0..1 of the training questions answered right; NAN: not measured */
    double base;    /* the base model, before training */
    double tuned;   /* after training, uncompressed */
    double served;  /* from the delta that is served */
};

/* How the difference is to be compressed: the smallest file of a size (ratio) or of a cost
 * (max_kl), not both. */
struct job_compression {
    char codec[32]; /* "": the engine's default */
    double ratio;   /* 16-bit bytes of the whole base / bytes of the file; 0: the codec's own */
    double max_kl;  /* nats per token; 0: none */
    int32_t distill_steps; /* -1: the codec's default */
};

struct job_delta { /* bytes 0: none yet */
    char codec[32];
    int64_t bytes;
    double ratio;          /* 16-bit bytes of the whole base / bytes */
    double relative_error; /* NAN: not measured */
};

struct job_dataset { /* examples 0: not validated yet */
    int64_t examples, tokens, trained_tokens, truncated_examples, untrained_examples;
};

/* The newest recovery checkpoint: recovery/<name> of the blob store. */
struct job_recovery {
    char name[96]; /* "": none */
    int64_t step, bytes;
};

struct job {
    char id[ID_SIZE];
    char project[UUID_SIZE];
    char organization_id[ID_SIZE];
    enum job_state state;
    int64_t created_at, started_at, finished_at, estimated_finish; /* 0: not (yet) */
    char *model;                                                   /* as the client asked */
    char *model_name; /* what the result is (or will be) called */
    bool has_model;   /* succeeded: model_name is the wire's fine_tuned_model */
    char *suffix;     /* NULL: none */
    /* Of a job that does not train, but compresses what another imported model, its name here,
     * differs by from the base; NULL for others. training_file is then what that is calibrated
     * with. */
    char *tuned_model;
    char tuned_sha256[SHA256_HEX];    /* blob of BLOB_OWNER_BASE; "" */
    char *training_file;              /* ids; "" for none, in a job with tuned_model only */
    char *validation_file;            /* NULL: none */
    char training_sha256[SHA256_HEX]; /* blobs of the project, kept until the job ends; "": none */
    char validation_sha256[SHA256_HEX]; /* "": none */
    char base_name[BASE_NAME_SIZE];
    char base_digest[SHA256_HEX];
    char base_sha256[SHA256_HEX];
    char start_sha256[SHA256_HEX]; /* delta to continue from (blob of the project); "": from the
                                      base */
    int64_t seed;
    char *method_type;  /* "supervised" */
    char *method;       /* JSON text as the client sent it, or NULL */
    char *metadata;     /* JSON text of an object, or NULL */
    char *integrations; /* JSON text, or NULL */
    char *extension;    /* JSON text of the "graft" object, or NULL */
    bool train_embeddings;
    char schedule[16]; /* "linear", "cosine" */
    struct job_hyperparameters chosen, resolved;
    struct job_compression compression;
    int32_t step, total_steps; /* 0: not started */
    int64_t trained_tokens;    /* 0: not finished */
    char result_file[ID_SIZE]; /* "": none */
    char error_code[48];       /* "": no error */
    char *error_message;
    char error_param[64]; /* "": null */
    struct job_dataset dataset;
    struct job_recall recall;
    struct job_delta delta;
    char *delta_report; /* JSON text of an object: all that compression measured; NULL: none yet */
    struct job_recovery recovery;
    int64_t attempt; /* 0: never claimed */
    int32_t crashes; /* in a row, without progress */
};
void job_release(struct job *job);

struct job_list {
    struct job *items;
    int count;
    bool has_more;
};
void job_list_release(struct job_list *list);

/* ------------------------------------------------------------------ the API's side */

struct job_new {
    const char *model;           /* a base, a fine-tuned model or a checkpoint of the project */
    const char *training_file;   /* file id; NULL with a tuned_model: none */
    const char *validation_file; /* NULL: none */
    const char *suffix;          /* NULL: none */
    const struct base *tuned;    /* compress this model's difference to `model`; NULL: train */
    int64_t seed;                /* -1: choose one */
    const char *method_type;     /* NULL: supervised */
    const char *method, *metadata, *integrations, *extension; /* JSON text or NULL */
    bool train_embeddings;
    const char *schedule; /* NULL: linear */
    struct job_hyperparameters chosen;
    struct job_compression compression;
    int max_unfinished; /* of the project; more is ERR_RATE. 0: no limit */
};

/* Job, its first two events ("Created fine-tuning job: …", "Validating training file: …") and
 * outbox row. ERR_INVALID with param training_file, validation_file: no such file, or purpose is
 * not fine-tune; ERR_NOT_FOUND with code model_not_found, param model. */
int jobs_create(struct db *db, const char *project, const struct job_new *job, struct job *out,
                struct err *err);
/* ERR_NOT_FOUND, code fine_tune_not_found, param fine_tune_id. */
int jobs_get(struct db *db, const char *project, const char *id, struct job *out, struct err *err);

struct job_query {
    const char *after;     /* id; NULL: from the newest. Unknown: ERR_INVALID, param after */
    int limit;             /* 1.. */
    const char *metadata;  /* JSON text of an object that the job's must contain; NULL: any */
    bool without_metadata; /* `metadata=null` */
};
int jobs_list(struct db *db, const char *project, const struct job_query *query,
              struct job_list *out, struct err *err); /* newest first */
/* Cancelled when it returns, whoever worked on it; the worker hears of it at its next renewal. A
 * cancelled job again: 0. A succeeded or failed one: ERR_INVALID. */
int jobs_cancel(struct db *db, const char *project, const char *id, struct job *out,
                struct err *err);
/* Over all tenants, for /metrics. DB_ROLE_APP or DB_ROLE_WORKER. */
int jobs_count(struct db *db, int64_t counts[JOB_STATE_COUNT], struct err *err);

/* ------------------------------------------------------------------ the worker's side: all fenced
 */

/* validating → queued, with the event "Files validated, moving job to queued state". */
int jobs_mark_validated(struct db *db, const struct lease *lease, const struct job_dataset *dataset,
                        struct err *err);

struct job_plan {
    struct job_hyperparameters resolved;
    int32_t total_steps;
    bool compression; /* nothing is trained: a job with tuned_model */
};
/* queued → running, with the event "Fine-tuning job started", or "Compression job started". */
int jobs_mark_running(struct db *db, const struct lease *lease, const struct job_plan *plan,
                      struct err *err);
int jobs_mark_compressing(struct db *db, const struct lease *lease, struct err *err);
/* Where training is. At most once a second is enough. */
int jobs_progress(struct db *db, const struct lease *lease, int32_t step, double seconds_left,
                  struct err *err);
/* recovery/<name> is durable: from now on it is the one to resume from. `old` gets the name of the
 * one before ("" if none), whose file the caller removes. */
int jobs_set_recovery(struct db *db, const struct lease *lease, const struct job_recovery *recovery,
                      char old[96], struct err *err);

struct job_success {
    const char *artifact_sha256; /* a committed blob of the project */
    struct job_delta delta;      /* bytes: of the artifact */
    const char *delta_report;    /* JSON text of an object, or NULL */
    struct job_recall recall;
    int64_t trained_tokens;
    struct file_new result_file; /* a committed blob; filename NULL: none. Purpose is set here */
};
/* Model, result file, events, outbox row and the job's success: all, or (ERR_FENCED,
 * ERR_CANCELLED) nothing. After ERR_UNAVAILABLE it may be called again: if the first call had
 * committed after all, the second says 0. */
int jobs_commit_success(struct db *db, const struct lease *lease, const struct job_success *success,
                        struct err *err);
/* `why`: ERR_INVALID and its kin give the job's error their code, param and message; other kinds
 * are logged, and the client reads that the server failed (code server_error) or, for ERR_NO_SPACE
 * and ERR_NO_MEMORY, what it lacked (insufficient_storage, insufficient_memory): in the words of
 * `why` where that has a code. */
int jobs_commit_failure(struct db *db, const struct lease *lease, const struct err *why,
                        struct err *err);

/* For leases.c, inside a transaction of the job's project and with its lease row locked: the end of
 * a job that killed its workers. */
int jobs_end_poisoned(struct db *db, const char *project, const char *id, int crashes,
                      struct err *err);

#endif
