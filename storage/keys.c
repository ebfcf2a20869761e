#include "storage/keys.h"

#include <openssl/crypto.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/sha256.h"

#define KEY_PREFIX "gk-"
#define KEY_RANDOM 43 /* log2(62^43) = 256.03 */
#define KEY_CHECK 6   /* 62^6 > 2^32 */
#define KEY_BODY (sizeof KEY_PREFIX - 1 + KEY_RANDOM)

static const char base62[] = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/* CRC-32 (IEEE 802.3), reflected. Keys are short, so no table. */
static uint32_t crc32_of(const char *data, size_t len)
{
    uint32_t crc = 0xffffffffu;

    for (size_t i = 0; i < len; i++) {
        crc ^= (unsigned char)data[i];
        for (int k = 0; k < 8; k++)
            crc = (crc >> 1) ^ (0xedb88320u & (0u - (crc & 1u)));
    }
    return ~crc;
}

/* A checksum lets a typing error be told, and a scanner find leaked keys, without the database. */
static void checksum(const char *body, char out[KEY_CHECK + 1])
{
    uint32_t crc = crc32_of(body, KEY_BODY);

    for (int i = KEY_CHECK - 1; i >= 0; i--) {
        out[i] = base62[crc % 62];
        crc /= 62;
    }
    out[KEY_CHECK] = '\0';
}

bool keys_well_formed(const char *key)
{
    char check[KEY_CHECK + 1];

    if (strlen(key) != KEY_TEXT_SIZE - 1 || strncmp(key, KEY_PREFIX, sizeof KEY_PREFIX - 1) != 0)
        return false;
    if (strspn(key + sizeof KEY_PREFIX - 1, base62) != KEY_RANDOM + KEY_CHECK)
        return false;
    checksum(key, check);
    return CRYPTO_memcmp(check, key + KEY_BODY, KEY_CHECK) == 0;
}

static int make_key(char key[KEY_TEXT_SIZE], struct err *err)
{
    char random[KEY_RANDOM + 1];

    if (id_random(KEY_RANDOM, random, err) != 0)
        return -1;
    snprintf(key, KEY_TEXT_SIZE, "%s%s", KEY_PREFIX, random);
    checksum(key, key + KEY_BODY);
    OPENSSL_cleanse(random, sizeof random);
    return 0;
}

static int check_name(const char *what, const char *name, struct err *err)
{
    static const char allowed[] = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
                                  "._- ";
    size_t len = strlen(name);

    if (len == 0 || len >= KEY_NAME_SIZE || strspn(name, allowed) != len || name[0] == ' ' ||
        name[len - 1] == ' ')
        return err_set_code(err, ERR_INVALID, "invalid_name", what,
                            "the name of the %s must be 1 to %d letters, digits, '.', '_', '-' or "
                            "inner blanks",
                            what, KEY_NAME_SIZE - 1);
    return 0;
}

int keys_create(struct db *db, const char *organization, const char *project,
                char key[KEY_TEXT_SIZE], struct key_identity *identity, struct err *err)
{
    struct db_result *res = NULL;
    char organization_id[ID_SIZE], sha256[SHA256_HEX], prefix[8];

    *identity = (struct key_identity){0};
    if (check_name("organization", organization, err) != 0 ||
        check_name("project", project, err) != 0 || make_key(key, err) != 0 ||
        id_new(ID_ORGANIZATION, organization_id, err) != 0 ||
        id_new(ID_KEY, identity->key_id, err) != 0)
        return -1;
    sha256_hex(key, strlen(key), sha256);
    snprintf(prefix, sizeof prefix, "%.5s", key);
    if (db_begin(db, NULL, err) != 0)
        return -1;
    if (db_exec(db, "SELECT * FROM key_create($1, $2, $3, $4, $5, $6, $7)",
                DB_ARGS(DB_TEXT(organization_id), DB_TEXT(organization), DB_TEXT(project),
                        DB_TEXT(identity->key_id), DB_TEXT(sha256), DB_TEXT(prefix),
                        DB_TEXT(key + KEY_TEXT_SIZE - 5)),
                &res, err) != 0) {
        db_rollback(db);
        return -1;
    }
    db_text_into(res, 0, 0, identity->organization_id, sizeof identity->organization_id);
    db_text_into(res, 0, 1, identity->project, sizeof identity->project);
    snprintf(identity->organization, sizeof identity->organization, "%s", organization);
    snprintf(identity->project_name, sizeof identity->project_name, "%s", project);
    db_result_free(res);
    return db_commit(db, err);
}

