#include "server/http_auth.h"

#include <openssl/sha.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#define SLOTS 4096 /* direct-mapped: a collision only costs another look-up */
#define REMEMBER_MS 5000
#define TRUSTED_MS 3600000
#define FAILURE_BURST 100
#define FAILURE_REFILL_MS 100 /* one more failure allowed each */

struct key_slot {
    unsigned char digest[SHA256_DIGEST_LENGTH];
    int64_t looked_up; /* ms; 0: empty */
    int64_t good_at;   /* ms of the last good look-up; 0: never */
    bool good;
    struct key_identity identity;
};

struct address_slot {
    char remote[48];
    double tokens; /* failures still allowed */
    int64_t refilled;
};

struct http_auth_cache {
    pthread_mutex_t lock;
    struct key_slot keys[SLOTS];
    struct address_slot addresses[SLOTS];
};

struct http_auth_cache *http_auth_cache_new(void)
{
    struct http_auth_cache *cache = calloc(1, sizeof(*cache));
    if (cache)
        pthread_mutex_init(&cache->lock, NULL);
    return cache;
}

void http_auth_cache_free(struct http_auth_cache *cache)
{
    if (!cache)
        return;
    pthread_mutex_destroy(&cache->lock);
    free(cache);
}

const char *http_auth_key(const char *authorization)
{
    if (!authorization || strncasecmp(authorization, "Bearer ", 7) != 0)
        return NULL;
    const char *key = authorization + 7;
    while (*key == ' ')
        key++;
    return *key ? key : NULL;
}

int http_auth_error(const char *authorization, struct err *err)
{
    const char *key = http_auth_key(authorization);
    if (!key)
        return err_set_code(err, ERR_AUTH, "invalid_api_key", "",
                            "You didn't provide an API key. Provide it in the Authorization "
                            "header: \"Authorization: Bearer gk-…\".");
    char masked[32] = "***";
    bool printable = strncmp(key, "gk-", 3) == 0;
    for (const char *p = key; *p; p++)
        printable &= *p > 0x20 && *p < 0x7f;
    if (printable) /* anything else may be a secret of another kind: show nothing of it */
        keys_mask(key, masked, sizeof(masked));
    return err_set_code(err, ERR_AUTH, "invalid_api_key", "",
                        "Incorrect API key provided: %s. Keys are made with `graft key create`.",
                        masked);
}

static struct key_slot *key_slot(struct http_auth_cache *cache,
                                 const unsigned char digest[SHA256_DIGEST_LENGTH])
{
    return &cache->keys[(digest[0] | digest[1] << 8) % SLOTS];
}

/* The address's allowance, refilled up to now. A collision hands the slot to the newer address. */
static struct address_slot *address_slot(struct http_auth_cache *cache, const char *remote,
                                         int64_t now)
{
    uint32_t hash = 2166136261u; /* FNV-1a */
    for (const char *p = remote; *p; p++)
        hash = (hash ^ (unsigned char)*p) * 16777619u;
    struct address_slot *slot = &cache->addresses[hash % SLOTS];
    if (strncmp(slot->remote, remote, sizeof(slot->remote) - 1) != 0) {
        size_t n = strnlen(remote, sizeof(slot->remote) - 1);
        memcpy(slot->remote, remote, n);
        slot->remote[n] = '\0';
        slot->tokens = FAILURE_BURST;
        slot->refilled = now;
    }
    slot->tokens += (double)(now - slot->refilled) / FAILURE_REFILL_MS;
    if (slot->tokens > FAILURE_BURST)
        slot->tokens = FAILURE_BURST;
    slot->refilled = now;
    return slot;
}

static int too_many_failures(struct err *err)
{
    return err_set_code(err, ERR_RATE, "too_many_failed_keys", "",
                        "Too many requests with wrong API keys came from your address. Wait a "
                        "second and try again.");
}

static enum http_auth_verdict check_locked(struct http_auth_cache *cache, const char *authorization,
                                           const char *key, const char *remote, int64_t now,
                                           struct key_identity *identity, struct err *err)
{
    struct address_slot *address = address_slot(cache, remote, now);
    if (!key || !keys_well_formed(key)) {
        if (address->tokens < 1) {
            too_many_failures(err);
            return HTTP_AUTH_REFUSED;
        }
        address->tokens -= 1;
        http_auth_error(authorization, err);
        return HTTP_AUTH_REFUSED;
    }
    unsigned char digest[SHA256_DIGEST_LENGTH];
    SHA256((const unsigned char *)key, strlen(key), digest);
    struct key_slot *slot = key_slot(cache, digest);
    bool same = slot->looked_up && memcmp(slot->digest, digest, sizeof(digest)) == 0;
    if (same && now - slot->looked_up < REMEMBER_MS) {
        if (slot->good) {
            *identity = slot->identity;
            return HTTP_AUTH_GOOD;
        }
        http_auth_error(authorization, err);
        return HTTP_AUTH_REFUSED;
    }
    bool trusted = same && slot->good_at && now - slot->good_at < TRUSTED_MS;
    if (!trusted && address->tokens < 1) {
        too_many_failures(err);
        return HTTP_AUTH_REFUSED;
    }
    return HTTP_AUTH_UNKNOWN;
}

enum http_auth_verdict http_auth_check(struct http_auth_cache *cache, const char *authorization,
                                       const char *remote, int64_t now,
                                       struct key_identity *identity, struct err *err)
{
    pthread_mutex_lock(&cache->lock);
    enum http_auth_verdict verdict = check_locked(
        cache, authorization, http_auth_key(authorization), remote, now, identity, err);
    pthread_mutex_unlock(&cache->lock);
    return verdict;
}

void http_auth_learn(struct http_auth_cache *cache, const char *key, const char *remote,
                     int64_t now, const struct key_identity *identity)
{
    unsigned char digest[SHA256_DIGEST_LENGTH];
    SHA256((const unsigned char *)key, strlen(key), digest);
    pthread_mutex_lock(&cache->lock);
    struct key_slot *slot = key_slot(cache, digest);
    if (memcmp(slot->digest, digest, sizeof(digest)) != 0) {
        memset(slot, 0, sizeof(*slot));
        memcpy(slot->digest, digest, sizeof(digest));
    }
    slot->looked_up = now ? now : 1;
    slot->good = identity != NULL;
    if (identity) {
        slot->identity = *identity;
        slot->good_at = slot->looked_up;
    } else {
        slot->good_at = 0;
        address_slot(cache, remote, now)->tokens -= 1;
    }
    pthread_mutex_unlock(&cache->lock);
}
