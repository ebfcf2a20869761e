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

static int digest_request(const struct http_request *request, const struct api_once *once,
                          char digest[SHA256_HEX], struct err *err)
{
    struct sha256 *h = sha256_new();
    if (!h)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    sha256_update(h, request->route->operation, strlen(request->route->operation) + 1);
    sha256_update(h, once->what, once->what_len);
    sha256_final_hex(h, digest);
    sha256_free(h);
    return 0;
}

struct answer {
    int status;
    char *text; /* malloc'ed; NULL: not known yet */
};

static int check(struct http_request *request, const struct api_once *once, const char *digest,
                 struct answer *answer, struct err *err)
{
    const char *key = request->idempotency_key;
    enum idempotency state = IDEMPOTENCY_NEW;
    if (key && idempotency_find(request->db, request->tenant.project_id, key, digest, &state,
                                &answer->status, &answer->text, err) < 0)
        return -1;
    return state == IDEMPOTENCY_REPLAY ? 0 : once->check(once->context, err);
}

static int create(struct http_request *request, const struct api_once *once, const char *digest,
                  struct answer *answer, struct err *err)
{
    const char *key = request->idempotency_key;
    const char *project = request->tenant.project_id;
    enum idempotency state = IDEMPOTENCY_NEW;
    json_t *body = NULL;
    if (key && idempotency_take(request->db, project, key, digest, &state, &answer->status,
                                &answer->text, err) < 0)
        return -1;
    if (state == IDEMPOTENCY_REPLAY)
        return 0;
    if (once->create(once->context, &body, err) < 0)
        return -1;
    answer->status = 200;
    answer->text = body ? json_dumps(body, JSON_COMPACT) : NULL;
    json_decref(body);
    if (!answer->text)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    return key ? idempotency_store(request->db, project, key, answer->status, answer->text, err)
               : 0;
}

static int create_and_commit(struct http_request *request, const struct api_once *once,
                             const char *digest, struct answer *answer, struct err *err)
{
    if (db_begin(request->db, request->tenant.project_id, err) < 0)
        return -1;
    if (create(request, once, digest, answer, err) < 0) {
        db_rollback(request->db);
        return -1;
    }
    return db_commit(request->db, err);
}

int api_once(struct http_request *request, struct http_response *response,
             const struct api_once *once, struct err *err)
{
    char digest[SHA256_HEX];
    struct answer answer = {0};
    const char *key = request->idempotency_key;
    if ((key && check_key(key, err) < 0) || digest_request(request, once, digest, err) < 0)
        return -1;
    if ((once->check && check(request, once, digest, &answer, err) < 0) ||
        (!answer.text && create_and_commit(request, once, digest, &answer, err) < 0)) {
        free(answer.text);
        return -1;
    }
    return http_response_bytes(response, answer.status, "application/json", answer.text,
                               strlen(answer.text), err);
}
