/* The handler threads: a bounded queue of complete requests, and threads that have time. */
#include <stdlib.h>
#include <string.h>

#include "engine/base/json_text.h"
#include "engine/base/log.h"
#include "server/http_internal.h"
#include "storage/db.h"

/* ------------------------------------------------------------------ one request */

int http_request_database(struct http_request *request, struct err *err)
{
    struct http_exchange *exchange =
        (struct http_exchange *)((char *)request - offsetof(struct http_exchange, request));
    const char *url = exchange->server->options.database_url;
    if (!request->db_slot || !url)
        return err_set(err, ERR_UNAVAILABLE, "this server has no database");
    if (!*request->db_slot && db_open(request->db_slot, url, DB_ROLE_APP, err) < 0)
        return -1;
    request->db = *request->db_slot;
    return 0;
}

void http_exchange_identify(struct http_exchange *exchange, const struct key_identity *identity)
{
    struct http_tenant *tenant = &exchange->request.tenant;
    memcpy(tenant->project_id, identity->project, sizeof(identity->project));
    memcpy(tenant->organization_id, identity->organization_id, sizeof(identity->organization_id));
    memcpy(tenant->organization, identity->organization, sizeof(identity->organization));
    memcpy(tenant->key_id, identity->key_id, sizeof(identity->key_id));
    exchange->known_tenant = true;
}

static int authenticate(struct http_exchange *exchange, struct err *err)
{
    struct http_server *server = exchange->server;
    const char *key = http_auth_key(exchange->authorization);
    struct key_identity identity;
    if (!key)
        return http_auth_error(exchange->authorization, err);
    if (http_request_database(&exchange->request, err) < 0)
        return -1;
    struct err lookup = {0};
    if (keys_lookup(exchange->request.db, key, &identity, &lookup) < 0) {
        if (lookup.kind != ERR_AUTH) {
            *err = lookup;
            return -1;
        }
        http_auth_learn(server->auth, key, exchange->connection->remote, http_now_ms(), NULL);
        atomic_fetch_add(&server->auth_failures, 1);
        return http_auth_error(exchange->authorization, err);
    }
    http_auth_learn(server->auth, key, exchange->connection->remote, http_now_ms(), &identity);
    http_exchange_identify(exchange, &identity);
    return 0;
}

static int parse_json(struct http_exchange *exchange, struct err *err)
{
    struct http_request *request = &exchange->request;
    if (request->body_len == 0)
        return err_set(err, ERR_INVALID,
                       "The request has no body. Send a JSON object with Content-Type: "
                       "application/json.");
    struct err why = {0};
    request->json = json_text_load(request->body, request->body_len, 0, &why);
    if (!request->json)
        return err_set(err, why.kind,
                       "We could not parse the JSON body of your request: it %s. The body must be "
                       "one JSON object.",
                       why.message);
    if (!json_is_object(request->json))
        return err_set(err, ERR_INVALID, "The body must be one JSON object.");
    return 0;
}

static int call(struct http_exchange *exchange, struct err *err)
{
    struct http_request *request = &exchange->request;
    if (request->route->auth == HTTP_AUTH_KEY) {
        if (!exchange->known_tenant && authenticate(exchange, err) < 0)
            return -1;
        if (http_request_database(request, err) < 0)
            return -1;
    }
    if (request->route->body == HTTP_BODY_JSON && parse_json(exchange, err) < 0)
        return -1;
    return request->route->handler(request, &exchange->response, err);
}

void http_exchange_run(struct http_exchange *exchange, struct db **db)
{
    struct http_request *request = &exchange->request;
    struct http_response *response = &exchange->response;
    struct err err = {0};
    request->db_slot = db;
    int rc = call(exchange, &err);
    if (request->db && db_in_transaction(request->db)) {
        log_error("request %s: the handler of %s left a transaction open", request->id,
                  request->route->operation);
        db_rollback(request->db);
    }
    request->db = NULL;
    request->db_slot = NULL;
    json_decref(request->json);
    request->json = NULL;
    if (response->kind == HTTP_RESPONSE_LATER)
        return;
    if (rc == 0 && response->kind == HTTP_RESPONSE_NONE)
        rc = err_set(&err, ERR_INTERNAL, "the handler of %s gave no answer",
                     request->route->operation);
    if (rc < 0)
        http_response_error(response, 0, &err);
}