static int unknown_key(struct err *err)
{
    return err_set_code(err, ERR_AUTH, "invalid_api_key", "", "this API key is not known");
}

int keys_lookup(struct db *db, const char *key, struct key_identity *out, struct err *err)
{
    struct db_result *res = NULL;
    char sha256[SHA256_HEX];

    *out = (struct key_identity){0};
    if (!keys_well_formed(key))
        return unknown_key(err);
    sha256_hex(key, strlen(key), sha256);
    if (db_begin(db, NULL, err) != 0)
        return -1;
    if (db_exec(db, "SELECT * FROM key_find($1)", DB_ARGS(DB_TEXT(sha256)), &res, err) != 0) {
        db_rollback(db);
        return -1;
    }
    if (db_rows(res) != 1) {
        db_result_free(res);
        db_rollback(db);
        return unknown_key(err);
    }
    db_text_into(res, 0, 0, out->key_id, sizeof out->key_id);
    db_text_into(res, 0, 1, out->organization_id, sizeof out->organization_id);
    db_text_into(res, 0, 2, out->organization, sizeof out->organization);
    db_text_into(res, 0, 3, out->project, sizeof out->project);
    db_text_into(res, 0, 4, out->project_name, sizeof out->project_name);
    db_result_free(res);
    return db_commit(db, err);
}

int keys_revoke(struct db *db, const char *key_or_id, struct err *err)
{
    struct db_result *res = NULL;
    char sha256[SHA256_HEX];
    bool found;

    sha256_hex(key_or_id, strlen(key_or_id), sha256);
    if (db_begin(db, NULL, err) != 0)
        return -1;
    if (db_exec(db, "SELECT key_revoke($1, $2)", DB_ARGS(DB_TEXT(key_or_id), DB_TEXT(sha256)), &res,
                err) != 0) {
        db_rollback(db);
        return -1;
    }
    found = db_int(res, 0, 0) > 0;
    db_result_free(res);
    if (db_commit(db, err) != 0)
        return -1;
    return found ? 0 : err_set(err, ERR_NOT_FOUND, "there is no such key, or it is revoked");
}

static void read_key(const struct db_result *res, int row, struct key_info *out)
{
    struct key_identity *who = &out->identity;

    db_text_into(res, row, 0, who->key_id, sizeof who->key_id);
    db_text_into(res, row, 1, who->organization_id, sizeof who->organization_id);
    db_text_into(res, row, 2, who->organization, sizeof who->organization);
    db_text_into(res, row, 3, who->project, sizeof who->project);
    db_text_into(res, row, 4, who->project_name, sizeof who->project_name);
    db_text_into(res, row, 5, out->last4, sizeof out->last4);
    out->created_at = db_int(res, row, 6);
    out->last_used_at = db_int(res, row, 7);
}

int keys_list(struct db *db, struct key_list *out, struct err *err)
{
    struct db_result *res = NULL;

    *out = (struct key_list){0};
    if (db_begin(db, NULL, err) != 0)
        return -1;
    /* The owner's policy asks for this; to any other role it opens nothing. */
    if (db_exec(db, "SELECT set_config('app.system', 'on', true)", DB_NO_ARGS, NULL, err) != 0 ||
        db_exec(db,
                "SELECT k.id, o.id, o.name, p.tenant, p.name, k.last4,"
                "       floor(extract(epoch FROM k.created_at))::bigint,"
                "       coalesce(floor(extract(epoch FROM k.last_used_at)), 0)::bigint"
                "  FROM api_key k JOIN project p ON p.tenant = k.tenant"
                "  JOIN organization o ON o.id = p.organization"
                " WHERE k.revoked_at IS NULL ORDER BY o.name, p.name, k.created_at, k.id",
                DB_NO_ARGS, &res, err) != 0) {
        db_rollback(db);
        return -1;
    }
    out->items = calloc((size_t)db_rows(res) + 1, sizeof *out->items);
    if (out->items == NULL) {
        db_result_free(res);
        db_rollback(db);
        return err_set(err, ERR_NO_MEMORY, "list the keys: out of memory");
    }
    for (; out->count < db_rows(res); out->count++)
        read_key(res, out->count, &out->items[out->count]);
    db_result_free(res);
    return db_commit(db, err);
}

void key_list_release(struct key_list *list)
{
    free(list->items);
    *list = (struct key_list){0};
}

void keys_mask(const char *key, char *out, size_t size)
{
    size_t len = strlen(key);

    /* Short ones would be given away whole. */
    if (len < 12)
        snprintf(out, size, "***");
    else
        snprintf(out, size, "%.5s***%s", key, key + len - 2);
}
