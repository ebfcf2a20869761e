/* models.h: a name that a client may write as `model`, and what stands behind it. */
#ifndef GRAFT_STORAGE_MODELS_H
#define GRAFT_STORAGE_MODELS_H

#include <stdbool.h>
#include <stdint.h>

#include "engine/base/sha256.h"
#include "storage/bases.h"
#include "storage/db.h"
#include "storage/files.h"
#include "storage/ids.h"

#define MODEL_NAME_SIZE 320 /* "ft:base:org:suffix:8chars:ckpt-step-N" */

enum model_kind { MODEL_BASE, MODEL_FINE_TUNED, MODEL_CHECKPOINT };

struct model {
    enum model_kind kind;
    char name[MODEL_NAME_SIZE];
    int64_t created_at;
    char owned_by[ID_SIZE]; /* the organization's id; "graft" for a base */
    char job[ID_SIZE];      /* "" for a base, and for a delta that was imported */
    char base_name[BASE_NAME_SIZE];
    char base_digest[SHA256_HEX];
    char base_sha256[SHA256_HEX];     /* blob of BLOB_OWNER_BASE */
    char artifact_sha256[SHA256_HEX]; /* blob of the project; "" for a base */
    int64_t artifact_bytes;
};

struct model_list {
    struct model *items;
    int count;
};
void model_list_release(struct model_list *list);

/* ERR_NOT_FOUND, code model_not_found, param model, where the project has no such model: one that
 * never was, one deleted and another tenant's all read the same. */
int models_resolve(struct db *db, const char *project, const char *name, struct model *out,
                   struct err *err);
/* Bases by name, then the project's fine-tuned models, newest first. Checkpoints are listed with
 * their job. */
int models_list(struct db *db, const char *project, struct model_list *out, struct err *err);

struct model_new {
    const char *file;        /* id of an uploaded delta, in which the caller has found no fault */
    const struct base *base; /* that it is of */
    const char *suffix;      /* NULL: none */
};
/* The file as an import may use it: ERR_INVALID, param file, where the project has no such file, or
 * its purpose is another than graft-delta. */
int models_import_file(struct db *db, const char *project, const char *id, struct file *out,
                       struct err *err);
/* A fine-tuned model of the file's bytes, which then live as long as the model, whatever becomes of
 * the file. ERR_INVALID: as models_import_file. */
int models_import(struct db *db, const char *project, const struct model_new *model,
                  struct model *out, struct err *err);
/* A new model's name, malloc'ed: ft:<base>:<organization>:<suffix or nothing>:<8 characters>, all
 * but the letters, digits, '.', '_' and '-' of organization and suffix replaced. */
int models_new_name(struct db *db, const char *project, const char *base_name, const char *suffix,
                    char **name, struct err *err);
/* A fine-tuned model, and with it those checkpoints of its job that hold the same bytes (that of
 * the last step); or a checkpoint alone. A base is ERR_FORBIDDEN. */
int models_delete(struct db *db, const char *project, const char *name, struct err *err);

#endif
