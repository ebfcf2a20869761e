/* bases.h: base models. They belong to no tenant and all may read them. */
#ifndef GRAFT_STORAGE_BASES_H
#define GRAFT_STORAGE_BASES_H

#include <stdbool.h>
#include <stdint.h>

#include "engine/base/sha256.h"
#include "storage/db.h"

#define BASE_NAME_SIZE 65

struct base {
    char name[BASE_NAME_SIZE];
    char digest[SHA256_HEX]; /* of names, shapes and values: what a delta names */
    char sha256[SHA256_HEX]; /* of the base file: blob of BLOB_OWNER_BASE */
    int64_t bytes;           /* of the base file */
    int64_t created_at;
    char architecture[32];
    int64_t parameters, linear_parameters, bytes_16bit;
    int32_t layers, hidden, intermediate, heads, kv_heads, vocabulary, context;
    bool tied_embeddings;
};

struct base_list {
    struct base *items;
    int count;
};

/* 1..64 of letters, digits, '.', '_', '-' and inner '/'; starts with a letter or digit. */
bool bases_name_valid(const char *name);
/* DB_ROLE_OWNER, after the blob is committed. The same content under the same name again is fine;
 * other content under a name that is taken is ERR_INVALID. created_at is filled in. */
int bases_add(struct db *db, struct base *base, struct err *err);
int bases_get(struct db *db, const char *name, struct base *out, struct err *err);
/* Of several with that digest, the first by name. ERR_NOT_FOUND: there is none. */
int bases_find(struct db *db, const char *digest, struct base *out, struct err *err);
int bases_list(struct db *db, struct base_list *out, struct err *err); /* by name */
void base_list_release(struct base_list *list);

#endif
