/* api_compression.h: the object that says how a difference is to be compressed, as a request has it
 * (`graft.compression` of a job, `compression` of a delta) and as a job shows it:
 *
 *   {"codec": "graft", "ratio": 32 | "max_kl": 0.05, "distill_steps": 60}
 *
 * All of it may be left out or null: then the engine chooses. */
#ifndef GRAFT_API_COMPRESSION_H
#define GRAFT_API_COMPRESSION_H

#include <jansson.h>

#include "engine/base/err.h"
#include "storage/blob_store.h"
#include "storage/jobs.h"

/* `path`: how the client knows the object. NULL for `object` is fine: everything is the engine's
 * choice. ERR_INVALID names the field; that there is no other field is field_table_check's
 * business. */
int api_compression_read(const json_t *object, const char *path, struct job_compression *out,
                         struct err *err);
/* Can a fine-tune of that base be as small? It trains everything but the embeddings, or these too.
 * ERR_INVALID names the ratio and says which can be had: better now than after the training. Says
 * nothing of a KL, which only a trained model has. */
int api_compression_check(const struct job_compression *compression, const char *path,
                          struct blob_store *blobs, const char *base_sha256, bool embeddings,
                          struct err *err);
/* New reference. What was not asked for is null. */
json_t *api_compression_json(const struct job_compression *compression);

#endif
