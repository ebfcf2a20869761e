/* http_auth.h: who asks: the Authorization header, a short memory of keys, and a brake on guessing.
 *
 * A key that was looked up is remembered for 5 s, found or not, by its SHA-256; so a revoked key is
 * refused everywhere after 5 s at most, and a flood of one wrong key costs one look-up in 5 s. Each
 * address may fail 100 times at once and 10 times a second on; beyond, its unknown keys get 429
 * without a look-up. Keys that were good in the last hour are looked up all the same.
 *
 * Thread-safe; nothing here blocks or touches the database. */
#ifndef GRAFT_HTTP_AUTH_H
#define GRAFT_HTTP_AUTH_H

#include <stdint.h>

#include "engine/base/err.h"
#include "storage/keys.h"

enum http_auth_verdict {
    HTTP_AUTH_GOOD,    /* identity filled in */
    HTTP_AUTH_REFUSED, /* err is the answer: 401, or 429 */
    HTTP_AUTH_UNKNOWN, /* look it up, then http_auth_learn */
};

struct http_auth_cache;

struct http_auth_cache *http_auth_cache_new(void); /* NULL: out of memory */
void http_auth_cache_free(struct http_auth_cache *cache);

/* The key inside an Authorization header ("Bearer gk-…"); NULL where there is none. */
const char *http_auth_key(const char *authorization);
/* `now`: milliseconds, monotonic. */
enum http_auth_verdict http_auth_check(struct http_auth_cache *cache, const char *authorization,
                                       const char *remote, int64_t now,
                                       struct key_identity *identity, struct err *err);
/* identity NULL: the key is not known. */
void http_auth_learn(struct http_auth_cache *cache, const char *key, const char *remote,
                     int64_t now, const struct key_identity *identity);
/* The 401 for this header; the key is masked. */
int http_auth_error(const char *authorization, struct err *err);

#endif
