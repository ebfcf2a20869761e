/* idempotency.h: a POST that is sent again with the same Idempotency-Key happens once.
 *
 *   db_begin(project) → idempotency_take → IDEMPOTENCY_NEW: do it → idempotency_store(response) →
 *   db_commit; everything in that one transaction. A second request with the key waits for the
 * first one's commit inside idempotency_take, and then gets IDEMPOTENCY_REPLAY with its answer.
 *
 * Keys last 24 h, are the project's own, and are 1..255 bytes. */
#ifndef GRAFT_STORAGE_IDEMPOTENCY_H
#define GRAFT_STORAGE_IDEMPOTENCY_H

#include <stdint.h>

#include "engine/base/sha256.h"
#include "storage/db.h"

enum idempotency { IDEMPOTENCY_NEW, IDEMPOTENCY_REPLAY };

/* `digest`: SHA-256 over method, path and what the request says. The same key with another digest
 * is ERR_INVALID, code idempotency_key_reused (400: SDKs silently send a 409 again). On REPLAY
 * *body is the stored answer (malloc'ed) and *status its HTTP status. Only inside a transaction. */
int idempotency_take(struct db *db, const char *project, const char *key, const char *digest,
                     enum idempotency *out, int *status, char **body, struct err *err);
/* The same question in a transaction of its own, without taking the key or waiting for it: for work
 * that a repeated request should be spared and that is too long for a transaction. NEW may have
 * become REPLAY by the time of idempotency_take. */
int idempotency_find(struct db *db, const char *project, const char *key, const char *digest,
                     enum idempotency *out, int *status, char **body, struct err *err);
int idempotency_store(struct db *db, const char *project, const char *key, int status,
                      const char *body, struct err *err);

#endif
