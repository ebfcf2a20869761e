/* keys.h: API keys, and the organizations and projects they open.
 *
 * A key is "gk-", 43 base-62 characters (256 random bits) and 6 of checksum. The database holds its
 * SHA-256; the key itself is shown once, by keys_create(), and can not be had again. */
#ifndef GRAFT_STORAGE_KEYS_H
#define GRAFT_STORAGE_KEYS_H

#include <stdbool.h>
#include <stdint.h>

#include "storage/db.h"
#include "storage/ids.h"

#define KEY_TEXT_SIZE 53 /* "gk-" + 43 + 6 + NUL */
#define KEY_NAME_SIZE 65 /* name of an organization or project: 1..64 bytes */

/* Whom a key speaks for. */
struct key_identity {
    char key_id[ID_SIZE];
    char organization_id[ID_SIZE];
    char organization[KEY_NAME_SIZE];
    char project[UUID_SIZE]; /* the tenant: what db_begin() and every other module want */
    char project_name[KEY_NAME_SIZE];
};

/* Needs DB_ROLE_OWNER. Makes organization and project where they are absent. Names: letters,
 * digits, '.', '_', '-' and inner blanks. `key` is the only copy. */
int keys_create(struct db *db, const char *organization, const char *project,
                char key[KEY_TEXT_SIZE], struct key_identity *identity, struct err *err);
/* Shape and checksum, without the database. */
bool keys_well_formed(const char *key);
/* DB_ROLE_APP. ERR_AUTH (code invalid_api_key) where there is no such key or it was revoked. Notes
 * the use at most once a minute. */
int keys_lookup(struct db *db, const char *key, struct key_identity *out, struct err *err);
/* DB_ROLE_OWNER. By key id or by the key itself; ERR_NOT_FOUND. */
int keys_revoke(struct db *db, const char *key_or_id, struct err *err);

/* A key as an operator sees it: enough to know which one to revoke. */
struct key_info {
    struct key_identity identity;
    char last4[5];
    int64_t created_at, last_used_at; /* seconds since 1970; last_used_at 0: never */
};
struct key_list {
    struct key_info *items;
    int count;
};
/* DB_ROLE_OWNER. Those that open something, of all projects: by organization, project and age. */
int keys_list(struct db *db, struct key_list *out, struct err *err);
void key_list_release(struct key_list *list);

/* "gk-ab***yz": fit for an error message. */
void keys_mask(const char *key, char *out, size_t size);

#endif