/* Before an upload's body: is the key good? */
static void run_key(struct http_exchange *exchange, struct db **db)
{
    exchange->request.db_slot = db;
    if (authenticate(exchange, &exchange->refusal) < 0)
        exchange->refused = true;
    exchange->request.db = NULL;
    exchange->request.db_slot = NULL;
    exchange->phase = HTTP_PHASE_KEYED;
}

/* ------------------------------------------------------------------ threads */

static struct http_exchange *take(struct http_handlers *handlers, bool *stopping)
{
    pthread_mutex_lock(&handlers->lock);
    while (!handlers->first && !handlers->stopping)
        pthread_cond_wait(&handlers->wake, &handlers->lock);
    struct http_exchange *exchange = handlers->first;
    if (exchange) {
        handlers->first = exchange->next;
        if (!handlers->first)
            handlers->last = NULL;
        handlers->queued--;
        handlers->handling++;
    }
    *stopping = handlers->stopping;
    pthread_mutex_unlock(&handlers->lock);
    return exchange;
}

static void handled(struct http_handlers *handlers, int64_t started)
{
    pthread_mutex_lock(&handlers->lock);
    handlers->handling--;
    handlers->seconds += (double)(http_now_ms() - started) / 1000;
    pthread_mutex_unlock(&handlers->lock);
}

static void *handler_thread(void *argument)
{
    struct http_server *server = argument;
    struct http_handlers *handlers = &server->handlers;
    struct db *db = NULL;
    struct http_exchange *exchange;
    bool stopping;
    while ((exchange = take(handlers, &stopping))) {
        int64_t started = http_now_ms();
        if (exchange->phase == HTTP_PHASE_KEY) {
            run_key(exchange, &db);
        } else if (stopping) {
            struct err err = {0};
            err_set_code(&err, ERR_UNAVAILABLE, "shutting_down", "",
                         "The server is shutting down. Try again.");
            http_response_error(&exchange->response, 0, &err);
        } else {
            http_exchange_run(exchange, &db);
        }
        handled(handlers, started);
        /* The last look at the exchange: once resumed, the event thread may free it. */
        if (exchange->response.kind == HTTP_RESPONSE_LATER)
            http_later_handler_done(exchange->response.later);
        else
            MHD_resume_connection(exchange->mhd);
    }
    db_close(db);
    return NULL;
}

int http_handlers_start(struct http_server *server, int threads, int limit, struct err *err)
{
    struct http_handlers *handlers = &server->handlers;
    handlers->limit = limit;
    handlers->threads = calloc((size_t)threads, sizeof(*handlers->threads));
    if (!handlers->threads)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    for (; handlers->thread_count < threads; handlers->thread_count++) {
        int rc = pthread_create(&handlers->threads[handlers->thread_count], NULL, handler_thread,
                                server);
        if (rc != 0)
            return err_set_errno(err, rc, "can not start a handler thread");
    }
    return 0;
}

bool http_handlers_submit(struct http_exchange *exchange)
{
    struct http_handlers *handlers = &exchange->server->handlers;
    pthread_mutex_lock(&handlers->lock);
    bool room = !handlers->stopping && handlers->queued < handlers->limit;
    if (room) {
        MHD_suspend_connection(exchange->mhd); /* before anyone can resume it */
        exchange->next = NULL;
        if (handlers->last)
            handlers->last->next = exchange;
        else
            handlers->first = exchange;
        handlers->last = exchange;
        handlers->queued++;
        pthread_cond_signal(&handlers->wake);
    }
    pthread_mutex_unlock(&handlers->lock);
    return room;
}

void http_handlers_stop(struct http_server *server)
{
    struct http_handlers *handlers = &server->handlers;
    if (!handlers->threads)
        return;
    pthread_mutex_lock(&handlers->lock);
    handlers->stopping = true;
    pthread_cond_broadcast(&handlers->wake);
    pthread_mutex_unlock(&handlers->lock);
    for (int i = 0; i < handlers->thread_count; i++)
        pthread_join(handlers->threads[i], NULL);
    free(handlers->threads);
    handlers->threads = NULL;
}
