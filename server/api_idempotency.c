#include "server/api_idempotency.h"

#include <stdlib.h>
#include <string.h>

#include "engine/base/sha256.h"
#include "storage/db.h"
#include "storage/idempotency.h"

#define KEY_MAX 255

static int check_key(const char *key, struct err *err)
{
    size_t n = 0;
    while (key[n] >= 0x20 && key[n] < 0x7f)
        n++;
    if (key[n] == '\0' && n >= 1 && n <= KEY_MAX)
        return 0;
    return err_set_code(err, ERR_INVALID, "invalid_idempotency_key", "",
                        "The Idempotency-Key header must have 1 to %d plain characters.", KEY_MAX);
}

static void digest_request(const struct http_request *request, const char *what, size_t what_len,
                           char digest[SHA256_HEX])
{
    struct sha256 *h = sha256_new();
    if (!h) {
        digest[0] = '\0';
        return;
    }
    sha256_update(h, request->route->operation, strlen(request->route->operation) + 1);
    sha256_update(h, what, what_len);
    sha256_final_hex(h, digest);
    sha256_free(h);
}

/* *text: the answer, malloc'ed. */
static int run(struct http_request *request, const char *digest, api_once_fn *create, void *context,
               int *status, char **text, struct err *err)
{
    const char *key = request->idempotency_key;
    const char *project = request->tenant.project_id;
    enum idempotency state = IDEMPOTENCY_NEW;
    json_t *body = NULL;
    if (key && idempotency_take(request->db, project, key, digest, &state, status, text, err) < 0)
        return -1;
    if (state == IDEMPOTENCY_REPLAY)
        return 0;
    if (create(context, &body, err) < 0)
        return -1;
    *status = 200;
    *text = body ? json_dumps(body, JSON_COMPACT) : NULL;
    json_decref(body);
    if (!*text)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    return key ? idempotency_store(request->db, project, key, *status, *text, err) : 0;
}

int api_once(struct http_request *request, struct http_response *response, const char *what,
             size_t what_len, api_once_fn *create, void *context, struct err *err)
{
    char digest[SHA256_HEX];
    char *text = NULL;
    int status = 200;
    const char *key = request->idempotency_key;
    if (key && check_key(key, err) < 0)
        return -1;
    digest_request(request, what, what_len, digest);
    if (!digest[0])
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    if (db_begin(request->db, request->tenant.project_id, err) < 0)
        return -1;
    if (run(request, digest, create, context, &status, &text, err) < 0) {
        db_rollback(request->db);
        free(text);
        return -1;
    }
    if (db_commit(request->db, err) < 0) {
        free(text);
        return -1;
    }
    return http_response_bytes(response, status, "application/json", text, strlen(text), err);
}
